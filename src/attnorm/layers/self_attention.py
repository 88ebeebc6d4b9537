"""Self-attention as SAGAN's code has it (Zhang et al., 2018): the quadratic alternative to Attentive Normalization."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.layers.gate import new_gate, read_gate


class SelfAttention2d(nn.Module):
    """x + gate * project(attention(query(x), key(x), value(x))), with keys and values max-pooled 2x2.

    The 1x1 convolutions have no bias; query and key have C/8 channels, value C/2; the gate starts at 0, so that the
    layer starts as the identity and replaces an AttentiveNorm2d. This is SAGAN's released code: its text has neither
    the pooling nor the narrow values. Torch's fused kernels have no second derivative: a gradient penalty through this
    layer needs `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around it.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features is {num_features}; expected at least 1")
        self.num_features = num_features
        narrow, half = max(num_features // 8, 1), max(num_features // 2, 1)
        self.query = nn.Conv2d(num_features, narrow, 1, bias=False)
        self.key = nn.Conv2d(num_features, narrow, 1, bias=False)
        self.value = nn.Conv2d(num_features, half, 1, bias=False)
        self.project = nn.Conv2d(half, num_features, 1, bias=False)
        self.gate = new_gate()

    def forward(self, x: Tensor) -> Tensor:
        """`x` is [N, C, H, W]; so is what is returned, in its memory format. Time grows with (H*W)^2.

        Raises:
            ValueError: `x` is of another shape, not floating, or without a pixel.
        """
        if x.ndim != 4 or x.shape[1] != self.num_features or not x.is_floating_point():
            raise ValueError(
                f"got {x.dtype} {tuple(x.shape)}; expected a floating feature map [N, {self.num_features}, H, W]"
            )
        if x.shape[2] * x.shape[3] == 0:
            raise ValueError(f"got a map without a pixel, {tuple(x.shape)}; expected H and W at least 1")
        query = self.query(x).flatten(2).transpose(1, 2)  # [N, P, C/8]
        key, value = (
            F.max_pool2d(map, 2, ceil_mode=True).flatten(2).transpose(1, 2) for map in (self.key(x), self.value(x))
        )  # [N, P/4, C/8], [N, P/4, C/2]
        # The fused kernels take one width for all three, with channels next to one another in memory; zeros add nothing
        # to an inner product. SAGAN does not scale.
        pad = value.shape[2] - query.shape[2]
        query, key = F.pad(query, (0, pad)), F.pad(key, (0, pad))
        query, key, value = (map.contiguous()[:, None] for map in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)[:, 0]
        attended = attended.transpose(1, 2).unflatten(2, x.shape[2:])
        # What attention returns has its channels last; the first term's memory format is the sum's.
        return (x + self.gate * self.project(attended)).to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        read_gate(state_dict, f"{prefix}gate")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return str(self.num_features)
