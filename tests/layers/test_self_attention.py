"""SelfAttention2d against a softmax over pooled keys written out in loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnorm import SelfAttention2d

# (rtol, atol): the same sums in another order.
TOLERANCES = {torch.float64: (1e-9, 1e-11)}


def make_layer(num_features: int, dtype: torch.dtype = torch.float64) -> SelfAttention2d:
    torch.manual_seed(0)
    layer = SelfAttention2d(num_features).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
        layer.gate.fill_(0.7)
    return layer


def feature_map(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def literal_self_attention(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """x_j + gate * project(sum_i softmax_i(key_i . query_j) value_i), i over the 2x2 max-pooled map; no scale."""
    weights = {name: p[f"{name}.weight"][:, :, 0, 0] for name in ("query", "key", "value", "project")}
    num_images, _, height, width = x.shape

    def pooled(name: str, image: int) -> list[Tensor]:
        windows = []
        for top in range(0, height, 2):
            for left in range(0, width, 2):
                pixels = [
                    weights[name] @ x[image, :, row, column]
                    for row in range(top, min(top + 2, height))
                    for column in range(left, min(left + 2, width))
                ]
                windows.append(torch.stack(pixels).max(0).values)
        return windows

    out = []
    for image in range(num_images):
        keys, values = pooled("key", image), pooled("value", image)
        for row in range(height):
            for column in range(width):
                query = weights["query"] @ x[image, :, row, column]
                exponentials = [torch.exp(torch.dot(query, key)) for key in keys]
                attended = sum(e * value for e, value in zip(exponentials, values, strict=True)) / sum(exponentials)
                out.append(p["gate"] * (weights["project"] @ attended) + x[image, :, row, column])
    return torch.stack(out).reshape(num_images, height, width, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "shape",
    [(2, 8, 4, 6), (1, 16, 5, 7), (2, 4, 1, 1), (1, 8, 1, 3), (1, 1, 3, 3)],
    ids=["even", "odd", "one-pixel", "one-row", "one-channel"],
)
def test_equals_softmax_over_pooled_keys_with_all_gradients(shape: tuple[int, ...]) -> None:
    layer = make_layer(shape[1])
    parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    x, x_literal = (feature_map(*shape).requires_grad_() for _ in range(2))
    out, expected = layer(x), literal_self_attention(parameters, x_literal)
    rtol, atol = TOLERANCES[torch.float64]
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)
    projection = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad(out, [x, *layer.parameters()], projection)
    expected_gradients = torch.autograd.grad(expected, [x_literal, *parameters.values()], projection)
    for name, got, value in zip(["x", *parameters], gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    if shape[2] * shape[3] > 4:  # with one pooled position the softmax is 1 whatever query and key are
        assert all(value.abs().max() > 1e-4 for value in expected_gradients)


def test_new_layer_is_exactly_the_identity() -> None:
    torch.manual_seed(0)
    layer = SelfAttention2d(8)
    x = feature_map(2, 8, 4, 4).float()
    assert torch.equal(layer(x), x)
    layer(x).sum().backward()
    assert layer.gate.grad.abs() > 0  # and can leave it


def test_derivatives_are_those_of_the_output() -> None:
    layer = make_layer(4)
    x = feature_map(1, 4, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        assert torch.autograd.gradgradcheck(layer, x)


def test_widths_are_those_of_the_published_code() -> None:
    layer = SelfAttention2d(256)
    shapes = {name: tuple(p.shape[:2]) for name, p in layer.named_parameters()}
    assert shapes == {
        "query.weight": (32, 256),
        "key.weight": (32, 256),
        "value.weight": (128, 256),
        "project.weight": (256, 128),
        "gate": (),
    }


@pytest.mark.parametrize(
    "x",
    [torch.zeros(1, 4, 2, 2), torch.zeros(8, 2, 2), torch.zeros(1, 8, 2, 2, dtype=torch.int64)],
    ids=["channels", "3-D", "integer"],
)
def test_wrong_input_is_told_what_was_expected(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"got torch\.\w+ \([\d, ]+\); expected a floating feature map \[N, 8, H, W\]"):
        SelfAttention2d(8)(x)


def test_a_map_without_a_pixel_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"without a pixel, \(2, 8, 0, 3\); expected H and W at least 1"):
        SelfAttention2d(8)(torch.zeros(2, 8, 0, 3))


def test_no_features_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_features is 0; expected at least 1"):
        SelfAttention2d(0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_the_fused_kernel_takes_it(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0)).to(memory_format=memory_format)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where it would have to fall back
        fused = SelfAttention2d(64)(x)
    assert fused.shape == x.shape
