"""AttentiveNorm2d against section 3 of the paper, written out in loops."""

# N batch, C channels, K entities (the paper's n).

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from attnorm import AttentiveNorm2d
from attnorm.ops import draw_positions
from tests.layers import conftest
from tests.layers.conftest import seeded

# Loops and matrix products add in different orders: some hundred roundings of 1e-16, and gradients of up to 1e2.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
IMPLS = ("reference", "fused")

make_layer = functools.partial(conftest.make_layer, dtype=torch.float64)
feature_map = functools.partial(conftest.feature_map, dtype=torch.float64)


# The literal reference


class Literal(NamedTuple):
    out: Tensor  # [N, C, H, W]
    layout: Tensor  # [N, K, H, W]
    mean: Tensor  # [M, K, C]; M = N, or 1 for moments over the batch
    var: Tensor


def literal(layer: AttentiveNorm2d, p: Mapping[str, Tensor], x: Tensor) -> Literal:
    """Eq. 2 to 6, image by image, entity by entity, pixel by pixel; only channels are vectors. With the switches of
    `layer`, and the positions that it draws from `seeded()`.

    Args:
        p: Parameters by their names in the layer's state_dict; what is missing is switched off.
    """
    positions = None  # of the pooled map, [N, K]; without self-sampling t = 0
    if layer.self_sampling and layer.training:
        positions = draw_positions(x, layer.num_entities, shared=layer.shared_sampling, generator=seeded())
    running = None  # mean and variance, [K, C] each, in place of the region's own
    if layer.moments == "batch" and not layer.training:
        running = (layer.running_mean.to(x.dtype), layer.running_var.to(x.dtype))
    num_images, _, height, width = x.shape
    num_entities = len(p["entities.weight"])
    pixels = [(row, column) for row in range(height) for column in range(width)]

    def translated(name: str, image: int, row: int, column: int) -> Tensor:
        """The 1x1 convolution `name` at one pixel."""
        return p[f"{name}.weight"][:, :, 0, 0] @ x[image, :, row, column] + p[f"{name}.bias"]

    layout: dict[tuple[int, int, int, int], Tensor] = {}
    for image in range(num_images):
        if positions is not None:
            pooled = []  # k(X) max-pooled 2x2, ceil mode, row by row
            for top in range(0, height, 2):
                for left in range(0, width, 2):
                    window = [
                        translated("key", image, row, column)
                        for row in range(top, min(top + 2, height))
                        for column in range(left, min(left + 2, width))
                    ]
                    pooled.append(torch.stack(window).max(0).values)
        for row, column in pixels:
            raw = []
            for i in range(num_entities):
                activation = torch.dot(p["entities.weight"][i, :, 0, 0], x[image, :, row, column])  # f(X)
                if positions is not None:
                    key = pooled[int(positions[image, i])]
                    f_ij = torch.dot(key, translated("query", image, row, column))  # Eq. 2
                    t = p["t"][i]
                    if layer.clamp_t and not 0 < t.item() < 1:  # a constant from there on
                        t = torch.tensor(min(max(t.item(), 0.0), 1.0), dtype=t.dtype)
                    activation = t * f_ij + activation  # Eq. 3
                raw.append(activation)
            total = sum(torch.exp(layer.temperature * activation) for activation in raw)
            for i, activation in enumerate(raw):
                layout[image, i, row, column] = torch.exp(layer.temperature * activation) / total  # Eq. 4

    v = {
        (image, row, column): translated("value", image, row, column)
        if "value.weight" in p
        else x[image, :, row, column]
        for image in range(num_images)
        for row, column in pixels
    }
    groups = [[image] for image in range(num_images)] if layer.moments == "instance" else [list(range(num_images))]
    x_bar = {key: torch.zeros_like(vector) for key, vector in v.items()}
    means, variances = [], []
    for group in groups:
        for i in range(num_entities):
            points = [
                (layout[image, i, row, column], v[image, row, column]) for image in group for row, column in pixels
            ]
            area = sum(s for s, _ in points)
            if running is not None:
                mean, var = running[0][i], running[1][i]
            elif layer.statistics == "weighted":
                mean = sum(s * point for s, point in points) / area
                var = sum(s * (point - mean) ** 2 for s, point in points) / area
            elif layer.statistics == "masked":
                mean = sum(s * point for s, point in points) / len(points)
                var = sum((s * point - mean) ** 2 for s, point in points) / len(points)
            else:  # released: the mean over positions divided by the area once more, and S squared in the variance
                mean = sum(s * point for s, point in points) / len(points) / area
                var = sum((s * point - mean) ** 2 for s, point in points) / area
            means.append(mean)
            variances.append(var)
            sigma = torch.sqrt(var + layer.eps) if layer.statistics == "weighted" else torch.sqrt(var) + layer.eps
            for image in group:
                for row, column in pixels:
                    normalized = (v[image, row, column] - mean) / sigma
                    if "weight" in p:
                        normalized = normalized * p["weight"][i] + p["bias"][i]
                    x_bar[image, row, column] = x_bar[image, row, column] + normalized * layout[image, i, row, column]

    out = torch.stack([p["rho"] * x_bar[key] + x[key[0], :, key[1], key[2]] for key in v])  # Eq. 6, [N*H*W, C]
    regions = [layout[image, i, r, c] for image in range(num_images) for i in range(num_entities) for r, c in pixels]
    return Literal(
        out.reshape(num_images, height, width, -1).permute(0, 3, 1, 2),
        torch.stack(regions).reshape(num_images, num_entities, height, width),
        torch.stack(means).reshape(len(groups), num_entities, -1),
        torch.stack(variances).reshape(len(groups), num_entities, -1),
    )


# Building a layer and comparing it


def with_gradients(out: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradient of a random projection of it with respect to each input."""
    projection = torch.randn(out.shape, generator=seeded(5), dtype=torch.float64).to(out.dtype)
    gradients = torch.autograd.grad(out, list(inputs.values()), projection, materialize_grads=True, allow_unused=True)
    return {"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}


def layer_results(layer: AttentiveNorm2d, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    layer = copy.deepcopy(layer)  # whose running moments may change
    return with_gradients(layer(x, generator=seeded()), {"x": x, **dict(layer.named_parameters())})


def literal_results(layer: AttentiveNorm2d, x: Tensor) -> dict[str, Tensor]:
    """In float64, from the values that the layer has."""
    x = x.detach().double().requires_grad_()
    parameters = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    return with_gradients(literal(layer, parameters, x).out, {"x": x, **parameters})


def assert_all_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def assert_small_errors(layer: AttentiveNorm2d, x: Tensor, limit: float) -> None:
    """Of the output and each gradient as a whole tensor: |got - expected| / |expected|."""
    expected = literal_results(layer, x)
    for name, value in layer_results(layer, x).items():
        assert value.dtype == x.dtype
        if name not in zero_by_mathematics(layer):
            assert (value.double() - expected[name]).norm() < limit * expected[name].norm(), name


def zero_by_mathematics(layer: AttentiveNorm2d) -> set[str]:
    """Parameters that no output depends on."""
    without_sampling = {"key.weight", "key.bias", "query.weight", "query.bias", "t"}
    zero = set() if layer.training or not layer.self_sampling else without_sampling  # t = 0 in evaluation
    if layer.num_entities == 1:  # a layout of ones
        zero |= {"entities.weight", *without_sampling}
    if layer.statistics == "weighted" and (layer.moments == "instance" or layer.training):
        zero |= {"value.bias"}  # a shift before a normalization
    return zero


# Every switch


SWITCHES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "temperature": {"temperature": 1.3},
    "affine-off": {"affine": False},
    "value-off": {"value_projection": False},
    "reduction-beyond-C": {"reduction": 64},
    "eps": {"eps": 0.3},
    "one-entity": {"num_entities": 1},
    "self-sampling-off": {"self_sampling": False},
    "shared-sampling": {"shared_sampling": True},
    "clamp-t": {"clamp_t": True},
    "batch": {"moments": "batch"},
    "batch-value-off": {"moments": "batch", "value_projection": False},
    "masked": {"statistics": "masked", "eps": 0.3},
    "masked-batch": {"statistics": "masked", "moments": "batch"},
    "released": {"statistics": "released", "eps": 0.3},
    "released-batch": {"statistics": "released", "moments": "batch"},
    "released-as-published": {"statistics": "released", "affine": False, "shared_sampling": True, "clamp_t": True},
}
IN_EVALUATION = ("defaults", "batch", "masked", "masked-batch", "released")
CASES = [
    pytest.param(switches, training, impl, id=f"{name}-{'training' if training else 'evaluation'}-{impl}")
    for name, switches in SWITCHES.items()
    for training in ((True, False) if name in IN_EVALUATION else (True,))
    for impl in (IMPLS if "statistics" not in switches else ("reference",))
]


@pytest.mark.parametrize(("switches", "training", "impl"), CASES)
def test_every_switch_equals_the_equations(switches: dict[str, Any], training: bool, impl: str) -> None:
    layer = make_layer(**switches, impl=impl).train(training)
    x = feature_map(2, 4, 3, 4, offset=0.5)
    expected = literal_results(layer, x)
    for name, value in expected.items():  # or comparing with it would show nothing
        if name not in zero_by_mathematics(layer):
            assert value.abs().max() > 1e-4, f"the reference gradient of {name} vanishes"
    assert_all_close(layer_results(layer, x), expected)
    wanted = literal(layer, dict(layer.named_parameters()), x)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    _, layout = layer(x, return_layout=True, generator=seeded())
    torch.testing.assert_close(layout, wanted.layout, rtol=1e-10, atol=1e-12)
    # Training moves running moments a tenth of the way; evaluation leaves them alone.
    share = 0.1 if layer.training else 0
    for name, buffer in layer.named_buffers():
        moment = (wanted.mean if name == "running_mean" else wanted.var)[0]
        torch.testing.assert_close(buffer, before[name].lerp(moment, share), rtol=1e-9, atol=1e-11)


# Eq. 1


@pytest.mark.parametrize("orthogonality", ["cosine", "raw"])
def test_orthogonality_penalty_equals_equation_1(orthogonality: str) -> None:
    layer = make_layer(orthogonality=orthogonality)
    rows = layer.entities.weight.detach().flatten(1).clone().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            product = sum(rows[i, c] * rows[j, c] for c in range(4))
            if orthogonality == "cosine":
                product = product / torch.sqrt(sum(rows[i, c] ** 2 for c in range(4)))
                product = product / torch.sqrt(sum(rows[j, c] ** 2 for c in range(4)))
            expected = expected + (product - int(i == j)) ** 2
    penalty = layer.orthogonality_penalty()
    assert penalty.shape == ()
    torch.testing.assert_close(penalty, expected)
    (gradient,) = torch.autograd.grad(penalty, layer.entities.weight)
    (expected_gradient,) = torch.autograd.grad(expected, rows)
    assert expected_gradient.abs().max() > 1e-2
    torch.testing.assert_close(gradient.flatten(1), expected_gradient)


# Shapes, strides and precisions

SHAPES = {
    "one-pixel": (2, 4, 3, 1, 1),  # variance 0; the pool has a single, incomplete window
    "odd": (1, 4, 3, 5, 7),  # incomplete pooling windows at two borders
    "more-entities-than-pixels": (2, 3, 7, 1, 3),  # positions are drawn with replacement
    "one-channel": (2, 1, 3, 3, 3),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shape_equals_the_equations(shape: tuple[int, ...], impl: str) -> None:
    num_images, channels, entities, height, width = shape
    layer = make_layer(channels, entities, impl=impl)
    x = feature_map(num_images, channels, height, width)
    assert_all_close(layer_results(layer, x), literal_results(layer, x))


STRIDES = {
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every-other-pixel": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, 1::2],
    "batch-last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES)
def test_strides_do_not_change_values(make: Any, impl: str) -> None:
    layer = make_layer(impl=impl)
    x = make(feature_map(2, 4, 4, 6))
    assert not x.is_contiguous()
    assert_all_close(layer_results(layer, x), layer_results(layer, x.contiguous()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)], ids=str)
def test_low_precision_loses_only_what_it_stores(dtype: torch.dtype, rounding: float, impl: str) -> None:
    """What is stored (v(x), the output, a gradient) is rounded, sums are not: four such roundings."""
    assert_small_errors(make_layer(dtype=dtype, impl=impl), feature_map(2, 4, 4, 5, dtype=dtype), 4 * rounding)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("moments", ["instance", "batch"])
def test_large_mean_costs_no_digits(impl: str, moments: str) -> None:
    """x = 1e3 + N(0, 1) is itself rounded to 3e-5, v(x) and logits to a few times that; E[x^2] - mu^2 would err by
    0.09. Gradients go through numbers that the offset has rounded by 1e-4.
    """
    layer = make_layer(impl=impl, moments=moments, dtype=torch.float32)
    with torch.no_grad():  # so that the offset reaches the statistics and does not saturate the layout
        for convolution in (layer.entities, layer.key, layer.query):
            convolution.weight -= convolution.weight.mean(1, keepdim=True)
    x = feature_map(2, 4, 4, 5, offset=1e3, dtype=torch.float32)
    got, expected = (results(layer, x)["out"].double() for results in (layer_results, literal_results))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    assert_small_errors(layer, x, 1e-3)


# Derivatives


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("moments", "training"), [("instance", True), ("batch", False)], ids=["instance-training", "batch-evaluation"]
)
def test_first_and_second_derivatives_are_those_of_the_output(impl: str, training: bool, moments: str) -> None:
    layer = make_layer(2, 2, impl=impl, moments=moments).train(training)
    used = {n: p for n, p in layer.named_parameters() if n not in zero_by_mathematics(layer)}
    buffers = dict(layer.named_buffers())

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(used, parameters, strict=True)) | {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(layer, state, (x,), {"generator": seeded()})

    inputs = (feature_map(2, 2, 2, 3).requires_grad_(), *(p.detach().requires_grad_() for p in used.values()))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


# What the layer is at special values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_new_layer_is_exactly_the_identity(dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    layer = AttentiveNorm2d(8).to(dtype).train(training)
    x = feature_map(2, 8, 6, 5, offset=1.0, dtype=dtype)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("impl", IMPLS)
def test_new_layer_is_the_identity_though_the_value_leaves_the_range_of_float16(impl: str) -> None:
    layer = AttentiveNorm2d(8, impl=impl)
    torch.nn.init.ones_(layer.value.weight)
    x = 65504 * feature_map(2, 8, 6, 5, dtype=torch.float16).sign()
    assert torch.equal(layer(x), x)


# Autocast


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl: str) -> None:
    layer = make_layer(8, 4, dtype=torch.float32, impl=impl)
    x = feature_map(2, 8, 4, 4, dtype=torch.float32)
    expected, expected_layout = layer_results(layer, x), layer.layout(x, generator=seeded())
    leaf = x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, layout = layer(leaf, return_layout=True, generator=seeded())
        penalty = layer.orthogonality_penalty()
    assert torch.equal(layout, expected_layout) and torch.equal(penalty, layer.orthogonality_penalty())
    for name, value in with_gradients(out, {"x": leaf, **dict(layer.named_parameters())}).items():
        assert torch.equal(value, expected[name]), name
