"""What a run is said to take before it begins, and what is to be seen of it afterwards."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from attnorm import cli
from attnorm.benchmark import training_step
from attnorm.benchmark.peers import PEERS
from attnorm.benchmark.timing import peak_bytes
from attnorm.benchmark.training_speed import SWITCHES, Speed, switches_of
from attnorm.benchmark.training_step import estimate, kinds_of_steps, measured_step, random_images
from attnorm.cli.watching import progress_of, render, sparkline
from attnorm.config import Config, ConfigError
from attnorm.data.stream import Stream
from attnorm.presets import PRESETS
from attnorm.reports.training_speed import table
from attnorm.run_directory import RunDirectory
from attnorm.settings import override
from attnorm.system.randomness import seed_step
from attnorm.training import trainer
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.signs import collapse
from attnorm.training.trainer import make_task, resolve, run_phase
from tests.conftest import run_together

CPU = torch.device("cpu")
TINY = ("model.image_size=32", "model.num_classes=3", "model.width=4", "model.latent_dim=4", "run.batch_size=16")


def test_memory_is_that_of_a_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extrapolated from four images to sixteen, beside sixteen measured; and a quarter of it in four parts."""
    config = override(Config(), TINY)
    monkeypatch.setattr(training_step, "PIXELS", {"cpu": 4 * 32**2})
    found = estimate(config, CPU)
    images = random_images(config)
    task = make_task(resolve(config, images), images, CPU)
    step = measured_step(task, config, images, 16, 0, CPU)
    step()
    assert found.step_bytes == pytest.approx(peak_bytes(step, CPU), rel=0.05)
    assert found.state_bytes == sum(tensor.nbytes for tensor in task.state.tensors().values())
    parts = estimate(override(config, ["run.accumulate=4"]), CPU)
    assert parts.step_bytes < 0.4 * found.step_bytes


def test_time_is_that_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clock by which every step lasts a second: four images each, 160 in all, in two processes."""
    moments = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    found = estimate(override(PRESETS["smoke"][1], ["model.width=2"]), CPU, processes=2)
    assert (found.images_per_second, found.seconds) == (4, 160 / 4 / 2)


def test_each_phase_of_a_run_counts_as_long_as_it_lasts() -> None:
    config = override(PRESETS["inpaint-smoke"][1], ["inpainting.switch_images=40", "model.width=2"])
    images = random_images(config)
    shares = kinds_of_steps(make_task(config, images, CPU), config)
    assert len(shares) == 2 and shares[0] == pytest.approx(40 / 152, abs=0.02) and sum(shares.values()) == 1


def test_a_dry_run_says_memory_and_hours(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = training_step.Estimate(2**30, 2**40, 8.0, 7200.0)
    monkeypatch.setattr(training_step, "estimate", lambda *_, **__: found)
    cli.main(["train", "--preset", "smoke", "--dry-run"])
    said = capsys.readouterr()
    assert json.loads(said.out)["preset"] == "smoke"
    assert "about 1025.00 GiB of" in said.err
    assert "of which 1.00 for weights and moments; 8.0 images a second" in said.err
    assert "2.00 hours for 160 images" in said.err and "that is too much: a larger run.accumulate" in said.err


def test_speeds_are_medians_and_ratios_are_round_by_round() -> None:
    """Every second round is disturbed alike: AN takes a tenth more than no block in each, and a switch halves both."""
    speeds = [
        Speed(context, switch, tuple(factor * share * took for took in (1.0, 4.0, 1.0)), 8)
        for context, factor in (("none", 1.0), ("an", 1.1))
        for switch, share in (("plain", 1.0), ("fast", 0.5))
    ]
    shown = table(speeds)
    assert shown.header == ("", "none", "an")
    assert shown.rows == (
        ("plain", "8.00 (1.00x, +0.0%)", "7.27 (1.00x, +10.0%)"),
        ("fast", "16.00 (2.00x, +0.0%)", "14.55 (2.00x, +10.0%)"),
    )


BENCH = ["bench", "train", "--preset", "smoke", "--seconds", "1e-9", "--device", "cpu"]
SMALL = ["--set", "model.width=2", "model.latent_dim=4", "run.batch_size=2", "run.precision=float32"]


def test_every_block_and_switch_has_its_turn_and_so_have_the_steps_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnorm.benchmark.training_speed.FEWEST_ROUNDS", 2)
    monkeypatch.setattr(nn.Module, "compile", lambda network: None)  # it would take a minute
    cli.main([*BENCH, "--out", str(tmp_path), *SMALL])
    found = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    names = {(speed["context"], speed["switch"]) for speed in found["speeds"]}
    switches = [*switches_of(CPU), "as torch-mimicry", "as StudioGAN"]
    assert names == {(context, switch) for context in ("none", "an", "self_attention") for switch in switches}
    assert all(len(speed["seconds"]) == 2 and min(speed["seconds"]) > 0 for speed in found["speeds"])
    assert "| as StudioGAN |" in (tmp_path / "train.md").read_text(encoding="utf-8")


def test_two_processes_are_measured_together(tmp_path: Path) -> None:
    run_together("-m", "attnorm", *BENCH, "--threads", "1", "--out", str(tmp_path), *SMALL)
    found = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    assert found["environment"]["processes"] == 2
    assert {speed["switch"] for speed in found["speeds"]} == {"2 processes"}


@pytest.mark.parametrize(
    ("preset", "names"),
    [
        ("smoke", ["generator", "discriminator"]),
        ("small32-relativistic-an", ["generator"]),
        ("inpaint-smoke", ["generator"]),
    ],
)
def test_critics_under_a_gradient_penalty_are_not_compiled(
    preset: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = list[nn.Module]()
    monkeypatch.setattr(nn.Module, "compile", lambda network: compiled.append(network))  # tracing a step takes a minute
    monkeypatch.setattr(trainer, "why_not_compiled", lambda: "")
    config = override(PRESETS[preset][1], ["run.compile=true", "model.width=2"])
    images = random_images(config)
    networks = make_task(resolve(config, images), images, CPU).state.networks
    assert compiled == [networks[name] for name in names]


def test_where_nothing_can_be_compiled_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "why_not_compiled", lambda: "no g++")
    config = override(PRESETS["smoke"][1], ["run.compile=true"])
    with pytest.raises(ConfigError, match=r"run\.compile: no g\+\+"):
        make_task(resolve(config, random_images(config)), random_images(config), CPU)
    assert "torch.compile" in SWITCHES
    monkeypatch.setattr("attnorm.benchmark.training_speed.why_not_compiled", lambda: "no g++")
    assert "torch.compile" not in switches_of(CPU)


@pytest.mark.parametrize("name", PEERS)
def test_a_step_of_others_is_ours_but_for_how_it_is_made(name: str) -> None:
    """From the same start with the same images and latents, up to rounding; without spectral norm, of which they make
    one power iteration more.
    """
    config = override(
        Config(), [*TINY, "model.context=none", "model.g_spectral_norm=false", "model.d_spectral_norm=false"]
    )
    images = random_images(config)
    config = resolve(config, images)
    weights = []
    for is_ours in (True, False):
        torch.manual_seed(0)
        task = make_task(config, images, CPU)
        assert isinstance(task, ClassConditionalTask)
        stream = Stream(config, images, CPU)
        seed_step(0, 0)
        if is_ours:
            for index, phase in enumerate(task.phases(0)):
                run_phase(phase, task.state, stream.batch(16 * index))
        else:
            PEERS[name](task, config)(stream.batch(16 * index) for index in itertools.count())
        weights.append([*task.discriminator.parameters(), *task.generator.parameters()])
    start = [*make_task(config, images, CPU).state.networks["discriminator"].parameters()]
    assert sum(not torch.equal(a, b) for a, b in zip(weights[0], start, strict=False)) > 10
    differing = sum(int(((a - b).abs() > 1e-5).sum()) for a, b in zip(*weights, strict=True))
    assert differing < 0.01 * sum(a.numel() for a in weights[0])  # Adam takes the sign of a gradient that is nearly 0


def rows(name: str, values: list[float]) -> list[dict[str, Any]]:
    return [{"images_seen": i, name: value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("name", "values", "sign"),
    [
        ("samples/diversity", [0.3, 0.2, 0.04], "differ by 0.040 only (by 0.300 once)"),
        ("samples/diversity", [0.3, 0.04, 0.2], ""),
        ("samples/diversity", [0.04, 0.03, 0.02], ""),  # it never was more
        ("discriminator/loss", [1.0, *[0.01] * 5], "the discriminator's loss stays below 0.05"),
        ("discriminator/loss", [*[0.01] * 4, 0.06], ""),
        ("discriminator/loss", [0.01] * 4, ""),
    ],
)
def test_a_collapse_is_told(name: str, values: list[float], sign: str) -> None:
    assert (sign in collapse(rows(name, values))) and bool(sign) == bool(collapse(rows(name, values)))


def test_progress_is_the_pace_of_the_newest_lines() -> None:
    steps = [{"images_seen": 10 * i, "seconds": 100.0 + i if i > 3 else i, "step": i} for i in range(1, 11)]
    assert progress_of(steps, 400, 0.0) == "100 of 400 images (25%), 10.0/s, 0:00:30 left"
    assert progress_of(steps, 400, 2.0) == "100 of 400 images (25%), 10.0/s, 0:00:10 left"
    assert progress_of(steps[:1], 400, 0.0) == "10 of 400 images (2%)"
    assert progress_of([], 400, 0.0) == "nothing logged yet of 400 images"


def test_a_curve_is_drawn_between_its_smallest_and_largest() -> None:
    assert sparkline([0.0, 1.0, 7.0]) == "▁▂█" and sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([0.0, 2.0, 5.0, 9.0], width=2) == "▁█"
    assert sparkline([0.0, math.nan, 9.0, math.inf]) == "▁█" and sparkline([math.nan]) == ""


def test_what_is_watched_is_what_was_logged(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create(PRESETS["smoke"][1], {"source": "photographs", "num_images": 7})
    logged = [
        {"images_seen": 8 * i, "step": i, "seconds": 2.0 * i, "generator/loss": 5.0 - i, "layout/g.an/entropy": 0.99}
        for i in range(1, 5)
    ]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in logged), encoding="utf-8")
    os.utime(run.metrics_file, times=(time.time() - 7200.5,) * 2)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(run))
    text = console.export_text()
    assert "7 images of photographs" in text and "32 of 160 images (20%), 4.0/s, 0:00:32 left" in text
    assert re.search(r"last logged +2:00:0\d ago", text)  # nobody trains it any more
    assert "generator/loss" in text and "█▆▃▁ 1" in text and "none yet" in text
    assert "layout/g.an/entropy is 0.990: the layout is uniform" in text
