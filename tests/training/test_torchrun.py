"""The commands of docs/training.md, and what torchrun makes of a lost process and of a signal."""

from __future__ import annotations

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

from attnorm.checkpoint import read_checkpoint
from attnorm.presets import PRESETS
from attnorm.run_directory import RunDirectory
from attnorm.settings import override

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
SETTINGS = ("run.duration_images=80000", "run.checkpoint_every_images=16", "run.layout_every_images=1000")


def blocks() -> list[str]:
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^```\w+\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_torchruns_commands_of_the_page_parse_and_the_script_for_slurm_is_bash(tmp_path: Path) -> None:
    """As torchrun reads them, and with settings that there are; attnorm's: tests/test_documents.py."""
    lines = [line.removeprefix("srun ") for block in blocks() for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("torchrun ")]
    assert len(commands) > 1
    for command in commands:
        given = get_args_parser().parse_args(command)
        assert given.module and given.training_script == "attnorm" and given.max_restarts > 0
        verb, *words = given.training_script_args
        settings = words[words.index("--set") + 1 :] if "--set" in words else []
        assert verb == "train"
        override(PRESETS[words[words.index("--preset") + 1]][1], settings)
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
