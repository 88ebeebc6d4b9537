"""Which implementation of an operation can run on given arguments, and why not; what the fast ones are given."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

IMPLEMENTATIONS = ("reference", "fused", "native", "triton")

log = logging.getLogger("attnorm")


class Parameters(NamedTuple):
    """What the layer by `native` and by `triton` takes beside x [N, C, H, W], float32; M = N, or 1 for the whole batch.

    rho * regional_norm(v, softmax(filters x + offset)) + x, with v = value_weight x + value_bias.
    """

    filters: Tensor  # of the logits of Eq. 4, tau and all, [M, K, C]
    offset: Tensor  # [M, K]
    value_weight: Tensor  # [C, C]
    value_bias: Tensor  # [C]
    weight: Tensor  # beta of Eq. 5, [K, C]
    bias: Tensor  # alpha of Eq. 5, [K, C]
    rho: Tensor  # of Eq. 6, []


_said: set[str] = set()


def is_exporting() -> bool:
    """Whether torch.export runs this. The flag itself: torch 2.11 compiles its `is_exporting()` as true."""
    return torch.compiler._is_exporting_flag


def resolve(operation: str, impl: str, candidates: Mapping[str, str | None]) -> str:
    """The name of the implementation to run.

    Args:
        impl: "auto", or the name of one candidate.
        candidates: implementations in order of preference; each maps to None if it can run here, or to the reason
            why it cannot.

    "auto" takes the first that can run and logs, once, what it passed over. An explicit name that cannot run raises
    ValueError with the reason: nothing falls back in silence.
    """
    if impl == "auto":
        for name, reason in candidates.items():
            if reason is None:
                return name
            if not torch.compiler.is_compiling():
                say_once(f"{operation}: not using the {name} implementation: {reason}")
        raise ValueError(f"{operation}: no implementation can run: {dict(candidates)}")
    if impl not in candidates:
        raise ValueError(f"{operation}: impl is {impl!r}; expected 'auto' or one of {', '.join(candidates)}")
    if candidates[impl] is not None:
        raise ValueError(f"{operation}: impl={impl!r} cannot run: {candidates[impl]}; use impl='auto'")
    return impl


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """The precision of logits and statistics: float32, or float64 where an argument has it (docs/paper.md, row 11)."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def widened(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return x.to(at_least_float32(x))


def memory_format(x: Tensor) -> torch.memory_format:
    """The order of the values of a feature map [N, C, H, W], which every operation and block hands on: channels_last
    where only that fits its strides, else contiguous.
    """
    # Inside vmap a map has no format of its own, and torch answers no question about channels_last.
    if x.is_contiguous() or torch._C._functorch.is_batchedtensor(x):
        return torch.contiguous_format
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def is_transformed() -> bool:
    """Whether a transformation of torch.func, a batched gradient or forward-mode differentiation is at work.

    Kernels see neither the batch nor the tangent: what goes into them would come out without it, in silence.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning(message)
