"""AttentiveNorm2d as its users meet it: random numbers, initial values, names, messages, errors."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnorm import AttentiveNorm2d
from attnorm.ops import dispatch


def make_layer(**switches: Any) -> AttentiveNorm2d:
    torch.manual_seed(0)
    layer = AttentiveNorm2d(4, 3, temperature=0.5, **switches)
    nn.init.constant_(layer.rho, 0.7)  # or the layer would be the identity
    return layer


def feature_map(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(1))


def seeded(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Randomness


def test_evaluation_draws_no_random_number_and_is_deterministic() -> None:
    layer = make_layer().eval()
    x = feature_map(2, 4, 4, 4)
    torch.manual_seed(3)
    generator = seeded()
    before, generator_before = torch.get_rng_state(), generator.get_state()
    first, second, third = layer(x), layer(x, generator=generator), layer(x, generator=seeded(7))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generator.get_state(), generator_before)
    assert torch.equal(first, second) and torch.equal(first, third)


def test_training_draws_from_the_generator_it_is_given() -> None:
    layer = make_layer()
    x = feature_map(2, 4, 6, 6)
    torch.manual_seed(3)
    before, generator = torch.get_rng_state(), seeded()
    first = layer(x, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(generator.get_state(), seeded().get_state())
    assert torch.equal(first, layer(x, generator=seeded()))
    assert not torch.equal(first, layer(x, generator=generator))


def test_training_without_a_generator_draws_from_the_global_one() -> None:
    layer = make_layer()
    x = feature_map(2, 4, 6, 6)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = layer(x), layer(x)
    assert not torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)


# Names, messages, errors


def test_new_layer_has_the_papers_initial_values() -> None:
    torch.manual_seed(0)
    layer = AttentiveNorm2d(256)
    assert layer.num_entities == 16 and layer.temperature == "auto"
    assert torch.equal(layer.t, torch.full((16,), 0.1))
    assert torch.equal(layer.weight, torch.ones(16, 256))
    assert torch.equal(layer.bias, torch.zeros(16, 256))
    assert layer.key.out_channels == layer.query.out_channels == 32
    # N(0, 1): 4,096 draws, so the mean is within 0.016 and the deviation within 0.011 two times in three.
    assert abs(layer.entities.weight.mean().item()) < 0.06
    assert layer.entities.weight.std().item() == pytest.approx(1, abs=0.04)


ALL_NAMES = {
    *("entities.weight", "key.weight", "key.bias", "query.weight", "query.bias", "value.weight", "value.bias"),
    *("t", "weight", "bias", "rho"),
}


@pytest.mark.parametrize(
    ("switches", "names"),
    [
        pytest.param({}, ALL_NAMES, id="defaults"),
        pytest.param({"affine": False}, ALL_NAMES - {"weight", "bias"}, id="affine-off"),
        pytest.param({"value_projection": False}, ALL_NAMES - {"value.weight", "value.bias"}, id="value-off"),
        pytest.param(
            {"self_sampling": False},
            ALL_NAMES - {"key.weight", "key.bias", "query.weight", "query.bias", "t"},
            id="self-sampling-off",
        ),
        pytest.param({"moments": "batch"}, ALL_NAMES | {"running_mean", "running_var"}, id="batch"),
    ],
)
def test_state_dict_names(switches: dict[str, Any], names: set[str]) -> None:
    moments = {"feature_mean", "feature_var", "num_batches_tracked"}  # of the features, which tau by itself needs
    assert set(AttentiveNorm2d(8, **switches).state_dict()) == names | moments
    assert set(AttentiveNorm2d(8, temperature=0.1, **switches).state_dict()) == names


@pytest.mark.parametrize(
    ("x", "message"),
    [
        pytest.param(torch.zeros(2, 5, 4, 4), r"got 5 channels.*expected a floating .*\[N, 4, H, W\]", id="channels"),
        pytest.param(torch.zeros(4, 4, 4), r"got 3 dimensions.*expected a floating .*\[N, 4, H, W\]", id="3-D"),
        pytest.param(
            torch.zeros(2, 4, 4, 4, dtype=torch.int64), r"got a tensor of torch.int64.*floating", id="integer"
        ),
        pytest.param([[0.0]], r"got list.*expected a floating feature map", id="list"),
        pytest.param(torch.zeros(2, 4, 0, 3), r"without a pixel, \(2, 4, 0, 3\).*H and W at least 1", id="no-rows"),
        pytest.param(torch.zeros(0, 4, 3, 0), r"without a pixel, \(0, 4, 3, 0\).*H and W at least 1", id="no-columns"),
    ],
)
def test_wrong_input_is_told_what_was_expected(x: Any, message: str) -> None:
    layer = AttentiveNorm2d(4)
    with pytest.raises(ValueError, match=message):
        layer(x)
    with pytest.raises(ValueError, match=message):
        layer.layout(x)


@pytest.mark.parametrize("switch", ["statistics", "moments", "orthogonality", "impl"])
def test_unknown_switch_value_is_told_the_choices(switch: str) -> None:
    with pytest.raises(ValueError, match=rf"{switch} is 'unknown'; expected one of \w+, \w+"):
        AttentiveNorm2d(4, **{switch: "unknown"})


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (4, 4, 0)], ids=["features", "entities", "reduction"])
def test_a_size_of_zero_is_an_error(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"num_features is \d, num_entities \d, reduction \d; expected at least 1"):
        AttentiveNorm2d(*sizes[:2], reduction=sizes[2] if len(sizes) > 2 else 8)


def test_every_fall_back_is_logged_once_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    layer = make_layer(statistics="masked")
    x = feature_map(1, 4, 3, 3)
    with caplog.at_level(logging.INFO, logger="attnorm"):
        layer(x)
        layer(x)
        make_layer(impl="fused")(x)  # asked for: nothing falls back
    assert [record.getMessage() for record in caplog.records] == [
        "AttentiveNorm2d: not using the native implementation: statistics='masked' with moments='instance' is computed "
        "by the plain implementations only",
        "AttentiveNorm2d: not using the fused implementation: statistics='masked' has the reference form only",
    ]
