"""The stream of training images: shuffled epochs without end, of which any batch can be made alone."""

# N batch, S side of a training square.

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from attnorm.config import Config, ConfigError
from attnorm.data.images import ImageSet, cut_squares, shuffled_indices, to_float, trained_indices
from attnorm.system.randomness import BatchPart, seed_of


class Batch(NamedTuple):
    images: Tensor  # float32 [N, 3, S, S] in [-1, 1]
    labels: Tensor  # int64 [N]
    position: int = 0  # of the first image in the stream of training images
    part: BatchPart | None = None  # which of the images of an update these are; None: all


def parts_of_batch(size: int, *, rank: int = 0, processes: int = 1, accumulate: int = 1) -> list[BatchPart | None]:
    """The parts of a batch that a process makes, one after another: `accumulate` of equal size, side by side.

    Raises:
        ConfigError: the batch cannot be divided so.
    """
    count = processes * accumulate
    if size % count:
        raise ConfigError(
            f"run.batch_size is {size}; expected a multiple of {count}, as {processes} process(es) make it in "
            f"{accumulate} part(s) each (run.accumulate)"
        )
    if count == 1:
        return [None]
    own = size // count
    numbers = range(rank * accumulate, (rank + 1) * accumulate)
    return [BatchPart(own * number, own * (number + 1), size) for number in numbers]


class Stream:
    """The endless stream of training images: shuffled epochs, squares cut at random, mirrored if that is set.

    It depends on seed and position alone, so that runs of different models see the same images, and so does a run
    whatever the number of its processes.
    """

    def __init__(self, config: Config, images: ImageSet, device: torch.device) -> None:
        self.config, self.images, self.device = config, images, device
        self.indices = trained_indices(len(images), config.data.held_out_every)

    def batch(self, position: int, part: BatchPart | None = None) -> Batch:
        """The batch that begins at `position`, or a part of it; what is drawn at random is drawn for all of it."""
        settings, side = self.config.run, self.config.model.image_size
        size = settings.batch_size
        own = slice(0, size) if part is None else slice(part.start, part.stop)
        order = shuffled_indices(len(self.indices), position + own.start, own.stop - own.start, seed=settings.seed)
        random = torch.Generator().manual_seed(seed_of(settings.seed, position, 0, 1))  # not one of a step's
        pixels, labels = (self._to_device(part) for part in self.images.batch(self.indices[order]))
        room = [length - side for length in pixels.shape[2:]]
        if any(room):
            tops, lefts = (self._to_device(torch.randint(most + 1, (size,), generator=random)[own]) for most in room)
            pixels = cut_squares(pixels, tops, lefts, side)
        real = to_float(pixels)
        if self.config.data.flip:
            mirrored = self._to_device(torch.rand(size, generator=random)[own] < 0.5)
            real = torch.where(mirrored[:, None, None, None], real.flip(3), real)
        if settings.channels_last:
            real = real.to(memory_format=torch.channels_last)
        return Batch(real, labels, position + own.start, part)

    def _to_device(self, part: Tensor) -> Tensor:
        if self.device.type == "cuda":  # pinned, so that the copy need not wait for the work that is queued
            return part.pin_memory().to(self.device, non_blocking=True)
        return part.to(self.device)


class BatchesAhead(contextlib.AbstractContextManager["BatchesAhead"]):
    """Gives the batches of a stream, the next of which a thread makes meanwhile; on a GPU, on a stream of its own.

    A batch depends on its position alone: that it was made ahead, or in vain, changes nothing.

    Args:
        enabled: False: nothing is made before it is asked for.
    """

    def __init__(self, stream: Stream, *, enabled: bool = True) -> None:
        self.stream = stream
        self.worker = ThreadPoolExecutor(1, "batches") if enabled else None
        self.side = torch.cuda.Stream(stream.device) if enabled and stream.device.type == "cuda" else None
        self.waiting: dict[int, Future[list[Batch]]] = {}  # by position; one at most

    def __exit__(self, *error: object) -> None:
        if self.worker:
            self.worker.shutdown(cancel_futures=True)

    def batches(self, position: int, parts: Sequence[BatchPart | None], *, then: int) -> list[Batch]:
        """The parts of the batch at `position`. Those of the one at `then` are begun."""
        made = self.waiting.pop(position, None)
        batches = made.result() if made else [self.stream.batch(position, part) for part in parts]
        if made and self.side:
            present = torch.cuda.current_stream(self.stream.device)
            present.wait_stream(self.side)
            for batch in batches:  # whose memory is not given away before these were used
                batch.images.record_stream(present)
                batch.labels.record_stream(present)
        self.waiting.clear()
        if self.worker:
            self.waiting[then] = self.worker.submit(self._make, then, parts)
        return batches

    def _make(self, position: int, parts: Sequence[BatchPart | None]) -> list[Batch]:
        with torch.cuda.stream(self.side):  # None: as it is
            return [self.stream.batch(position, part) for part in parts]
