"""The named runs: every row of the paper's tables in every family, differing in what the name says."""

from __future__ import annotations

from typing import Any

import pytest

from attnorm.presets import FAMILIES, INPAINTING_FAMILIES, PRESETS
from attnorm.settings import flatten

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

INPAINTING: dict[str, tuple[str, ...]] = {
    "paper-streetview256": ("an", "an-auto", "contextual", "none"),
    "inpaint128": ("an", "an-fixed", "an-wide", "contextual", "self_attention", "region", "none"),
    "inpaint64": ("an", "an-fixed", "an-wide", "contextual", "self_attention", "region", "none"),
    "inpaint128-small": ("an", "contextual", "none"),
    "inpaint-smoke": ("an", "contextual", "none"),
}

NAMES = {"preset", "family", "row"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_every_row_and_rows_differ_in_what_they_say(family: str) -> None:
    base = flatten(PRESETS[f"{family}-an"][1])
    for row, expected in ROWS.items():
        values = flatten(PRESETS[f"{family}-{row}"][1])
        assert (values.pop("preset"), values.pop("family"), values.pop("row")) == (f"{family}-{row}", family, row)
        assert values.keys() == base.keys() - {"preset", "family", "row"}
        assert {key: value for key, value in values.items() if value != base[key]} == expected, row


def test_there_are_no_others() -> None:
    inpainting = {f"{family}-{row}" for family, rows in INPAINTING.items() for row in rows}
    conditional = {f"{family}-{row}" for family in FAMILIES for row in ROWS}
    conditional |= {f"paper-imagenet128-{row}-auto" for row in ROWS if row.startswith("an")}
    conditional |= {f"{family}-an-fixed" for family in FAMILIES if family != "paper-imagenet128"}
    recipes = {"cifar10-projected", "cifar10-relativistic", "small32-relativistic"}
    of_today = {f"{family}-{context}" for family in recipes for context in ("an", "self_attention", "none")}
    assert set(PRESETS) == conditional | inpainting | of_today | {"demo", "smoke", "inpaint-smoke"}
    descriptions = [description for description, _ in PRESETS.values()]
    assert all(descriptions) and not any("\n\n" in description for description in descriptions)


def test_the_attentive_norm_of_a_family_is_the_papers() -> None:
    for family in FAMILIES:
        model, optim = PRESETS[f"{family}-an"][1].model, PRESETS[f"{family}-an"][1].optim
        assert model.an.num_entities == 16 and model.an.self_sampling and model.an.moments == "instance", family
        assert model.an_blocks == (3,) and model.g_spectral_norm and model.d_spectral_norm, family
        assert optim.orthogonality_weight == 1e-3, family
        if family != "small32":  # whose runs are far shorter
            assert (optim.g_lr, optim.d_lr) == (1e-4, 4e-4), family


def test_only_demo_and_smoke_have_data_of_their_own() -> None:
    for name, (_, config) in PRESETS.items():
        is_own = name == "demo" or name.startswith(("smoke", "inpaint-smoke"))
        assert config.data.source == ("builtin" if is_own else ""), name


def test_the_rows_of_smoke_are_smoke_but_for_the_number_of_entities() -> None:
    rows, single = flatten(PRESETS["smoke-an"][1]), flatten(PRESETS["smoke"][1])
    assert {key for key in rows if rows[key] != single[key]} == NAMES | {"model.an.num_entities"}
    single = flatten(PRESETS["inpaint-smoke"][1])
    rows = flatten(PRESETS["inpaint-smoke-an"][1])
    assert {key for key in rows if rows[key] != single[key]} == NAMES


def test_demo_stops_within_five_minutes_and_smoke_is_tiny() -> None:
    demo, smoke = PRESETS["demo"][1], PRESETS["smoke"][1]
    assert 0 < demo.run.max_minutes <= 5
    assert smoke.run.duration_images // smoke.run.batch_size <= 50 and smoke.model.width <= 8
    assert smoke.run.checkpoint_every_images < smoke.run.duration_images  # resuming is tried too


@pytest.mark.parametrize("family", INPAINTING)
def test_the_arms_of_an_inpainting_family_differ_in_their_context_block_alone(family: str) -> None:
    assert INPAINTING_FAMILIES[family][1] == INPAINTING[family]
    base = flatten(PRESETS[f"{family}-an"][1])
    for row in INPAINTING[family]:
        values = flatten(PRESETS[f"{family}-{row}"][1])
        block = row.removesuffix("-auto").removesuffix("-fixed")
        assert (values.pop("preset"), values.pop("row")) == (f"{family}-{row}", row)
        assert values.pop("model.context") == block
        if row in ("an-auto", "an-fixed"):
            assert values.pop("model.an.temperature") == {"an-auto": "auto", "an-fixed": None}[row]
        assert values.items() <= base.items(), row


def test_the_papers_presets_keep_its_tau_and_have_twins_with_the_layers_own() -> None:
    for row in (row for row in ROWS if row.startswith("an")):
        printed, twin = (flatten(PRESETS[f"paper-imagenet128-{row}{more}"][1]) for more in ("", "-auto"))
        assert printed["model.an.temperature"] == 0.1
        assert {key for key in twin if twin[key] != printed[key]} == {"preset", "row", "model.an.temperature"}
        assert twin["model.an.temperature"] == "auto"
    for name, (_, config) in PRESETS.items():
        is_paper = name.startswith("paper-") and not name.endswith("-auto")
        assert config.model.an.temperature == (0.1 if is_paper else None if name.endswith("-fixed") else "auto"), name


def test_inpainting_has_the_papers_losses_and_optimiser() -> None:
    for name, (_, config) in PRESETS.items():
        if config.task != "inpainting":
            continue
        assert config.inpainting is not None and not config.model.an.affine, name  # row 3
        assert config.inpainting.reconstruction_weight == 1.2 and config.inpainting.adversarial_weight == 1e-3, name
        assert config.inpainting.gradient_penalty_weight == 10 and not config.inpainting.gp_mask, name
        assert config.optim.d_lr == 1e-4 and config.optim.d_steps == 5 and config.optim.beta1 == 0.5, name
        assert config.data.held_out_every >= 2, name
        switch, duration = config.inpainting.switch_images, config.run.duration_images
        departs = (config.inpainting.hole_weight, config.optim.g_lr, config.optim.beta2)
        if config.family in ("inpaint64", "inpaint128-small"):  # row 18: reconstruction alone, and what makes it quick
            assert departs == (6, 2e-4, 0.99) and switch == duration, name
        else:
            assert departs == (1, 1e-4, 0.9), name
            assert (switch == 0) == name.startswith("paper-") and switch < duration, name
    paper = PRESETS["paper-streetview256-an"][1]
    assert paper.model.image_size == 256 and paper.model.width == 32 and paper.data.fit == "street-view"
    assert paper.model.temperature == pytest.approx(0.1)
    for family in ("inpaint64", "inpaint128-small"):
        assert PRESETS[f"{family}-an"][1].model.width == 16
    for family in ("inpaint64", "inpaint128", "inpaint128-small"):
        assert PRESETS[f"{family}-an"][1].data.held_out_every == 10
