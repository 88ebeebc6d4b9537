"""The number that opens a context block: 0 at first, so that the block starts as the identity."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn


def new_gate() -> nn.Parameter:
    """0, [1]: torch's fully_shard (FSDP2) divides no parameter without a dimension."""
    return nn.Parameter(torch.zeros(1))


def read_gate(state_dict: MutableMapping[str, Tensor], name: str) -> None:
    """Weights of earlier versions have a gate of shape []: it becomes [1] in `state_dict`."""
    gate = state_dict.get(name)
    if gate is not None and gate.ndim == 0:
        state_dict[name] = gate[None]
