"""Several processes that share a work, as torchrun starts them."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from attnorm.system.devices import find_device


@dataclass(frozen=True)
class ProcessGroup:
    """Those that torchrun has started, or this one alone. The first one has the results; the others help."""

    rank: int = 0
    count: int = 1

    def as_first(self, flags: Sequence[bool]) -> list[bool]:
        """The first one's flags, for all: what it finds in its files, others need not."""
        if self.count == 1:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.int64)
        dist.broadcast(values, 0)
        return [bool(value) for value in values.tolist()]

    def text_of_first(self, text: str) -> str:
        """The first one's text, for all."""
        if self.count == 1:
            return text
        size = torch.tensor([len(text.encode())])
        dist.broadcast(size, 0)
        content = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == 0:
            content = torch.tensor(list(text.encode()), dtype=torch.uint8)
        dist.broadcast(content, 0)
        return bytes(content.tolist()).decode()

    def gather(self, part: Tensor) -> list[Tensor]:
        """Every process's part, of up to two axes, in their order: on the CPU of the first; the others get nothing."""
        if self.count == 1:
            return [part]
        part = part.cpu()
        own_shape = torch.tensor([part.ndim, *part.shape, *[0] * (2 - part.ndim)])
        shapes = [torch.empty_like(own_shape) for _ in range(self.count)]
        dist.all_gather(shapes, own_shape)
        sizes = [torch.Size(sides[:ndim]) for ndim, *sides in (shape.tolist() for shape in shapes)]
        padded = part.new_zeros(max(1, *(size.numel() for size in sizes)))  # all must be as long
        padded[: part.numel()] = part.flatten()
        if self.rank:
            dist.gather(padded, None, 0)
            return []
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.gather(padded, parts, 0)
        return [row[: size.numel()].reshape(size) for row, size in zip(parts, sizes, strict=True)]


@contextlib.contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Joins the processes that torchrun has started (RANK, WORLD_SIZE and others in the environment) for as long as it
    lasts; within itself, and where there is one process, it changes nothing.
    """
    if dist.is_initialized():
        yield ProcessGroup(dist.get_rank(), dist.get_world_size())
    elif os.environ.get("WORLD_SIZE", "1") == "1":
        yield ProcessGroup()
    else:
        # gloo, on GPUs too: what is sent is little, and on the CPU. A process may wait long for another one's work.
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=2))
        try:
            yield ProcessGroup(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()


def find_own_device(name: str) -> torch.device:
    """As `find_device`, but of several processes on one machine each gets a GPU of its own for "auto" and "cuda"."""
    device = find_device(name)
    local_rank = os.environ.get("LOCAL_RANK", "") if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    return find_device(f"cuda:{local_rank}") if device == torch.device("cuda") and local_rank else device
