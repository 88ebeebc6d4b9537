"""One training loop for all tasks. Its clock is images.

A run that was stopped goes on bit for bit, on the same machine with the same number of threads.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from attnorm.config import Config, ConfigError
from attnorm.data.images import ImageSet
from attnorm.data.stream import Batch, Stream
from attnorm.run_directory import RunDirectory
from attnorm.system.devices import find_device, find_precision, temporary_tf32
from attnorm.system.files import file_lock
from attnorm.system.randomness import seed_step, seed_weights
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.hooks import (
    Training,
    due,
    hooks_of,
    log_layouts,
    log_validation,
    require_finite,
    save,
    save_samples,
)
from attnorm.training.hooks import TrainingError as TrainingError
from attnorm.training.inpainting import InpaintingTask
from attnorm.training.logger import Logger
from attnorm.training.resume import open_run
from attnorm.training.state import TrainingState
from attnorm.training.task import Phase, Task

TASKS: dict[str, type[Task]] = {"class_conditional": ClassConditionalTask, "inpainting": InpaintingTask}


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    reason: Literal["finished", "out of time", "interrupted"]
    images_seen: int
    checkpoint: Path


def train(config: Config, images: ImageSet, out: Path, *, console: Console | None = None) -> Outcome:
    """Trains from the start, or from the last checkpoint where `out` is a run of the same configuration and data.

    Raises:
        ConfigError, CheckpointError: `out` belongs to another run, or to something else, or is being trained already.
        TrainingError: a loss stopped being a number.
    """
    console = console or Console(stderr=True)
    config = resolve(config, images)
    run = RunDirectory(out)
    device = find_device(config.run.device)
    with temporary_tf32(config.run.tf32):
        seed_weights(config.run.seed)
        task = make_task(config, images, device)
        with file_lock(out):
            for said in open_run(run, config, images, task.state):
                console.print(said, highlight=False, soft_wrap=True, markup=False)
            # What checkpoints say of the run is how and where it was really made.
            precision = find_precision(config.run.precision, device)
            config = replace(config, run=replace(config.run, precision=precision, device=str(device)))
            _announce(config, task.state.images_seen, device, console)
            return _loop(config, images, task, run, device, console)


def resolve(config: Config, images: ImageSet) -> Config:
    """The configuration with what the data decide filled in; ConfigError where they do not fit."""
    height, width = images.images.shape[2:]
    if min(height, width) < config.model.image_size:
        raise ConfigError(
            f"{images.source} was read at {width}x{height} pixels, less than model.image_size "
            f"({config.model.image_size}); read it at that size or a larger one"
        )
    return TASKS[config.task].resolve(config, images)


def make_task(config: Config, images: ImageSet, device: torch.device) -> Task:
    """The task of a resolved configuration, at its start."""
    return TASKS[config.task].for_images(config, images, device)


def _announce(config: Config, images_seen: int, device: torch.device, console: Console) -> None:
    at = f", from {images_seen:,} images on" if images_seen else ""
    console.print(f"training on {device} in {config.run.precision}{at}", highlight=False)
    if device.type == "cuda" and config.model.context.startswith("an") and config.model.an.impl in ("auto", "triton"):
        console.print("the first step waits, up to a few minutes, where AN's kernels have not been compiled here yet")


def _loop(
    config: Config, images: ImageSet, task: Task, run: RunDirectory, device: torch.device, console: Console
) -> Outcome:
    settings, state = config.run, task.state
    stream, hooks = Stream(config, images, device), hooks_of(settings)
    saved_at = state.images_seen if run.checkpoints() else None
    with _stop_on_signals() as stop, Logger(run, settings, resumed_at=saved_at, console=console) as logger:
        no_step = torch.zeros((), dtype=torch.int64, device=device)
        training = Training(config, images, task, stream, run, logger, first_bad_step=no_step)

        # What there is before the first step.
        if state.images_seen == 0:
            for show in (log_layouts, log_validation, save_samples):
                show(training)

        clock = time.perf_counter()
        while state.images_seen < settings.duration_images and not stop and not _is_out_of_time(config, state):
            # Every random number of a step is a function of (seed, images seen).
            step = state.images_seen // settings.batch_size + 1
            seed_step(settings.seed, state.images_seen)

            # One update a phase, each on a batch of its own.
            training.logged = {}
            for index, phase in enumerate(task.phases(state.images_seen)):
                batch = stream.batch(task.position(state.images_seen) + index * settings.batch_size)
                loss, values = run_phase(phase, state, batch, settings.precision)
                is_first_bad = (training.first_bad_step == 0) & ~loss.isfinite()
                training.first_bad_step = torch.where(is_first_bad, step, training.first_bad_step)
                training.logged |= values
            state.finish_step(settings.batch_size)

            # Time, in which pictures, saves and a GPU's queue are included.
            now = time.perf_counter()
            seconds, clock = now - clock, now
            state.seconds += seconds
            logger.advance(state.images_seen, seconds, state.seconds)

            # What is due, once nothing that it would show or save is broken.
            waiting = due(hooks, state.images_seen, settings.batch_size)
            if waiting:
                require_finite(training)
            for hook in waiting:
                hook.run(training)

        # The end: what there is, is kept.
        require_finite(training)
        if not run.checkpoint_file(state.images_seen).exists():
            save(training)
        if not stop and not run.sample_file(state.images_seen).exists():
            save_samples(training)

    finished = state.images_seen >= settings.duration_images
    reason: Literal["finished", "out of time", "interrupted"] = (
        "finished" if finished else "interrupted" if stop else "out of time"
    )
    return Outcome(reason, state.images_seen, run.checkpoints()[-1])


def _is_out_of_time(config: Config, state: TrainingState) -> bool:
    return 0 < config.run.max_minutes * 60 <= state.seconds


def run_phase(
    phase: Phase, state: TrainingState, batch: Batch, precision: str = "float32"
) -> tuple[Tensor, dict[str, Tensor]]:
    """One optimiser update; returns the loss and the values to log, all detached."""
    for name, network in state.networks.items():
        network.requires_grad_(name == phase.network)  # no gradients for weights that this phase does not change
    optimiser = state.optimisers[phase.network]
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        loss, logged = phase.loss(batch)
    loss.backward()
    optimiser.step()
    return loss.detach(), {name: value.detach() for name, value in logged.items()}


@contextmanager
def _stop_on_signals() -> Iterator[list[Any]]:
    """A list that stops being empty at the first Ctrl-C or SIGTERM; a second one ends the program at once."""
    received: list[Any] = []
    if threading.current_thread() is not threading.main_thread():  # where signals never arrive
        yield received
        return

    def handle(number: int, _: object) -> None:
        signal.signal(number, previous[number])
        received.append(number)

    previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in previous:
            signal.signal(number, handle)
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
