"""The named runs: every row of the paper's tables in every family, differing in what the name says."""

from __future__ import annotations

from typing import Any

import pytest

from attnorm.config import Config, flatten, from_dict, to_dict
from attnorm.presets import FAMILIES, PRESETS

ROWS: dict[str, dict[str, Any]] = {
    "an": {},
    "sagan": {"model.context": "self_attention"},
    "sngan": {"model.context": "none", "model.g_spectral_norm": False},
    "sngan-star": {"model.context": "none"},
    "acgan": {"model.context": "none", "model.g_spectral_norm": False, "model.head": "auxiliary"},
    "an-n8": {"model.an.num_entities": 8},
    "an-n32": {"model.an.num_entities": 32},
    "an-no-ssr": {"model.an.self_sampling": False},
    "an-no-orth": {"optim.orthogonality_weight": 0.0},
    "an-bn": {"model.an.moments": "batch"},
}


@pytest.mark.parametrize("family", ["paper-imagenet128", "cifar10", "imagenette64", "imagenette128"])
def test_a_family_has_every_row_and_rows_differ_in_what_they_say(family: str) -> None:
    base = flatten(PRESETS[f"{family}-an"][1])
    for row, expected in ROWS.items():
        values = flatten(PRESETS[f"{family}-{row}"][1])
        assert values.pop("preset") == f"{family}-{row}"
        assert values.keys() == base.keys() - {"preset"}
        assert {key: value for key, value in values.items() if value != base[key]} == expected, row


def test_there_are_no_others() -> None:
    assert set(PRESETS) == {f"{family}-{row}" for family in FAMILIES for row in ROWS} | {"demo", "smoke"}
    assert len(PRESETS) == 42
    descriptions = [description for description, _ in PRESETS.values()]
    assert all(descriptions) and not any("\n\n" in description for description in descriptions)


def test_the_attentive_norm_of_a_family_is_the_papers() -> None:
    for family in FAMILIES:
        model, optim = PRESETS[f"{family}-an"][1].model, PRESETS[f"{family}-an"][1].optim
        assert model.an.num_entities == 16 and model.an.self_sampling and model.an.moments == "instance", family
        assert model.an_blocks == (3,) and model.g_spectral_norm and model.d_spectral_norm, family
        assert optim.orthogonality_weight == 1e-3 and (optim.g_lr, optim.d_lr) == (1e-4, 4e-4), family


@pytest.mark.parametrize(
    ("family", "image_size", "flip"),
    [("cifar10", 32, False), ("imagenette64", 64, True), ("imagenette128", 128, True)],
)
def test_families_have_their_size(family: str, image_size: int, flip: bool) -> None:
    config = PRESETS[f"{family}-an"][1]
    assert config.model.image_size == image_size and config.data.flip == flip
    assert config.optim.ema_decay == 0.999


def test_only_demo_and_smoke_have_data_of_their_own() -> None:
    for name, (_, config) in PRESETS.items():
        assert config.data.source == ("builtin" if name in ("demo", "smoke") else ""), name


def test_demo_stops_within_five_minutes_and_smoke_is_tiny() -> None:
    demo, smoke = PRESETS["demo"][1], PRESETS["smoke"][1]
    assert 0 < demo.run.max_minutes <= 5
    assert smoke.run.duration_images // smoke.run.batch_size <= 50 and smoke.model.width <= 8
    assert smoke.run.checkpoint_every_images < smoke.run.duration_images  # resuming is tried too


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back_from_json(name: str) -> None:
    assert from_dict(Config, to_dict(PRESETS[name][1])) == PRESETS[name][1]
