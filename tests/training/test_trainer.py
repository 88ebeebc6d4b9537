"""The training loop: resumed bit for bit, killed at any moment, stopped, refused; and what it reports."""

from __future__ import annotations

import errno
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
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from attnorm.checkpoint import CheckpointError, read_checkpoint, read_header, save_checkpoint
from attnorm.cli import training as command
from attnorm.config import Config, ConfigError
from attnorm.data.images import to_float
from attnorm.data.stream import Batch, Stream
from attnorm.presets import PRESETS
from attnorm.run_directory import RunDirectory
from attnorm.settings import override
from attnorm.system import devices
from attnorm.system.files import file_lock
from attnorm.system.process_group import ProcessGroup
from attnorm.system.randomness import seed_step, seed_weights
from attnorm.training import class_conditional, trainer
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.resume import effective_settings, require_trainable, start_from
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
    """The same run, killed after 4 steps and resumed with a longer duration."""
    out = tmp_path_factory.mktemp("continued") / "run"
    assert run(tiny("run.duration_images=16"), out).images_seen == 16
    with RunDirectory(out).metrics_file.open("a", encoding="utf-8") as file:  # a step later, and within a line
        file.write('{"images_seen": 20, "generator/loss": 123.0}\n{"images_seen": 24, "generator/lo')
    half = out / "checkpoints/.000000020.safetensors.abcd_123.tmp"
    half.write_bytes(b"half a checkpoint")
    assert [path.stem for path in RunDirectory(out).checkpoints()] == ["000000016"]
    assert run(tiny(), out).images_seen == 32
    assert not half.exists()
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


def test_a_disk_that_is_full_for_tensorboard_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread's own traceback would be a warning, and so an error, here."""

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hook = threading.excepthook
    monkeypatch.setattr(RecordWriter, "write", no_room)
    with pytest.raises(OSError, match="No space left on device"):
        run(tiny(), tmp_path / "run")
    assert threading.excepthook is hook


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


def test_resume_is_bit_exact_in_all_that_is_kept_and_reported(whole: Path, continued: Path) -> None:
    names = ("000000016", "000000032")
    tensors, _ = read_checkpoint(whole / f"checkpoints/{names[1]}.safetensors")
    for prefix in ("generator.", "discriminator.", "ema.", "optimiser.generator.", "optimiser.discriminator."):
        assert any(key.startswith(prefix) for key in tensors), prefix
    for name in names:
        assert_equal_checkpoints(*(out / f"checkpoints/{name}.safetensors" for out in (whole, continued)))
    assert rows_of(whole) == rows_of(continued)
    pictures = sorted(path.name for path in (whole / "samples").iterdir())
    assert pictures == ["000000000.png", "000000016.png", "000000032.png"]
    for name in pictures:
        assert (whole / "samples" / name).read_bytes() == (continued / "samples" / name).read_bytes(), name


@pytest.mark.parametrize(
    "settings",
    [
        ("run.channels_last=true", "model.an.moments=batch", "data.flip=true"),
        ("run.precision=bfloat16", "optim.d_steps=2", "model.context=self_attention", "model.head=auxiliary"),
    ],
    ids=["channels_last-batch_moments-flip", "bfloat16-d_steps2-self_attention-auxiliary"],
)
def test_resume_is_bit_exact_whatever_the_settings(tmp_path: Path, settings: tuple[str, ...]) -> None:
    settings = (*settings, "run.layout_every_images=1000", "run.grid_every_images=1000")
    out = check_resume(functools.partial(tiny, *settings), tmp_path, 8, 16)
    assert all(math.isfinite(row["generator/loss"]) for row in rows_of(out) if "step" in row)


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


def test_a_run_without_a_checkpoint_begins_anew_and_another_seed_is_another(tmp_path: Path, whole: Path) -> None:
    """Of whatever settings; a kill may have come as soon as when the folder was made."""
    out = tmp_path / "run"
    RunDirectory(out).create(tiny("model.width=4", "model.num_classes=3", "run.seed=1"), {"fingerprint": "other"})
    (out / ".config.json.abc.tmp").write_text("{", encoding="utf-8")
    RunDirectory(out).metrics_file.write_text('{"images_seen": 4, "generator/loss": 123.0}\n', encoding="utf-8")
    short = ("run.duration_images=16", "run.checkpoint_every_images=4", "run.keep_checkpoints=2")
    assert run(tiny(*short), out).images_seen == 16
    config, data = RunDirectory(out).read()
    assert config.model.width == 2 and data["fingerprint"] == noise().fingerprint
    names = [f"{seen:09}.safetensors" for seen in (12, 16)]  # the older ones are pruned
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == names
    assert_equal_checkpoints(out / "checkpoints" / names[1], whole / "checkpoints" / names[1])
    assert rows_of(out) == [row for row in rows_of(whole) if row["images_seen"] <= 16]
    run(tiny("run.duration_images=4", "run.seed=1"), tmp_path / "other")
    assert rows_of(tmp_path / "other")[2]["generator/loss"] != rows_of(whole)[2]["generator/loss"]


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


def test_a_run_of_automatic_precision_goes_on_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor with other units: float32 stays, bfloat16 becomes that where there is none, which is said."""
    for units, other in (([], ["flags: amx_bf16"]), (["flags: avx512_bf16"], [])):
        out = tmp_path / str(len(units))
        monkeypatch.setattr(devices, "cpu_info", lambda units=units: units)
        run(tiny("run.precision=auto", "run.duration_images=8"), out)
        begun = read_header(RunDirectory(out).checkpoints()[-1]).config.run.precision
        assert begun == ("bfloat16" if units else "float32")
        monkeypatch.setattr(devices, "cpu_info", lambda other=other: other)
        console = silent()
        run(tiny("run.precision=auto", "run.duration_images=16"), out, console=console)
        assert read_header(RunDirectory(out).checkpoints()[-1]).config.run.precision == "float32"
        said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
        assert ("so far in bfloat16, for which cpu has no units: from here in float32" in said) == bool(units)


def test_a_finished_run_is_left_as_it_is_and_refuses_other_settings_data_and_checkpoints(
    tmp_path: Path, whole: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").iterdir()}
    rows = rows_of(whole)
    outcome = run(tiny(), whole)
    assert (outcome.reason, outcome.images_seen) == ("finished", 32)
    changes = r"g_lr was 0\.0001, now 0\.5, run\.seed was 0, now 7; give the same settings"
    with pytest.raises(ConfigError, match=rf"{changes} \(--set optim\.g_lr=0\.0001 run\.seed=0\), or another --out"):
        run(tiny("optim.g_lr=0.5", "run.seed=7"), whole)
    for other_data in (noise(seed=1), noise(classes=("a", "b"))):
        with pytest.raises(ConfigError, match=r"trained on other data.*give the same data"):
            run(tiny(), whole, other_data)
    assert {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").iterdir()} == before
    assert rows_of(whole) == rows

    other = RunDirectory(tmp_path / "other")
    other.create(tiny("model.width=4", "model.num_classes=3"), RunDirectory(whole).read()[1])
    other.checkpoint_file(8).write_bytes((whole / "checkpoints/000000016.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"000000008\.safetensors does not fit"):
        run(tiny("model.width=4"), other.path)


def test_a_run_starts_from_the_weights_of_another_and_goes_on_from_its_own(tmp_path: Path, whole: Path) -> None:
    start = f"run.start_from={whole}"
    check_resume(lambda *settings: tiny(start, *settings), tmp_path / "resumed", 16, 32)
    console = silent()
    run(tiny(start, "optim.g_lr=1e-30", "optim.d_lr=1e-30", "optim.ema_decay=0"), tmp_path / "still", console=console)
    assert "starts from" in (said := console.file.getvalue()) and "new:" not in said  # type: ignore[attr-defined]
    (ours, header), (theirs, _) = (
        read_checkpoint(RunDirectory(path).checkpoint_file(32)) for path in (tmp_path / "still", whole)
    )
    weights = [name for name in theirs if not name.startswith("optimiser.") and name.endswith(("weight", "original"))]
    assert header.images_seen == 32 and len(weights) > 30
    for name in weights:
        assert torch.equal(ours[name], theirs[name.replace("ema.", "generator.")]), name


def test_a_start_with_another_tau_is_refused(tmp_path: Path) -> None:
    """The weights would take the layer's old default, whatever they were trained with and are said to have."""
    run(tiny("model.an.temperature=1", "run.duration_images=8"), tmp_path / "fixed")
    start = f"run.start_from={tmp_path / 'fixed'}"
    advice = r"tau of 1.0, and is to have auto: .*give --set model\.an\.temperature=1\.0"
    with pytest.raises(CheckpointError, match=advice):
        run(tiny(start, "model.an.temperature=auto"), tmp_path / "auto")
    run(tiny(start, "model.an.temperature=1", "run.duration_images=8"), tmp_path / "same")


def test_a_log_without_checkpoints_is_not_erased(tmp_path: Path) -> None:
    run(tiny("run.checkpoint_every_images=8"), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    for checkpoint in RunDirectory(tmp_path / "run").checkpoints():
        checkpoint.unlink()
    with pytest.raises(ConfigError, match="holds the log of 32 images of training, and no checkpoint"):
        run(tiny("run.seed=7"), tmp_path / "run")
    assert rows_of(tmp_path / "run") == rows


def test_of_a_model_with_other_classes_all_but_these_is_taken(tmp_path: Path, whole: Path) -> None:
    tensors, header = read_checkpoint(RunDirectory(whole).checkpoint_file(32), prefix="ema.")
    model = tmp_path / "model.safetensors"
    save_checkpoint(model, {f"ema.{name}": tensor.half() for name, tensor in tensors.items()}, header)
    images = noise(classes=("a", "b"))
    task = trainer.make_task(trainer.resolve(tiny(), images), images, torch.device("cpu"))
    start = {name: tensor.clone() for name, tensor in task.state.tensors().items()}
    (said,) = start_from(str(model), task.state, images.classes)
    for what in ("the discriminator", "what the generator has of each class", "what the ema has of each class"):
        assert what in said.partition("; new: ")[2]
    after, taken, kept = task.state.tensors(), 0, 0
    for name, tensor in tensors.items():
        for part in ("generator", "ema"):
            ours = after[f"{part}.{name}"]
            is_taken = ours.shape == tensor.shape
            expected = tensor.half().to(ours.dtype) if is_taken else start[f"{part}.{name}"]
            assert torch.equal(ours, expected), name
            taken, kept = taken + is_taken, kept + (not is_taken)
    assert taken > 30 and kept > 3
    assert all(torch.equal(after[name], start[name]) for name in start if name.startswith("discriminator."))
    wider = trainer.make_task(trainer.resolve(tiny("model.width=4"), noise()), noise(), torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors has another generator"):
        start_from(str(model), wider.state, header.classes)
    with pytest.raises(CheckpointError, match="does not exist"):
        require_trainable(tiny("run.start_from=nowhere"), tmp_path / "new")


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with file_lock(out), pytest.raises(ConfigError, match="another process is at work in"):
        run(tiny(), out)
    assert list(out.iterdir()) == []
    run(tiny("run.duration_images=4"), out)  # the lock is gone, and was no obstacle itself
    with file_lock(out):
        pass


# Stopping


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


def nan(scores: torch.Tensor) -> torch.Tensor:
    return scores.sum() * math.nan


def zero_without_a_gradient(scores: torch.Tensor) -> torch.Tensor:
    """The loss of the last step before a save may be finite and its gradient not."""
    return (scores - scores.detach()).abs().sqrt().sum()


@pytest.mark.parametrize(
    ("loss", "step", "fault"),
    [
        ("hinge_generator_loss", 3, nan),
        ("hinge_discriminator_loss", 3, nan),
        ("hinge_generator_loss", 4, zero_without_a_gradient),
    ],
)
def test_what_is_no_number_stops_the_run_and_is_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, step: int, fault: Any
) -> None:
    original, calls = getattr(class_conditional, loss), []

    def broken(*scores: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return original(*scores) + (fault(scores[0]) if len(calls) == step else 0)

    monkeypatch.setattr(class_conditional, loss, broken)
    out = tmp_path / "run"
    last_good = str(out / "checkpoints/000000008.safetensors")
    with pytest.raises(TrainingError, match=rf"not finite (at|after) step {step} ") as caught:
        run(tiny("run.checkpoint_every_images=8", "run.log_every_images=16"), out)
    assert last_good in str(caught.value) and "g_lr" in str(caught.value)
    assert [str(path) for path in RunDirectory(out).checkpoints()] == [last_good]
    tensors, _ = read_checkpoint(Path(last_good))
    assert [name for name, tensor in tensors.items() if not tensor.isfinite().all()] == []


KILLING = f"""
import os, random, signal, sys, time
from pathlib import Path
import torch
from attnorm.checkpoint import Header, read_checkpoint, save_checkpoint
from attnorm.config import Config
from attnorm.run_directory import RunDirectory
from attnorm.settings import override
from attnorm.training import hooks
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import run

torch.set_num_threads(1)
random.seed(0)
config = override(Config(), {TINY!r})
saves = RunDirectory(sys.argv[1])
saves.create(config, {{"fingerprint": ""}})
newest = lambda: int(saves.checkpoints()[-1].stem) if saves.checkpoints() else 0
unfinished = lambda: {{path.name for path in (saves.path / "checkpoints").iterdir() if path.suffix == ".tmp"}}
for _ in range(5):
    before, of_earlier_kills = newest(), unfinished()
    child = os.fork()
    if child == 0:
        number = before
        while True:
            number += 1
            content = torch.full((2**20,), float(number))
            save_checkpoint(saves.checkpoint_file(number), {{"ballast": content}}, Header(config, (), number, 0.0))
            saves.keep_last(3)
    while newest() == before:
        time.sleep(0.001)
    begun = set()
    while not begun:  # stopped at random moments, until one lies within a save
        os.kill(child, signal.SIGCONT)
        time.sleep(random.uniform(0.0, 0.01))
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        begun = unfinished() - of_earlier_kills
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(*begun & unfinished(), flush=True)
    for path in saves.checkpoints():
        tensors, header = read_checkpoint(path)
        assert path.stem == f"{{header.images_seen:09d}}"
        assert tensors["ballast"].shape == (2**20,) and (tensors["ballast"] == header.images_seen).all()

original = hooks.save_checkpoint
hooks.save_checkpoint = lambda path, tensors, header: original(path, tensors | {{"ballast": torch.ones(2**21)}}, header)
kills = 0
while True:
    child = os.fork()
    if child == 0:
        outcome = run(override(config, ["run.checkpoint_every_images=4"]), Path(sys.argv[2]))
        os._exit(0 if outcome.reason == "finished" else 1)
    if kills < 2:
        time.sleep(random.uniform(0.05, 1.2))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        sys.exit(os.WEXITSTATUS(status))
    kills += 1
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Path]:
    """Five processes that do nothing but save 4 MiB each, killed at random moments of a save: the folder that they
    saved in, and what each kill left unfinished. Then a run with saves as slow as those of a large model, killed
    twice and resumed until it is done.
    """
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-c", KILLING, folder / "saves", folder / "run"],
        capture_output=True, text=True, timeout=600, env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "saves", done.stdout.splitlines(), folder / "run"


def test_a_kill_while_saving_leaves_only_whole_checkpoints(killed: tuple[Path, list[str], Path]) -> None:
    saves, left, _ = killed
    assert len(set(left)) == 5 and all(left), "a kill fell between two saves: it has shown nothing"
    kept = RunDirectory(saves).checkpoints()  # those of the last kill too were read in the script
    assert 3 <= len(kept) <= 4 and int(kept[-1].stem) >= 5
    assert not any(".tmp" in path.name for path in kept)


def test_a_killed_run_goes_on_to_the_same_end(killed: tuple[Path, list[str], Path], whole: Path) -> None:
    _, _, run_path = killed
    (ours, _), (theirs, _) = (read_checkpoint(RunDirectory(path).checkpoint_file(32)) for path in (run_path, whole))
    ours.pop("ballast")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert rows_of(run_path) == rows_of(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    original, out = TrainingState.finish_step, tmp_path / "run"

    def stopped_at_the_second(self: TrainingState, batch_size: int) -> None:
        if self.images_seen == 4:
            os.kill(os.getpid(), number)
        original(self, batch_size)

    before = signal.getsignal(number)
    monkeypatch.setattr(command, "read_images", lambda _: noise())
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(TrainingState, "finish_step", stopped_at_the_second)
        command._train(tiny(), out, ProcessGroup())
    assert caught.value.code == 130 and signal.getsignal(number) is before
    said = capsys.readouterr()
    (checkpoint,) = RunDirectory(out).checkpoints()
    assert said.out == f"interrupted at 8 images; checkpoint {checkpoint}\n" and checkpoint.stem == "000000008"
    assert "The same command goes on from here" in said.err
    run(tiny("run.duration_images=12"), out)
    assert rows_of(out) == [row for row in rows_of(whole) if row["images_seen"] <= 12]


def test_a_run_stopped_before_its_first_step_begins_once(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "log_validation", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        outcome = run(tiny(), tmp_path / "run")
    assert (outcome.reason, outcome.images_seen) == ("interrupted", 0)
    console = silent()
    run(tiny("run.duration_images=8"), tmp_path / "run", console=console)
    assert rows_of(tmp_path / "run") == [row for row in rows_of(whole) if row["images_seen"] <= 8]
    (line,) = [line for line in console.file.getvalue().splitlines() if line.startswith("4 of 8 images, ")]
    assert re.search(r"\d+/s, 0:\d\d:\d\d left", line)


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
    with Image.open(whole / "samples/000000016.png") as picture:  # a class a row, and eight columns
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


def test_seeds_of_any_size_are_other_weights_and_other_steps() -> None:
    """Random numbers of a step are a function of seed and images seen."""
    starts = set()
    for seed in (0, 2**32, 2**40, 2**63 - 1):
        seed_weights(seed)
        starts.add(torch.rand(()).item())
    torch.manual_seed(0)
    assert torch.rand(()).item() in starts and len(starts) == 4
    drawn = set()
    for seed, images_seen in ((0, 0), (0, 4), (1, 0), (4, 0)) * 2:
        seed_step(seed, images_seen)
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 4


def test_every_discriminator_update_gets_a_batch_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bytes]] = []
    for name in ("_discriminator_loss", "_generator_loss"):
        original = getattr(ClassConditionalTask, name)

        def spy(self: Any, batch: Batch, name: str = name, original: Any = original) -> Any:
            seen.append((name, batch.images.numpy().tobytes()))
            return original(self, batch)

        monkeypatch.setattr(ClassConditionalTask, name, spy)
    run(tiny("optim.d_steps=3", "run.duration_images=4"), tmp_path / "run")
    assert [name for name, _ in seen] == ["_discriminator_loss"] * 3 + ["_generator_loss"]
    assert len({images for _, images in seen}) == 4
    tensors, _ = read_checkpoint(tmp_path / "run/checkpoints/000000004.safetensors")
    assert tensors["optimiser.discriminator.linear.bias.step"].item() == 3
    assert tensors["optimiser.generator.to_rgb.bias.step"].item() == 1


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
