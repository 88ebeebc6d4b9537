"""AttentiveNorm2d against section 3 of the paper, written out in loops."""

# N batch, C channels, K entities (the paper's n).

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from attnorm import AttentiveNorm2d
from attnorm.ops import draw_positions


class Tolerance(NamedTuple):
    rtol: float
    atol: float


TOLERANCES = {
    # Loops and matrix products add in different orders: some hundred roundings of 1e-16, and gradients of up to 1e2.
    "float64": Tolerance(rtol=1e-9, atol=1e-11),
    # x = 1e3 + N(0,1) is itself rounded to 3e-5, v(x) and logits to a few times that; E[x^2] - mu^2 would err by 0.09.
    "float32, offset 1e3": Tolerance(rtol=0, atol=1e-3),
}
# Of a whole tensor, as |got - expected| / |expected|.
RELATIVE_ERRORS = {
    # What is stored (v(x), the output, a gradient) is rounded, 2^-9 at most each, sums are not: four such roundings.
    torch.bfloat16: 4 * 2**-9,
    torch.float16: 4 * 2**-12,
    # Gradients through numbers that the offset has rounded by 1e-4.
    "float32, offset 1e3": 1e-3,
}

IMPLS = ("reference", "fused")


# The literal reference


class Literal(NamedTuple):
    out: Tensor  # [N, C, H, W]
    layout: Tensor  # [N, K, H, W]
    mean: Tensor  # [M, K, C]; M = N, or 1 for moments over the batch
    var: Tensor


def literal_attentive_norm(
    p: Mapping[str, Tensor],
    x: Tensor,
    positions: Tensor | None,
    *,
    temperature: float,
    statistics: str = "weighted",
    moments: str = "instance",
    clamp_t: bool = False,
    eps: float = 1e-5,
    running: tuple[Tensor, Tensor] | None = None,
) -> Literal:
    """Eq. 2 to 6, image by image, entity by entity, pixel by pixel; only channels are vectors.

    Args:
        p: Parameters by their names in the layer's state_dict; what is missing is switched off.
        positions: Sampled positions of the pooled map, [N, K]; None without self-sampling (t = 0).
        running: Mean and variance to use, [K, C] each, in place of the region's own.
    """
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
                    if clamp_t and not 0 < t.item() < 1:  # a constant from there on
                        t = torch.tensor(min(max(t.item(), 0.0), 1.0), dtype=t.dtype)
                    activation = t * f_ij + activation  # Eq. 3
                raw.append(activation)
            total = sum(torch.exp(temperature * activation) for activation in raw)
            for i, activation in enumerate(raw):
                layout[image, i, row, column] = torch.exp(temperature * activation) / total  # Eq. 4

    v = {
        (image, row, column): translated("value", image, row, column)
        if "value.weight" in p
        else x[image, :, row, column]
        for image in range(num_images)
        for row, column in pixels
    }
    groups = [[image] for image in range(num_images)] if moments == "instance" else [list(range(num_images))]
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
            elif statistics == "weighted":
                mean = sum(s * point for s, point in points) / area
                var = sum(s * (point - mean) ** 2 for s, point in points) / area
            elif statistics == "masked":
                mean = sum(s * point for s, point in points) / len(points)
                var = sum((s * point - mean) ** 2 for s, point in points) / len(points)
            else:  # released: the mean over positions divided by the area once more, and S squared in the variance
                mean = sum(s * point for s, point in points) / len(points) / area
                var = sum((s * point - mean) ** 2 for s, point in points) / area
            means.append(mean)
            variances.append(var)
            sigma = torch.sqrt(var + eps) if statistics == "weighted" else torch.sqrt(var) + eps
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


def make_layer(
    num_features: int = 4, num_entities: int = 3, *, dtype: torch.dtype = torch.float64, **switches: Any
) -> AttentiveNorm2d:
    """A layer in which nothing is special: random parameters, unequal t, and rho not 0, or all gradients would be."""
    torch.manual_seed(0)
    layer = AttentiveNorm2d(num_features, num_entities, **{"temperature": 0.5, "reduction": 2, **switches})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.rho.fill_(0.7)
        if layer.self_sampling:
            low, high = (-0.4, 1.3) if layer.clamp_t else (0.2, 0.9)
            layer.t.copy_(torch.linspace(low, high, num_entities))
        if layer.moments == "batch":
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return layer.to(dtype)


def feature_map(*shape: int, offset: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + offset).to(dtype)


def seeded(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run_literal(layer: AttentiveNorm2d, parameters: Mapping[str, Tensor], x: Tensor) -> Literal:
    """The reference on the positions that `layer` draws from `seeded()`."""
    positions = None
    if layer.self_sampling and layer.training:
        positions = draw_positions(x, layer.num_entities, shared=layer.shared_sampling, generator=seeded())
    running = None
    if layer.moments == "batch" and not layer.training:
        running = (layer.running_mean.to(x.dtype), layer.running_var.to(x.dtype))
    return literal_attentive_norm(
        parameters,
        x,
        positions,
        temperature=layer.temperature,
        statistics=layer.statistics,
        moments=layer.moments,
        clamp_t=layer.clamp_t,
        eps=layer.eps,
        running=running,
    )


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
    return with_gradients(run_literal(layer, parameters, x).out, {"x": x, **parameters})


def assert_all_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: Tolerance) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name],
            expected[name].to(got[name].dtype),
            rtol=tolerance.rtol,
            atol=tolerance.atol,
            check_stride=False,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


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


class Case(NamedTuple):
    switches: dict[str, Any]
    training: bool = True


SWITCHES = {
    "defaults": Case({}),
    "evaluation": Case({}, training=False),
    "temperature": Case({"temperature": 1.3}),
    "affine-off": Case({"affine": False}),
    "value-off": Case({"value_projection": False}),
    "affine-and-value-off": Case({"affine": False, "value_projection": False}),
    "reduction-1": Case({"reduction": 1}),
    "reduction-beyond-C": Case({"reduction": 64}),
    "eps": Case({"eps": 0.3}),
    "one-entity": Case({"num_entities": 1}),
    "self-sampling-off": Case({"self_sampling": False}),
    "shared-sampling": Case({"shared_sampling": True}),
    "clamp-t": Case({"clamp_t": True}),
    "batch": Case({"moments": "batch"}),
    "batch-evaluation": Case({"moments": "batch"}, training=False),
    "batch-value-off": Case({"moments": "batch", "value_projection": False}),
    "masked": Case({"statistics": "masked"}),
    "masked-eps": Case({"statistics": "masked", "eps": 0.3}),
    "masked-evaluation": Case({"statistics": "masked"}, training=False),
    "masked-batch": Case({"statistics": "masked", "moments": "batch"}),
    "masked-batch-evaluation": Case({"statistics": "masked", "moments": "batch"}, training=False),
    "released": Case({"statistics": "released"}),
    "released-eps": Case({"statistics": "released", "eps": 0.3}),
    "released-evaluation": Case({"statistics": "released"}, training=False),
    "released-batch": Case({"statistics": "released", "moments": "batch"}),
    "released-as-published": Case(
        {"statistics": "released", "affine": False, "shared_sampling": True, "clamp_t": True}
    ),
}


def impls_of(case: Case) -> tuple[str, ...]:
    return IMPLS if case.switches.get("statistics", "weighted") == "weighted" else ("reference", "auto")


@pytest.mark.parametrize(
    ("case", "impl"),
    [pytest.param(case, impl, id=f"{name}-{impl}") for name, case in SWITCHES.items() for impl in impls_of(case)],
)
def test_every_switch_equals_the_equations(case: Case, impl: str) -> None:
    layer = make_layer(**case.switches, impl=impl).train(case.training)
    x = feature_map(2, 4, 3, 4, offset=0.5)
    expected = literal_results(layer, x)
    for name, value in expected.items():  # or comparing with it would show nothing
        if name not in zero_by_mathematics(layer):
            assert value.abs().max() > 1e-4, f"the reference gradient of {name} vanishes"
    assert_all_close(layer_results(layer, x), expected, TOLERANCES["float64"])
    literal = run_literal(layer, dict(layer.named_parameters()), x)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    _, layout = layer(x, return_layout=True, generator=seeded())
    torch.testing.assert_close(layout, literal.layout, rtol=1e-10, atol=1e-12)
    # Training moves running moments a tenth of the way; evaluation leaves them alone.
    share = 0.1 if layer.training else 0
    for name, buffer in layer.named_buffers():
        moment = (literal.mean if name == "running_mean" else literal.var)[0]
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
    "one-row": (1, 4, 3, 1, 3),
    "odd": (1, 4, 3, 5, 7),  # incomplete pooling windows at two borders
    "more-entities-than-pixels": (2, 3, 7, 2, 2),  # positions are drawn with replacement
    "one-channel": (2, 1, 3, 3, 3),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in SHAPES.items()])
def test_shape_equals_the_equations(shape: tuple[int, ...], impl: str) -> None:
    num_images, channels, entities, height, width = shape
    layer = make_layer(channels, entities, impl=impl)
    x = feature_map(num_images, channels, height, width)
    assert_all_close(layer_results(layer, x), literal_results(layer, x), TOLERANCES["float64"])


STRIDES = {
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every-other-pixel": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, ::2, 1::2],
    "batch-last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in STRIDES.items()])
def test_strides_do_not_change_values(make: Any, impl: str) -> None:
    layer = make_layer(impl=impl)
    x = make(feature_map(2, 4, 4, 6))
    assert not x.is_contiguous()
    assert_all_close(layer_results(layer, x), layer_results(layer, x.contiguous()), TOLERANCES["float64"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_loses_only_what_it_stores(dtype: torch.dtype, impl: str) -> None:
    layer = make_layer(dtype=dtype, impl=impl)
    x = feature_map(2, 4, 4, 5, dtype=dtype)
    expected, got = literal_results(layer, x), layer_results(layer, x)
    assert got["out"].dtype == dtype
    for name, value in got.items():
        if name not in zero_by_mathematics(layer):
            assert relative_error(value, expected[name]) < RELATIVE_ERRORS[dtype], name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("moments", ["instance", "batch"])
def test_large_mean_costs_no_digits(impl: str, moments: str) -> None:
    layer = make_layer(impl=impl, moments=moments, dtype=torch.float32)
    with torch.no_grad():  # so that the offset reaches the statistics and does not saturate the layout
        for convolution in (layer.entities, layer.key, layer.query):
            convolution.weight -= convolution.weight.mean(1, keepdim=True)
    x = feature_map(2, 4, 4, 5, offset=1e3, dtype=torch.float32)
    got, expected = layer_results(layer, x), literal_results(layer, x)
    torch.testing.assert_close(got["out"].double(), expected["out"], **TOLERANCES["float32, offset 1e3"]._asdict())
    for name, value in got.items():
        if name not in zero_by_mathematics(layer):
            assert relative_error(value, expected[name]) < RELATIVE_ERRORS["float32, offset 1e3"], name


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_new_layer_is_exactly_the_identity(dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    layer = AttentiveNorm2d(8).to(dtype).train(training)
    x = feature_map(2, 8, 6, 5, offset=1.0, dtype=dtype)
    assert torch.equal(layer(x), x)


# Autocast


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_autocast_changes_nothing(impl: str, training: bool) -> None:
    layer = make_layer(8, 4, dtype=torch.float32, impl=impl).train(training)
    x = feature_map(2, 8, 4, 4, dtype=torch.float32)
    expected = layer_results(layer, x)
    expected_layout = layer.layout(x, generator=seeded())
    leaf = x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, layout = layer(leaf, return_layout=True, generator=seeded())
        penalty = layer.orthogonality_penalty()
    got = with_gradients(out, {"x": leaf, **dict(layer.named_parameters())})
    assert torch.equal(layout, expected_layout)
    assert torch.equal(penalty, layer.orthogonality_penalty())
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name
