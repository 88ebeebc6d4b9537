"""Networks by name, as timm has them, from a folder or a file: rebuilt from their configuration, with their weights."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from attnorm.checkpoint import Header, read_header
from attnorm.config import ClassConditionalConfig, ConfigError, InpaintingConfig, did_you_mean
from attnorm.hub import on_this_machine, read
from attnorm.models.class_conditional import Generator
from attnorm.models.inpainting import InpaintingGenerator
from attnorm.models.relativistic import RelativisticGenerator
from attnorm.presets import PRESETS
from attnorm.pretrained import shipped
from attnorm.system.devices import find_device

PRESET = "preset:"  # before the name of one
NETWORKS = (Generator, RelativisticGenerator, InpaintingGenerator)


@dataclass(frozen=True)
class Loaded:
    """A generator in evaluation mode, and where it comes from."""

    model: Generator | InpaintingGenerator  # as header.config.task says
    header: Header
    path: Path

    @property
    def classes(self) -> tuple[str, ...]:
        return self.header.classes


def load(path: Path | str, *, ema: bool = True, device: str = "cpu") -> Loaded:
    """Rebuilds the generator of a run directory (its latest checkpoint), of a checkpoint file, of a folder that
    `save_pretrained` wrote, or of a model that comes with the package, by its name.

    Args:
        ema: The average of the weights over training, which is what samples are judged by; False for the raw weights.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".

    Raises:
        CheckpointError: nothing there, or nothing that can be used.
    """
    file, tensors, header = read(path, ema=ema)
    model = build_generator(header.config.model)
    model.restore(tensors, header, file)
    return Loaded(model.to(find_device(device)).eval(), header, file)


def build_generator(config: ClassConditionalConfig | InpaintingConfig) -> Generator | InpaintingGenerator:
    """The network that `config` describes, as it is before training; ValueError without a number of classes."""
    network = next(network for network in NETWORKS if network.is_built_from(config))
    return network(config)  # type: ignore[arg-type]  # as it has just said


def list_models(pattern: str = "", *, pretrained: bool = False) -> list[str]:
    """Names that `create_model` takes, sorted: of models that come with the package and of presets. A preset whose name
    is a model's too is "preset:NAME".

    Args:
        pattern: Of file names, "cifar10*"; "": all.
        pretrained: Those with weights alone.
    """
    models = shipped()
    presets = {f"{PRESET}{name}" if name in models else name for name in PRESETS}
    names = set(models) | (set() if pretrained else presets)
    return sorted(fnmatch.filter(names, pattern or "*"))


def create_model(name: str, pretrained: bool = False, **settings: Any) -> Generator | InpaintingGenerator:
    """The generator of that name; a name that both a shipped model and a preset have is the shipped model's, and the
    preset's network is that of "preset:NAME".

    Args:
        name: Of `list_models`, or "preset:NAME" of any preset; pretrained, also a folder of `save_pretrained`, a run
            directory, or "OWNER/NAME" of the Hub.
        pretrained: With its weights, in evaluation mode; else as it is before training.
        settings: Of the network, without weights only, by their names in `--set model.NAME`: num_classes=10, which
            presets need for classes, width=16.

    Raises:
        ConfigError: no such name, no weights of it, or a setting that its network has not.
        CheckpointError: nothing can be had from there.
        ValueError: num_classes is missing.
    """
    models, preset = shipped(), name.removeprefix(PRESET)
    if pretrained:
        if settings:
            raise ConfigError(f"weights fix the network: {', '.join(settings)} cannot be set; leave pretrained out")
        if preset in PRESETS and name not in models:
            raise ConfigError(
                f"the preset {preset} has no weights; these have: {', '.join(list_models(pretrained=True))}"
            )
        return load(on_this_machine(name)).model
    if name not in models and preset not in PRESETS:
        hint = did_you_mean(name, [*models, *list_models()])
        raise ConfigError(f"there is no model {name!r}; {hint}`attnorm.list_models()` has all names")
    config = (read_header(models[name]).config if name in models else PRESETS[preset][1]).model
    known = [field.name for field in fields(config)]
    for setting in settings:
        if setting not in known:
            raise ConfigError(
                f"{name} has no setting {setting}; {did_you_mean(setting, known)}it has: {', '.join(known)}"
            )
    return build_generator(replace(config, **settings))
