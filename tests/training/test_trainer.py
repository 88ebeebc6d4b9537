"""The training loop: resumed bit for bit, killed at any moment, stopped, refused; and what it reports."""

from __future__ import annotations

import functools
import importlib.machinery
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attnorm.checkpoint import CheckpointError, read_checkpoint
from attnorm.config import Config, ConfigError
from attnorm.data.images import to_float
from attnorm.data.stream import Batch, Stream
from attnorm.presets import PRESETS
from attnorm.run_directory import RunDirectory
from attnorm.settings import override
from attnorm.system.files import file_lock
from attnorm.system.randomness import seed_step, seed_weights
from attnorm.training import class_conditional, trainer
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.resume import effective_settings
from attnorm.training.state import TrainingState
from attnorm.training.trainer import TrainingError
from tests.training.conftest import assert_equal_checkpoints, check_resume, noise, rows_of, run, silent

TINY = (
    "model.image_size=32",
    "model.width=2",
    "model.latent_dim=4",
    "model.an.num_entities=4",
    "run.device=cpu",
    "run.precision=float32",
    "run.batch_size=4",
    "run.duration_images=32",
    "run.log_every_images=4",
    "run.layout_every_images=8",
    "run.grid_every_images=16",
    "run.checkpoint_every_images=16",
    "run.keep_checkpoints=9",
)


def tiny(*settings: str) -> Config:
    return override(Config(), [*TINY, *settings])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps without a stop."""
    out = tmp_path_factory.mktemp("whole") / "run"
    outcome = run(tiny(), out)
    assert (outcome.reason, outcome.images_seen) == ("finished", 32)
    return out


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped after 4 steps and resumed with a longer duration."""
    out = tmp_path_factory.mktemp("continued") / "run"
    assert run(tiny("run.duration_images=16"), out).images_seen == 16
    assert run(tiny(), out).images_seen == 32
    return out


# What is shown


def test_tensorboard_has_curves_samples_and_the_winner_of_each_pixel(whole: Path) -> None:
    seen = EventAccumulator(str(whole / "tensorboard")).Reload()
    tags = seen.Tags()
    assert {"discriminator/real_score", "samples/diversity"} <= set(tags["scalars"])
    (layouts,) = [name for name in tags["images"] if name.startswith("layouts/")]
    assert (
        [event.step for event in seen.Images(layouts)]
        == [event.step for event in seen.Images("samples")]
        == [0, 16, 32]
    )
    picture = np.asarray(Image.open(io.BytesIO(seen.Images(layouts)[-1].encoded_image_string)))
    assert picture.shape == (3 * 33 + 1, 8 * 33 + 1, 3)  # three classes, eight latents, maps of 32 pixels
    assert 2 <= len(np.unique(picture.reshape(-1, 3), axis=0)) <= 5  # four entities, and what is between the maps


def test_weights_and_biases_gets_what_is_logged_and_goes_on_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    begun = types.SimpleNamespace(
        log=told.append, define_metric=lambda *_, **named: None, finish=lambda: told.append("finished")
    )
    fake = types.ModuleType("wandb")
    vars(fake).update(init=lambda **given: told.append(given) or begun, Image=lambda picture: picture.shape)
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    with pytest.raises(ConfigError, match=r"wandb is not installed: pip install wandb"):
        run(tiny("run.wandb=mine"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(tiny("run.wandb=mine", "run.duration_images=8"), tmp_path / "run")
    run(tiny("run.wandb=mine", "run.duration_images=16"), tmp_path / "run")
    first, second = (given for given in told if "project" in given)
    assert first["project"] == "mine" and first["config"]["run.batch_size"] == 4
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert told[-1] == "finished"
    sent = [row for row in told if "images_seen" in row]
    pictures = ("samples", "layouts/blocks.2.an")
    lines = [{**row} for row in sent if not any(name in row for name in pictures)]
    assert [row.keys() for row in lines] == [row.keys() for row in RunDirectory(tmp_path / "run").read_metrics()]
    assert {"images_seen": 16, "samples": (104, 274, 3)} in sent


# Resuming


def test_resume_is_bit_exact(whole: Path, continued: Path) -> None:
    name = "checkpoints/000000032.safetensors"
    tensors, _ = read_checkpoint(whole / name)
    for prefix in ("generator.", "discriminator.", "ema.", "optimiser.generator.", "optimiser.discriminator."):
        assert any(key.startswith(prefix) for key in tensors), prefix
    assert_equal_checkpoints(whole / name, continued / name)
    assert_equal_checkpoints(
        whole / "checkpoints/000000016.safetensors", continued / "checkpoints/000000016.safetensors"
    )


def test_resumed_run_reports_what_the_whole_one_does(whole: Path, continued: Path) -> None:
    assert rows_of(whole) == rows_of(continued)
    pictures = sorted(path.name for path in (whole / "samples").iterdir())
    assert pictures == ["000000000.png", "000000016.png", "000000032.png"]
    for name in pictures:
        assert (whole / "samples" / name).read_bytes() == (continued / "samples" / name).read_bytes(), name


@pytest.mark.parametrize(
    "settings",
    [
        ("run.channels_last=true", "model.an.moments=batch", "data.flip=true"),
        ("run.precision=bfloat16", "optim.d_steps=2"),
        ("model.context=self_attention", "model.head=auxiliary"),
    ],
    ids=["channels_last-batch_moments-flip", "bfloat16-d_steps2", "self_attention-auxiliary"],
)
def test_resume_is_bit_exact_whatever_the_settings(tmp_path: Path, settings: tuple[str, ...]) -> None:
    settings = (*settings, "run.layout_every_images=1000", "run.grid_every_images=1000")
    out = check_resume(functools.partial(tiny, *settings), tmp_path, 8, 16)
    assert all(math.isfinite(row["generator/loss"]) for row in rows_of(out) if "step" in row)


def test_a_seed_is_a_run_and_another_seed_another(whole: Path, tmp_path: Path) -> None:
    short = ("run.duration_images=4", "run.checkpoint_every_images=4")
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        run(tiny(*short, f"run.seed={seed}"), tmp_path / name)
    file = "checkpoints/000000004.safetensors"
    assert_equal_checkpoints(tmp_path / "first" / file, tmp_path / "again" / file)
    assert rows_of(tmp_path / "first") == rows_of(tmp_path / "again") == rows_of(whole)[:3]
    with pytest.raises(AssertionError):
        assert_equal_checkpoints(tmp_path / "first" / file, tmp_path / "other" / file)
    assert rows_of(tmp_path / "first")[2]["generator/loss"] != rows_of(tmp_path / "other")[2]["generator/loss"]


def test_metrics_are_cut_back_to_the_checkpoint_and_torn_lines_dropped(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    run(tiny("run.duration_images=16"), out)
    metrics = RunDirectory(out).metrics_file
    with metrics.open("a", encoding="utf-8") as file:  # steps after the checkpoint, and a kill within a line
        file.write('{"images_seen": 20, "generator/loss": 123.0}\n{"images_seen": 24, "generator/lo')
    run(tiny(), out)
    assert rows_of(out) == rows_of(whole)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    run(tiny("run.duration_images=8"), out)
    for checkpoint in RunDirectory(out).checkpoints():  # as if the kill had come sooner
        checkpoint.unlink()
    run(tiny(), out)
    assert rows_of(out) == rows_of(whole)
    name = "checkpoints/000000032.safetensors"
    assert_equal_checkpoints(out / name, whole / name)


def test_a_run_without_a_checkpoint_may_begin_anew_with_other_settings(tmp_path: Path) -> None:
    out = tmp_path / "run"
    RunDirectory(out).create(tiny("model.width=4", "model.num_classes=3"), {"fingerprint": "other"})
    assert run(tiny("run.duration_images=4"), out).images_seen == 4
    config, data = RunDirectory(out).read()
    assert config.model.width == 2 and data["fingerprint"] == noise().fingerprint


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path: Path, whole: Path) -> None:
    out, console = tmp_path / "run", silent()
    shutil.copytree(whole, out)
    last = out / "checkpoints/000000032.safetensors"
    last.write_bytes(last.read_bytes()[:-1] + b"?")
    assert run(tiny(), out, console=console).images_seen == 32
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "000000032.safetensors is damaged" in said and "kept as 000000032.safetensors.damaged" in said
    assert "from 16 images on" in said
    assert_equal_checkpoints(last, whole / "checkpoints/000000032.safetensors")
    assert rows_of(out) == rows_of(whole)


def test_a_resumed_run_says_when_its_threads_are_others(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = RunDirectory(whole).checkpoints()[-1]
    assert read_checkpoint(checkpoint)[1].threads == torch.get_num_threads() == 1
    for threads, is_said in ((1, False), (3, True)):
        console = silent()
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        run(tiny(), whole, console=console)
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("went so far with 1 threads and goes on with 3" in " ".join(said.split())) == is_said


def test_seeds_of_any_size_begin_with_other_weights() -> None:
    starts = []
    for seed in (0, 2**32, 2**40, 2**63 - 1):
        seed_weights(seed)
        starts.append(torch.rand(()).item())
    torch.manual_seed(0)
    assert starts[0] == torch.rand(()).item() and len(set(starts)) == 4


def test_a_finished_run_is_left_as_it_is(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").iterdir()}
    rows = rows_of(whole)
    outcome = run(tiny(), whole)
    assert (outcome.reason, outcome.images_seen) == ("finished", 32)
    assert {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").iterdir()} == before
    assert rows_of(whole) == rows


def test_changed_settings_are_refused_by_name(whole: Path) -> None:
    with pytest.raises(ConfigError, match=r"g_lr was 0\.0001, now 0\.5; give the same settings \(--set optim\.g_lr=0\.0001\), or another --out"):
        run(tiny("optim.g_lr=0.5"), whole)
    with pytest.raises(ConfigError, match=r"model\.width was 2, now 4, run\.seed was 0, now 7"):
        run(tiny("model.width=4", "run.seed=7"), whole)


def test_other_data_are_refused(whole: Path) -> None:
    with pytest.raises(ConfigError, match=r"trained on other data.*give the same data"):
        run(tiny(), whole, noise(seed=1))


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with file_lock(out), pytest.raises(ConfigError, match="another process is at work in"):
        run(tiny(), out)
    assert list(out.iterdir()) == []
    run(tiny("run.duration_images=4"), out)  # the lock is gone, and was no obstacle itself
    with file_lock(out):
        pass


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, whole: Path) -> None:
    run(tiny("model.width=4", "run.duration_images=4"), tmp_path / "run")
    (tmp_path / "run/checkpoints/000000008.safetensors").write_bytes(
        (whole / "checkpoints/000000016.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match=r"000000008\.safetensors does not fit"):
        run(tiny("model.width=4"), tmp_path / "run")


# Stopping


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    settings = ("run.duration_images=16", "run.checkpoint_every_images=4", "run.keep_checkpoints=2")
    run(tiny(*settings, "run.layout_every_images=1000", "run.grid_every_images=1000"), tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["000000012.safetensors", "000000016.safetensors"]


def test_max_minutes_stops_cleanly_and_can_be_raised(tmp_path: Path) -> None:
    out = tmp_path / "run"
    quick = ("run.layout_every_images=1000", "run.grid_every_images=1000", "run.duration_images=8")
    outcome = run(tiny(*quick, "run.max_minutes=1e-9"), out)
    assert (outcome.reason, outcome.images_seen) == ("out of time", 4)
    assert read_checkpoint(outcome.checkpoint)[1].images_seen == 4
    # Time is counted over all legs: the same limit again has nothing left.
    assert run(tiny(*quick, "run.max_minutes=1e-9"), out).images_seen == 4
    outcome = run(tiny(*quick, "run.max_minutes=60"), out)
    assert (outcome.reason, outcome.images_seen) == ("finished", 8)


@pytest.mark.parametrize("loss", ["hinge_generator_loss", "hinge_discriminator_loss"])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    original, calls = getattr(class_conditional, loss), []

    def broken(*scores: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return original(*scores) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(class_conditional, loss, broken)
    out = tmp_path / "run"
    last_good = str(out / "checkpoints/000000008.safetensors")
    with pytest.raises(TrainingError, match="not finite at step 3 ") as caught:
        run(tiny("run.checkpoint_every_images=8", "run.log_every_images=16"), out)
    assert last_good in str(caught.value) and "g_lr" in str(caught.value)
    assert [str(path) for path in RunDirectory(out).checkpoints()] == [last_good]
    assert_finite(out)


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the last step before a save may be finite and its gradient not."""
    original, calls = class_conditional.hinge_generator_loss, []

    def broken(scores: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        nothing = (scores - scores.detach()).abs().sqrt().sum()  # 0, whose gradient is not a number
        return original(scores) + (nothing if len(calls) == 4 else 0)

    monkeypatch.setattr(class_conditional, "hinge_generator_loss", broken)
    with pytest.raises(TrainingError, match=r"000000008\.safetensors"):
        run(tiny("run.checkpoint_every_images=8"), tmp_path / "run")
    assert [path.name for path in RunDirectory(tmp_path / "run").checkpoints()] == ["000000008.safetensors"]
    assert_finite(tmp_path / "run")


def assert_finite(out: Path) -> None:
    for path in RunDirectory(out).checkpoints():
        tensors, _ = read_checkpoint(path)
        assert [name for name, tensor in tensors.items() if not tensor.isfinite().all()] == []


PREPARATION = f"""
import io, os, random, signal, sys, time
from pathlib import Path
import torch
from rich.console import Console
from attnorm.checkpoint import Header, read_checkpoint, save_checkpoint
from attnorm.run_directory import RunDirectory
from attnorm.config import Config
from attnorm.settings import override
from attnorm.system.process_group import ProcessGroup
from attnorm.training import trainer

sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import noise

torch.set_num_threads(1)
images = noise()
config = override(Config(), {TINY!r})
"""


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", PREPARATION + textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


KILLING = """
random.seed(0)
run = RunDirectory(sys.argv[1])
run.create(config, {"fingerprint": ""})
newest = lambda: int(run.checkpoints()[-1].stem) if run.checkpoints() else 0
for _ in range(12):
    before = newest()
    child = os.fork()
    if child == 0:
        number = before
        while True:
            number += 1
            content = torch.full((2**20,), float(number))
            save_checkpoint(run.checkpoint_file(number), {"ballast": content}, Header(config, (), number, 0.0))
            run.keep_last(3)
    while newest() == before:
        time.sleep(0.001)
    time.sleep(random.uniform(0.0, 0.05))  # within the next save, or a later one
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(*(path.name for path in (run.path / "checkpoints").iterdir()), flush=True)
    for path in run.checkpoints():
        tensors, header = read_checkpoint(path)
        assert path.stem == f"{header.images_seen:09d}"
        assert tensors["ballast"].shape == (2**20,) and (tensors["ballast"] == header.images_seen).all()

from attnorm.training import hooks

original = hooks.save_checkpoint

def save_slowly(path, tensors, header):
    original(path, tensors | {"ballast": torch.ones(2**21)}, header)

hooks.save_checkpoint = save_slowly
kills = 0
while True:
    child = os.fork()
    if child == 0:
        outcome = trainer.train(
            override(config, ["run.checkpoint_every_images=4"]),
            images,
            Path(sys.argv[2]),
            console=Console(file=io.StringIO()),
        )
        os._exit(0 if outcome.reason == "finished" else 1)
    if kills < 4:
        time.sleep(random.uniform(0.05, 1.2))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        sys.exit(os.WEXITSTATUS(status))
    kills += 1
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Path]:
    """Twelve processes that do nothing but save 4 MiB each, killed at random moments: the folder that they saved in,
    and a line of its files for each kill. Then a run with saves as slow as those of a large model, killed four times
    and resumed until it is done.
    """
    folder = tmp_path_factory.mktemp("killed")
    process = python(KILLING, folder / "saves", folder / "run")
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return folder / "saves", output.splitlines(), folder / "run"


def test_a_kill_while_saving_leaves_only_whole_checkpoints(killed: tuple[Path, list[str], Path]) -> None:
    saves, left, _ = killed
    assert len(left) == 12
    assert any(".tmp" in line for line in left), "no kill fell into a save: this test has shown nothing"
    kept = RunDirectory(saves).checkpoints()  # those of the last kill too were read in the script
    assert 3 <= len(kept) <= 4 and int(kept[-1].stem) >= 12
    assert not any(".tmp" in path.name for path in kept)


def test_a_killed_run_goes_on_to_the_same_end(killed: tuple[Path, list[str], Path], whole: Path) -> None:
    _, _, run_path = killed
    ours, header = read_checkpoint(run_path / "checkpoints/000000032.safetensors")
    theirs, _ = read_checkpoint(whole / "checkpoints/000000032.safetensors")
    ours.pop("ballast")
    assert ours.keys() == theirs.keys() and header.images_seen == 32
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert rows_of(run_path) == rows_of(whole)


def test_a_kill_while_the_run_directory_is_made_does_not_block_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / ".config.json.abc.tmp").write_text("{", encoding="utf-8")
    assert run(tiny("run.duration_images=4"), out).images_seen == 4


def test_what_a_kill_left_behind_is_cleared_away(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(tiny("run.duration_images=4"), out)
    left = out / "checkpoints/.000000008.safetensors.abcd_123.tmp"
    left.write_bytes(b"half a checkpoint")
    assert [path.name for path in RunDirectory(out).checkpoints()] == ["000000004.safetensors"]
    assert run(tiny("run.duration_images=8"), out).images_seen == 8
    assert not left.exists()


def test_ctrl_c_saves_says_how_to_go_on_and_can_be_resumed(tmp_path: Path) -> None:
    script = """
    from attnorm.cli import training as verbs
    from attnorm.system.process_group import ProcessGroup
    verbs.read_images = lambda config: images
    long = override(config, ["run.duration_images=4000000", "run.checkpoint_every_images=4000000"])
    verbs._train(override(long, ["run.layout_every_images=4000000"]), Path(sys.argv[1]), ProcessGroup())
    """
    out = tmp_path / "run"
    process = python(script, out)
    deadline = time.monotonic() + 600
    metrics = RunDirectory(out).metrics_file
    while not (metrics.exists() and '"step"' in metrics.read_text(encoding="utf-8")):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[1])
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "interrupted at" in output and "The same command goes on from here" in errors
    assert "Traceback" not in errors
    (checkpoint,) = RunDirectory(out).checkpoints()
    seen = int(checkpoint.stem)
    assert seen >= 4 and str(checkpoint) in output.replace("\n", "")
    outcome = run(tiny(f"run.duration_images={seen + 4}"), out)
    assert (outcome.reason, outcome.images_seen) == ("finished", seen + 4)
    assert [row["images_seen"] for row in rows_of(out) if "step" in row] == list(range(4, seen + 5, 4))


def test_sigterm_ends_the_step_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TrainingState.finish_step

    def terminated_at_the_second(self: TrainingState, batch_size: int) -> None:
        if self.images_seen == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, batch_size)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(TrainingState, "finish_step", terminated_at_the_second)
    outcome = run(tiny(), tmp_path / "run")
    assert (outcome.reason, outcome.images_seen) == ("interrupted", 8)
    assert read_checkpoint(outcome.checkpoint)[1].images_seen == 8
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_stopped_before_its_first_step_begins_once(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "log_validation", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        outcome = run(tiny(), tmp_path / "run")
    assert (outcome.reason, outcome.images_seen) == ("interrupted", 0)
    run(tiny("run.duration_images=8"), tmp_path / "run")
    assert rows_of(tmp_path / "run") == [row for row in rows_of(whole) if row["images_seen"] <= 8]


# What is reported


def test_rows_hold_losses_scores_and_what_the_layouts_do(whole: Path) -> None:
    rows = rows_of(whole)
    steps = [row for row in rows if "step" in row]
    assert [(row["images_seen"], row["step"]) for row in steps] == [(4 * i, i) for i in range(1, 9)]
    for row in steps:
        for network in ("generator", "discriminator"):
            assert math.isfinite(row[f"{network}/loss"]) and row[f"{network}/orthogonality"] > 0
        assert math.isfinite(row["discriminator/real_score"]) and math.isfinite(row["discriminator/fake_score"])
    looks = [row for row in rows if "layout/generator.blocks.2.an/rho" in row]
    assert [row["images_seen"] for row in looks] == [0, 8, 16, 24, 32]
    for row in looks:
        for site in ("layout/generator.blocks.2.an", "layout/discriminator.blocks.0.an"):
            assert 0 < row[f"{site}/entropy"] <= 1
            assert len(row[f"{site}/usage"]) == 4 and sum(row[f"{site}/usage"]) == pytest.approx(1)
    assert looks[0]["layout/generator.blocks.2.an/rho"] == 0 != looks[-1]["layout/generator.blocks.2.an/rho"]
    times = [json.loads(line) for line in (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [row["seconds"] for row in times if "step" in row]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert any((whole / "tensorboard").glob("events*"))
    spreads = [(row["images_seen"], row["samples/diversity"]) for row in rows if "samples/diversity" in row]
    assert [seen for seen, _ in spreads] == [0, 16, 32] and all(0 < spread < 1 for _, spread in spreads)


def test_the_run_directory_says_what_was_trained_on_what(whole: Path) -> None:
    config, data = RunDirectory(whole).read()
    assert config == tiny("model.num_classes=3")
    assert data["classes"] == ["a", "b", "c"] and data["num_images"] == 24 and data["source"] == "by hand"
    _, header = read_checkpoint(whole / "checkpoints/000000032.safetensors")
    assert header.classes == ("a", "b", "c") and header.note == "nothing but noise"
    assert header.config == config and header.images_seen == 32 and header.seconds > 0


def test_a_grid_has_a_class_a_row_and_eight_columns(whole: Path) -> None:
    with Image.open(whole / "samples/000000016.png") as picture:
        assert picture.size == (8 * 34 + 2, 3 * 34 + 2)  # pictures of 32, and 2 pixels between and around
        pixels = np.asarray(picture)
    assert pixels[:2].max() == 0 and pixels[2:34, 2:34].std() > 0
    assert not np.array_equal(pixels[2:34, 2:34], pixels[2:34, 36:68])


def test_a_uniform_layout_is_warned_of_once(tmp_path: Path) -> None:
    settings = ("run.layout_every_images=4", "run.duration_images=16", "run.grid_every_images=1000")
    console = silent()
    run(tiny(*settings, "model.an.temperature=1e-6"), tmp_path / "uniform", console=console)
    text = console.file.getvalue()
    for site in ("generator.blocks.2.an", "discriminator.blocks.0.an"):
        assert text.count(f"warning: layout/{site}/entropy") == 1
    assert "model.an.temperature" in text
    console = silent()
    run(tiny(*settings, "model.an.temperature=100"), tmp_path / "sharp", console=console)
    assert "warning" not in console.file.getvalue()


def test_a_line_of_progress_names_speed_and_time_left(tmp_path: Path) -> None:
    console = silent()
    run(tiny("run.duration_images=8"), tmp_path / "run", console=console)
    (line,) = [line for line in console.file.getvalue().splitlines() if line.startswith("4 of 8 images, ")]
    assert re.search(r"\d+/s, 0:\d\d:\d\d left", line)


# Batches


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = noise(64)
    mirrored = {}
    for flip in (False, True):
        config = tiny("run.batch_size=64", f"data.flip={flip}")
        batch = Stream(config, images, torch.device("cpu")).batch(0)
        originals = to_float(torch.from_numpy(images.images))
        same = [any(torch.equal(image, original) for original in originals) for image in batch.images]
        turned = [any(torch.equal(image.flip(2), original) for original in originals) for image in batch.images]
        assert all(a != b for a, b in zip(same, turned, strict=True))
        mirrored[flip] = sum(turned)
    assert mirrored[False] == 0 and 16 < mirrored[True] < 48


def test_every_discriminator_update_gets_a_batch_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, torch.Tensor]] = []
    for name in ("_discriminator_loss", "_generator_loss"):
        original = getattr(ClassConditionalTask, name)

        def spy(self: Any, batch: Batch, name: str = name, original: Any = original) -> Any:
            seen.append((name, batch.images))
            return original(self, batch)

        monkeypatch.setattr(ClassConditionalTask, name, spy)
    run(tiny("optim.d_steps=3", "run.duration_images=4"), tmp_path / "run")
    assert [name for name, _ in seen] == ["_discriminator_loss"] * 3 + ["_generator_loss"]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(seen[i][1], seen[j][1]), (i, j)
    tensors, _ = read_checkpoint(tmp_path / "run/checkpoints/000000004.safetensors")
    assert tensors["optimiser.discriminator.linear.bias.step"].item() == 3
    assert tensors["optimiser.generator.to_rgb.bias.step"].item() == 1


def test_random_numbers_are_a_function_of_seed_and_images_seen() -> None:
    drawn = set()
    for seed, images_seen, rank in ((0, 0, 0), (0, 4, 0), (1, 0, 0), (0, 0, 1), (4, 0, 0)):
        seed_step(seed, images_seen, rank)
        first = torch.rand(1).item()
        seed_step(seed, images_seen, rank)
        assert torch.rand(1).item() == first
        drawn.add(first)
    assert len(drawn) == 5


def test_what_has_no_effect_is_no_other_run() -> None:
    """Runs of before have tau none: the paper's presets the same number, networks without AN nothing of it at all."""
    paper, none = PRESETS["paper-imagenet128-an"][1], ["model.an.temperature=none"]
    assert effective_settings(override(paper, none)) | {"row": "an"} == effective_settings(paper)
    without = PRESETS["small32-sngan"][1]
    changed = effective_settings(override(without, [*none, "model.an.num_entities=3"]))
    assert changed | {"row": "sngan"} == effective_settings(without)
    auto = effective_settings(PRESETS["small32-an"][1])
    before = effective_settings(override(PRESETS["small32-an"][1], none))
    assert {key for key, value in auto.items() if before[key] != value} == {"row", "model.an.temperature"}
