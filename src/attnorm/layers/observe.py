"""What every AttentiveNorm2d inside a network saw, and how to steer it."""

# N batch, C channels, K entities (the paper's n).

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnorm.layers.attentive_norm import AttentiveNorm2d


class Observation(NamedTuple):
    """What one AttentiveNorm2d saw in one forward pass."""

    features: Tensor  # its input, [N, C, H, W]
    layout: Tensor  # [N, K, H, W]


@contextlib.contextmanager
def observe_layouts(model: nn.Module) -> Iterator[dict[str, Observation]]:
    """Collects what every AttentiveNorm2d inside `model` sees in the forward passes made in the block, by module name.

    A later pass replaces an earlier one. Use it in evaluation mode: in training mode the layout is drawn anew. In the
    block what torch.compile has compiled runs as it was written: compiled code calls no layer::

        with observe_layouts(generator.eval()) as seen:
            generator(z, labels)
        seen["blocks.2.an"].layout
    """
    seen: dict[str, Observation] = {}

    def look(name: str, layer: AttentiveNorm2d, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        x = args[0] if args else kwargs["x"]
        with torch.no_grad():
            seen[name] = Observation(x.detach(), layer.layout(x))

    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # importing it takes seconds, and nothing is compiled without it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, layer in layers_of(model).items():
            hook = layer.register_forward_hook(functools.partial(look, name), with_kwargs=True)
            stack.callback(hook.remove)
        yield seen


@contextlib.contextmanager
def edited_entities(
    layer: AttentiveNorm2d, *, off: Collection[int] = (), exchanged: tuple[int, int] | None = None
) -> Iterator[None]:
    """In the block, entities that are off win no pixel: the softmax of Eq. 4 is over the others. And where one of two
    exchanged entities was, the other one is: each region is normalized by its own moments, with the other's affine
    transformation (so nothing changes where affine=False). Nothing of this stays.

    Raises:
        ValueError: an entity is none of the layer's, or all are off.
    """
    entities = range(layer.num_entities)
    if unknown := {*off, *(exchanged or ())} - set(entities):
        raise ValueError(f"got entities {sorted(unknown)}; expected 0 to {layer.num_entities - 1}")
    if set(off) == set(entities):
        raise ValueError("all entities are off; expected at least one that is left")
    order = list(entities)
    if exchanged:
        first, second = exchanged
        order[first], order[second] = second, first
    logits = layer._logits

    def edited(x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        x, filters, offset = logits(x, generator)
        is_off = torch.zeros(layer.num_entities, dtype=torch.bool, device=filters.device)
        is_off[list(off)] = True
        filters = filters.masked_fill(is_off[:, None], 0)
        offset = offset.masked_fill(is_off, -1e4)  # its share underflows to 0
        return x, filters[:, order], offset[:, order]

    vars(layer)["_logits"] = edited
    try:
        yield
    finally:
        del vars(layer)["_logits"]


def layers_of(model: nn.Module) -> dict[str, AttentiveNorm2d]:
    """Every AttentiveNorm2d inside `model` by its name, without what torch.compile adds to names."""
    return {uncompiled_name(path): layer for path, layer in model.named_modules() if isinstance(layer, AttentiveNorm2d)}


def uncompiled_name(path: str) -> str:
    """The name of a module without what torch.compile adds to it."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")
