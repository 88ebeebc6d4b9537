"""The fixed feature network against timm's own, in value and in gradient."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from attnorm.models.feature_network import CHANNELS, DEVIATIONS, STAGES, FeatureNetwork, FixedConvolution, _pretrained


@pytest.fixture(scope="module")
def networks() -> Any:
    return FeatureNetwork(), _pretrained().requires_grad_(False)


def timms_maps(network: Any, images: torch.Tensor) -> list[torch.Tensor]:
    x = network.bn1(network.conv_stem(((images + 1) * 127.5 - 127) / 128))
    maps = []
    for index, stage in enumerate(network.blocks):
        x = stage(x)
        if index in STAGES:
            maps.append(x)
    return maps


@pytest.mark.parametrize("side", [32, 50])  # 50 is 25, 13, 7, 4, 2: odd sides are padded on one side only
def test_maps_and_the_images_gradient_are_timms(networks: Any, side: Any) -> None:
    # In double precision: where rounding moves a value over a corner of ReLU6, its gradient is another.
    ours, theirs = (copy.deepcopy(network).double() for network in networks)
    images = (torch.rand(2, 3, side, side, dtype=torch.float64) * 2 - 1).requires_grad_()
    expected = [m / d for m, d in zip(timms_maps(theirs, images), DEVIATIONS, strict=True)]
    maps = ours(images)
    assert [m.shape[1] for m in maps] == list(CHANNELS)
    directions = [torch.randn_like(m) for m in maps]
    gradients = [
        torch.autograd.grad(sum((m * d).sum() for m, d in zip(result, directions, strict=True)), images)[0]
        for result in (maps, expected)
    ]
    for got, wanted in zip([*maps, gradients[0]], [*expected, gradients[1]], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_what_is_classified_is_what_the_weights_were_trained_for(networks: Any) -> None:
    """The file's names are another library's: paired in the wrong order, the network would not know a photograph."""
    from skimage import data

    cat = torch.from_numpy(data.chelsea()[:300, 75:375].copy()).permute(2, 0, 1)[None].float()
    logits = networks[1]((cat - 127) / 128)
    assert 281 <= logits.argmax().item() <= 285  # ImageNet's domestic cats
    for m in networks[0](cat / 127.5 - 1):  # DEVIATIONS are those of photographs
        assert 0.5 < m.std().item() < 2


@pytest.mark.parametrize(("stride", "kernel", "side"), [(1, 3, 9), (2, 3, 8), (2, 3, 9), (2, 5, 8), (2, 5, 9)])
@pytest.mark.parametrize("depthwise", [True, False])
def test_the_gradient_of_a_fixed_convolution_is_autograds(stride: Any, kernel: Any, side: Any, depthwise: Any) -> None:
    channels = 4
    convolution = nn.Conv2d(channels, channels, kernel, stride, groups=channels if depthwise else 1, bias=False)
    norm = nn.BatchNorm2d(channels).eval()
    nn.init.normal_(norm.weight)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    convolution, norm = convolution.double(), norm.double()
    layer = FixedConvolution(convolution, norm, rectifies=True).double()
    x = torch.randn(2, channels, side, side, dtype=torch.float64, requires_grad=True)
    (before, after) = layer.padding(side)
    padded = nn.functional.pad(x, (before, after, before, after))
    expected = norm(convolution(padded)).clamp(0, 6)
    direction = torch.randn_like(expected)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)  # the folded weights are float32's
    (wanted,) = torch.autograd.grad((expected * direction).sum(), x)
    (got,) = torch.autograd.grad((layer(x) * direction).sum(), x)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_nothing_of_it_learns_or_goes_into_a_checkpoint(networks: Any) -> None:
    assert not list(networks[0].parameters())
    assert not networks[0].state_dict()
