"""Generators in a folder that is like one of the Hugging Face Hub's: written here, sent there, and had from there.

DIR/config.json          the whole configuration, the names of the classes, and what inputs and outputs mean
DIR/model.safetensors    the network's tensors by their own names
DIR/README.md            the model card
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from attnorm.checkpoint import CONFIG, REMEDY, WEIGHTS, CheckpointError, Header, read_checkpoint, save_weights
from attnorm.config import (
    ClassConditionalConfig,
    Config,
    InpaintingConfig,
    InpaintingTaskConfig,
    UserError,
    printable,
)
from attnorm.pretrained import card_text, read_card, shipped
from attnorm.run_directory import RunDirectory, find_checkpoint, is_saved_model
from attnorm.system.devices import find_device
from attnorm.system.files import write_json

MISSING = "huggingface_hub is not installed; saving for the Hub needs: pip install 'attnorm[hub]'"

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, PyTorchModelHubMixin
else:
    try:
        from huggingface_hub import PyTorchModelHubMixin
    except ImportError:  # all else works without it, reading such a folder too

        class PyTorchModelHubMixin:
            def save_pretrained(self, *arguments: Any, **options: Any) -> None:
                raise UserError(MISSING)

            push_to_hub = generate_model_card = save_pretrained


class HubModel(nn.Module, PyTorchModelHubMixin):
    """A generator with `save_pretrained`, `push_to_hub` and `from_pretrained`, huggingface_hub's.

    Attributes:
        config: What the network is built from.
        header: What else is known of it, None of one that was not loaded: classes, images seen, the run's settings.
        card: Markdown on data, licence, scores and limits, of a model that came with one.
        scores: What was measured of it, a line each, for the card of a run.
    """

    config: ClassConditionalConfig | InpaintingConfig
    header: Header | None = None
    card: str = ""
    scores: tuple[str, ...] = ()

    def __init__(self, config: ClassConditionalConfig | InpaintingConfig) -> None:
        super().__init__()
        self.config = config

    @staticmethod
    def is_built_from(config: ClassConditionalConfig | InpaintingConfig) -> bool:
        """Whether this class, rather than another generator's, has the network that `config` describes."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(  # type: ignore[override]  # not by the mixin's way, which knows neither runs nor names
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: str = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Self:
        """The generator, float32 and in evaluation mode, of a folder that `save_pretrained` wrote, a run directory, a
        checkpoint file or a model that comes with the package; only where there is nothing of that name on this
        machine, of the Hub's model "OWNER/NAME".

        Args:
            device: "auto", "cpu", "cuda", "cuda:1" or "mps".
            revision: Of the Hub's model: a branch, a tag or a commit; it and what follows as huggingface_hub has them.

        Raises:
            CheckpointError: nothing there, or a network of another class.
        """
        asked = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download, "token": token}
        name = on_this_machine(pretrained_model_name_or_path, local_files_only=local_files_only, **asked)
        file, tensors, header = read(name)
        if not cls.is_built_from(header.config.model):
            raise CheckpointError(
                f"{pretrained_model_name_or_path} holds another network than {cls.__name__}; "
                "`attnorm.load(...).model` is whichever it holds"
            )
        model = cls(header.config.model)
        model.restore(tensors, header, file)
        return model.to(find_device(device)).eval()

    def restore(self, tensors: Mapping[str, Tensor], header: Header, file: Path) -> None:
        """Takes over what `read` has found, in the weights' own precision."""
        try:
            self.load_state_dict(tensors)
        except RuntimeError as error:
            raise CheckpointError(f"{file} does not fit the model that its header describes: {error}") from error
        self.header, self.card = header, _card_of(file)
        if file.parent.name == "checkpoints":
            self.scores = RunDirectory(file.parent.parent).scores_of(header.images_seen)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes the three files into a folder, which is made; a README.md that is there already stays.

        Args:
            options: huggingface_hub's: repo_id and push_to_hub=True to send it at once, model_card_kwargs.

        Raises:
            UserError: the folder is a run directory, whose config.json is not ours to replace; the network has other
                tensors than its configuration describes; or huggingface_hub is not installed.
        """
        folder = Path(save_directory)
        if (folder / CONFIG).is_file() and not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder} has a {CONFIG} of something else, perhaps of a run; choose another folder")
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Called by `save_pretrained`, which makes the folder before and the card after."""
        with torch.device("meta"):
            described = type(self)(self.config).state_dict()
        if changed := sorted(described.keys() ^ self.state_dict().keys()):
            raise UserError(
                f"the network is not the one that its configuration describes: {changed[0]} and {len(changed) - 1} "
                "other tensors came or went, as by attnorm.insert_after or replace; undo that, or keep its state_dict()"
            )
        header = (self.header or header_of(self.config)).public()
        values = {"architectures": [type(self).__name__], "inference": describe(header)}
        save_weights(save_directory / WEIGHTS, self.state_dict())
        write_json(save_directory / CONFIG, values | header.to_dict())

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card of a loaded model, or what can be said of any; with the Hub's metadata before it."""
        from huggingface_hub import ModelCard, ModelCardData

        header = (self.header or header_of(self.config)).public()
        is_inpainter = header.config.task == "inpainting"
        tags = ["attentive-normalization", "gan", "inpainting" if is_inpainter else "class-conditional"]
        data = ModelCardData(library_name="attnorm", tags=tags, pipeline_tag="image-to-image" if is_inpainter else None)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{self.card or _card(self, header)}")


def read(path: Path | str, *, ema: bool = True) -> tuple[Path, dict[str, Tensor], Header]:
    """The checkpoint that `path` means (`find_checkpoint`), the tensors of its generator, and its header.

    Args:
        ema: The average of the weights over training; False for the raw weights.

    Raises:
        CheckpointError: nothing there, or nothing that can be used.
    """
    file = find_checkpoint(path)
    tensors, header = read_checkpoint(file, prefix="ema." if ema else "generator.")
    if not (tensors or ema):
        raise CheckpointError(f"{file} holds the average of the weights alone; leave the raw weights")
    settings = header.config.model
    if isinstance(settings, ClassConditionalConfig) and len(header.classes) != settings.num_classes:
        raise CheckpointError(
            f"{file} names {len(header.classes)} classes for a model of {settings.num_classes}; {REMEDY}"
        )
    return file, tensors, header


def on_this_machine(name: str | Path, **options: Any) -> str:
    """What `find_checkpoint` takes for that name, fetched from the Hub where it is one of its and nothing here has it.

    Args:
        options: huggingface_hub's, of `snapshot_download`.
    """
    name = str(name)
    return str(_from_hub(name, **options)) if name.count("/") == 1 and not Path(name).exists() else name


def describe(header: Header) -> dict[str, str]:
    """What a user of the network must know: task, sizes, meaning of inputs and output, each as text."""
    config = header.config
    common = {
        "task": config.task,
        "image_size": str(config.model.image_size),
        "images_seen": str(header.images_seen),
        "attnorm": importlib.import_module("attnorm").__version__,  # by its name: the list of all names is above
        "values": "images are RGB, float32 in [-1, 1]: pixel / 127.5 - 1",
        "pixel_scale": "127.5",
        "pixel_offset": "-1",
    }
    if not isinstance(config.model, ClassConditionalConfig):
        return {**common, "mask": "0: known, anything else: missing", "mask_known": "0", "mask_missing": "1"}
    return {
        **common,
        "classes": json.dumps(header.classes),
        "latent_dim": str(config.model.latent_dim),
        "classes_input": "float32 [N, number of classes], rows sum to 1: 1 for a class, or a mixture",
    }


def header_of(
    model: ClassConditionalConfig | InpaintingConfig, classes: tuple[str, ...] = (), note: str = ""
) -> Header:
    """Of a network that was not trained here: classes without names have numbers for these."""
    if isinstance(model, ClassConditionalConfig):
        names = classes or tuple(map(str, range(model.num_classes)))
        return Header(Config(model=model), names, 0, 0.0, note)
    return Header(Config(task="inpainting", model=model, inpainting=InpaintingTaskConfig()), (), 0, 0.0, note)


def _card_of(file: Path) -> str:
    """What is known of a network beside its header, as Markdown, where it came with a card."""
    if file in shipped().values():
        return card_text(file.stem, read_card(file.stem))
    if is_saved_model(file.parent):
        readme = file.with_name("README.md")
        text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
        return re.sub(r"\A---\n.*?\n---\n+", "", text, flags=re.DOTALL)
    return ""


def _card(network: HubModel, header: Header) -> str:
    name = type(network).__name__
    config, about = header.config, describe(header)
    size = config.model.image_size
    what = (
        f"fills holes of photographs; trained at {size} pixels"
        if config.task == "inpainting"
        else (
            f"makes images of {size} pixels, of {len(header.classes)} classes: {', '.join(header.classes[:20])}"
            + (", ..." if len(header.classes) > 20 else "")
        )
    )
    facts = {
        "context block": config.model.context,
        "training": f"{header.images_seen:,} images, preset {config.preset or 'none'}, seed {config.run.seed}",
        "data": header.note or "not stated",
        "licence": "not stated: neither of the data nor of the weights",
        "scores": "; ".join(network.scores) or "not stated",
        "values": about["values"],
    }
    if "mask" in about:
        facts["mask"] = about["mask"]
    lines = [f"- {key}: {value}" for key, value in facts.items()]
    use = f'```python\nfrom attnorm import {name}\n\nmodel = {name}.from_pretrained("OWNER/NAME")\n```'
    text = "\n".join([f"# {name}", "", f"A network of attnorm (Attentive Normalization) that {what}.", "", *lines])
    return f"{printable(text)}\n\n{use}\n"


def _from_hub(name: str, **options: Any) -> Path:
    """The folder, in huggingface_hub's cache, of a model on the Hub."""
    expected = f"{name} is not on this machine; expected a folder, a name of `attnorm models`, or a model on the Hub"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(f"{expected}; the Hub needs: pip install 'attnorm[hub]'") from None
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, "README.md"], **options))
    except (OSError, ValueError) as error:  # of no such model, no such right, no network
        raise CheckpointError(f"{expected}, which says: {str(error).strip().splitlines()[0]}") from error
