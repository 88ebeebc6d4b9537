"""The soft semantic layout (paper, sections 3.1 and 3.2, Eq. 2-4): which entity each pixel belongs to, and how much."""

# N batch, C channels, K entities (the paper's n), D channels of key and query, P = H*W pixels.

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnorm.ops.dispatch import at_least_float32, resolve


class SelfSampling(NamedTuple):
    """What the self-sampling branch needs: translations k and q, the sampled positions, and t."""

    key_weight: Tensor  # [D, C]
    key_bias: Tensor  # [D]
    query_weight: Tensor  # [D, C]
    query_bias: Tensor  # [D]
    t: Tensor  # [K]
    positions: Tensor  # int64 [N, K], into the 2x2 max-pooled map of ceil(H/2) * ceil(W/2) positions, row by row


def soft_layout(
    x: Tensor,
    entities: Tensor,
    sampling: SelfSampling | None = None,
    *,
    temperature: float = 0.1,
    impl: str = "auto",
) -> Tensor:
    """Eq. 4: softmax over entities of tau * (t F + f(x)), with F_ij = k(x)_i . q(x)_j (Eq. 2) and f(x) = W x (Eq. 3).

    Args:
        x: Feature map, [N, C, H, W], any floating dtype.
        entities: W, [K, C].
        sampling: The self-sampling branch; None switches it off, as evaluation does.
        temperature: tau, which multiplies the logits.
        impl: "auto", "reference" or "fused" (k only where it is sampled, q never: the same numbers by associativity).

    Returns:
        [N, K, H, W], float32 (float64 for float64), in [0, 1], summing to 1 over K.
    """
    if x.ndim != 4 or not x.is_floating_point() or entities.ndim != 2 or entities.shape[1] != x.shape[1]:
        raise ValueError(
            f"got x {x.dtype} {tuple(x.shape)} and entities {tuple(entities.shape)}; "
            "expected a floating x [N, C, H, W] and entities [K, C]"
        )
    name = resolve("soft_layout", impl, {"fused": None, "reference": None})
    dtype = at_least_float32(x, entities)
    x, entities = x.to(dtype), entities.to(dtype)
    if sampling is not None:
        if sampling.positions.shape != (x.shape[0], entities.shape[0]):
            raise ValueError(
                f"sampling.positions has shape {tuple(sampling.positions.shape)}; "
                f"expected [N, K] = [{x.shape[0]}, {entities.shape[0]}]"
            )
        sampling = SelfSampling._make(part if part is sampling.positions else part.to(dtype) for part in sampling)
    raw = (_fused if name == "fused" else _reference)(x, entities, sampling)
    return torch.softmax(temperature * raw, dim=1)


def _reference(x: Tensor, entities: Tensor, sampling: SelfSampling | None) -> Tensor:
    """Eq. 2 and 3 to the letter."""
    raw = torch.einsum("kc,nchw->nkhw", entities, x)  # f(X)
    if sampling is None:
        return raw
    key = torch.einsum("dc,nchw->ndhw", sampling.key_weight, x) + sampling.key_bias[:, None, None]
    query = torch.einsum("dc,nchw->ndhw", sampling.query_weight, x) + sampling.query_bias[:, None, None]
    pooled = F.max_pool2d(key, 2, ceil_mode=True).flatten(2)  # more salient semantics, [N, D, P/4]
    sampled = pooled.gather(2, sampling.positions[:, None].expand(-1, pooled.shape[1], -1))  # k(X)_i, [N, D, K]
    activation = torch.einsum("ndk,ndhw->nkhw", sampled, query)  # F
    return sampling.t[:, None, None] * activation + raw


def _fused(x: Tensor, entities: Tensor, sampling: SelfSampling | None) -> Tensor:
    """t k_i . (Q x + q) + w_i . x = (w_i + t Q^T k_i) . x + t k_i . q: one matrix product with K rows an image."""
    height, width = x.shape[2:]
    flat = x.flatten(2)  # [N, C, P]
    if sampling is None:
        return (entities @ flat).unflatten(2, (height, width))

    pixels = pixels_under(sampling.positions, height, width)
    at_samples = flat.gather(2, pixels[:, None].expand(-1, flat.shape[1], -1))  # [N, C, K*4]
    filters, offset = sampled_filters(at_samples, entities, *sampling[:5])
    return torch.baddbmm(offset[..., None], filters, flat).unflatten(2, (height, width))


def pixels_under(positions: Tensor, height: int, width: int) -> Tensor:
    """The 2x2 pixels under each position of the max-pooled map, [N, K]: int64 [N, K*4], row by row.

    At an odd border a pixel stands in for its missing neighbour, which leaves the maximum as it is.
    """
    row, column = positions // math.ceil(width / 2) * 2, positions % math.ceil(width / 2) * 2
    corners = [
        (row + i).clamp_max(height - 1) * width + (column + j).clamp_max(width - 1) for i in (0, 1) for j in (0, 1)
    ]
    return torch.stack(corners, 2).flatten(1)


def sampled_filters(
    at_samples: Tensor,
    entities: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    t: Tensor,
) -> tuple[Tensor, Tensor]:
    """Filters [N, K, C] and offsets [N, K] with filters . x + offset = t F + f(x), from x at the sampled pixels.

    `at_samples` is [N, C, K*4]: k is needed there only, and q, being linear, moves into the filters.
    """
    key = key_weight @ at_samples + key_bias[:, None]  # [N, D, K*4]
    sampled = key.unflatten(2, (-1, 4)).amax(3).transpose(1, 2)  # k(X)_i, [N, K, D]
    filters = entities + t[:, None] * (sampled @ query_weight)
    return filters, t * (sampled @ query_bias)


def draw_positions(
    x: Tensor, num_entities: int, *, shared: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Uniform positions in the 2x2 max-pooled map of `x`, [N, C, H, W]: int64 [N, num_entities].

    Without replacement where there are enough positions; `shared` draws once for the whole batch.
    """
    count = ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
    rows = 1 if shared else x.shape[0]
    # Not even None may be handed on: torch.compile takes a generator for maps of one size only.
    settings: dict[str, Any] = (
        {"device": x.device} if generator is None else {"device": generator.device, "generator": generator}
    )
    if count >= max(4096, 64 * num_entities):
        # A row of that many candidates repeats itself so rarely that the first distinct ones of twice as many are
        # enough for certain (fewer than n of 2n: below 1e-30), and nothing of the size of the map is sorted.
        drawn = torch.randint(count, (rows, 2 * num_entities), **settings)
        repeats = (drawn[:, :, None] == drawn[:, None, :]).tril(-1).any(2)
        order = repeats.to(torch.uint8).argsort(dim=1, stable=True)
        positions = drawn.gather(1, order[:, :num_entities])
    elif num_entities <= count:
        # The largest of independent uniform numbers stand at a uniformly drawn subset.
        positions = torch.rand(rows, count, **settings).topk(num_entities, dim=1).indices
    else:
        positions = torch.randint(count, (rows, num_entities), **settings)
    return positions.to(x.device).expand(x.shape[0], -1)


def layout_entropy(layout: Tensor) -> Tensor:
    """Mean entropy of the pixels' distributions over entities, divided by log K: 0 is a hard layout, 1 a uniform one.

    `layout` is [N, K, H, W]; a scalar is returned. Near 1, regional normalization is instance normalization.
    """
    entities = layout.shape[1]
    if entities == 1:
        return layout.new_zeros(())
    return torch.special.entr(layout).sum(1).mean() / math.log(entities)


def entity_usage(layout: Tensor) -> Tensor:
    """Share of the pixels that each entity wins (argmax), [K], summing to 1. `layout` is [N, K, H, W]."""
    winners = layout.argmax(1).flatten()
    return torch.bincount(winners, minlength=layout.shape[1]).to(layout.dtype) / max(winners.numel(), 1)
