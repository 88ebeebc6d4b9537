"""Data sets of noise, whole runs on them without a word, and what two runs that are the same have in common."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from attnorm.checkpoint import read_checkpoint
from attnorm.config import Config
from attnorm.data.images import ImageSet, fingerprint
from attnorm.data.stream import Batch
from attnorm.run_directory import RunDirectory
from attnorm.training.task import Phase
from attnorm.training.trainer import Outcome, run_phase, train


@pytest.fixture
def float64() -> Iterator[None]:
    """In which what is zero by mathematics is zero to 1e-9, and nothing else is."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def noise(
    num: int = 24, height: int = 32, width: int = 32, *, classes: tuple[str, ...] = ("a", "b", "c"), seed: int = 0
) -> ImageSet:
    pixels = np.random.default_rng(seed).integers(0, 256, (num, 3, height, width), dtype=np.uint8)
    return images_from(pixels, classes=classes)


def images_from(pixels: np.ndarray, *, classes: tuple[str, ...] = ("all",)) -> ImageSet:
    """Whose labels are 0, 1, ... in turn."""
    labels = np.arange(len(pixels), dtype=np.int64) % len(classes)
    return ImageSet(pixels, labels, classes, "by hand", fingerprint(pixels, labels, classes), note="nothing but noise")


def copies(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.named_parameters()}


def changed(network: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in network.named_parameters() if not torch.equal(tensor, before[name])}


def check_precision(task: Any, phase: Phase, batch: Batch) -> None:
    """Under bfloat16 loss, weights and gradients are float32, and finite."""
    batch = Batch(batch.images.to(memory_format=torch.channels_last), batch.labels)
    loss, _ = run_phase(phase, task.state, batch, precision="bfloat16")
    assert loss.isfinite() and loss.dtype == torch.float32
    for name, parameter in task.state.networks[phase.network].named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def run(config: Config, out: Path, images: ImageSet | None = None, console: Console | None = None) -> Outcome:
    return train(config, images or noise(), out, console=console or silent())


def rows_of(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what no two runs share: times."""
    lines = RunDirectory(out).metrics_file.read_text(encoding="utf-8").splitlines()
    times = ("seconds", "images_per_second")
    return [{key: value for key, value in json.loads(line).items() if key not in times} for line in lines]


def assert_equal_checkpoints(first: Path, second: Path) -> None:
    (ours, our_header), (theirs, their_header) = read_checkpoint(first), read_checkpoint(second)
    assert ours.keys() == theirs.keys() and our_header.images_seen == their_header.images_seen
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []


def assert_equal_runs(first: Path, second: Path) -> None:
    """The last checkpoint and all that was reported."""
    assert_equal_checkpoints(*(RunDirectory(out).checkpoints()[-1] for out in (first, second)))
    assert rows_of(first) == rows_of(second)


def check_resume(
    tiny: Callable[..., Config], folder: Path, stop: int, end: int, images: ImageSet | None = None
) -> Path:
    """A run that stopped after so many images and went on is one without a stop, which is returned."""
    run(tiny(f"run.duration_images={end}"), folder / "whole", images)
    run(tiny(f"run.duration_images={stop}"), folder / "parts", images)
    run(tiny(f"run.duration_images={end}"), folder / "parts", images)
    assert_equal_runs(folder / "whole", folder / "parts")
    return folder / "whole"
