"""Configurations: to JSON and back, changed with `a.b=value`, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from attnorm.config import (
    AttentiveNormConfig,
    ClassConditionalConfig,
    Config,
    ConfigError,
    DataConfig,
    InpaintingConfig,
    InpaintingTaskConfig,
    OptimiserConfig,
    RunConfig,
    printable,
)
from attnorm.presets import PRESETS
from attnorm.settings import (
    MAKES_A_ROW,
    MAY_CHANGE_ON_RESUME,
    MAY_DIFFER,
    flatten,
    from_dict,
    marked,
    override,
    to_dict,
)

INPAINTING = Config(task="inpainting", model=InpaintingConfig(), inpainting=InpaintingTaskConfig())
ODD = override(
    Config(),
    [
        "preset=of a=b, c",
        "data.source=x,-= y",
        "run.seed=4611686018427387904",
        "run.max_minutes=1e-7",
        "model.an_blocks=",
    ],
)
SMALL = [config for name, (_, config) in PRESETS.items() if name.startswith(("smoke", "small32", "inpaint"))]
EXAMPLES = [ODD, *(dataclasses.replace(config, row="") for config in SMALL)]


def test_json_round_trip_gives_the_same_configuration() -> None:
    for config in EXAMPLES:
        assert from_dict(Config, json.loads(json.dumps(to_dict(config), allow_nan=False))) == config


def test_every_leaf_can_be_set_from_text() -> None:
    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    for config in EXAMPLES:
        start = INPAINTING if config.task == "inpainting" else Config()
        leaves = flatten(config)
        if leaves.keys() == flatten(start).keys():  # a recipe's own group comes with its presets alone
            assert override(start, [f"{name}={text(value)}" for name, value in leaves.items()]) == config


def test_flatten_names_every_leaf() -> None:
    groups = (AttentiveNormConfig, ClassConditionalConfig, DataConfig, OptimiserConfig, RunConfig, Config)
    leaves = flatten(Config())
    assert leaves["model.an.num_entities"] == 16 and leaves["inpainting"] is None and "model.an" not in leaves
    assert len(leaves) == sum(len(dataclasses.fields(group)) for group in groups) - 5
    leaves = flatten(INPAINTING)
    assert leaves["model.an.affine"] is False and leaves["inpainting.reconstruction_weight"] == 1.2
    groups = (*groups[:1], InpaintingConfig, InpaintingTaskConfig, *groups[2:])
    assert len(leaves) == sum(len(dataclasses.fields(group)) for group in groups) - 6


def test_a_task_and_its_settings_go_together() -> None:
    settings = InpaintingTaskConfig()
    for values in (
        {"task": "inpainting"},
        {"task": "inpainting", "model": InpaintingConfig()},
        {"task": "inpainting", "inpainting": settings},
        {"model": InpaintingConfig()},
        {"inpainting": settings},
    ):
        with pytest.raises(ConfigError, match="but the other settings are not; choose a preset of that task"):
            Config(**values)
    with pytest.raises(ConfigError, match="task is class_conditional, but the other settings are not"):
        override(INPAINTING, ["task=class_conditional"])
    with pytest.raises(ConfigError, match=r"task is 'painting'; expected one of .*; did you mean inpainting\?"):
        from_dict(Config, {"task": "painting", "model": {}})
    with pytest.raises(ConfigError, match=r"there is no setting model\.latent_dim"):
        from_dict(Config, {"task": "inpainting", "model": {"latent_dim": 3}, "inpainting": {}})
    with pytest.raises(ConfigError, match=r"there is no setting model\.latent_dim"):
        override(INPAINTING, ["model.latent_dim=3"])
    with pytest.raises(ConfigError, match=r"inpainting is '3'; expected a group of settings or none"):
        override(Config(), ["inpainting=3"])
    with pytest.raises(ConfigError, match="inpainting is 3; expected a group of settings"):
        from_dict(Config, {"task": "inpainting", "model": {}, "inpainting": 3})


def test_what_was_written_before_there_were_two_tasks_is_read() -> None:
    values = to_dict(Config())
    del values["inpainting"], values["run"]["validate_every_images"]
    for name in ("fit", "stored_size", "held_out_every"):
        del values["data"][name]
    assert from_dict(Config, values) == Config()
    del values["task"]
    assert from_dict(Config, values) == Config()


def test_every_setting_has_one_mark_and_a_run_may_go_on_with_what_changes_nothing_of_what_is_learnt() -> None:
    settings = set(flatten(Config()))
    assert {"model.context", "model.an.eps", "optim.orthogonality_weight"} <= MAKES_A_ROW
    assert {"run.duration_images", "run.device", "data.source", "row"} <= MAY_CHANGE_ON_RESUME <= MAY_DIFFER
    assert {"run.seed", "run.precision", "preset"} <= MAY_DIFFER - MAY_CHANGE_ON_RESUME
    assert settings >= MAY_DIFFER | MAKES_A_ROW and not MAY_DIFFER & MAKES_A_ROW
    must_agree = settings - MAY_DIFFER - MAKES_A_ROW
    assert {"task", "model.width", "model.image_size", "run.batch_size", "optim.g_lr", "data.flip"} <= must_agree
    assert marked("compare", "row") == MAKES_A_ROW


def test_a_setting_of_a_row_that_is_changed_makes_it_none_and_others_do_not() -> None:
    config = Config(family="small32", row="an")
    assert override(config, ["run.batch_size=3", "model.an.num_entities=16"]).row == "an"
    changed = override(config, ["model.an.num_entities=8"])
    assert (changed.family, changed.row) == ("small32", "")


# --set


@pytest.mark.parametrize(
    ("setting", "name", "value"),
    [
        ("run.batch_size=32", "run.batch_size", 32),
        ("run.duration_images=1e6", "run.duration_images", 1_000_000),
        ("run.duration_images=6_400_000", "run.duration_images", 6_400_000),
        (" run.seed = 7 ", "run.seed", 7),
        ("optim.g_lr=2e-4", "optim.g_lr", 2e-4),
        ("optim.classifier_weight=3", "optim.classifier_weight", 3.0),
        ("run.tf32=true", "run.tf32", True),
        ("model.an.affine=false", "model.an.affine", False),
        ("model.an.affine=0", "model.an.affine", False),
        ("model.an_blocks=(1, 2)", "model.an_blocks", [1, 2]),
        ("model.an_blocks=", "model.an_blocks", []),
        ("model.context=none", "model.context", "none"),
        ("model.an.temperature=2", "model.an.temperature", 2.0),
        ("model.an.temperature=auto", "model.an.temperature", "auto"),
        ("data.source=none", "data.source", "none"),
    ],
)
def test_text_becomes_the_type_of_the_setting(setting: str, name: str, value: Any) -> None:
    before, after = flatten(Config()), flatten(override(Config(), [setting]))
    assert after[name] == value and type(after[name]) is type(value)
    assert {key for key in after if after[key] != before[key]} <= {name}


def test_none_takes_an_optional_setting_back() -> None:
    for text in ("None", "null"):
        config = override(Config(), ["model.an.temperature=0.5", f"model.an.temperature={text}"])
        assert config.model.an.temperature is None


def test_what_would_steer_a_terminal_is_shown_as_an_escape() -> None:
    assert printable("caf\u00e9 \u732b\n\t$5_$10 [b]") == "caf\u00e9 \u732b\n\t$5_$10 [b]"
    assert printable("\x1b[31m\x00\x7f\x9b\u202e\udce9\ud800") == r"\x1b[31m\x00\x7f\x9b\u202e\xe9\ud800"
    assert str(ConfigError("\x1bc")) == r"\x1bc"


def test_settings_that_belong_together_are_taken_in_any_order() -> None:
    settings = ["data.stored_size=64", "model.image_size=64"]
    preset = dataclasses.replace(INPAINTING, model=InpaintingConfig(image_size=32), data=DataConfig(stored_size=40))
    for ordered in (settings, settings[::-1]):
        config = override(preset, ordered)
        assert (config.data.stored_size, config.model.image_size) == (64, 64)
    with pytest.raises(ConfigError, match=r"data\.stored_size is 40; expected 0 or at least model\.image_size \(64\)"):
        override(preset, settings[1:])


def test_a_seed_has_63_bits() -> None:
    assert override(Config(), [f"run.seed={2**63 - 1}"]).run.seed == 2**63 - 1
    with pytest.raises(ConfigError, match=rf"run\.seed is {2**63}; expected a whole number from 0 to 2\^63 - 1"):
        override(Config(), [f"run.seed={2**63}"])


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [
        ("run.batchsize=3", "run.batch_size"),
        ("batch_size=3", "run.batch_size"),
        ("model.an.num_entitys=3", "model.an.num_entities"),
        ("model.num_entities=3", "model.an.num_entities"),
        ("modle.width=3", "model.width"),
    ],
)
def test_unknown_setting_names_the_nearest(setting: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"there is no setting {setting.split('=')[0]}; did you mean {nearest}\?"):
        override(Config(), [setting])


def test_group_is_not_a_setting() -> None:
    for setting in ("model.an=3", "run.seed.x=3", "=3", "model.=3"):
        with pytest.raises(ConfigError, match="there is no setting"):
            override(Config(), [setting])


def test_setting_without_a_value_shows_how() -> None:
    with pytest.raises(ConfigError, match=r"--set got 'run.seed'; expected KEY=VALUE, for example"):
        override(Config(), ["run.seed"])


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("run.batch_size", ["big", "1.5", "1.5e0", "1e999", "none", ""], "a whole number"),
        ("optim.g_lr", ["fast"], "a number"),
        ("run.tf32", ["maybe"], "true or false"),
        ("model.an.temperature", ["warm"], "a number or auto or none"),
        ("model.context", ["attention"], "one of an, self_attention, none"),
        ("model.context", ["ann"], r"one of an, self_attention, none; did you mean an\?"),
    ],
)
def test_wrong_type_is_told_what_was_expected(name: str, values: list[str], expected: str) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"{name} is '{value}'; expected {expected}"):
            override(Config(), [f"{name}={value}"])
    with pytest.raises(ConfigError, match=r"model\.an_blocks is 'x'; expected a whole number"):
        override(Config(), ["model.an_blocks=3,x"])


def test_number_that_is_not_finite_is_refused() -> None:
    numbers = [name for name, value in flatten(Config()).items() if type(value) is float]
    for name in ("model.an.temperature", *numbers):
        for text in ("nan", "-inf", "1e999"):
            with pytest.raises(ConfigError, match=name.rsplit(".", 1)[-1]):
                override(Config(), [f"{name}={text}"])


# from_dict


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run": {"batchsize": 3}}, r"there is no setting run.batchsize; did you mean run.batch_size\?"),
        ({"run": {"batch_size": "3"}}, "run.batch_size is '3'; expected a whole number"),
        ({"run": {"batch_size": True}}, "run.batch_size is True; expected a whole number"),
        ({"run": {"tf32": 1}}, "run.tf32 is 1; expected true or false"),
        ({"optim": {"g_lr": True}}, "optim.g_lr is True; expected a number"),
        ({"optim": {"orthogonality_weight": math.nan}}, "optim.orthogonality_weight is nan; expected a number"),
        ({"model": {"an_blocks": ["3"]}}, "model.an_blocks is '3'; expected a whole number"),
        ({"model": {"context": ["an"]}}, "model.context is .*; expected one of"),
        ({"model": {"an": 3}}, "model.an is 3; expected a group of settings"),
        ({"run": None}, "run is None; expected a group of settings"),
    ],
)
def test_wrong_dictionary_is_told_what_was_expected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Config, values)


def test_whole_numbers_of_json_are_numbers() -> None:
    config = from_dict(Config, {"optim": {"g_lr": 1}, "model": {"an": {"temperature": 2}}})
    assert type(config.optim.g_lr) is float and config.optim.g_lr == 1
    assert type(config.model.an.temperature) is float


# Validation


REFUSED = """
model.image_size=48 model.width=0 model.num_classes=-1 model.latent_dim=0 model.an_blocks=6 model.an_blocks=0
model.an.num_entities=0 model.an.reduction=0 model.an.temperature=0 model.an.eps=0
optim.g_lr=0 optim.d_lr=-1 optim.beta1=1 optim.beta2=-0.1 optim.ema_decay=1 optim.d_steps=0
run.batch_size=0 run.duration_images=0 run.keep_checkpoints=0 run.grid_every_images=0 run.checkpoint_every_images=0
run.validate_every_images=0 run.max_minutes=-1 run.seed=-1
data.held_out_every=1 data.stored_size=-1 data.stored_size=127
"""
REFUSED_OF_INPAINTING = """
model.image_size=100 model.image_size=24 model.width=0 model.context=attention inpainting.masks=circle
inpainting.gradient_penalty_weight=-1 inpainting.reconstruction_weight=-1 inpainting.adversarial_weight=-1
inpainting.hole_weight=-1
inpainting.switch_images=-1 inpainting.patience=0 inpainting.validation_images=0 inpainting.min_improvement=1
"""


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        *((Config(), setting) for setting in REFUSED.split()),
        *((INPAINTING, setting) for setting in REFUSED_OF_INPAINTING.split()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_setting_that_cannot_be_meant_is_refused_by_name(config: Config, setting: str) -> None:
    name = setting.partition("=")[0].rpartition(".")[2]
    with pytest.raises(
        ConfigError, match=rf"{name} (is .*; expected|names block \d; a 128-pixel generator has blocks 1 to 5)"
    ):
        override(config, [setting])


def test_temperature_is_the_layers_own_or_follows_the_width_or_is_set() -> None:
    """Row 7: the paper's 0.1 at the paper's width; a quarter of the channels halves the spread of the logits."""
    rule, own = AttentiveNormConfig(temperature=None), AttentiveNormConfig(temperature=0.1)
    for group, width in ((ClassConditionalConfig, 64), (InpaintingConfig, 32)):
        assert group(width=width // 4).temperature == "auto"
        assert group(width=width, an=rule).temperature == pytest.approx(0.1)
        assert group(width=width // 4, an=rule).temperature == pytest.approx(0.2)
        assert group(width=width // 4, an=own).temperature == 0.1
