"""One training loop for all tasks, in one process or in several. Its clock is images.

A run that was stopped goes on bit for bit, on the same machine with as many threads and processes. Several processes
make each batch together: every one has its own part of the images, gradients are averaged in one message after each
backward pass, and so the weights, and all else that a checkpoint holds, stay the same in all of them. That is done by
hand, without DistributedDataParallel: it is exact for a gradient of a gradient, for several parts in a row and for
networks that a phase leaves alone, and at the size of these networks the message is short beside a step.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from attnorm.config import Config, ConfigError
from attnorm.data.images import ImageSet
from attnorm.data.stream import Batch, BatchesAhead, Stream, parts_of_batch
from attnorm.layers.batch_norm import share_moments
from attnorm.layers.resampling import resample_apart
from attnorm.run_directory import RunDirectory
from attnorm.system.devices import find_precision, temporary_tf32, why_not_compiled
from attnorm.system.files import file_lock
from attnorm.system.process_group import ProcessGroup, find_own_device
from attnorm.system.randomness import BatchPart, drawing_for, mark_place, seed_step, seed_weights
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.hooks import (
    NONE,
    Training,
    due,
    hooks_of,
    log_layouts,
    log_validation,
    require_equal,
    require_finite,
    run_hooks,
    save_missing,
    save_missing_samples,
    save_samples,
)
from attnorm.training.hooks import TrainingError as TrainingError
from attnorm.training.inpainting import InpaintingTask
from attnorm.training.logger import Logger, without_tensorboards_traceback
from attnorm.training.projected import ProjectedTask
from attnorm.training.relativistic import RelativisticTask
from attnorm.training.resume import load_state, open_run, precision_of_leg, require_possible, start_from
from attnorm.training.state import TrainingState, singular_vectors_at_rest
from attnorm.training.task import Phase, Task

TASKS: dict[str, type[Task]] = {"class_conditional": ClassConditionalTask, "inpainting": InpaintingTask}
RECIPES: dict[str, type[Task]] = {
    "projected": ProjectedTask,
    "relativistic": RelativisticTask,
}  # other ways to train one of the tasks


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    reason: Literal["finished", "out of time", "interrupted"]
    images_seen: int
    checkpoint: Path


def train(
    config: Config,
    images: ImageSet,
    out: Path,
    *,
    console: Console | None = None,
    group: ProcessGroup = ProcessGroup(),  # noqa: B008
) -> Outcome:
    """Trains from the start, or from the last checkpoint where `out` is a run of the same configuration and data.

    Args:
        group: The processes that train together; each of them calls this with the same arguments, and `out` is one
            folder for all of them.

    Raises:
        ConfigError, CheckpointError: `out` belongs to another run, or to something else, or is being trained already.
        TrainingError: a loss stopped being a number.
        RuntimeError: another process is gone (`is_loss_of_a_process`).
        SystemExit: another process has raised an error.
    """
    console = console or Console(stderr=True, quiet=group.rank > 0)
    config = resolve(config, images)
    settings, run = config.run, RunDirectory(out)
    require_possible(settings, group)
    parts = parts_of_batch(settings.batch_size, rank=group.rank, processes=group.count, accumulate=settings.accumulate)
    device = find_own_device(config.run.device)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    with temporary_tf32(config.run.tf32), contextlib.ExitStack() as stack:
        seed_weights(config.run.seed)
        task = make_task(config, images, device)
        share_batch_norm(config, task, group)
        is_first = group.rank == 0
        group.together(lambda: stack.enter_context(file_lock(out)) if is_first else None)
        checkpoint, said = group.together(lambda: open_run(run, config, images) if is_first else (None, []))
        name = group.text_of_first("" if checkpoint is None else str(checkpoint))
        precision = find_precision(config.run.precision, device)
        if name:
            said += group.together(lambda: load_state(Path(name), task.state, processes=group.count))
            precision, unlike = precision_of_leg(config.run.precision, Path(name), device)
            said += unlike
        elif config.run.start_from:
            tau = config.model.temperature if config.model.context.startswith("an") else None
            said += group.together(
                lambda: start_from(config.run.start_from, task.state, images.classes, temperature=tau)
            )
        for text in said:
            console.print(text, highlight=False, soft_wrap=True, markup=False)
        # What checkpoints say of the run is how and where it was really made.
        config = replace(config, run=replace(config.run, precision=precision, device=str(device)))
        _announce(config, task.state.images_seen, device, group, console)
        no_step = torch.tensor(NONE, device=device)
        training = Training(
            config, images, task, Stream(config, images, device), run, group, None, first_bad_step=no_step
        )
        return _loop(training, parts, task.state.images_seen if name else None, console)


def resolve(config: Config, images: ImageSet) -> Config:
    """The configuration with what the data decide filled in; ConfigError where they do not fit."""
    height, width = images.images.shape[2:]
    if min(height, width) < config.model.image_size:
        raise ConfigError(
            f"{images.source} was read at {width}x{height} pixels, less than model.image_size "
            f"({config.model.image_size}); read it at that size or a larger one"
        )
    return _task(config).resolve(config, images)


def _task(config: Config) -> type[Task]:
    return RECIPES.get(config.recipe, TASKS[config.task])


def make_task(config: Config, images: ImageSet, device: torch.device) -> Task:
    """The task of a resolved configuration, at its start."""
    task = _task(config).for_images(config, images, device)
    if not config.run.fused_resampling:
        for network in task.state.networks.values():
            resample_apart(network)
    if config.run.compile:
        if reason := why_not_compiled():
            raise ConfigError(f"run.compile: {reason}")
        for name in task.differentiated_once:
            task.state.networks[name].compile()
    return task


def share_batch_norm(config: Config, task: Task, group: ProcessGroup) -> None:
    """Lets batch norm take its moments over the processes that `run.batch_norm_group` says."""
    size = config.run.batch_norm_group or group.count
    if size == 1:
        return
    own: dist.ProcessGroup | None = None
    for start in range(0, group.count, size) if size < group.count else ():  # every process has to make all of them
        made = dist.new_group(list(range(start, start + size)))
        if start <= group.rank < start + size:
            assert isinstance(made, dist.ProcessGroup)
            own = made
    for network in task.state.networks.values():
        share_moments(network, own)


def _announce(config: Config, images_seen: int, device: torch.device, group: ProcessGroup, console: Console) -> None:
    at = f", from {images_seen:,} images on" if images_seen else ""
    where = f"{device}" if group.count == 1 else f"{group.count} processes, {device.type},"
    console.print(f"training on {where} in {config.run.precision}{at}", highlight=False)
    if config.run.compile:
        console.print("the first step waits, for minutes, while the networks are compiled")
    if device.type == "cuda" and config.model.context.startswith("an") and config.model.an.impl in ("auto", "triton"):
        console.print("the first step waits, up to a few minutes, where AN's kernels have not been compiled here yet")


def _loop(training: Training, parts: list[BatchPart | None], resumed_at: int | None, console: Console) -> Outcome:
    task, run, group = training.task, training.run, training.group
    settings, state = training.config.run, task.state
    hooks, own_moments = hooks_of(settings), state.moments_of_a_part() if group.count > 1 else []
    is_stopped = is_out_of_time = False
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stop_on_signals())
        ahead = stack.enter_context(BatchesAhead(training.stream, enabled=settings.prefetch))
        if group.rank == 0:
            stack.enter_context(without_tensorboards_traceback())
            logger = Logger(run, training.config, resumed_at=resumed_at, console=console)
            training.logger = stack.enter_context(logger)

        # What there is before the first step. A run that was stopped before it has shown that already.
        if resumed_at is None:
            run_hooks((log_layouts, log_validation, save_samples), training)

        clock = time.perf_counter()
        while state.images_seen < settings.duration_images:
            # All processes end at the same step.
            is_stopped, is_out_of_time = group.any_of(bool(stop), 0 < settings.max_minutes * 60 <= state.seconds)
            if is_stopped or is_out_of_time:
                break

            # Every random number of a step is a function of (seed, images seen).
            step = state.images_seen // settings.batch_size + 1
            seed_step(settings.seed, state.images_seen)

            # One update a phase, each on a batch of its own, of which this process has its parts.
            training.logged = {}
            position, phases = task.position(state.images_seen), task.phases(state.images_seen)
            next_step = task.position(state.images_seen + settings.batch_size)
            for phase, is_last in zip(phases, [*[False] * (len(phases) - 1), True], strict=True):
                then = next_step if is_last else position + settings.batch_size
                batches, position = ahead.batches(position, parts, then=then), then
                loss, values = run_phase(phase, state, *batches, precision=settings.precision, group=group)
                earlier = training.first_bad_step
                training.first_bad_step = earlier.where(loss.isfinite(), earlier.clamp_max(step))
                training.logged |= values
            group.average(own_moments)
            state.finish_step(settings.batch_size)

            # Time, in which pictures, saves and a GPU's queue are included.
            now = time.perf_counter()
            seconds, clock = now - clock, now
            state.seconds += seconds
            if training.logger:
                training.logger.advance(state.images_seen, seconds, state.seconds)

            # What is due, once nothing that it would show or save is broken.
            waiting = due(hooks, state.images_seen, settings.batch_size)
            if waiting:
                require_finite(training)
                require_equal(training)
                group.average([*training.logged.values()])
                run_hooks((hook.run for hook in waiting), training)

        # The end: what there is, is kept.
        require_finite(training)
        run_hooks([save_missing] if is_stopped else [save_missing, save_missing_samples], training)

    finished = state.images_seen >= settings.duration_images
    reason: Literal["finished", "out of time", "interrupted"] = (
        "finished" if finished else "interrupted" if is_stopped else "out of time"
    )
    return Outcome(reason, state.images_seen, run.checkpoint_file(state.images_seen))


def run_phase(
    phase: Phase,
    state: TrainingState,
    *batches: Batch,
    precision: str = "float32",
    group: ProcessGroup = ProcessGroup(),  # noqa: B008
) -> tuple[Tensor, dict[str, Tensor]]:
    """One optimiser update on a batch, or on all parts of one that fall to this process.

    Returns the mean over these parts of the loss, and of the values to log; all detached. The gradient is the mean over
    all processes' parts: as every loss is a mean over images, that of the whole batch.
    """
    for name, network in state.networks.items():
        network.requires_grad_(name == phase.network)  # no gradients for weights that this phase does not change
    optimiser, device = state.optimisers[phase.network], batches[0].images.device
    optimiser.zero_grad(set_to_none=True)
    rewind = mark_place(device) if len(batches) > 1 else None
    losses: list[Tensor] = []
    logged: dict[str, list[Tensor]] = {}
    for number, batch in enumerate(batches):
        if rewind:  # each part takes its own of the random numbers of the whole batch
            rewind()
        with (
            drawing_for(batch.part),
            singular_vectors_at_rest(state.networks.values(), at_rest=number > 0),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            loss, values = phase.loss(batch)
        (loss / len(batches)).backward()
        losses.append(loss.detach())
        for name, value in values.items():
            logged.setdefault(name, []).append(value.detach())
    group.average([p.grad for p in state.networks[phase.network].parameters() if p.grad is not None])
    optimiser.step()
    return torch.stack(losses).mean(), {name: torch.stack(parts).mean() for name, parts in logged.items()}


@contextlib.contextmanager
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
