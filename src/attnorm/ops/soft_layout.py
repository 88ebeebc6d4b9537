"""The soft semantic layout (paper, sections 3.1 and 3.2, Eq. 2-4): which entity each pixel belongs to, and how much."""

# N batch, C channels, K entities (the paper's n), P = H*W pixels.

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from attnorm.ops.dispatch import at_least_float32, is_transformed
from attnorm.system.randomness import draw_for_images


def soft_layout(x: Tensor, filters: Tensor, offset: Tensor) -> Tensor:
    """Eq. 4, the softmax over entities of `layout_logits`, with the same arguments and errors.

    Returns:
        [N, K, H, W], float32 (float64 for float64), in [0, 1], summing to 1 over K.
    """
    return torch.softmax(layout_logits(x, filters, offset), dim=1)


def layout_logits(x: Tensor, filters: Tensor, offset: Tensor) -> Tensor:
    """The logits of Eq. 4, tau and all: filters x + offset.

    Args:
        x: Feature map, [N, C, H, W], any floating dtype.
        filters, offset: [M, K, C] and [M, K], with M = N, or 1 for the whole batch. Those of Eq. 2 and 3 are
            tau * (W + t Q^T k) and tau * t k . b, where q(x) = Q x + b (layers/attentive_norm.py).

    Returns:
        [N, K, H, W], float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit.
    """
    if (
        not (x.ndim == 4 and x.is_floating_point() and filters.ndim == 3 and filters.shape[2] == x.shape[1])
        or filters.shape[0] not in (1, x.shape[0])
        or offset.shape != filters.shape[:2]
    ):
        raise ValueError(
            f"got x {x.dtype} {tuple(x.shape)}, filters {tuple(filters.shape)} and offset {tuple(offset.shape)}; "
            "expected a floating x [N, C, H, W], filters [M, K, C] and offset [M, K] with M = N or 1"
        )
    dtype = at_least_float32(x, filters)
    filters = filters.to(dtype).expand(x.shape[0], -1, -1)
    logits = torch.baddbmm(offset.to(dtype)[..., None], filters, x.to(dtype).flatten(2))  # [N, K, P]
    return logits.unflatten(2, x.shape[2:])


def sample(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """x itself, and its pixels under the sampled positions, [N, C, K, 4]: a maximum over four is that of a position.

    What else is computed of x is to be computed of the first: then the gradient of the second is added to the gradient
    of the first in place. Autograd would build a map of zeros of the size of x and add that.
    """
    pixels = _pixels_under(positions, *x.shape[2:])
    if is_transformed() or torch.compiler.is_compiling():
        return x, _gather(x, pixels)
    same, at_pixels = _Sample.apply(x, pixels)
    return same, at_pixels


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pixels)
        return x.view_as(x), _gather(x, pixels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, at_pixels: Tensor) -> tuple[Tensor, None]:
        (pixels,) = ctx.saved_tensors
        index = pixels[:, None].expand(-1, grad.shape[1], -1)
        # Of is_grads_batched, which hides from is_transformed in here, flatten has no rule and reshape has.
        flat, added = (part.reshape(*part.shape[:2], part.shape[2:].numel()) for part in (grad, at_pixels))
        # In place unless it is to be differentiated in its turn. Nobody else has this gradient: it is the sum of what
        # the layer's own operations on `same` gave, and `same` is theirs alone.
        is_ours = not (torch.is_grad_enabled() or is_transformed())
        total = flat.scatter_add_(2, index, added) if is_ours else flat.scatter_add(2, index, added)
        return total.view_as(grad), None


def _gather(x: Tensor, pixels: Tensor) -> Tensor:
    return x.flatten(2).gather(2, pixels[:, None].expand(-1, x.shape[1], -1)).unflatten(2, (-1, 4))


def _pixels_under(positions: Tensor, height: int, width: int) -> Tensor:
    """The 2x2 pixels under each position of the max-pooled map, [N, K]: int64 [N, K*4], row by row.

    At an odd border a pixel stands in for its missing neighbour, which leaves the maximum as it is.
    """
    row, column = positions // math.ceil(width / 2) * 2, positions % math.ceil(width / 2) * 2
    corners = [
        (row + i).clamp_max(height - 1) * width + (column + j).clamp_max(width - 1) for i in (0, 1) for j in (0, 1)
    ]
    return torch.stack(corners, 2).flatten(1)


def draw_positions(
    x: Tensor, num_entities: int, *, shared: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Uniform positions in the 2x2 max-pooled map of `x`, [N, C, H, W]: int64 [N, num_entities].

    Without replacement where there are enough positions; `shared` draws once for the whole batch.
    """
    count = ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
    rows = 1 if shared else x.shape[0]
    # A generator of one's own, and positions of the whole batch, are the same however the batch is divided.
    for_images = draw_for_images if generator is None and not shared else lambda rows, draw: draw(rows)
    # Not even None may be handed on: torch.compile takes a generator for maps of one size only.
    settings: dict[str, Any] = (
        {"device": x.device} if generator is None else {"device": generator.device, "generator": generator}
    )
    if count >= max(4096, 64 * num_entities):
        # A row of that many candidates repeats itself so rarely that the first distinct ones of twice as many are
        # enough for certain (fewer than n of 2n: below 1e-30), and nothing of the size of the map is sorted.
        drawn = for_images(rows, lambda rows: torch.randint(count, (rows, 2 * num_entities), **settings))
        repeats = (drawn[:, :, None] == drawn[:, None, :]).tril(-1).any(2)
        order = repeats.to(torch.uint8).argsort(dim=1, stable=True)
        positions = drawn.gather(1, order[:, :num_entities])
    elif num_entities <= count:
        # The largest of independent uniform numbers stand at a uniformly drawn subset.
        random = for_images(rows, lambda rows: torch.rand(rows, count, **settings))
        positions = random.topk(num_entities, dim=1).indices
    else:
        positions = for_images(rows, lambda rows: torch.randint(count, (rows, num_entities), **settings))
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


def effective_entities(usage: Iterable[float]) -> float:
    """exp of the entropy of the shares of pixels that the entities win: 1 where one wins all, K where all win alike."""
    return math.exp(-sum(share * math.log(share) for share in usage if share > 0))
