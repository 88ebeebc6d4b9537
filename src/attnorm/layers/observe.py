"""What every AttentiveNorm2d inside a network saw."""

# N batch, C channels, K entities (the paper's n).

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

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

    A later pass replaces an earlier one. Use it in evaluation mode: in training mode the layout is drawn anew.

        with observe_layouts(generator.eval()) as seen:
            generator(z, labels)
        seen["blocks.2.an"].layout
    """
    seen: dict[str, Observation] = {}

    def hook(name: str, layer: AttentiveNorm2d, inputs: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            seen[name] = Observation(inputs[0].detach(), layer.layout(inputs[0]))

    handles = [
        layer.register_forward_hook(lambda layer, inputs, _, name=name: hook(name, layer, inputs))
        for name, layer in model.named_modules()
        if isinstance(layer, AttentiveNorm2d)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
