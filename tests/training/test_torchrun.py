"""The commands of docs/training.md, and what torchrun makes of a lost process and of a signal."""

from __future__ import annotations

import functools
import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from attnorm import cli
from attnorm.checkpoint import read_checkpoint
from attnorm.presets import PRESETS
from attnorm.run_directory import RunDirectory
from attnorm.settings import override

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
SETTINGS = ("run.duration_images=80000", "run.checkpoint_every_images=16", "run.layout_every_images=1000")


def blocks() -> list[str]:
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^```\w+\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.removeprefix("srun ") for block in blocks() for line in block.splitlines()]
    return [line for line in lines if line.startswith(("attnorm ", "torchrun "))]


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_page_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun and attnorm read it, and with settings that there are."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        given = get_args_parser().parse_args(words[1:])
        assert given.module and given.training_script == "attnorm" and given.max_restarts > 0
        words = ["attnorm", *given.training_script_args]
    called: list[inspect.BoundArguments] = []
    original = getattr(cli, words[1])

    @functools.wraps(original)
    def pretend(*positional: object, **named: object) -> None:
        called.append(inspect.signature(original).bind(*positional, **named))

    monkeypatch.setattr(cli, "app", cli.tyro.extras.SubcommandApp())
    for verb in (cli.train, cli.watch):
        cli.app.command(pretend if verb is original else verb)
    cli.main(words[1:])
    (found,) = called
    if words[1] == "train":
        override(PRESETS[found.arguments["preset"]][1], found.arguments.get("settings", ()))


def test_the_script_for_slurm_is_bash(tmp_path: Path) -> None:
    (script,) = [block for block in blocks() if block.startswith("#!")]
    (tmp_path / "job").write_text(script)
    subprocess.run(["bash", "-n", tmp_path / "job"], check=True)


def torchrun(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *more]
    command += ["-m", "attnorm", "train", "--preset", "smoke", "--out", str(out), "--set", *SETTINGS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 500
    while not what():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.02)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="the processes that torchrun has started are found in /proc")
def test_a_lost_process_is_started_anew_and_sigterm_saves(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    process = torchrun(run.path, "--max-restarts", "1")
    wait_for(lambda: len(run.checkpoints()) > 0, process)
    lost = workers_of(process)[-1]
    os.kill(lost, signal.SIGKILL)
    wait_for(lambda: lost not in workers_of(process), process)
    had = int(run.checkpoints()[-1].stem)
    wait_for(lambda: int(run.checkpoints()[-1].stem) > had, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=500)
    seen = int(run.checkpoints()[-1].stem)
    assert said.count("attnorm: another process of this training was lost; the last checkpoint is") == 1
    assert f"training on 2 processes, cpu, in float32, from {had} images on" in said
    assert said.count(f"interrupted at {seen} images") == 1 and "The same command goes on from here" in said
    assert process.returncode != 0 and read_checkpoint(run.checkpoints()[-1])[1].processes == 2
