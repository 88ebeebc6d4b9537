"""The command line from end to end, and what it says of mistakes."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnorm import __version__, cli
from attnorm.cli import SUBCOMMANDS, terminal
from attnorm.cli.generation import folder_names
from attnorm.config import Config
from attnorm.presets import PRESETS
from attnorm.run_directory import RunDirectory
from attnorm.settings import from_dict
from tests.conftest import contents, draw_photographs, look_at

ROOT = Path(__file__).parents[1]
TINY = ("model.width=2", "model.latent_dim=4", "run.batch_size=4", "run.duration_images=8", "run.device=cpu")
QUIET = ("run.log_every_images=4", "run.layout_every_images=8", "run.grid_every_images=8", "run.precision=float32")
CLASSES = ["bird", "cat", "dog"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders of three pictures each, and a file that is none."""
    folder = tmp_path_factory.mktemp("data") / "photographs [mine]"
    for name in CLASSES:
        draw_photographs(folder / name, 3)
    (folder / "cat/broken.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def trained(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Two steps of the preset `smoke`, smaller still, and what the command said on both streams."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as noted:
        cli.main(train_command(photographs, out))
    return out, said.getvalue(), noted.getvalue()


@pytest.fixture
def run(trained: tuple[Path, str, str]) -> Path:
    return trained[0]


def train_command(photographs: Path, out: Path, *settings: str) -> list[str]:
    settings = (*TINY, *QUIET, *settings)
    return ["train", "--preset", "smoke", "--data", str(photographs), "--out", str(out), "--set", *settings]


# Training


def test_training_writes_a_run_and_says_where(trained: tuple[Path, str, str], photographs: Path) -> None:
    out, said, noted = trained
    assert said == f"finished at 8 images; checkpoint {out / 'checkpoints/000000008.safetensors'}\n"
    assert f"9 images of 3 classes from {photographs}" in noted
    assert "skipped 1:" in noted and "cat/broken.png" in noted
    assert {entry.name for entry in out.iterdir()} == {
        *("checkpoints", "config.json", "metrics.jsonl", "samples", "tensorboard")
    }
    config, data = RunDirectory(out).read()
    assert config.model.width == 2 and config.model.num_classes == 3 and data["classes"] == CLASSES
    look_at(out / "samples/000000008.png")


def test_a_loss_that_is_no_number_ends_with_status_1(
    photographs: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "attnorm.training.class_conditional.hinge_generator_loss", lambda scores: scores.mean() * math.nan
    )
    message = refused(train_command(photographs, tmp_path / "[bold]run"), 1, is_silent=False)
    assert "attnorm: a loss was not finite at step 1" in message


# The resolved configuration


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run takes is measured in tests/test_training_step.py."""
    monkeypatch.setattr("attnorm.cli.training._say_what_it_takes", lambda config: None)


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    cli.main(["train", "--preset", "smoke", "--dry-run", *arguments])
    return json.loads(capsys.readouterr().out)


def test_a_dry_run_prints_the_resolved_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    values = dry_run(capsys)
    assert values["model"]["an"]["temperature"] == "auto"
    rule = dry_run(capsys, "--set", "model.an.temperature=none")
    assert rule["model"]["an"]["temperature"] == pytest.approx(0.1 * math.sqrt(64 / 4))
    assert values["data"]["source"] == "builtin" and values["run"]["batch_size"] == 8
    assert from_dict(Config, values) == PRESETS["smoke"][1]
    assert dry_run(capsys, "--set", "model.an.temperature=7")["model"]["an"]["temperature"] == 7


@pytest.mark.parametrize(
    "arguments",
    ["--set=run.seed=3 --set=model.width=2", "--set run.seed=1 model.width=2 --set run.seed=3"],
)
def test_settings_may_follow_one_set_or_several(capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    values = dry_run(capsys, *arguments.split(), "--set", "data.flip=true")
    assert values["run"]["seed"] == 3 and values["model"]["width"] == 2 and values["data"]["flip"]


def test_a_dry_run_says_what_images_are_there_without_decoding_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/1.png", "a/2.jpg", "b/1.png", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    cli.main(["train", "--preset", "smoke", "--dry-run", "--data", str(tmp_path)])
    said = capsys.readouterr()
    assert json.loads(said.out)["data"]["source"] == str(tmp_path)
    found = f"3 image files of 2 classes from {tmp_path}, 1 to 2 a class\nskipped 1:\n  b/notes.txt: not an image file"
    assert said.err.startswith(found)


# Sampling


def test_the_same_seed_gives_the_same_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "second"):
        cli.main(["sample", str(run), "--num", "7", "--seed", "40", "--out", str(tmp_path / name)])
    files = contents(tmp_path / "first")
    assert files == contents(tmp_path / "second")
    pictures = sorted(name for name in files if "/" in name)
    assert pictures == [
        *(f"bird/{seed:06d}.png" for seed in (40, 43, 46)),
        *(f"cat/{seed:06d}.png" for seed in (41, 44)),
        *(f"dog/{seed:06d}.png" for seed in (42, 45)),
    ]
    assert len({files[name] for name in pictures}) == 7
    record = json.loads(files["samples.json"])
    assert record["seeds"] == [40, 46] and record["classes"] == CLASSES and record["weights"] == "ema"
    look_at(tmp_path / "first/grid.png")
    assert "7 images of 3 classes" in capsys.readouterr().out


def test_raw_weights_classes_and_a_checkpoint_file_may_be_asked_for(run: Path, tmp_path: Path) -> None:
    file = RunDirectory(run).checkpoints()[-1]
    for name, extra in (("ema", []), ("raw", ["--raw-weights"])):
        cli.main(["sample", str(file), "--num", "2", "--classes", "dog, 0", *extra, "--out", str(tmp_path / name)])
    ema, raw = (contents(tmp_path / name) for name in ("ema", "raw"))
    assert ema.keys() == raw.keys() == {"dog/000000.png", "bird/000001.png", "grid.png", "samples.json"}
    assert ema["bird/000001.png"] != raw["bird/000001.png"]
    assert json.loads(raw["samples.json"])["weights"] == "raw"


# Figures


def test_a_walk_is_drawn_with_the_map_of_an_entity(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["interpolate", str(run), "--from", "bird", "--to", "2", "--steps", "3"]
    cli.main([*command, "--out", str(tmp_path / "walk.png")])
    assert re.fullmatch(r".*walk\.png, with the map of entity \d\n", capsys.readouterr().out)
    cli.main([*command, "--entity", "3", "--via", "cat,1", "--out", str(tmp_path / "new/chain.png")])
    assert "with the map of entity 3" in capsys.readouterr().out
    walk, chain = look_at(tmp_path / "walk.png"), look_at(tmp_path / "new/chain.png")
    assert chain.shape[1] > 2 * walk.shape[1]  # 7 pictures beside 3


def test_layouts_are_drawn(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["layout", str(run), "--classes", "dog,cat", "--seed", "5", "--out", str(tmp_path / "out")])
    diagnosis, *files = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"blocks\.2\.an: entropy 0\.\d\d, .* of 4 entities in use, rho .*: (awake|asleep: .*)", diagnosis
    )
    assert files == [str(tmp_path / "out" / name) for name in ("layouts.png", "statistics.png", "layouts.json")]
    look_at(tmp_path / "out/layouts.png")
    (site,) = json.loads((tmp_path / "out/layouts.json").read_text(encoding="utf-8")).values()
    assert [(image["class"], image["seed"]) for image in site["images"]] == [("dog", 5), ("cat", 6)]


def test_curves_of_runs_of_one_name_are_both_drawn(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str] = []
    from attnorm.reports import figures

    original = figures.curves_figure
    monkeypatch.setattr(figures, "curves_figure", lambda runs: named.extend(runs) or original(runs))
    other = tmp_path / "other/run"
    other.mkdir(parents=True)
    (other / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    cli.main(["curves", str(run), str(other), "--out", str(tmp_path / "curves.png")])
    look_at(tmp_path / "curves.png")
    assert len(named) == 2


def test_every_preset_is_listed_with_its_sites_and_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """And its networks can be built."""
    cli.main(["presets"])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")}
    for name in PRESETS:
        assert re.search(r" [1-9][\d,]{4,} +[1-9][\d,]{4,} *$", rows[name]), name
    assert "41,996,931" in rows["paper-imagenet128-sngan"]
    assert "4,304,387" in rows["cifar10-sngan"] and "1,055,105" in rows["cifar10-sngan"]
    assert "G block 3 (256 channels), D block 1 (64 channels)" in rows["paper-imagenet128-an"]


# Nothing existing is overwritten


def test_nothing_is_overwritten_without_being_asked(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder, picture = tmp_path / "folder", tmp_path / "walk.png"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine", encoding="utf-8")
    picture.write_bytes(b"mine too")
    before = contents(tmp_path)
    commands = [
        ["sample", str(run), "--num", "1", "--out", str(folder)],
        ["layout", str(run), "--classes", "cat", "--out", str(folder)],
        ["page", str(run), "--out", str(folder)],
        ["interpolate", str(run), "--from", "cat", "--to", "dog", "--steps", "2", "--out", str(picture)],
        ["curves", str(run), "--out", str(picture)],
    ]
    for command in commands:
        assert "already there; choose another --out, or say --overwrite" in refused(command)
    assert contents(tmp_path) == before
    for command in (commands[0], commands[3]):
        cli.main([*command, "--overwrite"])
    look_at(picture)
    assert (folder / "mine.txt").read_text(encoding="utf-8") == "mine" and (folder / "grid.png").exists()


# Mistakes


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("train --preset smok --out OUT", "did you mean smoke?"),
        ("train --preset smoke", "--out is missing"),
        ("train --preset cifar10-an --out OUT", "--data is missing"),
        ("train --preset smoke --out OUT --set", "--set"),
        ("train --preset smoke --out OUT --data EMPTY", "no readable image"),
        ("train --preset smoke --data EMPTY --dry-run", "no image in"),
        ("train --preset smoke --data OUT/photos --dry-run", "does not exist"),
        ("train --preset smoke --out OUT --data DATA --set run.device=tpu9", "expected auto, cpu, cuda"),
        ("train --preset smoke --out OUT --data DATA --set model.num_classes=7", "leave it at 0"),
        ("train --preset smoke --out FILE/run --data DATA", "FILE"),
        ("train --preset smoke --out FILE --data DATA", "choose another --out"),
        ("sample OUT/nowhere --out OUT", "expected a run directory, a checkpoint file or the name of a model"),
        ("sample EMPTY --out OUT", "is not a run directory"),
        ("sample FILE --out OUT", "is no checkpoint; expected a run directory"),
        ("sample RUN --out OUT --num 0", "at least 1 image"),
        ("sample RUN --out OUT --seed -1", "--seed is -1; expected a whole number from 0 to 2^63 - 1"),
        ("interpolate RUN --from cat --to dog --seed 9223372036854775808 --out OUT/x.png", "expected a whole number"),
        ("manifest --data DATA --size 32 --seed -1 --out OUT", "expected a whole number"),
        ("evaluate RUN --metrics is --classes cat --num 10", "--classes is for intra-frechet"),
        ("evaluate RUN --out RUN", "is a run directory, or a part of one"),
        ("sample RUN --out OUT --classes cat,dogs", "did you mean dog?"),
        ("sample RUN --out OUT --classes ,", "--classes"),
        ("sample RUN --out FILE/deep", "FILE"),
        ("sample RUN --out FILE --overwrite", "expected a folder"),
        ("interpolate RUN --from cat --to dog --via cow --out OUT/x.png", "it has: bird, cat, dog"),
        ("interpolate RUN --from cat --to dog --entity 4 --out OUT/x.png", "entities 0 to 3"),
        ("interpolate RUN --from cat --to dog --out EMPTY", "EMPTY"),
        ("layout RUN --out OUT --seed -1", "expected a whole number from 0"),
        ("sample RUN --out RUN/samples --overwrite", "is a run directory, or a part of one"),
        ("page RUN --out RUN/checkpoints/new --overwrite", "is a run directory, or a part of one"),
        ("curves RUN --out RUN/config.json --overwrite", "let its name end in .png"),
        ("interpolate RUN --from cat --to dog --out OUT/x.jpg", "let its name end in .png"),
        ("interpolate RUN --from cat --to dog --steps 1000000 --out OUT/x.png", "at most 500"),
        ("trian --preset smoke --out OUT", "did you mean train?"),
        ("page OUT/nowhere --out OUT", "does not exist"),
        ("page CHECKPOINT --out OUT", "is not a run directory"),
        ("curves EMPTY --out OUT/x.png", "expected a run directory"),
        ("train --preset smoke --out DATA/run --data DATA", "is inside the data"),
        ("reproduce table4 --scale small --out DATA/x --data DATA", "is inside the data"),
        ("evaluate RUN --out DATA/x --data DATA", "is inside the data"),
        ("manifest --out DATA/x --data DATA --size 32", "is inside the data"),
        ("manifest --out OUT --data DATA", "no size was named"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(
    run: Path, photographs: Path, tmp_path: Path, refused: Callable[..., str], command: str, remedy: str
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("mine", encoding="utf-8")
    places = {"RUN": run, "DATA": photographs, "CHECKPOINT": RunDirectory(run).checkpoints()[-1]}
    places |= {name: tmp_path / name for name in ("OUT", "EMPTY", "FILE")}
    arguments = [re.sub(r"^[A-Z]+(?=/|$)", lambda m: str(places[m[0]]), word) for word in command.split()]
    before = contents(run)
    assert remedy in refused(arguments)
    assert contents(run) == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["EMPTY", "FILE"]
    assert (tmp_path / "FILE").read_text(encoding="utf-8") == "mine" and not any((tmp_path / "EMPTY").iterdir())


@pytest.mark.parametrize(
    "command",
    [
        "train --preset smoke --data DATA --out OUT --set run.device=cuda:99",
        "train --preset smoke --data DATA --out FOLDER",
        "train --preset smoke --data DATA --out FILE/deep",
        "train --preset smoke --data DATA --out RUN --set model.width=3",
        "evaluate RUN --num 3 --extractor efficientnet-lite0",
        "evaluate RUN --device cuda:99 --extractor efficientnet-lite0",
    ],
)
def test_mistakes_are_told_before_the_data_are_read(
    run: Path,
    photographs: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER/mine.txt").touch()
    (tmp_path / "FILE").touch()
    places = {"RUN": run, "DATA": photographs} | {name: tmp_path / name for name in ("OUT", "FOLDER", "FILE")}
    for module in ("training", "evaluate_generators"):
        found = importlib.import_module(f"attnorm.cli.{module}")  # in the package the function has that name too
        monkeypatch.setattr(found, "read_images", lambda config: pytest.fail("the data were read"))
    refused([re.sub(r"^[A-Z]+(?=/|$)", lambda m: str(places[m[0]]), word) for word in command.split()])


def test_names_of_files_cannot_steer_a_terminal(
    refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(["sample", "a\x1b]0;title\x07\u202egnp.\udce9", "--out", "x"])
    assert r"a\x1b]0;title\x07\u202egnp.\xe9 does not exist" in message
    terminal.console.print("skipped \x1b[2J", "[bold]")
    assert capsys.readouterr().err == r"skipped \x1b[2J [bold]" + "\n"


def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The help of curves says Fréchet."""
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    with pytest.raises(SystemExit) as caught:
        cli.main(["curves", "--help"])
    screen.flush()
    assert caught.value.code == 0 and rb"Fr\xe9chet" in screen.buffer.getvalue()  # type: ignore[attr-defined]


def test_tables_are_as_wide_as_columns_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = {}
    for columns in ("40", ""):
        monkeypatch.setenv("COLUMNS", columns)
        terminal.screen().print("x" * 300)
        widths[columns] = max(map(len, capsys.readouterr().out.splitlines()))
    assert widths == {"40": 40, "": 200}


def test_every_class_has_a_folder_of_its_own() -> None:
    names = ["class-1", "a/b", "", "..", "Cat", "cat", "caf\u00e9", "cafe\u0301", "grid.png", "nul\0", "x" * 300, "dog"]
    folders = folder_names(names)
    assert folders[:6] == ["class-1", "class-1-", "class-2", "class-3", "Cat", "class-5"]
    assert folders[6:] == ["caf\u00e9", "class-7", "class-8", "class-9", "class-10", "dog"]


# Help


HELP = """
import contextlib, io, json, sys
from attnorm import cli

said = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            cli.main(arguments)
        except SystemExit as end:
            assert not end.code
    said.append(out.getvalue())
heavy = {"torch", "numpy", "matplotlib", "PIL"} & set(sys.modules)
assert not heavy, heavy
print(json.dumps(said))
"""


def test_help_is_there_for_every_subcommand_and_neither_it_nor_the_version_loads_torch() -> None:
    """In one process of its own: the tests' has torch."""
    asked = [
        ["--version"],
        *([*name, flag] for name in ([], *([name] for name in SUBCOMMANDS)) for flag in ("-h", "--help")),
    ]
    command = [sys.executable, "-c", HELP, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    version, short, long, *of_each = json.loads(done.stdout)
    assert version == f"attnorm {__version__}\n" and short == long
    assert all(name in long for name in SUBCOMMANDS) and "attnorm train --preset demo" in " ".join(long.split())
    for (called, function), short, long in zip(SUBCOMMANDS.items(), of_each[::2], of_each[1::2], strict=True):
        for name in inspect.signature(function).parameters:
            option = {"start": "from", "end": "to", "settings": "set"}.get(name, name).replace("_", "-")
            assert f"--{option}" in long or option.removesuffix("s").upper() in long, (called, option)
        assert short == long and function.__doc__.split()[0] in long


def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "attnorm", "train", "--preset", "smok", "--out", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr == "attnorm: there is no preset 'smok'; did you mean smoke? `attnorm presets` lists them\n"


def test_an_interrupt_while_importing_ends_at_once(tmp_path: Path) -> None:
    """Even where what is imported swallows it, as some packages do."""
    script = """
import os, signal, sys
from attnorm import cli

class Swallowing:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                pass

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Swallowing())
cli.main(sys.argv[1:])
print("went on")
"""
    command = [sys.executable, "-c", script, "train", "--preset", "smoke", "--out", str(tmp_path / "x")]
    done = subprocess.run([*command, "--set", *TINY], capture_output=True, text=True, timeout=600)
    assert done.returncode == 130 and done.stdout == done.stderr == ""


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "attnorm", "train", "--preset", "smoke", "--dry-run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_device_without_memory_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(**_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(cli.app, "cli", full)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["presets"])
    assert stopped.value.code == 1 and "out of memory for 2 GiB more; a smaller batch" in capsys.readouterr().err
    for ask, asked in (
        (lambda **_: torch.empty(2**44), " for 70,368,744,177,664 bytes more"),
        (lambda **_: torch.empty(2**40, 2**40), ""),
        (lambda **_: np.empty(2**55), " for 256 PiB more"),
    ):
        monkeypatch.setattr(cli.app, "cli", ask)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["presets"])
        assert stopped.value.code == 1 and f"the device is out of memory{asked}; a" in capsys.readouterr().err
    monkeypatch.setattr(cli.app, "cli", lambda **_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):  # others are ours to mend, and keep their traceback
        cli.main(["presets"])
