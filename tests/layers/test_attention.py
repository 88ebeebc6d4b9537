"""SelfAttention2d and LinearAttention2d against their sums over keys, written out in loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnorm import AttentiveNorm2d, SelfAttention2d
from attnorm.layers.linear_attention import LinearAttention2d

KINDS: dict[str, type[nn.Module]] = {"softmax": SelfAttention2d, "linear": LinearAttention2d}


def make_layer(kind: str, num_features: int, **options: int) -> Any:
    torch.manual_seed(0)
    layer = KINDS[kind](num_features, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
        layer.gate.fill_(0.7)
    return layer


def feature_map(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def pixels_of(image: Tensor) -> list[Tensor]:
    return [image[:, row, column] for row in range(image.shape[1]) for column in range(image.shape[2])]


def pooled(weight: Tensor, image: Tensor) -> list[Tensor]:
    """Of weight x max-pooled 2x2, ceil mode."""
    windows = []
    for top in range(0, image.shape[1], 2):
        for left in range(0, image.shape[2], 2):
            window = [weight @ pixel for pixel in pixels_of(image[:, top : top + 2, left : left + 2])]
            windows.append(torch.stack(window).max(0).values)
    return windows


def attended(layer: Any, weights: dict[str, Tensor], image: Tensor) -> list[Tensor]:
    """sum_i softmax_i(key_i . query_j) value_i, i over the 2x2 max-pooled map; no scale. Or head by head
    sum_i s_ij value_i / (sum_i s_ij + P eps), s_ij = relu(query_j) . relu(key_i).
    """
    sources: list[Any] = pixels_of(image)
    out: list[Any] = []
    if isinstance(layer, SelfAttention2d):
        keys, values = pooled(weights["key"], image), pooled(weights["value"], image)
        for pixel in sources:
            exponentials = [torch.exp(torch.dot(weights["query"] @ pixel, key)) for key in keys]
            total = sum(e * value for e, value in zip(exponentials, values, strict=True))
            out.append(total / sum(exponentials))
        return out
    for pixel in sources:
        heads = []
        for first in range(0, image.shape[0], layer.head_width):
            own = slice(first, first + layer.head_width)
            query = (weights["query"] @ pixel)[own].clamp_min(0)
            scores = [torch.dot(query, (weights["key"] @ source)[own].clamp_min(0)) for source in sources]
            values = [(weights["value"] @ source)[own] for source in sources]
            total = sum(score * value for score, value in zip(scores, values, strict=True))
            heads.append(total / (sum(scores) + len(sources) * layer.eps))
        out.append(torch.cat(heads))
    return out


def literal(layer: Any, p: dict[str, Tensor], x: Tensor) -> Tensor:
    """x_j + gate * project(what j attends to)."""
    weights = {name: p[f"{name}.weight"][:, :, 0, 0] for name in ("query", "key", "value", "project")}
    out = [
        pixel + p["gate"] * (weights["project"] @ part)
        for image in x
        for pixel, part in zip(pixels_of(image), attended(layer, weights, image), strict=True)
    ]
    return torch.stack(out).reshape(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("kind", "shape", "options"),
    [
        ("softmax", (2, 16, 5, 7), {}),
        ("softmax", (2, 4, 1, 1), {}),
        ("softmax", (1, 1, 3, 3), {}),
        ("linear", (2, 8, 2, 3), {"head_width": 4}),
        ("linear", (1, 6, 3, 3), {"head_width": 32}),
        ("linear", (1, 1, 1, 1), {"head_width": 1}),
    ],
)
def test_equals_the_sum_over_keys_with_all_gradients(
    kind: str, shape: tuple[int, ...], options: dict[str, int]
) -> None:
    layer = make_layer(kind, shape[1], **options)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    x, x_literal = (feature_map(*shape).requires_grad_() for _ in range(2))
    out, expected = layer(x), literal(layer, parameters, x_literal)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    projection = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad(out, [x, *layer.parameters()], projection)
    expected_gradients = torch.autograd.grad(expected, [x_literal, *parameters.values()], projection)
    for name, got, value in zip(["x", *parameters], gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    if shape[2] * shape[3] > 4:  # with one pooled position the softmax is 1 whatever query and key are
        assert all(value.abs().max() > 1e-4 for value in expected_gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_new_layer_is_exactly_the_identity_and_can_leave_it(kind: str) -> None:
    torch.manual_seed(0)
    layer: Any = KINDS[kind](8)
    x = feature_map(2, 8, 4, 4).float()
    assert torch.equal(layer(x), x)
    layer(x).sum().backward()
    assert layer.gate.grad.abs() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_input_is_told_what_was_expected(kind: str) -> None:
    for x in (torch.zeros(1, 4, 2, 2), torch.zeros(8, 2, 2), torch.zeros(1, 8, 2, 2, dtype=torch.int64)):
        with pytest.raises(
            ValueError, match=r"got torch\.\w+ \([\d, ]+\); expected a floating feature map \[N, 8, H, W"
        ):
            KINDS[kind](8)(x)
    with pytest.raises(ValueError, match=r"without a pixel, \(2, 8, 0, 3\); expected H and W at least 1"):
        SelfAttention2d(8)(torch.zeros(2, 8, 0, 3))
    with pytest.raises(ValueError, match="num_features is 0; expected at least 1"):
        SelfAttention2d(0)
    with pytest.raises(ValueError, match=r"num_features is 48, head_width 32; expected .* head_width divide"):
        LinearAttention2d(48)


def test_widths_are_those_of_the_published_code() -> None:
    shapes = {name: tuple(p.shape[:2]) for name, p in SelfAttention2d(256).named_parameters()}
    narrow = {"query.weight": (32, 256), "key.weight": (32, 256), "value.weight": (128, 256)}
    assert shapes == {**narrow, "project.weight": (256, 128), "gate": (1,)}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_the_fused_kernel_takes_it(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0)).to(memory_format=memory_format)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where it would have to fall back
        fused = SelfAttention2d(64)(x)
    assert fused.shape == x.shape


def test_sums_keep_float32_under_autocast_and_bfloat16() -> None:
    """(256 + 258) / 4 of one key and -256 * 2 / 4 of another: 0.5 is left, or 0 where 128.5 is rounded to 8 bits."""
    layer = LinearAttention2d(4)
    with torch.no_grad():
        for convolution in (layer.query, layer.key, layer.value, layer.project):
            convolution.weight.zero_()
        layer.query.weight[:2, 3] = 1.0  # the query is (x_3, x_3, 0, 0)
        layer.key.weight[:2, :2] = torch.eye(2)[:, :, None, None]  # the key (x_0, x_1, 0, 0)
        layer.value.weight[0, 2] = 1.0  # the value (x_2, 0, 0, 0)
        layer.project.weight[3, 0] = 1.0
        layer.gate.fill_(1.0)
    x = torch.tensor([[1, 0, 256, 1], [1, 0, 258, 1], [0, 1, -256, 1], [0, 1, -256, 1]]).float().T.view(1, 4, 2, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        under_autocast = layer(x)
    with torch.no_grad():
        low = layer.bfloat16()(x.bfloat16())
    assert under_autocast.dtype == torch.float32 and low.dtype == torch.bfloat16
    for got in (under_autocast, low.float()):
        torch.testing.assert_close(got[:, 3], torch.full((1, 2, 2), 1.5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", [AttentiveNorm2d, SelfAttention2d, LinearAttention2d])
def test_a_gate_without_a_dimension_is_that_of_earlier_versions(block: type[nn.Module]) -> None:
    name = "rho" if block is AttentiveNorm2d else "gate"
    old = nn.Sequential(block(8))
    state = old.state_dict()
    state[f"0.{name}"] = torch.tensor(0.25)
    old.load_state_dict(state)
    assert dict(old.named_parameters())[f"0.{name}"].tolist() == [0.25] and state[f"0.{name}"].ndim == 0
