"""Regional normalization as a function: regions that can be checked by hand, and fused against reference."""

# N batch, C channels, K entities (the paper's n).

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attnorm.ops import regional_norm

IMPLS = ("reference", "fused")


class Inputs(NamedTuple):
    x: Tensor
    layout: Tensor
    weight: Tensor
    bias: Tensor


def make_inputs(
    num_images: int, channels: int, entities: int, height: int, width: int, *, dtype: torch.dtype = torch.float64
) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    logits = normal(num_images, entities, height, width)
    return Inputs(
        normal(num_images, channels, height, width),
        (2 * logits.double()).softmax(1).to(torch.float64 if dtype == torch.float64 else torch.float32),
        1 + normal(entities, channels),
        normal(entities, channels),
    )


def results(inputs: Inputs, **options: Any) -> dict[str, Tensor]:
    """Output and all gradients of a fixed random projection of it."""
    leaves = [part.detach().requires_grad_() for part in inputs]
    out = regional_norm(*leaves, **options)
    projection = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    gradients = torch.autograd.grad(out, leaves, projection)
    return {"out": out.detach(), **dict(zip(Inputs._fields, gradients, strict=True))}


@pytest.mark.parametrize(
    ("shape", "moments", "dtype", "rtol", "atol"),
    [
        # Other orders of summation: some thousand roundings of 1e-16.
        ((3, 5, 7, 11, 13), "batch", torch.float64, 1e-9, 1e-10),
        ((2, 3, 1, 5, 5), "instance", torch.float64, 1e-9, 1e-10),
        # The same of 6e-8, and gradients that add a few hundred numbers of size 1.
        ((1, 24, 16, 63, 17), "instance", torch.float32, 1e-4, 1e-4),
        ((1, 3, 16, 2, 3), "batch", torch.float32, 1e-4, 1e-4),
        # Variance 0: the gradient of x is a difference of equal numbers of size 1 / sqrt(eps) = 300.
        ((2, 3, 4, 1, 1), "instance", torch.float32, 1e-4, 3e-2),
        # Both round the output and each gradient to 8 bits, once, from numbers that differ by 1e-6: one step at most.
        ((2, 32, 16, 8, 8), "instance", torch.bfloat16, 2**-7, 1e-3),
    ],
)
def test_fused_equals_reference(shape: Any, moments: str, dtype: torch.dtype, rtol: float, atol: float) -> None:
    inputs = make_inputs(*shape, dtype=dtype)
    expected = results(inputs, moments=moments, impl="reference")
    got = results(inputs, moments=moments, impl="fused")
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


# Regions that can be checked by hand


@pytest.mark.parametrize("impl", IMPLS)
def test_hard_regions_are_normalized_by_the_points_of_one_colour(impl: str) -> None:
    """Figure 3: mean and variance of the pixels of one colour, nothing else."""
    inputs = make_inputs(1, 3, 3, 6, 5)
    colour = torch.randint(3, (6, 5), generator=torch.Generator().manual_seed(3))
    layout = torch.stack([colour == i for i in range(3)])[None].double()
    expected = torch.zeros_like(inputs.x[0])
    for i in range(3):
        points = inputs.x[0][:, colour == i]  # [C, points of one colour]
        assert points.shape[1] > 2
        normalized = (points - points.mean(1, keepdim=True)) / torch.sqrt(
            points.var(1, correction=0, keepdim=True) + 1e-5
        )
        expected[:, colour == i] = normalized * inputs.weight[i][:, None] + inputs.bias[i][:, None]
    out = regional_norm(inputs.x, layout, inputs.weight, inputs.bias, impl=impl)
    torch.testing.assert_close(out[0], expected, rtol=1e-10, atol=1e-10)


# Invariances


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_region_counts_for_nothing(impl: str) -> None:
    inputs = make_inputs(2, 3, 3, 4, 4)
    padded = inputs._replace(
        layout=torch.cat([inputs.layout, torch.zeros_like(inputs.layout[:, :1])], 1),
        weight=torch.cat([inputs.weight, torch.ones(1, 3)]),
        bias=torch.cat([inputs.bias, torch.ones(1, 3)]),
    )
    got, expected = results(padded, impl=impl), results(inputs, impl=impl)
    torch.testing.assert_close(got["out"], expected["out"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got["x"], expected["x"], rtol=1e-10, atol=1e-10)
    assert all(value.isfinite().all() for value in got.values())
    assert not got["weight"][3].any() and not got["bias"][3].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_region_is_normalized_to_zero_with_finite_gradients(impl: str) -> None:
    """Row 10: with sigma + eps the gradient here would be NaN."""
    inputs = make_inputs(1, 3, 2, 4, 4)
    inputs = inputs._replace(x=torch.full_like(inputs.x, 2.5), bias=torch.zeros_like(inputs.bias))
    got = results(inputs, impl=impl)
    torch.testing.assert_close(got["out"], torch.zeros_like(got["out"]), rtol=0, atol=1e-10)
    assert all(value.isfinite().all() for value in got.values())


@pytest.mark.parametrize("impl", IMPLS)
def test_running_moments_go_the_way_of_their_momentum_but_for_no_images(impl: str) -> None:
    """By a tenth, and in evaluation: tests/layers/test_attentive_norm.py."""
    moments = torch.full((1, 2), 2.0), torch.full((1, 2), 3.0)
    options: dict[str, Any] = {"moments": "batch", "running_mean": moments[0], "running_var": moments[1], "impl": impl}
    x = torch.zeros(0, 2, 4, 5, requires_grad=True)
    out = regional_norm(x, torch.zeros(0, 1, 4, 5), **options)
    out.sum().backward()
    assert out.shape == x.shape and [moment.unique().tolist() for moment in moments] == [[2.0], [3.0]]
    x = make_inputs(3, 2, 1, 4, 5).x + 7
    regional_norm(x, torch.ones(3, 1, 4, 5), **options, momentum=0.75)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    torch.testing.assert_close(moments[0][0].double(), 0.25 * 2 + 0.75 * mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments[1][0].double(), 0.25 * 3 + 0.75 * var, rtol=1e-6, atol=1e-6)


# Precision and errors


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_of_low_precision_features_are_taken_in_float32(impl: str) -> None:
    """In 8 bits 0.01 + 100 is 100, so a sum over 1,024 pixels would be far off: the exact result, rounded once."""
    inputs = make_inputs(1, 2, 2, 32, 32, dtype=torch.float32)
    x = inputs.x.bfloat16()
    out = regional_norm(x, inputs.layout, impl=impl)
    exact = regional_norm(x.double(), inputs.layout.double(), impl="reference")
    # One rounding; atol for float32's own sums near 0.
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8 * 1.01, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x is torch.float32 of shape \(2, 3, 4\); expected a floating \[N, C, H, W\]"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, r"x is torch.int32 .*expected a floating"),
        ({"layout": torch.zeros(2, 5, 4, 3)}, r"layout has shape \(2, 5, 4, 3\); expected \[2, K, 4, 4\]"),
        ({"layout": torch.zeros(1, 5, 4, 4)}, r"layout has shape \(1, 5, 4, 4\); expected \[2, K, 4, 4\]"),
        ({"layout": torch.zeros(5, 4, 4)}, r"layout has shape \(5, 4, 4\); expected \[2, K, 4, 4\]"),
        ({"weight": torch.zeros(4, 3)}, r"weight has shape \(4, 3\); expected \[K, C\] = \[5, 3\]"),
        ({"bias": torch.zeros(3, 5)}, r"bias has shape \(3, 5\); expected \[K, C\] = \[5, 3\]"),
        ({"impl": "fast"}, r"impl is 'fast'; expected 'auto' or one of fused, reference"),
        ({"impl": "fused", "statistics": "masked"}, r"'fused' cannot run: statistics='masked' has the reference form"),
        ({"moments": "batch", "training": False}, r"need running_mean and running_var, \[K, C\] each; got None"),
    ],
)
def test_wrong_argument_is_told_what_was_expected(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 3, 4, 4), "layout": torch.zeros(2, 5, 4, 4), **change}
    with pytest.raises(ValueError, match=message):
        regional_norm(**arguments)
