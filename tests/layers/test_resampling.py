"""What is done in one step is what two steps do: values, gradients of two orders, weights by their names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from attnorm.layers.resampling import DownConv2d, UpConv2d

LAYERS = {"up": UpConv2d, "down": DownConv2d}


def in_two_steps(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if name == "up":
        return F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, bias, padding=1)
    return F.avg_pool2d(F.conv2d(x, weight, bias, padding=1), 2)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [(4, 4), (6, 10), (2, 2)])
def test_values_and_gradients_of_two_orders_are_those_of_two_steps(name: str, size: tuple[int, int]) -> None:
    layer = LAYERS[name](3, 5).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    of = (x, *layer.parameters())
    results = []
    for y in (layer(x), in_two_steps(name, x, layer.weight, layer.bias)):
        first = torch.autograd.grad(y.pow(3).sum(), of, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), of)
        results.append((y, *first, *second))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
def test_evaluation_agrees_with_training(name: str) -> None:
    layer = LAYERS[name](4, 4)
    x = torch.randn(2, 4, 8, 8)
    in_training = layer(x)
    torch.testing.assert_close(layer.eval()(x), in_training, rtol=1e-5, atol=1e-5)


def test_an_odd_row_and_column_are_dropped_in_both_modes() -> None:
    layer = DownConv2d(2, 3)
    x = torch.randn(1, 2, 7, 5)
    in_training = layer(x)
    assert in_training.shape == (1, 3, 3, 2)
    torch.testing.assert_close(layer.eval()(x), in_training, rtol=1e-5, atol=1e-5)


def test_bilinear_is_interpolated_in_training_too() -> None:
    layer = UpConv2d(2, 3, upsampling="bilinear")
    x = torch.randn(1, 2, 4, 4)
    doubled = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(layer(x), F.conv2d(doubled, layer.weight, layer.bias, padding=1))


@pytest.mark.parametrize("name", LAYERS)
def test_by_its_weights_it_is_a_convolution(name: str) -> None:
    layer, plain = LAYERS[name](3, 4), nn.Conv2d(3, 4, 3, padding=1)
    assert {key: value.shape for key, value in layer.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(layer(x), in_two_steps(name, x, plain.weight, plain.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_are_loaded_where_there_was_no_memory_are_all_it_needs(name: str) -> None:
    with torch.device("meta"):
        layer = LAYERS[name](3, 4)
    layer.to_empty(device="cpu")
    assert not list(layer.buffers())  # which nothing would fill
    whole = LAYERS[name](3, 4)
    layer.load_state_dict(whole.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(layer(x), whole(x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_norm_of_its_weight_counts(name: str) -> None:
    layer = spectral_norm(LAYERS[name](3, 4))
    x = torch.randn(2, 3, 6, 6)
    made = layer(x)
    # The weight as it was then: another look in training would be another power iteration.
    torch.testing.assert_close(made, in_two_steps(name, x, layer.eval().weight, layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_summed_before_autocast_rounds_them(name: str) -> None:
    layer = LAYERS[name](1, 1)
    with torch.no_grad():  # of bfloat16's numbers 1 + 2^-7 is the next above 1
        layer.weight.copy_(torch.tensor([[[[0, 0, 0], [0, 1 + 2**-8, 2**-8], [0, 0, 0]]]]))
        nn.init.zeros_(layer.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = layer(torch.ones(1, 1, 4, 4))
    assert made.dtype == torch.bfloat16 and made.max().item() == 1 + 2**-7
