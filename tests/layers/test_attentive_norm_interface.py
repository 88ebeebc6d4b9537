"""AttentiveNorm2d as its users meet it: random numbers, initial values, names, messages, errors."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from attnorm import AttentiveNorm2d
from attnorm.ops import dispatch
from tests.layers.conftest import feature_map, make_layer, seeded

# Randomness


def test_evaluation_draws_no_random_number() -> None:
    layer, x, generator = make_layer().eval(), feature_map(2, 4, 4, 4), seeded()
    before, generator_before = torch.get_rng_state(), generator.get_state()
    assert torch.equal(layer(x), layer(x, generator=generator))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(generator.get_state(), generator_before)


def test_training_draws_from_the_generator_it_is_given_or_the_global_one() -> None:
    layer, x = make_layer(), feature_map(2, 4, 6, 6)
    before, generator = torch.get_rng_state(), seeded()
    first, second = (layer(x, generator=generator) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, layer(x, generator=seeded())) and not torch.equal(first, second)
    torch.manual_seed(2)
    third = layer(x)
    assert torch.equal(third, first) and not torch.equal(layer(x), third)


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
        ({}, ALL_NAMES),
        ({"affine": False}, ALL_NAMES - {"weight", "bias"}),
        ({"value_projection": False}, ALL_NAMES - {"value.weight", "value.bias"}),
        ({"self_sampling": False}, ALL_NAMES - {"key.weight", "key.bias", "query.weight", "query.bias", "t"}),
        ({"moments": "batch"}, ALL_NAMES | {"running_mean", "running_var"}),
    ],
    ids=["defaults", "affine-off", "value-off", "self-sampling-off", "batch"],
)
def test_state_dict_names(switches: dict[str, Any], names: set[str]) -> None:
    moments = {"feature_mean", "feature_var", "num_batches_tracked"}  # of the features, which tau by itself needs
    assert set(AttentiveNorm2d(8, **switches).state_dict()) == names | moments
    assert set(AttentiveNorm2d(8, temperature=0.1, **switches).state_dict()) == names


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 5, 4, 4), r"got 5 channels.*expected a floating .*\[N, 4, H, W\]"),
        (torch.zeros(4, 4, 4), r"got 3 dimensions.*expected a floating .*\[N, 4, H, W\]"),
        (torch.zeros(2, 4, 4, 4, dtype=torch.int64), r"got a tensor of torch.int64.*floating"),
        ([[0.0]], r"got list.*expected a floating feature map"),
        (torch.zeros(2, 4, 0, 3), r"without a pixel, \(2, 4, 0, 3\).*H and W at least 1"),
    ],
    ids=["channels", "3-D", "integer", "list", "no-rows"],
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
    for sizes in ({"num_features": 0}, {"num_features": 4, "num_entities": 0}, {"num_features": 4, "reduction": 0}):
        with pytest.raises(
            ValueError, match=r"num_features is \d, num_entities \d+, reduction \d; expected at least 1"
        ):
            AttentiveNorm2d(**sizes)


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
