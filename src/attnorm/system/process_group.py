"""Several processes that share a work, as torchrun starts them."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from attnorm.config import UserError
from attnorm.system.devices import find_device

T = TypeVar("T")

# Of the group that this process is in; torch does not export the type.
_store: dist.Store | None = None  # type: ignore[name-defined]


@dataclass(frozen=True)
class ProcessGroup:
    """Those that torchrun has started, or this one alone. The first one has the results; the others help."""

    rank: int = 0
    count: int = 1
    # What all of them can reach, while some are lost too.
    store: dist.Store | None = None  # type: ignore[name-defined]

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns, once it has returned in every process.

        Where it fails, the first process in which it does raises its error, and the others end (SystemExit): none waits
        for what will not come, and one message is enough.
        """
        if self.count == 1:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:  # of any kind: the others must be told
            error = raised
        failed = torch.zeros(self.count, dtype=torch.int64)
        failed[self.rank] = int(error is not None)
        dist.all_reduce(failed)
        if failed.any():
            if error is not None and int(failed.argmax()) == self.rank:
                raise error
            raise SystemExit(2 if isinstance(error, UserError) else 1)
        return result

    def any_of(self, *flags: bool) -> list[bool]:
        """Whether each of the flags is set in some process, for all."""
        if self.count == 1:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [bool(value) for value in values.tolist()]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors of one type and device by their means over the processes, in one message."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view(tensor.shape))

    def smallest(self, value: Tensor) -> Tensor:
        """The smallest of the processes' values."""
        if self.count > 1:
            value = value.clone()
            dist.all_reduce(value, dist.ReduceOp.MIN)
        return value

    def says(self, what: str) -> bool:
        """Whether this process is the one to say it: the first that asks."""
        if self.store is None:
            return True
        try:
            return self.store.add(f"attnorm/{_attempt()}/{what}", 1) == 1
        except RuntimeError:  # the store is lost too
            return True

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
    global _store
    if dist.is_initialized():
        yield ProcessGroup(dist.get_rank(), dist.get_world_size(), _store)
    elif os.environ.get("WORLD_SIZE", "1") == "1":
        yield ProcessGroup()
    else:
        has_nccl = torch.cuda.is_available() and dist.is_nccl_available()  # for gradients; all else is on the CPU
        _store, rank, count = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        # A process may wait long for another one's work.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
            store=dist.PrefixStore(f"attnorm/{_attempt()}", _store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=count,
            timeout=datetime.timedelta(days=2),
        )
        try:
            yield ProcessGroup(rank, count, _store)
        finally:
            dist.destroy_process_group()
            _store = None


def _attempt() -> str:
    """How often torchrun has started the processes anew: its store remembers those of before, who are gone."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def is_loss_of_a_process(error: BaseException) -> bool:
    """Whether an error says that another process of the group is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(sign in text for sign in ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer"))
    )


def find_own_device(name: str) -> torch.device:
    """As `find_device`, but of several processes on one machine each gets a GPU of its own for "auto" and "cuda"."""
    device = find_device(name)
    local_rank = os.environ.get("LOCAL_RANK", "") if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    return find_device(f"cuda:{local_rank}") if device == torch.device("cuda") and local_rank else device
