"""One thread for all tests: their maps are too small for two, and results that are compared to the last bit must be
summed in one order, in subprocesses too. Without a GPU, Triton's interpreter runs the kernels. Below, what tests of
several parts share.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from attnorm import AttentiveNorm2d, cli

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("COLUMNS", None)  # xdist sets it; without it, tables are printed whole
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is built, decoded, and made of real images stays out of the user's cache; xdist's workers share it."""
    base = tmp_path_factory.getbasetemp()
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNORM_CACHE", str((base.parent if is_worker else base) / "attnorm-cache"))
        yield


def draw_photographs(folder: Path, count: int, size: int = 40) -> Path:
    """0.png and so on: smooth pictures of random colours."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{number:0{len(str(count - 1))}}.png")
    return folder


def awake(network: nn.Module) -> nn.Module:
    """In evaluation, with every gate open and every table and moment its own, so that no part of it goes unseen."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, AttentiveNorm2d):
            nn.init.constant_(module.rho, 0.7)
            nn.init.normal_(module.feature_mean)  # type: ignore[arg-type]
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2), nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, 1)
    return network.eval()


def look_at(path: Path) -> np.ndarray:
    """The samples of a picture that opens and shows something."""
    with Image.open(path) as picture:
        assert np.asarray(picture.convert("RGB")).std() > 1
        return np.asarray(picture)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_together(*arguments: str, count: int = 2) -> list[str]:
    """What Python says on the standard output in each of several processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([sys.executable, *arguments], env=shared | {"RANK": rank, "LOCAL_RANK": rank}, **pipes)
        for rank in map(str, range(count))
    ]
    try:
        said = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), said
    return [output for output, _ in said]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command line says of a mistake: a short text, no traceback, nothing on the standard output."""

    def refused(arguments: Sequence[object], code: int = 2, *, is_silent: bool = True) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([*map(str, arguments)])
        said = capsys.readouterr()
        assert caught.value.code == code and "Traceback" not in said.err
        message = " ".join(re.sub("[│╭╮╰╯─]", " ", said.err).split())
        assert not is_silent or (said.out == "" and 0 < len(message) < 600)
        return message

    return refused


@pytest.fixture(scope="module")
def few_pictures() -> Iterator[None]:
    """Reports draw fewer pictures than they would, which takes most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnorm.reports.pictures.COLUMNS", 2)
        patch.setattr("attnorm.reports.pictures.INTERPOLATION_STEPS", 2)
        yield
