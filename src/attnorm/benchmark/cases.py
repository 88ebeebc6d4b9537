"""What is measured: input sizes, and the implementations of AN and of what stands beside it."""

# N batch, C channels, H, W; P = H*W pixels; K entities.

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from attnorm.config import ConfigError, did_you_mean
from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.layers.linear_attention import LinearAttention2d
from attnorm.layers.region_norm import RegionNorm2d
from attnorm.layers.self_attention import SelfAttention2d
from attnorm.system.devices import why_not_compiled

Shape = tuple[int, int, int, int]  # N, C, H, W
Mode = Literal["forward", "training"]  # evaluation without gradients; forward and backward in training mode
MODES: tuple[Mode, ...] = get_args(Mode)

NUM_ENTITIES = 16  # Table 5's n


@dataclass(frozen=True)
class Case:
    """One input size; `why` says what it stands for."""

    name: str
    shape: Shape
    why: str


CASES = (
    Case("smoke", (2, 8, 16, 16), "tiny: is everything there?"),
    Case("table5-128", (1, 32, 128, 128), "Table 5 of the paper"),
    Case("table5-256", (1, 32, 256, 256), "Table 5 of the paper"),
    Case("table5-512", (1, 32, 512, 512), "Table 5 of the paper"),
    Case("table5-1024", (1, 32, 1024, 1024), "Table 5 of the paper"),
    Case("small", (64, 64, 16, 16), "a site at 32 pixels, a large batch of small maps"),
    Case("gan-16", (16, 256, 32, 32), "the generator's site at 128 pixels, a small batch"),
    Case("gan-64", (64, 256, 32, 32), "the generator's site at 128 pixels, a large batch"),
    Case("wide", (8, 128, 256, 256), "more than any cache holds"),
)
# By device, unless cases are named; the others take minutes each on a CPU.
USUAL = {"cpu": "table5-128,table5-256,table5-512,table5-1024,small,gan-16", "cuda": "table5,small,gan,wide"}


@dataclass(frozen=True)
class Implementation:
    """What is timed.

    Args:
        build: The layer for inputs of C channels; ValueError where it cannot exist here.
        reference: The layer whose result in float64 is right, with parameters of the same names.
        largest: Elements of the largest tensor that the reference builds for a shape.
        sizing: A layer whose need of memory bounds this one's; None for its own.
    """

    name: str
    build: Callable[[int], nn.Module]
    reference: Callable[[int], nn.Module]
    largest: Callable[[Shape], int] = math.prod
    sizing: Callable[[int], nn.Module] | None = None
    is_compiled: bool = False  # the first step with a shape compiles


class _Copy(nn.Module):
    """Into a tensor that is there already: one read and one write of the input, the unit of all that follows."""

    target: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.target is None or self.target.shape != x.shape:
            self.target = torch.empty_like(x, requires_grad=False)
        return self.target.copy_(x.detach())


def _conv_instance_norm(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 1), nn.InstanceNorm2d(channels, affine=True))


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(max(1, min(32, channels // 4)), channels)  # the groups of EDM's networks


def attention_scores(shape: Shape) -> int:
    """Elements of self-attention's score matrix, whose keys are of a map of half the side."""
    n, _, h, w = shape
    return n * h * w * math.ceil(h / 2) * math.ceil(w / 2)


def _rival(name: str, build: Callable[[int], nn.Module], largest: Callable[[Shape], int] = math.prod) -> Implementation:
    return Implementation(name, build, build, largest)


@functools.cache  # one object each: a reference's result is computed once for all implementations
def _builder(impl: str, self_sampling: bool) -> Callable[[int], nn.Module]:
    return lambda channels: AttentiveNorm2d(channels, NUM_ENTITIES, impl=impl, self_sampling=self_sampling)


def _nfold(shape: Shape) -> int:
    return NUM_ENTITIES * math.prod(shape)


def _attentive_norm(impl: str, *, self_sampling: bool = True) -> Implementation:
    name = f"an-{impl}" if self_sampling else f"an-{impl}-no-sampling"
    return Implementation(name, _builder(impl, self_sampling), _builder("reference", self_sampling), _nfold)


def _compiled(channels: int) -> nn.Module:
    """The plain form through torch.compile: one graph, compiled for the shape at hand."""
    if reason := why_not_compiled():
        raise ValueError(f"an-inductor cannot run: {reason}")
    layer = _builder("fused", True)(channels)
    # Positions are drawn as without the compiler, so that they can be checked; nothing comes from a cache on disk, so
    # that the time to compile is one.
    layer.compile(fullgraph=True, dynamic=False, options={"fallback_random": True, "fx_graph_cache": False})
    return layer


COPY, CONV_INSTANCE_NORM = "copy", "conv+instance_norm"
ATTENTION, LINEAR_ATTENTION = "self_attention", "linear_attention"
IMPLEMENTATIONS = (
    _rival(COPY, lambda channels: _Copy()),
    _rival("instance_norm", lambda channels: nn.InstanceNorm2d(channels, affine=True)),
    _rival("group_norm", _group_norm),
    _rival("region_norm", lambda channels: RegionNorm2d(channels, regions="learned")),
    _rival(CONV_INSTANCE_NORM, _conv_instance_norm),
    _rival(LINEAR_ATTENTION, LinearAttention2d),
    _rival(ATTENTION, SelfAttention2d, attention_scores),
    _attentive_norm("reference"),
    _attentive_norm("fused"),
    Implementation("an-inductor", _compiled, _builder("reference", True), _nfold, _builder("fused", True), True),
    _attentive_norm("native"),
    _attentive_norm("triton"),
    *(_attentive_norm(impl, self_sampling=False) for impl in ("native", "triton")),
)


def find_named(kind: str, names: str, known: Sequence[Any]) -> tuple[Any, ...]:
    """The entries that `names` means, in the list's order; "table5" stands for every "table5-..."."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if not any(_stands_for(name, entry.name) for entry in known):
            all_names = [entry.name for entry in known]
            hint = did_you_mean(name, all_names)
            raise ConfigError(f"there is no {kind} {name!r}; {hint}expected some of {', '.join(all_names)}")
    if not wanted:
        raise ConfigError(f"no {kind} was named in {names!r}; expected names with commas between")
    return tuple(entry for entry in known if any(_stands_for(name, entry.name) for name in wanted))


def _stands_for(name: str, full: str) -> bool:
    return full == name or full.startswith(f"{name}-")
