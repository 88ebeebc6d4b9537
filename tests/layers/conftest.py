"""Layers in which nothing is special, and feature maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnorm import AttentiveNorm2d


def make_layer(
    num_features: int = 4, num_entities: int = 3, *, dtype: torch.dtype = torch.float32, **switches: Any
) -> AttentiveNorm2d:
    """With random parameters, unequal t, and rho not 0, or the layer would be the identity and all gradients 0."""
    torch.manual_seed(0)
    layer = AttentiveNorm2d(num_features, num_entities, **{"temperature": 0.5, "reduction": 2, **switches})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.rho.fill_(0.7)
        if layer.self_sampling:
            low, high = (-0.4, 1.3) if layer.clamp_t else (0.2, 0.9)
            layer.t.copy_(torch.linspace(low, high, num_entities))
        if layer.moments == "batch":
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return layer.to(dtype)


def feature_map(*shape: int, seed: int = 1, offset: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=seeded(seed), dtype=torch.float64) + offset).to(dtype)


def seeded(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
