"""RegionNorm2d against its equations, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnorm.layers.region_norm import RegionNorm2d, normalize_regions


def feature_map(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


MASK = torch.tensor([[[[0, 1, 1], [0, 0, 1]]], [[[1, 1, 1], [1, 1, 0]]]])  # the second: one known pixel


def make_layer(num_features: int, regions: str) -> RegionNorm2d:
    torch.manual_seed(0)
    layer = RegionNorm2d(num_features, regions=regions).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def literal_region_norm(x: Tensor, mask: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5) -> Tensor:
    """Pixel by pixel; gamma and beta have a value for each value of x."""
    out = torch.empty_like(x)
    for n, c in ((n, c) for n in range(x.shape[0]) for c in range(x.shape[1])):
        pixels = [(row, column) for row in range(x.shape[2]) for column in range(x.shape[3])]
        for region in (0, 1):
            members = [at for at in pixels if bool(mask[n, 0][at]) == bool(region)]
            values = [x[n, c][at].item() for at in members]
            mean = sum(values) / max(len(values), 1)
            variance = sum((value - mean) ** 2 for value in values) / max(len(values), 1)
            for at, value in zip(members, values, strict=True):
                x_bar = (value - mean) / math.sqrt(variance + eps)
                out[n, c][at] = gamma[n, c][at] * x_bar + beta[n, c][at]
    return out


@pytest.mark.parametrize("mask", [torch.zeros_like(MASK), MASK * 7], ids=["all-known", "mixed"])
def test_regions_of_a_mask_have_their_own_statistics_and_affine(mask: Tensor) -> None:
    layer = make_layer(3, "mask")
    x = feature_map(2, 3, 2, 3) * 3 + 5
    regions = (mask != 0).expand_as(x).long()
    channels = torch.arange(3)[None, :, None, None].expand_as(x)
    gamma, beta = layer.weight[regions, channels], layer.bias[regions, channels]
    torch.testing.assert_close(layer(x, mask), literal_region_norm(x, mask, gamma, beta), rtol=1e-9, atol=1e-9)


def test_learned_regions_and_affine_come_from_the_response() -> None:
    layer = make_layer(4, "learned")
    with torch.no_grad():
        layer.response.weight.mul_(3)
    x = feature_map(2, 4, 5, 6)
    padded = F.pad(torch.stack([x.max(1).values, x.sum(1) / 4], 1), (3, 3, 3, 3))
    response = torch.empty(2, 1, 5, 6, dtype=torch.float64)
    for n, row, column in ((n, row, column) for n in range(2) for row in range(5) for column in range(6)):
        window = padded[n, :, row : row + 7, column : column + 7]
        response[n, 0, row, column] = 1 / (1 + math.exp(-(window * layer.response.weight[0]).sum().item()))
    mask = response > 0.8
    assert 5 < mask.sum() < 55
    gamma = (1 + F.conv2d(response, layer.gamma.weight, layer.gamma.bias, padding=3)).expand_as(x)
    beta = F.conv2d(response, layer.beta.weight, layer.beta.bias, padding=3).expand_as(x)
    torch.testing.assert_close(layer(x), literal_region_norm(x, mask, gamma, beta), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("regions", ["mask", "learned"])
def test_derivatives_are_those_of_the_output(regions: str) -> None:
    layer = make_layer(2, regions)
    mask = (MASK[:, :, :, :2],) if regions == "mask" else ()
    x = feature_map(2, 2, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x, *mask))
    assert torch.autograd.gradgradcheck(layer, (x, *mask))
    layer(x, *mask).square().sum().backward()
    assert all(parameter.grad.abs().max() > 1e-6 for parameter in layer.parameters())


def test_an_offset_loses_no_digits() -> None:
    x = (feature_map(1, 2, 16, 16).float() + 1e4).double()  # what float32 holds of it
    mask = torch.arange(256).view(1, 1, 16, 16) % 3 == 0
    torch.testing.assert_close(
        normalize_regions(x.float(), mask).double(), normalize_regions(x, mask), rtol=0, atol=3e-3
    )


@pytest.mark.parametrize("regions", ["mask", "learned"])
def test_statistics_keep_float32_under_autocast_and_bfloat16(regions: str) -> None:
    """Values 256 and 258, half of the pixels each: their mean, 257, is no bfloat16, and their variance is 1."""
    x = torch.where(torch.arange(4096).view(1, 1, 64, 64) % 2 == 0, 256.0, 258.0).expand(1, 2, 64, 64).contiguous()
    mask = (torch.zeros(1, 1, 64, 64),) if regions == "mask" else ()
    layer = RegionNorm2d(2, regions=regions)
    if regions == "learned":
        for convolution in (layer.response, layer.gamma, layer.beta):
            torch.nn.init.zeros_(convolution.weight)
        torch.nn.init.zeros_(layer.gamma.bias), torch.nn.init.zeros_(layer.beta.bias)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x, *mask), x - 257, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        out = layer.bfloat16()(x.bfloat16(), *mask)
    assert out.dtype == torch.bfloat16 and torch.equal(out.float(), x - 257)


def test_wrong_arguments_are_told_what_was_expected() -> None:
    x = torch.zeros(2, 4, 2, 3)
    with pytest.raises(ValueError, match=r'got a mask, but regions="learned" finds its own; leave it out'):
        RegionNorm2d(4, regions="learned")(x, MASK)
    for mask, got in ((None, "None"), (MASK[:1], r"\(1, 1, 2, 3\)")):
        with pytest.raises(ValueError, match=rf"got a mask {got} for \(2, 4, 2, 3\); expected \[N, 1, H, W\]"):
            RegionNorm2d(4)(x, mask)
    with pytest.raises(ValueError, match=r"got torch.float32 \(2, 4, 2, 3\); expected a floating feature map \[N, 8,"):
        RegionNorm2d(8)(x)
    with pytest.raises(ValueError, match=r"regions 'soft', threshold 0.8; expected .* one of mask, learned"):
        RegionNorm2d(8, regions="soft")
