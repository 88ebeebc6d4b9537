"""Random numbers, each a function of a seed: torch's generator set anew, latents, permutations, the bootstrap's draws.

What must never change is drawn from the raw stream of a bit generator, which NumPy promises for ever; not from what
its Generator makes of that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def seed_of(*numbers: int) -> int:
    """One seed of 63 bits for several numbers of any size, from 0 on."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_step(seed: int, images_seen: int) -> None:
    """Makes every random number of a step a function of (seed, images seen): nothing else need be stored."""
    torch.manual_seed(seed_of(seed, images_seen, 0))


class BatchPart(NamedTuple):
    """Images `start` to `stop` - 1 of a batch of `total`: what one process makes of it in one pass."""

    start: int
    stop: int
    total: int


_part: BatchPart | None = None


@contextlib.contextmanager
def drawing_for(part: BatchPart | None) -> Iterator[None]:
    """In the block `draw_for_images` draws for a part of a batch; None: for a whole one."""
    global _part
    before, _part = _part, part
    try:
        yield
    finally:
        _part = before


def draw_for_images(count: int, draw: Callable[[int], Tensor]) -> Tensor:
    """`draw(count)`, random numbers for `count` images: a row for each.

    For a part of a batch they are drawn for the whole batch, and its own rows are taken: so an image has the same
    numbers however the batch is divided over processes and passes, as long as their generators are seeded alike. The
    count may be a multiple of the part's: real and generated images in one pass.
    """
    if _part is None:
        return draw(count)
    own = _part.stop - _part.start
    assert count % own == 0, (count, _part)
    whole = draw(count // own * _part.total)
    return whole.unflatten(0, (-1, _part.total))[:, _part.start : _part.stop].flatten(0, 1)


def mark_place(device: torch.device) -> Callable[[], None]:
    """A function that sets torch's generators back to where they are now: what was drawn is drawn again."""
    on_cpu = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind() -> None:
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    return rewind


def seed_weights(seed: int) -> None:
    """Before networks are made. torch's generator on the CPU reads 32 bits of its seed: larger ones are hashed."""
    torch.manual_seed(seed if seed < 2**32 else seed_of(seed))


def standard_normal(size: int, seed: int) -> Tensor:
    """float32 [size] on the CPU; ValueError for a negative seed."""
    if seed < 0:
        raise ValueError(f"got seed {seed}; expected 0 or more")
    if seed < 2**32:
        return torch.randn(size, generator=torch.Generator().manual_seed(seed))
    # Of a larger number torch's generator on the CPU would read 32 bits.
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(size, np.float32))


def permutation(stream: np.random.PCG64, count: int) -> np.ndarray:
    """0 to count - 1 in the order of the next raw numbers of a stream: int64 [count]."""
    return np.argsort(stream.random_raw(count), kind="stable").astype(np.int64)


def resampled_counts(count: int, resamples: int, stream: np.random.PCG64) -> Iterator[np.ndarray]:
    """The bootstrap: how often each of `count` is drawn, with replacement, as many as there are: int64 [count] each
    time.
    """
    for _ in range(resamples):
        # The remainder's bias is of the order of 2^-50.
        rows = (stream.random_raw(count) % np.uint64(count)).astype(np.int64)
        yield np.bincount(rows, minlength=count)
