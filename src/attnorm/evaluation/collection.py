"""Features of many images, batch after batch, over several processes; those of real images are kept between calls."""

# N images, M real ones, D dimensions of their features, L logits, S side of an image.

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import safetensors
import torch
from torch import Tensor

from attnorm.checkpoint import write_tensors
from attnorm.data.images import ImageSet, cut_centres
from attnorm.metrics.features import Extractor, Features
from attnorm.metrics.generative import Gaussian, InceptionScore, Moments
from attnorm.system.process_group import ProcessGroup

_log = logging.getLogger(__name__)

SPLITS = 10  # of the Inception Score
_FORMAT = 1  # raise it when what is kept of real images changes, so that no older file is taken for a new one

Progress = Callable[[int, int, str], None]  # done, in all, of what
Streaming = TypeVar("Streaming", Moments, InceptionScore)


# What is kept of features


class Wanted(NamedTuple):
    """What is to be kept of features."""

    moments: bool = False
    pooled: bool = False
    logits: bool = False
    score: bool = False


class Collected(NamedTuple):
    """What was wanted; of all images in the first process only."""

    moments: Moments | None
    pooled: Tensor | None  # float32 [N, D], on the CPU
    logits: Tensor | None  # float32 [N, L], on the CPU
    score: InceptionScore | None

    def gaussian(self) -> Gaussian:
        """From the features where they were kept: of fewer than D that is exact."""
        if self.pooled is not None:
            return Gaussian.from_features(self.pooled)
        assert self.moments is not None
        return Gaussian.from_moments(self.moments)


def collect(
    features_of: Callable[[range], Features],
    total: int,
    wanted: Wanted,
    dimensions: int,
    *,
    batch_size: int,
    group: ProcessGroup,
    progress: Callable[[int, int], None],
) -> Collected:
    """Features of images number 0 .. total - 1. Process r of n makes batches r, r + n, r + 2n, ...; the last batch may
    be smaller, and no image is left out. Batches, and so features, are the same for any number of processes.
    """
    batches = [range(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]
    moments = Moments(dimensions) if wanted.moments else None
    score = InceptionScore(total, SPLITS) if wanted.score else None
    pooled: list[Tensor] = []
    logits: list[Tensor] = []
    for numbers in batches[group.rank :: group.count]:
        features = features_of(numbers)
        if moments is not None:
            moments.add(features.pooled)
        if score is not None:
            score.add(features.logits, numbers.start)
        if wanted.pooled:
            pooled.append(features.pooled.cpu())
        if wanted.logits:
            logits.append(features.logits.cpu())
        progress(min(numbers.stop + (group.count - 1 - group.rank) * batch_size, total), total)

    def in_order(parts: list[Tensor]) -> Tensor | None:
        gathered = group.gather(torch.cat(parts) if parts else torch.empty(0, 0))
        if group.rank:
            return None
        rows = torch.empty(total, gathered[0].shape[1])
        for rank, part in enumerate(gathered):
            numbers = list(itertools.chain.from_iterable(batches[rank :: group.count]))
            if numbers:  # there may be more processes than batches
                rows[numbers] = part
        return rows

    return Collected(
        _merged(moments, group) if moments is not None else None,
        in_order(pooled) if wanted.pooled else None,
        in_order(logits) if wanted.logits else None,
        _merged(score, group) if score is not None else None,
    )


def _merged(own: Streaming, group: ProcessGroup) -> Streaming:
    """The sum over the processes, in their order; of use in the first one only."""
    if group.count == 1:
        return own
    gathered = {name: group.gather(part) for name, part in own.state().items()}
    if group.rank:
        return own
    first, *others = [{name: parts[rank] for name, parts in gathered.items()} for rank in range(group.count)]
    total = own.from_state(first)
    for other in others:
        total.merge(own.from_state(other))
    return total


class RealFeatures:
    """What is made of real images, cut at their centre to S; it is kept under a key made of content, never of a name.

    Args:
        folder: Where; what lies there damaged is made again.
    """

    def __init__(
        self, images: ImageSet, side: int, extractor: Extractor, *, batch_size: int, folder: Path, progress: Progress
    ) -> None:
        self.images, self.side, self.extractor, self.batch_size = images, side, extractor, batch_size
        self.folder, self.progress = folder, progress

    def gaussian(self, chosen: np.ndarray, group: ProcessGroup) -> Gaussian | None:
        """Of the images at the indices `chosen`; in the first process only."""
        is_few = len(chosen) <= self.extractor.dimensions

        def make() -> dict[str, Tensor]:
            collected = self._collect(chosen, Wanted(moments=not is_few, pooled=is_few), group, "real images")
            if group.rank:
                return {}
            made = collected.gaussian()
            return {"mean": made.mean, "factor": made.factor, "count": torch.tensor(made.count)}

        state = self._kept("gaussian", chosen, make, group)
        return Gaussian(state["mean"], state["factor"], int(state["count"])) if state else None

    def pooled(self, chosen: np.ndarray, group: ProcessGroup, what: str = "real images") -> Tensor | None:
        """float32 [M, D], on the CPU; in the first process only."""

        def make() -> dict[str, Tensor]:
            pooled = self._collect(chosen, Wanted(pooled=True), group, what).pooled
            return {} if pooled is None else {"pooled": pooled}

        return self._kept("pooled", chosen, make, group).get("pooled")

    def _collect(self, chosen: np.ndarray, wanted: Wanted, group: ProcessGroup, what: str) -> Collected:
        def features_of(numbers: range) -> Features:
            pixels, _ = self.images.batch(chosen[numbers.start : numbers.stop])
            return self.extractor(cut_centres(pixels, self.side))

        return collect(
            features_of,
            len(chosen),
            wanted,
            self.extractor.dimensions,
            batch_size=self.batch_size,
            group=group,
            progress=lambda done, total: self.progress(done, total, what),
        )

    def key(self, kind: str, chosen: np.ndarray) -> str:
        """SHA-256 (hex) of all that decides what is kept: pixels, labels and classes, which of them, and extractor."""
        which = hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()
        extractor = self.extractor
        values = [_FORMAT, kind, self.images.fingerprint, which, self.side]
        values += [extractor.name, extractor.weights_sha256, extractor.preprocessing]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def _kept(
        self, kind: str, chosen: np.ndarray, make: Callable[[], dict[str, Tensor]], group: ProcessGroup
    ) -> dict[str, Tensor]:
        """What the first process has kept, or what all make now, which it then keeps; elsewhere nothing."""
        file = self.folder / f"{kind}-{self.key(kind, chosen)[:32]}.safetensors"
        state = _read(file) if group.rank == 0 else None
        (is_there,) = group.as_first([state is not None])
        if is_there:
            return state or {}
        state = make()
        if group.rank == 0:
            _write(file, state)
        return state


def _read(file: Path) -> dict[str, Tensor] | None:
    """What `_write` left, or None where there is nothing or where it is damaged."""
    if not file.is_file():
        return None
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            if (stored.metadata() or {}).get("sha256") != _hash(state):
                raise ValueError("its content has changed")
        return state
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        _log.warning("making features of real images again: %s is damaged (%s)", file, error)
        return None


def _write(file: Path, state: Mapping[str, Tensor]) -> None:
    plain = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, plain, {"sha256": _hash(plain)})
    except OSError as error:
        _log.warning("features of real images cannot be kept (%s)", error)


def _hash(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {list(state[name].shape)} {state[name].dtype}".encode())
        digest.update(state[name].reshape(-1).numpy().tobytes())
    return digest.hexdigest()
