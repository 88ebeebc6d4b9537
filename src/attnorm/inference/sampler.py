"""From a checkpoint to generated images, and what the layers saw; needs no data set."""

# N images, Z latent dimension, S side of an image.

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from attnorm.checkpoint import CheckpointError
from attnorm.config import did_you_mean
from attnorm.data.images import to_uint8
from attnorm.layers.observe import Observation, observe_layouts
from attnorm.models.class_conditional import Generator
from attnorm.registry import load
from attnorm.system.devices import temporary_tf32
from attnorm.system.randomness import standard_normal


class Samples(NamedTuple):
    """A batch of generated images."""

    images: Tensor  # uint8 [N, 3, S, S], on the CPU
    layouts: dict[str, Observation]  # what each AttentiveNorm2d saw, by module name; empty unless asked for


class Sampler:
    """Images of one generator. Image number i is made from seeds[i] and labels[i] alone: on the same machine with the
    same number of threads, the same request gives the same pixels. Elsewhere, or with something else asked for along
    with it, an image changes by no more than rounding, a grey level.

    Args:
        path: A run directory (its latest checkpoint is taken), a checkpoint file, a folder of
            `save_pretrained`, or the name of a model that comes with the package.
        ema: Use the average of the weights over training, as all scores do; False for the raw weights.
        device: "auto" takes a GPU where there is one.

    Raises:
        CheckpointError: there is nothing to load.
    """

    def __init__(self, path: Path | str, *, ema: bool = True, device: str = "auto", batch_size: int = 50) -> None:
        loaded = load(path, ema=ema, device=device)
        if not isinstance(loaded.model, Generator):
            raise CheckpointError(
                f"{loaded.path} was trained for {loaded.header.config.task}; expected a class-conditional generator"
            )
        self.model: Generator = loaded.model
        self.header, self.path, self.classes = loaded.header, loaded.path, loaded.classes
        self.device, self.batch_size = next(self.model.parameters()).device, batch_size
        # As in training: otherwise images, and scores of them, would be made at another precision on NVIDIA's GPUs.
        self.tf32 = self.header.config.run.tf32

    def class_index(self, name: str) -> int:
        """The label of a class, given by its name, however accents are composed, or its number from 0 on; where every
        name is a number, a number is a name: 1 would else be the second of 001, 002, 003.
        """
        if name in self.classes:
            return self.classes.index(name)
        composed = [unicodedata.normalize("NFC", known) for known in self.classes]
        if composed.count(unicodedata.normalize("NFC", name)) == 1:
            return composed.index(unicodedata.normalize("NFC", name))
        are_numbers = all(known.isdecimal() for known in self.classes)
        if name.isdecimal() and int(name) < len(self.classes) and not are_numbers:
            return int(name)
        listed = ", ".join(self.classes[:20]) + (", ..." if len(self.classes) > 20 else "")
        hint = did_you_mean(name, self.classes)
        raise CheckpointError(f"{self.path} knows no class {name!r}; {hint}it has: {listed}")

    def latents(self, seeds: Sequence[int], *, truncation: float | None = None) -> Tensor:
        """[N, Z] on the CPU: row i is standard normal and a function of seeds[i], any whole number from 0 on; see
        `truncated` for the rest.
        """
        rows = [standard_normal(self.model.latent_dim, seed) for seed in seeds]
        latents = torch.stack(rows) if rows else torch.empty(0, self.model.latent_dim)
        return latents if truncation is None else truncated(latents, truncation)

    def batches(self, seeds: Sequence[int], labels: Sequence[int]) -> Iterator[Tensor]:
        """uint8 [<= batch_size, 3, S, S] each, so that any number of images fits in memory."""
        if len(seeds) != len(labels):
            raise ValueError(f"got {len(seeds)} seeds and {len(labels)} labels; expected as many of each")
        for start in range(0, len(seeds), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self._generate(seeds[part], torch.tensor(labels[part])).images

    def sample(
        self,
        seeds: Sequence[int],
        labels: Sequence[int],
        *,
        with_layouts: bool = False,
        truncation: float | None = None,
    ) -> Samples:
        """All images at once, with what the layers saw on request; latents beyond +-truncation are moved inside."""
        if len(seeds) != len(labels):
            raise ValueError(f"got {len(seeds)} seeds and {len(labels)} labels; expected as many of each")
        return self._generate(seeds, torch.tensor(labels, dtype=torch.int64), with_layouts, truncation)

    def interpolate(self, seed: int, classes: Sequence[int], steps: int, *, truncation: float | None = None) -> Samples:
        """A walk through `classes` with one latent (section 5.2, Figure 8): between two of them the statistics of
        conditional normalization are mixed linearly, in `steps` images that include both ends.
        """
        mixtures = self._mixtures(classes, steps)
        return self._generate([seed] * len(mixtures), torch.stack(mixtures), True, truncation)

    def walk(
        self, seed: int, classes: Sequence[int], steps: int, *, truncation: float | None = None
    ) -> Iterator[Samples]:
        """`interpolate`, an image at a time."""
        for mixture in self._mixtures(classes, steps):
            yield self._generate([seed], mixture[None], True, truncation)

    def _mixtures(self, classes: Sequence[int], steps: int) -> list[Tensor]:
        if len(classes) < 2 or steps < 2:
            raise ValueError(f"got {len(classes)} classes and {steps} steps; expected at least 2 of each")
        mixtures = []
        for leg, (start, end) in enumerate(itertools.pairwise(classes)):
            for share in torch.linspace(0, 1, steps)[1 if leg else 0 :]:  # a class in the middle is shown once
                mixture = torch.zeros(len(self.classes))
                mixture[start] += 1 - share
                mixture[end] += share
                mixtures.append(mixture)
        return mixtures

    @torch.no_grad()
    def _generate(
        self, seeds: Sequence[int], condition: Tensor, with_layouts: bool = False, truncation: float | None = None
    ) -> Samples:
        z = self.latents(seeds, truncation=truncation).to(self.device)
        condition = condition.to(self.device)
        if not with_layouts:
            with temporary_tf32(self.tf32):
                return Samples(to_uint8(self.model(z, condition)).cpu(), {})
        with temporary_tf32(self.tf32), observe_layouts(self.model) as seen:
            images = to_uint8(self.model(z, condition)).cpu()
        return Samples(images, {name: Observation(*(part.cpu() for part in seen[name])) for name in seen})


def truncated(latents: Tensor, limit: float) -> Tensor:
    """Standard normal values as values of the normal distribution truncated to [-limit, limit], quantile by quantile.

    BigGAN's truncation (Brock et al., 2019) draws what lies beyond the limit again; this has the same distribution,
    changes continuously with the limit, and draws nothing. ValueError unless the limit is positive.
    """
    if not limit > 0:
        raise ValueError(f"got a truncation of {limit}; expected a positive number")
    upper = torch.special.ndtr(latents.new_tensor(limit, dtype=torch.float64))
    share = torch.special.ndtr(-latents.double().abs())  # of the tail beyond the value, where the digits are
    return (-torch.special.ndtri((1 - upper) + share * (2 * upper - 1)) * latents.sign()).to(latents.dtype)
