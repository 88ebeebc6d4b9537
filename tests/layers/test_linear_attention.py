"""LinearAttention2d against its sum over pairs of pixels, written out in loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnorm.layers.linear_attention import LinearAttention2d


def make_layer(num_features: int, head_width: int = 32) -> LinearAttention2d:
    torch.manual_seed(0)
    layer = LinearAttention2d(num_features, head_width=head_width).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
        layer.gate.fill_(0.7)
    return layer


def feature_map(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def literal_linear_attention(layer: LinearAttention2d, p: dict[str, Tensor], x: Tensor) -> Tensor:
    """x_j + gate * project(sum_i s_ij v_i / (sum_i s_ij + P eps)), s_ij = relu(q_j) . relu(k_i), head by head."""
    weights = {name: p[f"{name}.weight"][:, :, 0, 0] for name in ("query", "key", "value", "project")}
    num_images, num_channels, height, width = x.shape
    out = []
    for image in range(num_images):
        pixels = [x[image, :, row, column] for row in range(height) for column in range(width)]
        for pixel in pixels:
            heads = []
            for first in range(0, num_channels, layer.head_width):
                own = slice(first, first + layer.head_width)
                query = (weights["query"] @ pixel)[own].clamp_min(0)
                scores = [torch.dot(query, (weights["key"] @ source)[own].clamp_min(0)) for source in pixels]
                values = [(weights["value"] @ source)[own] for source in pixels]
                total = sum(score * value for score, value in zip(scores, values, strict=True))
                heads.append(total / (sum(scores) + len(pixels) * layer.eps))
            out.append(pixel + p["gate"] * (weights["project"] @ torch.cat(heads)))
    return torch.stack(out).reshape(num_images, height, width, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("shape", "head_width"),
    [((2, 8, 2, 3), 4), ((1, 6, 3, 3), 32), ((1, 4, 1, 1), 2), ((1, 1, 2, 2), 1)],
    ids=["two-heads", "one-head", "one-pixel", "one-channel"],
)
def test_equals_the_sum_over_pairs_with_all_gradients(shape: tuple[int, ...], head_width: int) -> None:
    layer = make_layer(shape[1], head_width)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    x, x_literal = (feature_map(*shape).requires_grad_() for _ in range(2))
    out, expected = layer(x), literal_linear_attention(layer, parameters, x_literal)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    projection = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad(out, [x, *layer.parameters()], projection)
    expected_gradients = torch.autograd.grad(expected, [x_literal, *parameters.values()], projection)
    for name, got, value in zip(["x", *parameters], gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_new_layer_is_exactly_the_identity_and_can_leave_it() -> None:
    torch.manual_seed(0)
    layer = LinearAttention2d(8)
    x = feature_map(2, 8, 4, 4).float()
    assert torch.equal(layer(x), x)
    layer(x).sum().backward()
    assert layer.gate.grad.abs() > 0


def test_derivatives_are_those_of_the_output() -> None:
    layer = make_layer(4, 2)
    x = feature_map(1, 4, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


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


@pytest.mark.parametrize("x", [torch.zeros(1, 4, 2, 2), torch.zeros(8, 2, 2), torch.zeros(1, 8, 2, 2, dtype=torch.int)])
def test_wrong_input_is_told_what_was_expected(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"got torch\.\w+ \([\d, ]+\); expected a floating feature map \[N, 8, H, W\]"):
        LinearAttention2d(8)(x)


def test_heads_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"num_features is 48, head_width 32; expected .* head_width divide"):
        LinearAttention2d(48)
