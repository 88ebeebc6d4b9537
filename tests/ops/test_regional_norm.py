"""Regional normalization as a function: regions that can be checked by hand, and fused against reference."""

# N batch, C channels, K entities (the paper's n).

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attnorm.ops import regional_norm
from attnorm.ops.regional_norm import _reference


class Tolerance(NamedTuple):
    rtol: float
    atol: float


TOLERANCES = {
    # Other orders of summation: some thousand roundings of 1e-16.
    "float64": Tolerance(rtol=1e-9, atol=1e-10),
    # The same of 6e-8, and gradients that add a few hundred numbers of size 1.
    "float32": Tolerance(rtol=1e-4, atol=1e-4),
    # Both round the output and each gradient to 8 bits, once, from numbers that differ by 1e-6: one step at most.
    "bfloat16": Tolerance(rtol=2**-7, atol=1e-3),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

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


SHAPES = {
    "one-pixel": (2, 3, 4, 1, 1),  # variance 0
    "one-entity": (2, 3, 1, 5, 5),  # instance normalization
    "one-channel": (1, 1, 4, 5, 5),
    "more-entities-than-pixels": (1, 3, 16, 2, 3),
    "primes": (3, 5, 7, 11, 13),
    "below-a-power-of-two": (1, 24, 16, 63, 17),  # what a block of 64 does not divide
    "a-power-of-two": (2, 32, 16, 8, 8),
}


@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=dtype) for dtype in DTYPES])
@pytest.mark.parametrize("moments", ["instance", "batch"])
@pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in SHAPES.items()])
def test_fused_equals_reference(shape: tuple[int, ...], moments: str, dtype: str) -> None:
    inputs = make_inputs(*shape, dtype=DTYPES[dtype])
    expected = results(inputs, moments=moments, impl="reference")
    got = results(inputs, moments=moments, impl="fused")
    # The gradient of x at a variance of 0 is a difference of equal numbers of size 1 / sqrt(eps) = 300.
    scale = 300 if min(shape[3:]) == 1 else 1
    rtol, atol = TOLERANCES[dtype]
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol * scale, msg=lambda t, n=name: f"{n}: {t}")


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


@pytest.mark.parametrize(
    ("statistics", "mean", "deviation"),
    [
        ("weighted", (0.9, 1.1), (1.9, 2.1)),
        ("masked", (0.05, 0.075), (0.15, 0.23)),
        ("released", (0, 0.002), (0.7, 0.9)),
    ],
)
def test_three_readings_of_the_moments_of_a_region(
    statistics: Any, mean: tuple[float, float], deviation: tuple[float, float]
) -> None:
    """X ~ N(1, 2^2) in 16 random soft regions: only weighted moments are those of X (docs/paper.md, row 1)."""
    generator = torch.Generator().manual_seed(0)
    x = 1 + 2 * torch.randn(4, 8, 32, 32, generator=generator, dtype=torch.float64)
    layout = torch.randn(4, 16, 32, 32, generator=generator, dtype=torch.float64).softmax(1)
    _, (means, variances) = _reference(x, layout, None, None, statistics, "instance", None, 1e-5)
    assert mean[0] < means.mean() < mean[1]
    assert deviation[0] < variances.sqrt().mean() < deviation[1]


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


# Batch moments


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_moments_of_one_hard_region(impl: str, momentum: float) -> None:
    x = make_inputs(3, 2, 1, 4, 5).x + 7
    running_mean, running_var = torch.full((1, 2), 2.0), torch.full((1, 2), 3.0)
    options: dict[str, Any] = {"moments": "batch", "running_mean": running_mean, "running_var": running_var}
    regional_norm(x, torch.ones(3, 1, 4, 5), **options, momentum=momentum, impl=impl)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(running_mean[0].double(), (1 - momentum) * 2 + momentum * mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(running_var[0].double(), (1 - momentum) * 3 + momentum * var, rtol=1e-6, atol=1e-6)
    assert running_mean.dtype == torch.float32

    evaluated = regional_norm(x, torch.ones(3, 1, 4, 5), **options, training=False, impl=impl)
    mean, var = (moment.double()[:, :, None, None] for moment in (running_mean, running_var))
    torch.testing.assert_close(evaluated, (x - mean) / (var + 1e-5).sqrt(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_batch_of_zero_images_leaves_running_moments_alone(impl: str) -> None:
    running_mean, running_var = torch.full((3, 2), 2.0), torch.full((3, 2), 3.0)
    x = torch.zeros(0, 2, 4, 4, requires_grad=True)
    out = regional_norm(
        x, torch.zeros(0, 3, 4, 4), moments="batch", running_mean=running_mean, running_var=running_var, impl=impl
    )
    out.sum().backward()
    assert out.shape == (0, 2, 4, 4)
    assert torch.equal(running_mean, torch.full((3, 2), 2.0))
    assert torch.equal(running_var, torch.full((3, 2), 3.0))


# Precision and errors


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sums_of_low_precision_features_are_taken_in_float32(impl: str, dtype: torch.dtype) -> None:
    """In 8 bits 0.01 + 100 is 100, so a sum over 1,024 pixels would be far off: the exact result, rounded once."""
    inputs = make_inputs(1, 2, 2, 32, 32, dtype=torch.float32)
    x = inputs.x.to(dtype)
    out = regional_norm(x, inputs.layout, impl=impl)
    exact = regional_norm(x.double(), inputs.layout.double(), impl="reference")
    assert out.dtype == dtype
    # One rounding; atol for float32's own sums near 0.
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-5)


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
    ids=["3-D", "integer", "size", "batch", "layout-3-D", "weight", "bias", "impl", "not-fused", "no-running-moments"],
)
def test_wrong_argument_is_told_what_was_expected(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 3, 4, 4), "layout": torch.zeros(2, 5, 4, 4), **change}
    with pytest.raises(ValueError, match=message):
        regional_norm(**arguments)
