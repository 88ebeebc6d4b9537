"""Linear attention with a ReLU kernel (EfficientViT, Cai et al., 2023; SANA, Xie et al., 2024), AN's rival in cost."""

# N batch, C channels, G heads, D channels of a head, P = H*W pixels.

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.layers.gate import new_gate, read_gate
from attnorm.ops.dispatch import at_least_float32
from attnorm.system.devices import no_autocast


class LinearAttention2d(nn.Module):
    """x + gate * project(a) with a_j = phi(q_j) (sum_i phi(k_i)^T v_i) / (phi(q_j) sum_i phi(k_i)^T), phi = ReLU.

    Both sums are over all pixels i and the same for every pixel j, so time and memory grow with H*W. q, k, v and
    project are 1x1 convolutions without a bias; every head has its own channels of all three.

    Ours: the gate, which starts at 0, so that the layer starts as the identity and replaces an AttentiveNorm2d; means
    in place of both sums, which leaves their ratio as it is and keeps `eps` apart from the map's size. Left out, as not
    of the attention itself: EfficientViT's second set of heads on a 5x5 neighbourhood and the norm behind `project`.

    Args:
        num_features: C.
        head_width: D, channels of a head; C where there are fewer.
        eps: Added to the denominator: a pixel whose q is nowhere positive gets nothing.
    """

    def __init__(self, num_features: int, *, head_width: int = 32, eps: float = 1e-6) -> None:
        super().__init__()
        if num_features < 1 or head_width < 1 or num_features % min(head_width, num_features):
            raise ValueError(
                f"num_features is {num_features}, head_width {head_width}; expected at least 1 each and whole heads: "
                "let head_width divide num_features"
            )
        self.num_features, self.head_width, self.eps = num_features, min(head_width, num_features), eps
        self.query = nn.Conv2d(num_features, num_features, 1, bias=False)
        self.key = nn.Conv2d(num_features, num_features, 1, bias=False)
        self.value = nn.Conv2d(num_features, num_features, 1, bias=False)
        self.project = nn.Conv2d(num_features, num_features, 1, bias=False)
        self.gate = new_gate()

    def forward(self, x: Tensor) -> Tensor:
        """`x` is [N, C, H, W], floating; so is what is returned, in its dtype and memory format."""
        if x.ndim != 4 or x.shape[1] != self.num_features or not x.is_floating_point():
            raise ValueError(
                f"got {x.dtype} {tuple(x.shape)}; expected a floating feature map [N, {self.num_features}, H, W]"
            )
        query, key, value = F.relu(self.query(x)), F.relu(self.key(x)), self.value(x)
        dtype = value.dtype
        with no_autocast(x):  # sums over pixels need their digits
            query, key, value = (
                map.to(at_least_float32(map)).flatten(2).unflatten(1, (-1, self.head_width))
                for map in (query, key, value)
            )  # [N, G, D, P]
            num_pixels = max(x.shape[2] * x.shape[3], 1)
            memory = value @ key.mT / num_pixels  # [N, G, D of the value, D of the key]
            weight = key.sum(3, keepdim=True) / num_pixels  # [N, G, D, 1]
            attended = (memory @ query) / (weight.mT @ query + self.eps)
        attended = attended.to(dtype).flatten(1, 2).unflatten(2, x.shape[2:])
        # The first term's memory format is the sum's.
        return (x + self.gate * self.project(attended)).to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        read_gate(state_dict, f"{prefix}gate")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"{self.num_features}, head_width={self.head_width}"
