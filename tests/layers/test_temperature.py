"""temperature="auto": the logits keep their spread, whatever the features are like (docs/paper.md, row 7)."""

from __future__ import annotations

import copy
import functools
import logging
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnorm import AttentiveNorm2d, layout_entropy
from attnorm.layers.attentive_norm import _moments
from attnorm.ops import dispatch


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels of other means and deviations each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    channel = torch.linspace(0.5, 2, shape[1], dtype=dtype)[:, None, None]
    return channel * x + 3 * channel.flip(0)


def trained(num_features: int, x: Tensor, *, batches: int = 1, seed: int = 0, **settings: object) -> AttentiveNorm2d:
    torch.manual_seed(seed)
    layer = AttentiveNorm2d(num_features, **settings).to(x.dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.rho.fill_(0.7)
        for _ in range(batches):
            layer(x)
    return layer


def spread(layer: AttentiveNorm2d, x: Tensor) -> float:
    logits = layer.layout(x).log()  # but for a number a pixel
    return logits.std(1, correction=0).square().mean().sqrt().item()


@pytest.mark.parametrize(("num_features", "scale"), [(8, 1e4), (64, 1.0), (256, 1e-4)])
def test_one_training_batch_gives_the_papers_spread_whatever_the_features(num_features: int, scale: float) -> None:
    x = scale * features(4, num_features, 12, 12)
    layer = trained(num_features, x, num_entities=64, self_sampling=False).eval()
    assert spread(layer, x) == pytest.approx(1.6, rel=0.2)  # the entities are drawn
    assert layout_entropy(layer.layout(x)) < 0.85
    small = x / scale * 0.01
    fixed = trained(num_features, small, temperature=0.1).eval()
    assert layout_entropy(fixed.layout(small)) > 0.98  # what the paper's tau makes of small features


def test_spread_comes_back_when_features_drift() -> None:
    x = features(4, 16, 8, 8)
    layer = trained(16, x, num_entities=64, batches=20, self_sampling=False)
    drifted, before = 20 * x - 50, spread(layer, x)
    assert layout_entropy(layer.layout(drifted)) < 0.3 * layout_entropy(layer.layout(x))
    with torch.no_grad():
        for _ in range(200):
            layer(drifted)
    assert spread(layer, drifted) == pytest.approx(before, rel=1e-3)


def test_moments_are_those_of_the_first_batch_and_then_follow() -> None:
    batches = [features(3, 5, 4, 6, seed=seed) * (seed + 1) for seed in range(14)]
    layer = trained(5, batches[0], batches=0)
    for number, x in enumerate(batches, start=1):
        layer(x)
        columns = x.double().transpose(0, 1).flatten(1)
        mean, var = columns.mean(1), columns.var(1, correction=0)
        share = max(1 / number, 0.1)
        if number == 1:
            expected_mean, expected_var = mean, var
        else:
            expected_mean = (1 - share) * expected_mean + share * mean
            expected_var = (1 - share) * expected_var + share * var
        torch.testing.assert_close(layer.feature_mean, expected_mean.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.feature_var, expected_var.float(), rtol=1e-5, atol=1e-5)
    assert layer.num_batches_tracked.item() == 14


def test_self_sampling_meets_standardized_features_too() -> None:
    """The same layout as that of a layer of fixed tau on features that were standardized beforehand."""
    x = 0.01 * features(2, 16, 6, 6, dtype=torch.float64)
    layer = trained(16, x, num_entities=4)
    with torch.no_grad():
        layer.t.fill_(0.8)
    fixed = AttentiveNorm2d(16, 4, temperature=1.6 / 4).double()
    fixed.load_state_dict(layer.state_dict(), strict=False)
    z = (x - layer.feature_mean[:, None, None]) / layer.feature_var.sqrt()[:, None, None]
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    got, expected = layer.layout(x, generator=draws[0]), fixed.layout(z, generator=draws[1])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(got, layer.eval().layout(x), atol=1e-2)


def test_evaluation_changes_nothing_and_draws_nothing() -> None:
    x = features(2, 8, 6, 6)
    layer = trained(8, x).eval()
    before = copy.deepcopy(layer.state_dict())
    state = torch.get_rng_state()
    first, second = layer(50 * x), layer(50 * x)
    assert torch.equal(state, torch.get_rng_state())
    layer.train().layout(50 * x)  # looking at a layout is no training either
    assert torch.equal(first, second)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_gradient_of_a_training_step_takes_the_moments_for_constants() -> None:
    x = features(2, 4, 5, 5, dtype=torch.float64).requires_grad_()
    layer = trained(4, x.detach(), num_entities=3, self_sampling=False)
    (got,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
    frozen = copy.deepcopy(layer).eval()  # with the moments that the step has left
    (expected,) = torch.autograd.grad(frozen(x).pow(3).sum(), x)
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(frozen, (x,))


def test_two_passes_before_a_backward_one_keep_each_its_moments() -> None:
    """As a discriminator has it that sees real and generated images one after the other."""
    x, y = features(2, 4, 5, 5), 30 * features(2, 4, 5, 5, seed=1)
    layer = trained(4, x, batches=0, num_entities=3, self_sampling=False)
    alone = copy.deepcopy(layer)
    (layer(x).square().sum() + 0 * layer(y).sum()).backward()
    alone(x).square().sum().backward()
    torch.testing.assert_close(layer.entities.weight.grad, alone.entities.weight.grad)
    assert not torch.equal(layer.feature_mean, alone.feature_mean)


def test_features_that_are_constant_or_not_finite_or_large_in_half_precision_do_no_harm() -> None:
    x = torch.full((2, 4, 5, 5), 7.0, requires_grad=True)
    layer = trained(4, x.detach(), num_entities=3, self_sampling=False)
    layer(x).sum().backward()
    assert layout_entropy(layer.layout(x)) > 0.9999  # rounding moves the shares of entities by a hundredth
    assert x.grad is not None and x.grad.isfinite().all()

    x = features(2, 4, 5, 5)
    layer, spoilt = trained(4, x, batches=2), x.clone()
    before = copy.deepcopy(layer.state_dict())
    spoilt[0, 1, 2, 3] = float("inf")
    layer(spoilt)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    fresh = trained(4, spoilt, batches=1)
    fresh(x)
    assert fresh.num_batches_tracked == 1 and layer(x).isfinite().all()
    torch.testing.assert_close(fresh.feature_mean, x.mean((0, 2, 3)))  # the first that counts makes them

    x = (300 * x).half()  # whose variance is beyond its range
    layer = trained(4, x, batches=3, num_entities=3, self_sampling=False, impl="fused")
    assert layer.feature_var.isfinite().all() and layer(x).isfinite().all()
    assert layout_entropy(layer.eval().layout(x)) < 0.9


def test_activation_checkpointing_has_the_gradients_of_a_plain_step() -> None:
    x = features(2, 4, 5, 5)
    for use_reentrant in (False, True):
        layer, batch = trained(4, x, num_entities=3, self_sampling=False), 3 * x + 5
        plain = copy.deepcopy(layer)
        for each, call in ((plain, plain), (layer, functools.partial(checkpoint, layer, use_reentrant=use_reentrant))):
            each.zero_grad()
            inputs = batch.clone().requires_grad_()
            call(inputs).pow(3).sum().backward()
            if each is plain:
                expected = inputs.grad
        torch.testing.assert_close(inputs.grad, expected)
        torch.testing.assert_close(layer.entities.weight.grad, plain.entities.weight.grad)
        assert layer.num_batches_tracked == plain.num_batches_tracked == 2


def test_inside_torch_func_moments_stay_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    x = features(2, 4, 5, 5)
    layer = trained(4, x)
    dispatch._said.clear()
    with caplog.at_level(logging.WARNING, logger="attnorm"):
        torch.func.grad(lambda x: layer(x).sum())(7 * x)
    assert layer.num_batches_tracked == 1 and "the features' moments stay as they are" in caplog.text


@pytest.mark.parametrize("is_renewed", [False, True], ids=["plain", "weight-norm"])
def test_moments_are_saved_and_weights_without_them_keep_their_tau(
    caplog: pytest.LogCaptureFixture, is_renewed: bool
) -> None:
    x = features(2, 8, 6, 6)
    layer, before, restored = trained(8, x), trained(8, x, temperature=0.1), AttentiveNorm2d(8)
    for each in (layer, before, restored):
        if is_renewed:
            nn.utils.parametrizations.weight_norm(each.entities)
        each.eval()
    assert not {"feature_mean", "feature_var", "num_batches_tracked"} & before.state_dict().keys()
    with caplog.at_level(logging.WARNING, logger="attnorm"):
        restored.load_state_dict(before.state_dict())
    assert restored.temperature == 0.1 and "temperature becomes 0.1" in caplog.text
    assert torch.equal(restored(x), before(x))
    restored.load_state_dict(layer.state_dict())  # and back
    assert restored.temperature == "auto" and torch.equal(restored(x), layer(x))


def test_weights_with_one_deviation_for_all_channels_have_the_layout_that_they_were_trained_with() -> None:
    x = features(2, 8, 6, 6)
    layer = trained(8, x).eval()
    state = {**layer.state_dict(), "feature_var": torch.tensor(2.5)}
    layer.load_state_dict(state)
    z = (x - layer.feature_mean[:, None, None]) / 2.5**0.5
    logits = torch.einsum("kc,nchw->nkhw", layer.entities.weight[:, :, 0, 0], z)
    torch.testing.assert_close(layer.layout(x), torch.softmax(1.6 / 8**0.5 * logits, 1))
    assert state["feature_var"].ndim == 0 and layer.feature_var.shape == (8,)


def test_no_channel_rules_the_layout_by_its_scale_and_one_that_hardly_varies_adds_little() -> None:
    x = features(4, 16, 8, 8)
    loud, still = x.clone(), x.clone()
    loud[:, 3] *= 1000
    torch.testing.assert_close(trained(16, loud).eval().layout(loud), trained(16, x).eval().layout(x))
    still[:, 3] = 5 + 1e-6 * torch.randn(4, 8, 8)
    layer, without = trained(16, still, num_entities=3).eval(), trained(16, still, num_entities=3).eval()
    nn.init.zeros_(without.entities.weight[:, 3])
    assert (layer.layout(still) - without.layout(still)).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", ["warm", None, True, 0, -1.0, math.nan])
def test_what_is_no_temperature_is_refused(temperature: object) -> None:
    with pytest.raises(ValueError, match=f"temperature is {temperature!r}; expected a positive number or 'auto'"):
        AttentiveNorm2d(8, temperature=temperature)  # type: ignore[arg-type]


def test_moments_of_a_map_of_millions_keep_their_digits() -> None:
    x = torch.randn(4, 8, 256, 256, generator=torch.Generator().manual_seed(0)) + 30
    mean, var = _moments(x)
    expected_var, expected_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), expected_var, rtol=1e-5, atol=0)
    low = _moments(x.bfloat16())
    torch.testing.assert_close(low[1].double(), x.bfloat16().double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
