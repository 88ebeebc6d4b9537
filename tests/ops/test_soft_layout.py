"""The soft layout as a function: fused against reference, the draw of positions, and what is reported of a layout."""

# N batch, C channels, D channels of key and query, K entities (the paper's n).

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnorm.ops import SelfSampling, draw_positions, entity_usage, layout_entropy, soft_layout

IMPLS = ("reference", "fused")

# (rtol, atol). Three products in other orders: some hundred roundings, of 1e-16 and of 6e-8.
TOLERANCES = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-4, 1e-5)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_inputs(
    num_images: int, channels: int, entities: int, height: int, width: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, SelfSampling]:
    generator = seeded()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(num_images, channels, height, width)
    return (
        x,
        normal(entities, channels),
        SelfSampling(
            key_weight=normal(2, channels),
            key_bias=normal(2),
            query_weight=normal(2, channels),
            query_bias=normal(2),
            t=normal(entities),
            positions=draw_positions(x, entities, generator=generator),
        ),
    )


def results(x: Tensor, entities: Tensor, sampling: SelfSampling | None, **options: Any) -> list[Tensor]:
    """The layout and the gradient of a fixed random projection of it with respect to every argument."""
    leaves = [x.detach().requires_grad_(), entities.detach().requires_grad_()]
    if sampling is not None:
        leaves += [part.detach().requires_grad_() for part in sampling[:-1]]
        sampling = SelfSampling(*leaves[2:], sampling.positions)
    layout = soft_layout(*leaves[:2], sampling, **options)
    projection = torch.randn(layout.shape, generator=seeded(1), dtype=torch.float64).to(layout.dtype)
    return [layout.detach(), *torch.autograd.grad(layout, leaves, projection)]


SHAPES = {
    "one-pixel": (2, 3, 4, 1, 1),
    "one-row": (2, 3, 2, 1, 5),  # no pooling window is complete
    "odd": (2, 3, 4, 5, 7),
    "more-entities-than-positions": (1, 3, 9, 4, 4),
    "even": (3, 8, 5, 6, 4),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in SHAPES.items()])
@pytest.mark.parametrize("samples", [True, False], ids=["sampling", "no-sampling"])
def test_fused_equals_reference(shape: tuple[int, ...], samples: bool, dtype: torch.dtype) -> None:
    x, entities, sampling = make_inputs(*shape, dtype=dtype)
    given = sampling if samples else None
    expected, got = (results(x, entities, given, temperature=0.4, impl=impl) for impl in IMPLS)
    rtol, atol = TOLERANCES[dtype]
    for index, (value, expected_value) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(value, expected_value, rtol=rtol, atol=atol, msg=lambda t, i=index: f"{i}: {t}")


@pytest.mark.parametrize("impl", IMPLS)
def test_sampled_position_counts_the_pooled_map_row_by_row(impl: str) -> None:
    """With W = 0, q(x) = 1 and k(x) = x, an entity's logit is t times the maximum of x in its 2x2 window."""
    x = torch.tensor([[1.0, 5.0, 2.0], [3.0, 4.0, 9.0], [7.0, 6.0, 8.0]], dtype=torch.float64)[None, None]
    one = torch.ones(1, 1, dtype=torch.float64)
    pooled = [5.0, 9.0, 7.0, 8.0]
    for position, maximum in enumerate(pooled):
        positions = torch.tensor([[position, 0]])
        t = torch.tensor([0.3, 0.0], dtype=torch.float64)
        sampling = SelfSampling(one, torch.zeros(1).double(), 0 * one, torch.ones(1).double(), t, positions)
        layout = soft_layout(x, torch.zeros(2, 1).double(), sampling, temperature=1.0, impl=impl)
        expected = torch.full((3, 3), 1 / (1 + math.exp(-0.3 * maximum)), dtype=torch.float64)
        torch.testing.assert_close(layout[0, 0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_known_logits_give_known_probabilities(impl: str) -> None:
    x = torch.tensor([0.0, math.log(3)], dtype=torch.float64).reshape(1, 1, 1, 2)
    entities = torch.tensor([[2.0], [0.0]], dtype=torch.float64)
    layout = soft_layout(x, entities, temperature=0.5, impl=impl)  # logits (0, 0) and (log 3, 0)
    torch.testing.assert_close(layout[0, :, 0], torch.tensor([[0.5, 0.75], [0.5, 0.25]], dtype=torch.float64))


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=25, deadline=None)
@given(temperature=st.floats(1e-3, 1e3), log_scale=st.floats(-3, 6))
def test_layout_is_a_distribution_at_any_scale(impl: str, temperature: float, log_scale: float) -> None:
    x, entities, sampling = make_inputs(1, 3, 4, 3, 3, dtype=torch.float32)
    layout = soft_layout(10**log_scale * x, entities, sampling, temperature=temperature, impl=impl)
    assert layout.min() >= 0 and layout.max() <= 1
    torch.testing.assert_close(layout.sum(1), torch.ones(1, 3, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_low_precision_features_get_float32_logits(impl: str) -> None:
    x, entities, sampling = make_inputs(2, 8, 4, 4, 4, dtype=torch.bfloat16)
    layout = soft_layout(x, entities, sampling, impl=impl)
    wide = SelfSampling(*(part.double() for part in sampling[:-1]), sampling.positions)
    exact = soft_layout(x.double(), entities.double(), wide, impl="reference")
    assert layout.dtype == torch.float32
    torch.testing.assert_close(layout.double(), exact, rtol=1e-4, atol=1e-6)  # bfloat16 logits would err by 1e-2


@pytest.mark.parametrize("impl", IMPLS)
def test_batch_of_zero_images_gives_zero_layouts(impl: str) -> None:
    x, entities, sampling = make_inputs(0, 3, 4, 4, 4)
    assert sampling.positions.shape == (0, 4)
    layout, *gradients = results(x, entities, sampling, impl=impl)
    assert layout.shape == (0, 4, 4, 4)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 4)}, r"got x torch.float32 \(3, 4, 4\).*expected a floating x \[N, C, H, W\]"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, r"got x torch.int64.*expected a floating x"),
        ({"entities": torch.zeros(5, 4)}, r"entities \(5, 4\); expected .* entities \[K, C\]"),
        ({"entities": torch.zeros(5, 3, 1, 1)}, r"entities \(5, 3, 1, 1\); expected .* entities \[K, C\]"),
        ({"impl": "fast"}, r"soft_layout: impl is 'fast'; expected 'auto' or one of fused, reference"),
        (
            {"sampling": SelfSampling(*[torch.zeros(1)] * 5, torch.zeros(2, 4, dtype=torch.int64))},
            r"sampling.positions has shape \(2, 4\); expected \[N, K\] = \[2, 5\]",
        ),
    ],
    ids=["3-D", "integer", "channels", "entities-4-D", "impl", "positions"],
)
def test_wrong_argument_is_told_what_was_expected(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 3, 4, 4), "entities": torch.zeros(5, 3), **change}
    with pytest.raises(ValueError, match=message):
        soft_layout(**arguments)


# The draw


def test_positions_are_distinct_where_there_are_enough() -> None:
    x = torch.zeros(500, 1, 5, 4)  # 3 * 2 positions
    positions = draw_positions(x, 6, generator=seeded())
    assert positions.dtype == torch.int64
    assert torch.equal(positions.sort(1).values, torch.arange(6).expand(500, -1))
    assert positions.unique(dim=0).shape[0] > 100  # in any order: 720 of them


@pytest.mark.parametrize("entities", [2, 9], ids=["without-replacement", "with-replacement"])
def test_every_entity_draws_every_position_equally_often(entities: int) -> None:
    rows = 6000
    positions = draw_positions(torch.zeros(rows, 1, 4, 6), entities, generator=seeded())
    assert positions.shape == (rows, entities)
    for i in range(entities):
        counts = torch.bincount(positions[:, i], minlength=6).double()
        assert counts.shape == (6,)
        chi_square = ((counts - rows / 6) ** 2 / (rows / 6)).sum()
        assert chi_square < 20.5  # five degrees of freedom: one draw in a thousand exceeds it


def test_pairs_are_drawn_equally_often() -> None:
    rows = 6000
    positions = draw_positions(torch.zeros(rows, 1, 4, 4), 2, generator=seeded())
    counts = torch.bincount(positions[:, 0] * 4 + positions[:, 1], minlength=16).reshape(4, 4).double()
    assert not counts.diagonal().any()
    chi_square = ((counts - rows / 12) ** 2 / (rows / 12)).sum() - 4 * rows / 12
    assert chi_square < 31.3  # eleven degrees of freedom, one in a thousand


def test_fewer_positions_than_entities_are_drawn_again() -> None:
    positions = draw_positions(torch.zeros(50, 1, 3, 3), 5, generator=seeded())
    assert positions.min() == 0 and positions.max() == 3
    assert all(len(set(row)) < 5 for row in positions.tolist())
    assert torch.equal(draw_positions(torch.zeros(2, 1, 1, 1), 3), torch.zeros(2, 3, dtype=torch.int64))


def test_images_draw_their_own_positions_unless_shared() -> None:
    x = torch.zeros(8, 1, 16, 16)
    own, shared = (draw_positions(x, 4, shared=shared, generator=seeded()) for shared in (False, True))
    assert len(own.unique(dim=0)) == 8
    assert shared.shape == (8, 4)
    assert len(shared.unique(dim=0)) == 1


def test_same_generator_state_draws_the_same_positions() -> None:
    x = torch.zeros(2, 1, 8, 8)
    generator = seeded()
    first, second = (draw_positions(x, 4, generator=generator) for _ in range(2))
    assert torch.equal(first, draw_positions(x, 4, generator=seeded()))
    assert not torch.equal(first, second)


# Entropy and usage


def test_entropy_is_0_for_a_hard_layout_and_1_for_a_uniform_one() -> None:
    hard = torch.eye(4)[torch.randint(4, (2, 3, 3), generator=seeded())].permute(0, 3, 1, 2)
    assert layout_entropy(hard).item() == 0
    assert layout_entropy(torch.full((2, 4, 3, 3), 0.25)).item() == pytest.approx(1, abs=1e-6)
    assert layout_entropy(torch.ones(2, 1, 3, 3)).item() == 0  # one entity: no choice to be uncertain of


def test_entropy_of_known_layouts() -> None:
    quarter = torch.tensor([0.25, 0.75]).reshape(1, 2, 1, 1)
    bits = (0.25 * math.log(4) + 0.75 * math.log(4 / 3)) / math.log(2)
    assert layout_entropy(quarter).item() == pytest.approx(bits, abs=1e-6)
    two_of_four = torch.tensor([0.5, 0.5, 0.0, 0.0]).reshape(1, 4, 1, 1)
    assert layout_entropy(two_of_four).item() == pytest.approx(0.5, abs=1e-6)
    mean_of_both = torch.cat([quarter, torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1)], 3)
    assert layout_entropy(mean_of_both).item() == pytest.approx(bits / 2, abs=1e-6)


def test_usage_is_the_share_of_pixels_won() -> None:
    layout = torch.tensor([[0.5, 0.1, 0.1, 0.6], [0.3, 0.8, 0.2, 0.3], [0.2, 0.1, 0.7, 0.1]]).reshape(1, 3, 2, 2)
    assert entity_usage(layout).tolist() == [0.5, 0.25, 0.25]
    never_wins = torch.cat([layout, torch.zeros(1, 1, 2, 2)], 1)
    assert entity_usage(never_wins).tolist() == [0.5, 0.25, 0.25, 0]
    assert entity_usage(layout[:0]).tolist() == [0, 0, 0]


def test_positions_on_large_maps_are_distinct_and_uniform() -> None:
    """Drawn without sorting the map there (row 30): 4,096 positions, 16 of them for each of 2,000 images."""
    drawn = draw_positions(torch.empty(2000, 1, 128, 128), 16, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (2000, 16) and drawn.min() >= 0 and drawn.max() < 4096
    assert all(len(set(row)) == 16 for row in drawn.tolist())
    counts = torch.bincount(drawn.flatten() // 64, minlength=64).double()  # 500 expected in each of 64 strips
    assert ((counts - 500) ** 2 / 500).sum() < 110  # chi-squared with 63 degrees of freedom: 1 in 4,000
    for place in (0, 15):  # a position's place among the 16 says nothing about where it is
        assert abs(drawn[:, place].double().mean() - 2047.5) < 4 * 1182.4 / 2000**0.5
    again = draw_positions(torch.empty(2000, 1, 128, 128), 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
