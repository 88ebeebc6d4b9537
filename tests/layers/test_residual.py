"""The residual blocks against formulas written in the textbook order of operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm import AttentiveNorm2d, SelfAttention2d
from attnorm.layers.conditional_norm import ConditionalBatchNorm2d
from attnorm.layers.residual import DownBlock, UpBlock

# Nearest upsampling and average pooling commute with a 1x1 convolution, so the blocks may take the cheaper order: in
# float64 that is a matter of 1e-15.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-10}

LABELS = torch.tensor([1, 0, 2])


def randomized(block: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
    return block.double()


def feature_map(channels: int, size: int = 4) -> Tensor:
    """Of mean 0: half of what a rectified skip would lose."""
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def upsample(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def pool(x: Tensor) -> Tensor:
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def rectify(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def conv(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, convolution.weight, convolution.bias, padding=convolution.kernel_size[0] // 2)


def conditional_norm(norm: ConditionalBatchNorm2d, x: Tensor) -> Tensor:
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    gamma, beta = norm.gamma.weight[LABELS][:, :, None, None], norm.beta.weight[LABELS][:, :, None, None]
    return gamma * (x - mean) / torch.sqrt(var + 1e-5) + beta


def up_formula(block: Any, x: Tensor) -> Tensor:
    h = conv(block.conv1, upsample(rectify(conditional_norm(block.norm1, x))))
    if block.an is not None:
        h = block.an(h)
    if block.norm2 is not None:
        h = conditional_norm(block.norm2, h)
    h = conv(block.conv2, rectify(h))
    h = h + conv(block.shortcut, upsample(x))
    return h if block.after is None else block.after(h)


@pytest.mark.parametrize("channels", [(4, 2), (3, 3)], ids=["narrower", "same"])
@pytest.mark.parametrize("site", [None, "replace", "insert"])
def test_up_block_is_norm_relu_up_conv_norm_relu_conv_plus_shortcut(channels: tuple[int, int], site: Any) -> None:
    """With AN before the second activation, and attention after the sum."""
    an = None if site is None else AttentiveNorm2d(channels[1], 3, self_sampling=False)
    after = SelfAttention2d(channels[1])
    block: Any = randomized(UpBlock(*channels, 3, an=an, site=site or "replace", after=after))
    assert (block.norm2 is None) == (site == "replace")
    x = feature_map(channels[0])
    out = block(x, LABELS)
    assert out.shape == (3, channels[1], 8, 8)
    torch.testing.assert_close(out, up_formula(block, x), **TOLERANCE)
    assert (an is None or an.rho.abs() > 0.1) and after.gate.abs() > 0.01  # both count


def down_formula(block: Any, x: Tensor) -> Tensor:
    h = conv(block.conv1, x if block.is_first else rectify(x))
    if block.an is not None:
        h = block.an(h)
    h = conv(block.conv2, rectify(h))
    skip = x if block.shortcut is None else conv(block.shortcut, x)
    h = pool(h) + pool(skip) if block.downsample else h + skip
    return h if block.after is None else block.after(h)


@pytest.mark.parametrize("is_first", [False, True], ids=["inner", "first"])
@pytest.mark.parametrize(
    ("channels", "downsample", "has_shortcut"),
    [((2, 4), True, True), ((3, 3), True, True), ((3, 3), False, False), ((2, 4), False, True)],
    ids=["wider-down", "same-down", "same-flat", "wider-flat"],
)
def test_down_block_is_relu_conv_relu_conv_pool_plus_raw_skip(
    channels: tuple[int, int], downsample: bool, has_shortcut: bool, is_first: bool
) -> None:
    an = AttentiveNorm2d(channels[1], 3, self_sampling=False)
    after = None if is_first else SelfAttention2d(channels[1])
    block: Any = randomized(DownBlock(*channels, downsample=downsample, is_first=is_first, an=an, after=after))
    assert (block.shortcut is not None) == has_shortcut
    x = feature_map(channels[0])
    kept = x.clone()
    out = block(x)
    assert torch.equal(x, kept), "the input was changed in place: the skip path is no longer raw"
    torch.testing.assert_close(out, down_formula(block, x), **TOLERANCE)
