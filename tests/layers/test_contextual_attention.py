"""ContextualAttention against the same rule written out in loops over patches."""

# N batch, C channels, P patches.

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from attnorm.layers.contextual_attention import ContextualAttention, score_bytes

attend = ContextualAttention()


def feature_map(*shape: int, seed: int = 1) -> Tensor:
    # Small, so that the softmax is not decided: logits are 90 times as large as a patch.
    return 0.01 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(num: int, height: int, width: int, *missing: tuple[int, int, int]) -> Tensor:
    """`missing` are (image, row, column)."""
    mask = torch.zeros(num, 1, height, width, dtype=torch.float64)
    for image, row, column in missing:
        mask[image, 0, row, column] = 1
    return mask


def pixel(x: Tensor, row: int, column: int) -> Tensor:
    """x[:, row, column], zeros beyond the border."""
    is_inside = 0 <= row < x.shape[1] and 0 <= column < x.shape[2]
    return x[:, row, column] if is_inside else torch.zeros(len(x), dtype=x.dtype)


def patch(x: Tensor, top: int, left: int, side: int) -> Tensor:
    return torch.cat([pixel(x, top + i, left + j) for i in range(side) for j in range(side)])


def fused(scores: dict[Any, Any], order: list[tuple[int, int]]) -> dict[Any, Any]:
    """Every score plus those of the next and the previous pair in `order`."""
    position = {place: number for number, place in enumerate(order)}
    out = {}
    for q, p in itertools.product(order, order):
        total = scores[q, p]
        for step in (-1, 1):
            i, j = position[q] + step, position[p] + step
            if 0 <= i < len(order) and 0 <= j < len(order):
                total = total + scores[order[i], order[j]]
        out[q, p] = total
    return out


def literal_image(x: Tensor, mask: Tensor) -> Tensor:
    """One image, [C, H, W], with its mask [H, W]."""
    height, width = x.shape[1] // 2, x.shape[2] // 2
    small = torch.stack([torch.stack([x[:, 2 * i, 2 * j] for j in range(width)], 1) for i in range(height)], 1)
    row_by_row = [(i, j) for i in range(height) for j in range(width)]
    column_by_column = [(i, j) for j in range(width) for i in range(height)]

    compared = {(i, j): patch(small, i - 1, j - 1, 3) for i, j in row_by_row}
    scores = {}
    for q, p in itertools.product(row_by_row, row_by_row):
        norm = compared[p].square().sum().sqrt()
        scores[q, p] = torch.dot(compared[q], compared[p]) / (norm if norm > 1e-4 else 1e-4)
    scores = fused(fused(scores, row_by_row), column_by_column)

    # The 3x3 patch of (i, j) at half resolution covers 6x6 pixels, and the 4x4 pixels that are pasted are among them.
    known = {
        (i, j): float(
            not any(
                mask[row, column] != 0
                for row in range(max(2 * i - 2, 0), min(2 * i + 4, 2 * height))
                for column in range(max(2 * j - 2, 0), min(2 * j + 4, 2 * width))
            )
        )
        for i, j in row_by_row
    }
    sources = {(i, j): patch(x, 2 * i - 1, 2 * j - 1, 4) for i, j in row_by_row}
    out = [[torch.zeros(len(x), dtype=x.dtype) for _ in range(2 * width)] for _ in range(2 * height)]
    for q in row_by_row:
        exponentials = {p: torch.exp(10 * scores[q, p] * known[p]) for p in row_by_row}
        total = sum(exponentials.values())
        pasted = sum(exponentials[p] / total * known[p] * sources[p] for p in row_by_row)
        for number, (i, j) in enumerate(itertools.product(range(4), range(4))):
            row, column = 2 * q[0] - 1 + i, 2 * q[1] - 1 + j
            if 0 <= row < 2 * height and 0 <= column < 2 * width:
                out[row][column] = out[row][column] + pasted[number * len(x) : (number + 1) * len(x)] / 4
    return torch.stack([torch.stack(line, 1) for line in out], 1)


def literal(x: Tensor, mask: Tensor) -> Tensor:
    """Patches here list pixels first, then channels: the order within a patch does not matter."""
    return torch.stack([literal_image(image, one[0]) for image, one in zip(x, mask, strict=True)])


CASES: dict[str, tuple[tuple[int, ...], list[tuple[int, int, int]], float]] = {
    "one-mask-each": ((3, 2, 6, 8), [(0, 5, 7), (1, 0, 0), (1, 1, 1), (1, 3, 2)], 1),
    "odd-pixel": ((1, 2, 8, 8), [(0, 5, 5)], 1),  # which reducing the mask by nearest neighbour would lose
    "one-patch": ((1, 2, 2, 2), [], 1),
    "one-row-of-patches": ((2, 1, 2, 8), [(0, 1, 7)], 1),
    "nothing-known-in-one": ((2, 2, 4, 4), [(0, 1, 2)], 1),
    "below-the-floor-of-the-norm": ((2, 3, 10, 4), [(1, 0, 3)], 1e-3),
}


@pytest.mark.parametrize(("shape", "missing", "scale"), CASES.values(), ids=CASES)
def test_equals_loops_over_patches_with_gradient(
    shape: tuple[int, int, int, int], missing: list[tuple[int, int, int]], scale: float
) -> None:
    mask = mask_of(shape[0], shape[2], shape[3], *missing)
    x, x_literal = ((scale * feature_map(*shape)).requires_grad_() for _ in range(2))
    out, expected = attend(x, mask), literal(x_literal, mask)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=scale * 1e-11)
    assert expected.abs().amax((1, 2, 3)).max() > scale * 1e-4
    projection = feature_map(*shape, seed=2)
    (gradient,) = torch.autograd.grad(out, x, projection)
    (expected_gradient,) = torch.autograd.grad(expected, x_literal, projection)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-11)


def test_a_constant_zero_map_has_a_finite_gradient() -> None:
    """As behind a ReLU that lets nothing through: the norm of a patch is 0 there."""
    x = torch.zeros(1, 2, 6, 6, requires_grad=True)
    attend(x, torch.zeros(1, 1, 6, 6)).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


def test_scores_keep_their_precision_under_autocast() -> None:
    x, mask = feature_map(1, 4, 8, 8).to(torch.bfloat16), mask_of(1, 8, 8, (0, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(x, mask)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend(x.float(), mask).to(torch.bfloat16))


def test_score_bytes_are_those_of_the_matrix() -> None:
    """For maps of a quarter of an image's sides: 4 MiB at 256 pixels, 64 at 512, 16 GiB at 2048."""
    assert [score_bytes(side // 4, side // 4) for side in (256, 512, 2048)] == [4 * 2**20, 64 * 2**20, 16 * 2**30]
    seen = []
    x = feature_map(1, 2, 6, 10).float().requires_grad_()
    out = attend(x, mask_of(1, 6, 10))
    stack = [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if node.name().startswith("Softmax"):
            seen.append(node._saved_result)
        stack += [parent for parent, _ in node.next_functions]
    (weights,) = seen
    assert weights.shape == (1, 15, 15) and weights.numel() * weights.element_size() == score_bytes(6, 10)


@pytest.mark.parametrize(
    ("shape", "mask_shape"),
    [
        ((1, 2, 5, 4), (1, 1, 5, 4)),
        ((1, 2, 4, 5), (1, 1, 4, 5)),
        ((2, 4, 4), (1, 4, 4)),
        ((2, 2, 4, 4), (1, 1, 4, 4)),
        ((1, 2, 4, 4), (1, 1, 2, 2)),
    ],
    ids=["odd-height", "odd-width", "3-D", "one-mask-for-two", "half-the-size"],
)
def test_wrong_input_is_told_what_was_expected(shape: tuple[int, ...], mask_shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"got torch\.\w+ \(.*\) and a mask \(.*\); expected a floating .* even H and W"
    ):
        attend(torch.zeros(shape), torch.zeros(mask_shape))
