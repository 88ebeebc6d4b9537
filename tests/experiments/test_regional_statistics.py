"""The experiment's images do what they are said to do; its command resumes; its tables equal sums by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnorm import cli
from attnorm.config import ConfigError
from attnorm.experiments import regional_images as images
from attnorm.experiments import regional_statistics as experiment
from attnorm.experiments.regional_images import CELL, Setting
from attnorm.experiments.regional_statistics import ARMS, BASE, REACH
from attnorm.reports import regional_statistics as report
from attnorm.reports.regional_statistics import write_report


def drawn(setting: Setting, num: int = 3, size: int = 64) -> images.Examples:
    return images.draw_examples(num, size, setting, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "setting", [BASE, Setting(2, 6), Setting(64, 1), Setting(16, 3)], ids=lambda setting: setting.name
)
def test_what_tells_a_hidden_colour_is_elsewhere_and_at_least_so_far_away(setting: Setting) -> None:
    examples = drawn(setting)
    hidden = examples.hidden[:, 0, ::CELL, ::CELL]
    assert 0.02 < hidden.float().mean() < 0.45
    nearest = []
    for textures, is_hidden in zip(examples.textures, hidden, strict=True):
        assert not (is_hidden & (textures < 0)).any()
        for texture in textures[is_hidden].unique():
            there = (textures == texture) & is_hidden
            seen = (textures == texture) & ~is_hidden
            assert seen.any()
            steps = (there.nonzero()[:, None] - seen.nonzero()[None]).abs().amax(2)  # Chebyshev
            nearest.append(int(steps.min()))
    assert min(nearest) == setting.distance or setting.num_textures == 64  # with few cells of each it may be more
    assert min(nearest) >= setting.distance


def test_an_image_is_its_texture_times_the_contrast_plus_the_colour_and_what_is_shown_hides_both() -> None:
    examples = drawn(BASE, num=2)
    bank = images.texture_bank()
    assert bank.shape == (64, CELL, CELL) and not bank.sum((1, 2)).any() and (bank.abs() == 1).all()
    differing = (bank.flatten(1)[:, None] != bank.flatten(1)[None]).sum(2) + 16 * torch.eye(64)
    assert differing.min() >= 4
    for n, texture in ((n, texture) for n in range(2) for texture in range(BASE.num_textures)):
        found = set()
        for row, column in (examples.textures[n] == texture).nonzero().tolist():
            at = (slice(None), slice(row * CELL, row * CELL + CELL), slice(column * CELL, column * CELL + CELL))
            cell, shown = examples.images[n][at], examples.shown[n][at]
            colour = cell.mean((1, 2))
            contrast = (cell[0] - colour[0])[0, 0] / bank[texture, 0, 0]
            assert 0.2 <= contrast <= 1 + 1e-6 and (colour.abs() <= 1).all()
            torch.testing.assert_close(cell, bank[texture] * contrast + colour[:, None, None])
            found.add((*(round(value, 4) for value in colour.tolist()), round(contrast.item(), 4)))
            is_hidden = bool(examples.hidden[n, 0, row * CELL, column * CELL])
            assert torch.equal(shown[:3], cell * (not is_hidden)) and torch.equal(shown[3], bank[texture])
            assert torch.equal(shown[4:20, 1, 2], bank[texture].flatten()) and bool(shown[20].all()) == is_hidden
        assert len(found) <= 1  # one colour and contrast an image


def test_convolutions_reach_less_far_than_the_colour_is() -> None:
    network = experiment.Network(ARMS["none"], BASE)
    shown = drawn(BASE, num=1).shown.requires_grad_()
    network(shown)[0, :, 32, 32].sum().backward()
    rows = shown.grad[0].abs().sum(0).nonzero()[:, 0]
    assert rows.min() == 32 - REACH and rows.max() == 32 + REACH
    assert CELL * (BASE.distance - 1) + 1 > REACH  # from the edge of a hidden cell to a seen one of its texture


@pytest.mark.parametrize("arm", [name for name in ARMS if name != "none"])
def test_every_arm_can_be_trained_and_starts_with_the_same_weights_around_the_block(arm: str) -> None:
    torch.manual_seed(3)
    network = experiment.Network(ARMS[arm], BASE)
    torch.manual_seed(3)
    without = experiment.Network(ARMS["none"], BASE).state_dict()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in without.items())
    for name, parameter in network.block.named_parameters():  # open the gate
        if name.rpartition(".")[2] in ("rho", "gate"):
            torch.nn.init.constant_(parameter, 0.5)
    examples = drawn(BASE, num=1, size=32)
    images.hidden_error(network(examples.shown), examples).backward()
    for name, parameter in network.named_parameters():
        # Softmax does not see the bias of keys, nor Eq. 5 that of values.
        assert name.endswith(("key.bias", "value.bias")) or parameter.grad.abs().max() > 0, name


def test_pre_norm_attention_is_softmax_over_pooled_keys_of_the_normalized_map() -> None:
    torch.manual_seed(0)
    block = experiment.PreNormAttention(4).double()
    x = torch.randn(1, 4, 4, 6, dtype=torch.float64)
    normal = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    weights = {name: getattr(block, name).weight[:, :, 0, 0] for name in ("query", "key", "value", "project")}
    biases = {name: getattr(block, name).bias[:, None, None] for name in weights}
    maps = {name: torch.einsum("oc,chw->ohw", weights[name], normal[0]) + biases[name] for name in weights}
    pooled = {name: maps[name].unflatten(2, (3, 2)).unflatten(1, (2, 2)).amax((2, 4)).flatten(1) for name in maps}
    scores = torch.einsum("chw,cp->hwp", maps["query"], pooled["key"]) / math.sqrt(4)
    attended = torch.einsum("hwp,cp->chw", scores.softmax(2), pooled["value"])
    expected = x[0] + torch.einsum("oc,chw->ohw", weights["project"], attended) + biases["project"]
    torch.testing.assert_close(block(x)[0], expected)


def test_the_error_is_the_mean_over_hidden_pixels() -> None:
    examples = drawn(BASE, num=2, size=32)
    predicted = torch.where(examples.hidden, examples.images + 0.25, examples.images + 9)
    assert images.hidden_error(predicted, examples).item() == pytest.approx(0.25, rel=1e-5)


def test_the_command_goes_on_where_it_stopped_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "regional"
    (tmp_path / "report.md").write_text("of something else")
    with pytest.raises(ConfigError, match="is not empty, and no folder of an experiment; choose another --out"):
        experiment.run(tmp_path, write_report, scale="smoke", arms=["none"])
    command = ["experiment", "regional-statistics", "--out", str(out), "--scale", "smoke", "--arms", "an,none"]
    cli.main(command)
    written = (out / "trainings.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in written]
    # Two seeds of two arms at two settings, and of AN at the one in which n alone is another.
    assert sum(not row["is_tuning"] for row in rows) == 2 * (2 * 2 + 1)
    tuned = [row for row in rows if row["is_tuning"] and row["arm"] == "an"]
    assert sorted(row["lr"] for row in tuned) == [0.002, 0.005, 0.01]
    best = min(tuned, key=lambda row: row["errors"]["64"])["lr"]
    assert {row["lr"] for row in rows if row["arm"] == "an" and not row["is_tuning"]} == {best}
    assert [Path(line).name for line in capsys.readouterr().out.split()][:2] == ["report.md", "report.json"]
    kept = next(row for row in rows if (row["arm"], row["seed"], row["lr"]) == ("an", 1, best))
    left = [line for line in written if json.loads(line) != kept]
    (out / "trainings.jsonl").write_text("".join(left))
    names: list[str] = []
    train = experiment.train
    monkeypatch.setattr(experiment, "train", lambda job, *rest: (names.append(str(job)), train(job, *rest))[1])
    cli.main(command)
    assert names == [f"an, {BASE.name}, seed 1"]
    *others, last = (out / "trainings.jsonl").read_text().splitlines(keepends=True)
    assert others == left
    again = json.loads(last)
    for key in ("errors", "entropy", "rho", "error_while_training"):
        assert again[key] == kept[key]
    with pytest.raises(ConfigError, match=r"results of another .*scale.*; choose another --out"):
        experiment.run(out, write_report, scale="full", arms=["none"])
    with pytest.raises(ConfigError, match="got scale 'smoke', arms nothing; expected one of full, long, smoke"):
        experiment.run(out, write_report, scale="smoke", arms=["nothing"])


def row(arm: str, seed: int, error: float, **setting: int) -> dict[str, Any]:
    about = {"num_textures": 8, "distance": 3, "num_entities": 16, **setting}
    return {"arm": arm, "setting": about, "seed": seed, "errors": {"64": error}, "parameters": 1}


def test_intervals_are_students_and_differences_are_paired_by_seed() -> None:
    results = report.Results([row("none", s, 0.5 + 0.1 * s) for s in range(3)])
    found = results.mean("none", BASE, report.error_at(64))
    assert found.mean == pytest.approx(0.6)
    assert found.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3))  # t of 2 degrees of freedom
    an = [row("an", seed, error) for seed, error in ((0, 0.2), (1, 0.31), (3, 9.0))]
    results = report.Results([*results.rows.values(), *an])
    difference = results.difference("none", BASE)  # of the two seeds that both have
    assert difference.mean == pytest.approx((0.3 + 0.29) / 2) and difference.num == 2
    assert difference.half == pytest.approx(12.706205 * np.std([0.3, 0.29], ddof=1) / math.sqrt(2))
    assert report.conclusions(results) == ["none: AN is better at K = 8."] and results.counts() == [3, 3]
    worse = report.Results([row("an", 0, 0.4), row("an", 1, 0.41), row("none", 0, 0.3), row("none", 1, 0.31)])
    assert report.conclusions(worse) == ["none: AN is worse at K = 8."]
    alone = report.Results([row("an", 0, 0.4), row("none", 0, 0.3)])
    assert report.conclusions(alone) == ["One seed says nothing of seeds."]


def test_a_gate_may_open_to_either_side() -> None:
    rows = [
        row("an", seed, 0.1) | {"rho": rho, "entropy": 0.5, "entities_in_use": 7} for seed, rho in enumerate((-2, 2))
    ]
    cells = report._layouts(report.Results(rows)).tables[0].rows[0]
    assert cells[-1] == "2.000 ± 0.000" and cells[2] == "0.500 ± 0.000"


def test_costs_are_read_as_ratios_to_an() -> None:
    cells = {
        name: {"256": {"milliseconds": t, "peak_bytes": b}}
        for name, t, b in (("an", 4, 50), ("self_attention", 60, 75))
    }
    assert report.cost_conclusions(cells) == [
        "self-attention (SAGAN): times AN's time and memory, 15.0 and 1.5 at 256 pixels."
    ]
    assert report.still_falling({"error_while_training": [0.5, 0.4, 0.3, 0.25]}) == pytest.approx(0.05)
