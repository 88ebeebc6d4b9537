"""What a task is: networks, and the updates that one step makes of them.

To add a task:

1. its networks in `models`, and their settings as a dataclass in `config`, which `config.MODELS` lists by the task's
   name (`config.Task`); settings of its losses in a dataclass beside `InpaintingTaskConfig`;
2. a class with the methods of `Task` below, in a file of its own in `training`: `inpainting.py` is an example. What a
   loss takes from a batch, and what it draws at random, is one value for each image, and its result is a mean over
   the images;
3. a row in `trainer.TASKS`, and a preset.

A loss of a task that is there already is a function in `losses`, a choice in the settings, and a line in the task's
phases. Neither the loop, its hooks, the checkpoint nor the logger knows of tasks or losses: what a phase returns is
logged under the names that it gives, and all that `state` holds is saved and comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from attnorm.config import Config
from attnorm.data.images import ImageSet
from attnorm.data.stream import Batch
from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.layers.observe import Observation
from attnorm.ops.soft_layout import entity_usage, layout_entropy
from attnorm.system.process_group import ProcessGroup
from attnorm.training.state import ExponentialAverage, TrainingState


@dataclass(frozen=True)
class Phase:
    """One optimiser update: `loss` of a fresh batch is minimized over the network called `network`."""

    network: str
    loss: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]  # what to minimize, and named values to log


class Task(Protocol):
    """What the loop needs to know of a task."""

    state: TrainingState  # all that training changes
    average: ExponentialAverage  # of the generator: what is validated, shown and kept
    differentiated_once: ClassVar[tuple[str, ...]]  # networks that torch.compile may take: it has no double backward

    @classmethod
    def resolve(cls, config: Config, images: ImageSet) -> Config:
        """The configuration with what the data decide filled in; ConfigError where they do not fit."""
        ...

    @classmethod
    def for_images(cls, config: Config, images: ImageSet, device: torch.device) -> Self:
        """The task at its start, of a resolved configuration; ConfigError where the images do not suffice."""
        ...

    def position(self, images_seen: int) -> int:
        """Where in the stream of training images the step that begins at `images_seen` takes its first batch."""
        ...

    def phases(self, images_seen: int) -> Sequence[Phase]:
        """The updates of the step that begins at `images_seen`, each of which gets a batch of its own."""
        ...

    def validate(self, images_seen: int, group: ProcessGroup) -> dict[str, float]:
        """Values to log of the averaged network on held-out images; none where there is nothing to say.

        Called in every process: each takes a share of the images, and all return the same.
        """
        ...

    def sample_grid(self, *, columns: int = 8) -> Tensor:
        """What the averaged network makes, always of the same latents or images: float [rows * columns, 3, S, S]."""
        ...

    def layout_statistics(self, batch: Batch) -> dict[str, float | list[float]]:
        """Entropy, usage, t and rho of every AttentiveNorm2d by name; nothing is drawn and the state stays."""
        ...


def adam(network: nn.Module, learning_rate: float, config: Config) -> torch.optim.Adam:
    """Adam over all parameters; the scalar gates that open a context block have a learning rate of their own."""
    gates: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        (gates if name.rpartition(".")[2] in ("rho", "gate") else others).append(parameter)
    groups: list[dict[str, Any]] = [{"params": others}]
    if gates:
        groups.append({"params": gates, "lr": learning_rate * config.optim.gate_lr_scale})
    betas = (config.optim.beta1, config.optim.beta2)
    return torch.optim.Adam(groups, learning_rate, betas=betas, fused=config.run.fused_adam)


def describe_layouts(name: str, network: nn.Module, seen: Mapping[str, Observation]) -> dict[str, float | list[float]]:
    """`layout_statistics` of one network, from what `observe_layouts` has seen in it."""
    statistics: dict[str, float | list[float]] = {}
    for site, observation in seen.items():
        layer = network.get_submodule(site)
        assert isinstance(layer, AttentiveNorm2d)
        key = f"layout/{name}.{site}"
        statistics[f"{key}/entropy"] = layout_entropy(observation.layout).item()
        statistics[f"{key}/usage"] = entity_usage(observation.layout).tolist()
        statistics[f"{key}/rho"] = layer.rho.item()
        if layer.self_sampling:
            statistics[f"{key}/t"] = layer.t.tolist()
    return statistics
