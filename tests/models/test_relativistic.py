"""R3GAN's networks against their equations."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.config import ClassConditionalConfig
from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.models.relativistic import GroupedBlock, RelativisticDiscriminator, RelativisticGenerator


def config(**changes: Any) -> ClassConditionalConfig:
    settings: dict[str, Any] = {"image_size": 32, "num_classes": 3, "width": 8, "latent_dim": 5, "context": "none"}
    settings |= {"architecture": "grouped", "g_channels": (4, 2, 2, 2), "an_blocks": (2,)}
    return ClassConditionalConfig(**(settings | changes))


def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution as a sum over its taps, group by group."""
    out = []
    for inputs, weight in zip(x.chunk(layer.groups, 1), layer.weight.chunk(layer.groups), strict=True):
        side = weight.shape[2]
        patches = F.unfold(inputs, side, padding=side // 2)
        out.append(torch.einsum("ok,nkp->nop", weight.flatten(1), patches).unflatten(2, x.shape[2:]))
    h = torch.cat(out, 1)
    return h if layer.bias is None else h + layer.bias[:, None, None]


def test_a_block_is_one_by_one_grouped_three_by_three_one_by_one_and_the_sum() -> None:
    torch.manual_seed(0)
    block = GroupedBlock(24, 8).double()
    nn.init.normal_(block.conv3.weight)
    nn.init.normal_(block.conv2.bias)
    x = torch.randn(2, 24, 5, 5, dtype=torch.float64)
    assert block.conv2.groups == 3  # 16 of the 48 hidden channels each

    def leaky(h: Tensor) -> Tensor:
        return torch.where(h > 0, h, 0.2 * h)

    expected = x + conv(block.conv3, leaky(conv(block.conv2, leaky(conv(block.conv1, x)))))
    torch.testing.assert_close(block(x), expected)


def test_the_start_is_fixups() -> None:
    torch.manual_seed(0)
    block = GroupedBlock(256, 8)
    x = torch.randn(1, 256, 4, 4)
    assert torch.equal(block(x), x)  # the last convolution is 0
    gain = math.sqrt(2 / 1.04) * 8**-0.25
    for layer, fan_in in ((block.conv1, 256), (block.conv2, 16 * 9)):
        assert layer.weight.std().item() == pytest.approx(gain / math.sqrt(fan_in), rel=0.03)


def test_the_generator_scales_learnt_maps_by_latent_and_class() -> None:
    torch.manual_seed(0)
    generator = RelativisticGenerator(config()).double()
    z, labels = torch.randn(2, 5, dtype=torch.float64), torch.tensor([2, 0])
    scale = torch.cat([z, generator.embedding.weight[:, labels].T], 1) @ generator.linear.weight.T
    h = generator.basis * scale[:, :, None, None]
    for number, (change, stage) in enumerate(zip(generator.changes, generator.stages, strict=True)):
        h = change(h)
        h = F.interpolate(h, scale_factor=2, mode="bilinear") if number else h
        h = stage(h)
    images = generator(z, labels)
    torch.testing.assert_close(images, generator.to_rgb(h))
    assert images.shape == (2, 3, 32, 32)
    mixture = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(generator(z, mixture), images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in generator.modules())


@pytest.mark.parametrize("has_context", [False, True])
def test_context_blocks_are_where_the_map_has_16_pixels(has_context: bool) -> None:
    networks = (
        RelativisticGenerator(config(context="an")),
        RelativisticDiscriminator(config(context="an"), has_context=has_context),
    )
    sides = []
    for network in networks:
        for module in network.modules():
            if isinstance(module, AttentiveNorm2d):
                module.register_forward_hook(lambda *arguments: sides.append(arguments[2].shape[2]))
    images, labels = networks[0](torch.randn(2, 5), torch.tensor([0, 1])), torch.tensor([1, 2])
    seen = []
    networks[1].linear.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    scores = networks[1](images, labels)
    assert sides == [16] * (1 + has_context)
    torch.testing.assert_close(scores, (seen[0] * networks[1].embedding.weight.T[labels]).sum(1))  # the class's row


def test_the_published_networks_have_the_published_size() -> None:
    from attnorm.presets import PRESETS

    model = PRESETS["cifar10-relativistic-none"][1].model
    assert [m * model.width for m in model.g_channels] == [768] * 4
    with torch.device("meta"):
        generator = RelativisticGenerator(replace(model, num_classes=10))
    assert generator.stages[0][0].conv2.groups == 96
