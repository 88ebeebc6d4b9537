"""The soft layout as a function, the draw of positions and of pixels, and what is reported of a layout."""

# N batch, C channels, K entities (the paper's n).

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnorm.ops import draw_positions, entity_usage, layout_entropy, sample, soft_layout


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("sets", [1, 2], ids=["shared-filters", "own-filters"])
def test_layout_is_the_softmax_of_a_1x1_convolution(sets: int) -> None:
    x, filters, offset = normal(2, 3, 5, 4), normal(sets, 6, 3, seed=1), normal(sets, 6, seed=2)
    logits = torch.cat([F.conv2d(x[n : n + 1], filters[n % sets, :, :, None, None], offset[n % sets]) for n in (0, 1)])
    torch.testing.assert_close(soft_layout(x, filters, offset), torch.softmax(logits, 1), rtol=1e-12, atol=1e-14)


def test_layout_is_a_distribution_at_any_scale() -> None:
    x, filters, offset = normal(1, 3, 3, 3).float(), normal(1, 4, 3, seed=1).float(), normal(1, 4, seed=2).float()
    for scale in (1e-3, 1.0, 1e9):
        layout = soft_layout(scale * x, filters, offset)
        assert layout.min() >= 0 and layout.max() <= 1
        torch.testing.assert_close(layout.sum(1), torch.ones(1, 3, 3), rtol=0, atol=1e-6)
    assert soft_layout(x[:0], filters, offset).shape == (0, 4, 3, 3)


def test_low_precision_features_get_float32_logits() -> None:
    x, filters, offset = (part.bfloat16() for part in (normal(2, 8, 4, 4), normal(1, 4, 8), normal(1, 4)))
    layout = soft_layout(x, filters, offset)
    assert layout.dtype == torch.float32
    exact = soft_layout(x.double(), filters.double(), offset.double())
    torch.testing.assert_close(layout.double(), exact, rtol=1e-4, atol=1e-6)  # bfloat16 logits would err by 1e-2


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(3, 4, 4)},
        {"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)},
        {"filters": torch.zeros(1, 5, 4)},
        {"filters": torch.zeros(5, 3)},
        {"filters": torch.zeros(3, 5, 3), "offset": torch.zeros(3, 5)},
        {"offset": torch.zeros(1, 4)},
    ],
    ids=["3-D", "integer", "channels", "entities-2-D", "images", "offset"],
)
def test_wrong_argument_is_told_what_was_expected(change: dict[str, Tensor]) -> None:
    arguments = {"x": torch.zeros(2, 3, 4, 4), "filters": torch.zeros(1, 5, 3), "offset": torch.zeros(1, 5), **change}
    got = "|".join(re.escape(f"{name} {tuple(part.shape)}") for name, part in change.items() if name != "x")
    with pytest.raises(ValueError, match=f"got x torch.*{got}.*; expected a floating x .*filters .M, K, C. and offset"):
        soft_layout(**arguments)


# The sampled pixels


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (3, 4)])
def test_the_maximum_over_sampled_pixels_is_the_max_pooled_map_at_a_position(height: int, width: int) -> None:
    """And its gradient, in the same pass as that of x itself, is autograd's."""
    memory_formats = (torch.contiguous_format, torch.channels_last)
    for x in (normal(2, 3, height, width).contiguous(memory_format=order).requires_grad_() for order in memory_formats):
        positions = draw_positions(x, 4, generator=seeded(3))
        pooled = F.max_pool2d(x, 2, ceil_mode=True).flatten(2)
        expected = pooled.gather(2, positions[:, None].expand(-1, 3, -1))
        same, at_pixels = sample(x, positions)
        assert torch.equal(same, x)
        assert torch.equal(at_pixels.amax(3), expected)

        def weighted(same: Tensor, maxima: Tensor) -> Tensor:
            return (same**2 * normal(*same.shape, seed=4)).sum() + (maxima**2 * normal(*maxima.shape, seed=5)).sum()

        (right,) = torch.autograd.grad(weighted(x, expected), x)
        (got,) = torch.autograd.grad(weighted(same, at_pixels.amax(3)), x)
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-14)
        assert torch.autograd.gradgradcheck(lambda x, at=positions: [part**3 for part in sample(x, at)], x)


# The draw


@pytest.mark.parametrize("entities", [2, 9], ids=["without-replacement", "with-replacement"])
def test_every_entity_draws_every_position_equally_often(entities: int) -> None:
    rows = 6000
    positions = draw_positions(torch.zeros(rows, 1, 4, 6), entities, generator=seeded())  # of 6
    assert positions.shape == (rows, entities) and positions.dtype == torch.int64
    for column in positions.T:
        counts = torch.bincount(column, minlength=6).double()
        assert len(counts) == 6
        assert ((counts - rows / 6) ** 2 / (rows / 6)).sum() < 20.5  # chi-squared, 5 degrees of freedom: 1 in 1,000
    pairs = torch.bincount(6 * positions[:, 0] + positions[:, 1], minlength=36).reshape(6, 6).double()
    if entities == 2:
        assert not pairs.diagonal().any()
        assert ((pairs - rows / 30) ** 2 / (rows / 30)).sum() - 6 * rows / 30 < 58.3  # 29 degrees of freedom
    else:
        assert pairs.diagonal().all()
    assert torch.equal(draw_positions(torch.zeros(2, 1, 1, 1), 3), torch.zeros(2, 3, dtype=torch.int64))


def test_positions_on_large_maps_are_distinct_and_uniform() -> None:
    """Drawn without sorting the map there (row 30): 4,096 positions, 16 of them for each of 2,000 images."""
    x, generator = torch.empty(2000, 1, 128, 128), seeded()
    drawn = draw_positions(x, 16, generator=generator)
    assert drawn.shape == (2000, 16) and drawn.min() >= 0 and drawn.max() < 4096
    assert all(len(set(row)) == 16 for row in drawn.tolist()) and len(drawn.unique(dim=0)) == 2000
    counts = torch.bincount(drawn.flatten() // 64, minlength=64).double()  # 500 expected in each of 64 strips
    assert ((counts - 500) ** 2 / 500).sum() < 110  # chi-squared with 63 degrees of freedom: 1 in 4,000
    for place in (0, 15):  # a position's place among the 16 says nothing about where it is
        assert abs(drawn[:, place].double().mean() - 2047.5) < 4 * 1182.4 / 2000**0.5
    assert not torch.equal(drawn, draw_positions(x, 16, generator=generator))
    assert torch.equal(drawn, draw_positions(x, 16, generator=seeded()))
    assert len(draw_positions(x, 16, shared=True).unique(dim=0)) == 1


# Entropy and usage


def test_entropy_of_known_layouts() -> None:
    quarter = torch.tensor([0.25, 0.75]).reshape(1, 2, 1, 1)
    bits = (0.25 * math.log(4) + 0.75 * math.log(4 / 3)) / math.log(2)
    assert layout_entropy(quarter).item() == pytest.approx(bits, abs=1e-6)
    two_of_four = torch.tensor([0.5, 0.5, 0.0, 0.0]).reshape(1, 4, 1, 1)
    assert layout_entropy(two_of_four).item() == pytest.approx(0.5, abs=1e-6)
    mean_of_both = torch.cat([quarter, torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1)], 3)
    assert layout_entropy(mean_of_both).item() == pytest.approx(bits / 2, abs=1e-6)
    assert layout_entropy(torch.full((2, 4, 3, 3), 0.25)).item() == pytest.approx(1, abs=1e-6)
    assert layout_entropy(torch.ones(2, 1, 3, 3)).item() == 0  # one entity: no choice to be uncertain of


def test_usage_is_the_share_of_pixels_won() -> None:
    layout = torch.tensor([[0.5, 0.1, 0.1, 0.6], [0.3, 0.8, 0.2, 0.3], [0.2, 0.1, 0.7, 0.1]]).reshape(1, 3, 2, 2)
    assert entity_usage(layout).tolist() == [0.5, 0.25, 0.25]
    never_wins = torch.cat([layout, torch.zeros(1, 1, 2, 2)], 1)
    assert entity_usage(never_wins).tolist() == [0.5, 0.25, 0.25, 0]
    assert entity_usage(layout[:0]).tolist() == [0, 0, 0]
