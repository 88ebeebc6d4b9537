"""What any model must beat: the mean colour, and Telea's inpainting of 2004, which know nothing of photographs."""

# N images, H height and W width.

from __future__ import annotations

import heapq
import math

import numpy as np
import torch
from torch import Tensor

TELEA_RADIUS = 5


def mean_fill(images: Tensor, masks: Tensor) -> Tensor:
    """Each image's mean colour over its known pixels, in its hole. uint8 [N, 3, H, W] and bool [N, 1, H, W]."""
    known = (~masks).double()
    means = (images * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    return torch.where(masks, means.round().to(torch.uint8), images)


def telea_fill(images: Tensor, masks: Tensor) -> Tensor:
    """`telea` of every image; those that share a mask share the work. uint8 [N, 3, H, W] and bool [N, 1, H, W]."""
    filled = images.clone()
    groups: dict[bytes, list[int]] = {}
    for number, mask in enumerate(masks):
        groups.setdefault(mask.numpy().tobytes(), []).append(number)
    for numbers in groups.values():
        planes = images[numbers].flatten(0, 1).numpy()
        values = telea(planes, masks[numbers[0], 0].numpy())
        filled[numbers] = torch.from_numpy(values).unflatten(0, (len(numbers), 3))
    return filled


def telea(planes: np.ndarray, hole: np.ndarray, radius: int = TELEA_RADIUS) -> np.ndarray:
    """An Image Inpainting Technique Based on the Fast Marching Method (Telea, 2004).

    From the border inwards, in the order in which a front arrives at them, missing pixels p become the weighted mean of
    the pixels q within `radius` that are known by then. A q weighs more along the front's normal, near p, and on the
    same level line of the arrival time T:

        w = |(p - q) . grad T(p)| / |p - q|  *  1 / |p - q|^2  *  1 / (1 + |T(p) - T(q)|)

    The paper adds the extrapolation grad I(q) . (p - q) to each I(q). In holes as large as ours its errors add up,
    until the result is worse than the mean colour. OpenCV adds no more of it than its direction; here, where J are the
    two components of its weighted mean, (J_y + J_x) / max(|J|, 1) is added: all, up to a length of one grey level.

    Args:
        planes: uint8 [C, H, W]; each channel for itself.
        hole: bool [H, W], True = missing; some pixel is known.
    """
    pad = radius + 1  # so that no window leaves the arrays; what is beyond the image is never known
    times, order = _arrival_times(hole, radius)
    times = np.pad(times, pad, constant_values=np.inf)
    wide = times.shape[1]
    known = np.pad(~hole, pad).ravel()
    image = np.pad(planes.astype(np.float64), ((0, 0), (pad, pad), (pad, pad))).reshape(len(planes), -1)

    downs, rights = np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, -1)
    inside = (downs**2 + rights**2 <= radius**2) & (downs**2 + rights**2 > 0)
    downs, rights = downs[inside], rights[inside]
    offsets, lengths = downs * wide + rights, np.hypot(downs, rights)
    times = times.ravel()
    for row, column in order:
        p = (row + pad) * wide + column + pad
        near = known[p + offsets]
        q, down, right, length = p + offsets[near], downs[near], rights[near], lengths[near]
        normal = -(down * _slope(times, p, wide) + right * _slope(times, p, 1)) / length
        weights = np.maximum(np.abs(normal), 1e-6) / length**2 / (1 + np.abs(times[p] - times[q]))
        weights /= weights.sum()
        step_down = -(_gradients(image, known, q, wide) * down) @ weights
        step_right = -(_gradients(image, known, q, 1) * right) @ weights
        limited = (step_down + step_right) / np.maximum(np.hypot(step_down, step_right), 1)
        image[:, p] = image[:, q] @ weights + limited
        image[:, p] = image[:, p].clip(0, 255)
        known[p] = True
    filled = image.reshape(len(planes), -1, wide)[:, pad:-pad, pad:-pad]
    return np.rint(filled).astype(np.uint8)


def _slope(times: np.ndarray, p: int, step: int) -> float:
    """The derivative of the arrival time at p along one axis; from one side where there is no time on the other."""
    after, before = times[p + step], times[p - step]
    if math.isinf(after):
        return 0.0 if math.isinf(before) else float(times[p] - before)
    return float(after - times[p] if math.isinf(before) else (after - before) / 2)


def _gradients(image: np.ndarray, known: np.ndarray, q: np.ndarray, step: int) -> np.ndarray:
    """Derivatives of the channels at the pixels q along one axis, from the known neighbours; 0 without one."""
    after, before = known[q + step], known[q - step]
    here = image[:, q]
    sums = (image[:, q + step] - here) * after + (here - image[:, q - step]) * before
    return sums / np.maximum(after.astype(np.int64) + before, 1)


def _arrival_times(hole: np.ndarray, radius: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Distances from the hole's border, negative outside it, up to `radius` there; and the hole's pixels in order."""
    padded = np.pad(hole, 1)
    touches = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    border = touches & ~hole
    inner, order = _march(border, hole, math.inf)
    outer, _ = _march(border, ~hole & ~border, radius + 1)
    return np.where(hole, inner, -outer), order


def _march(front: np.ndarray, region: np.ndarray, limit: float) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Fast marching: the first-order solution of |grad T| = 1 in `region`, with T = 0 on `front`.

    Returns the times, infinite where nothing arrives before `limit`, and the region's pixels as it arrives at them.
    """
    height, width = front.shape
    times = np.full((height + 2, width + 2), np.inf)  # a frame that nothing enters spares the checks at the border
    free = np.pad(region, 1)
    times[1:-1, 1:-1][front] = 0
    settled = np.pad(front, 1)
    heap = [(0.0, row + 1, column + 1) for row, column in np.argwhere(front).tolist()]
    order = []
    while heap:
        _, row, column = heapq.heappop(heap)
        if free[row, column]:
            if settled[row, column]:
                continue  # it was reached earlier, from another side
            settled[row, column] = True
            order.append((row - 1, column - 1))
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if not free[r, c] or settled[r, c]:
                continue
            upright = min(times[i, c] if settled[i, c] else math.inf for i in (r - 1, r + 1))
            level = min(times[r, j] if settled[r, j] else math.inf for j in (c - 1, c + 1))
            gap = abs(upright - level)
            new = (
                (upright + level + math.sqrt(2 - gap**2)) / 2  # from a corner
                if gap < 1
                else 1 + min(upright, level)
            )
            if new < times[r, c] and new <= limit:
                times[r, c] = new
                heapq.heappush(heap, (float(new), r, c))
    return times[1:-1, 1:-1], order
