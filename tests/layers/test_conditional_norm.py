"""ConditionalBatchNorm2d against its formula, image by image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnorm.layers.conditional_norm import ConditionalBatchNorm2d


def make_layer() -> ConditionalBatchNorm2d:
    """Random tables, and running moments that are not those of the batches below."""
    torch.manual_seed(0)
    layer = ConditionalBatchNorm2d(3, 4).double()
    with torch.no_grad():
        layer.gamma.weight.normal_()
        layer.beta.weight.normal_()
    layer.norm.running_mean.normal_()
    layer.norm.running_var.uniform_(0.5, 2)
    return layer


def feature_map(num_images: int) -> Tensor:
    return 2 + torch.randn(num_images, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


LABELS = torch.tensor([2, 0, 3, 2, 1])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_each_image_has_its_own_class_scale_and_shift(training: bool) -> None:
    layer, x = make_layer().train(training), feature_map(5)
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    else:
        mean, var = layer.norm.running_mean.clone(), layer.norm.running_var.clone()
    new = ConditionalBatchNorm2d(3, 4)
    assert (new.gamma.weight == 1).all() and not new.beta.weight.any()
    out = layer(x, LABELS)
    for image, label in enumerate(LABELS.tolist()):
        for channel in range(3):
            normalized = (x[image, channel] - mean[channel]) / torch.sqrt(var[channel] + 1e-5)
            expected = layer.gamma.weight[label, channel] * normalized + layer.beta.weight[label, channel]
            torch.testing.assert_close(out[image, channel], expected, rtol=1e-10, atol=1e-10)


def test_mixture_is_linear_in_the_tables() -> None:
    layer, x = make_layer().eval(), feature_map(2)
    mixture = torch.tensor([[0.25, 0.75, 0, 0], [0, 0.5, 0, 0.5]], dtype=torch.float64)
    pure = [layer(x, torch.full((2,), label)) for label in range(4)]
    expected = torch.stack([sum(mixture[image, y] * pure[y][image] for y in range(4)) for image in range(2)])
    torch.testing.assert_close(layer(x, mixture), expected, rtol=1e-10, atol=1e-10)


def test_gradient_reaches_the_mixture() -> None:
    layer, x = make_layer(), feature_map(2)
    mixture = torch.full((2, 4), 0.25, dtype=torch.float64, requires_grad=True)
    layer(x, mixture).pow(2).sum().backward()
    assert mixture.grad.abs().min() > 0
