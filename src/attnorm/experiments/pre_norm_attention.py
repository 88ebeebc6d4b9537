"""Self-attention behind a norm, the rival of both experiments."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PreNormAttention(nn.Module):
    """x + project(softmax(q . k / sqrt(C)) v) of LayerNorm(x) over channels, keys and values max-pooled 2x2.

    Attention as transformers have it: awake from the first step, where SAGAN's block has a gate of 0.

    Args:
        is_identity: At the start `project` is 0, as diffusion models have it, and so is what the block adds.
    """

    def __init__(self, num_features: int, *, is_identity: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_features)
        self.query, self.key, self.value, self.project = (nn.Conv2d(num_features, num_features, 1) for _ in range(4))
        if is_identity:
            for parameter in self.project.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x.movedim(1, 3)).movedim(3, 1)
        maps = (
            self.query(normal),
            F.max_pool2d(self.key(normal), 2, ceil_mode=True),
            F.max_pool2d(self.value(normal), 2, ceil_mode=True),
        )
        query, key, value = (map.flatten(2).mT.contiguous()[:, None] for map in maps)
        attended = F.scaled_dot_product_attention(query, key, value)[:, 0].mT.unflatten(2, x.shape[2:])
        out: Tensor = x + self.project(attended)
        return out
