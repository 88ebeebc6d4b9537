"""One training loop over phases. It knows no task; its clock is images.

A run that was stopped goes on bit for bit, on the same machine with the same number of threads.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from attnorm import config as configuration
from attnorm.checkpoint import CheckpointError, Header, read_checkpoint, save_checkpoint
from attnorm.config import MAY_CHANGE_ON_RESUME, ClassConditionalConfig, Config, ConfigError, InpaintingTaskConfig
from attnorm.data.images import (
    ImageSet,
    cut_centres,
    cut_squares,
    held_out_indices,
    shuffled_indices,
    to_float,
)
from attnorm.run_directory import RunDirectory
from attnorm.system.devices import find_device, find_precision, set_tf32
from attnorm.system.files import file_lock
from attnorm.system.randomness import seed_of, seed_step, seed_weights
from attnorm.training.phases import Batch, ClassConditionalTask, InpaintingTask, Phase
from attnorm.training.reporting import Report
from attnorm.training.state import TrainingState

UNIFORM_LAYOUT = 0.98  # normalised entropy above which AN is instance normalization in all but name


class TrainingError(RuntimeError):
    """Training cannot go on: the message says where it stopped and what the last good checkpoint is."""


class Task(Protocol):
    """What the loop needs to know of a task."""

    state: TrainingState

    def position(self, images_seen: int) -> int: ...
    def phases(self, images_seen: int) -> Sequence[Phase]: ...
    def finish_step(self, step: int) -> None: ...
    def validate(self, images_seen: int) -> dict[str, float]: ...
    def grid(self, *, columns: int = 8) -> Tensor: ...
    def layout_statistics(self, batch: Batch) -> dict[str, float | list[float]]: ...


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
    set_tf32(config.run.tf32)
    seed_weights(config.run.seed)
    task = _task(config, images, device)
    with file_lock(out):
        for said in _open(run, config, images, task.state):
            console.print(said, highlight=False, soft_wrap=True, markup=False)
        return _train(task, config, images, run, device, console)


def _train(
    task: Task, config: Config, images: ImageSet, run: RunDirectory, device: torch.device, console: Console
) -> Outcome:
    # What checkpoints say of the run is how and where it was really made.
    precision = find_precision(config.run.precision, device)
    config = replace(config, run=replace(config.run, precision=precision, device=str(device)))
    at = f", from {task.state.images_seen:,} images on" if task.state.images_seen else ""
    console.print(f"training on {device} in {config.run.precision}{at}", highlight=False)
    if device.type == "cuda" and config.model.context.startswith("an") and config.model.an.impl in ("auto", "triton"):
        console.print("the first step waits, up to a few minutes, where AN's kernels have not been compiled here yet")
    return _loop(task, config, images, run, device, console)


def _task(config: Config, images: ImageSet, device: torch.device) -> Task:
    if config.inpainting is not None:
        return InpaintingTask(config, device, _held_out(config, config.inpainting, images))
    return ClassConditionalTask(config, device)


def _held_out(config: Config, settings: InpaintingTaskConfig, images: ImageSet) -> Tensor:
    """Centre squares of the images that validate, uint8 [V, 3, S, S]."""
    indices = held_out_indices(len(images), config.data.held_out_every)
    if not len(indices):
        raise ConfigError(
            f"data.held_out_every is {config.data.held_out_every}: of the {len(images)} images of {images.source} none "
            "is held out to validate on; give more images, or a smaller number from 2 on"
        )
    spread = np.unique(np.linspace(0, len(indices) - 1, settings.validation_images).astype(np.int64))
    return cut_centres(images.batch(indices[spread])[0], config.model.image_size).clone()


def resolve(config: Config, images: ImageSet) -> Config:
    """The configuration with what the data decide filled in."""
    height, width = images.images.shape[2:]
    if min(height, width) < config.model.image_size:
        raise ConfigError(
            f"{images.source} was read at {width}x{height} pixels, less than model.image_size "
            f"({config.model.image_size}); read it at that size or a larger one"
        )
    if not isinstance(config.model, ClassConditionalConfig):
        return config
    num_classes = len(images.classes)
    if config.model.num_classes not in (0, num_classes):
        raise ConfigError(
            f"model.num_classes is {config.model.num_classes}, but {images.source} has {num_classes} classes; "
            "leave it at 0 to take the data's"
        )
    return replace(config, model=replace(config.model, num_classes=num_classes))


def require_trainable(config: Config, out: Path) -> None:
    """What can be told before the data are read: device, place, and settings of a run that is there.

    Raises:
        ConfigError, CheckpointError: as `train` would.
    """
    find_device(config.run.device)
    run = RunDirectory(out)
    run.require_free_or_run()
    if run.checkpoints():
        _require_same_settings(run, config)


def _require_same_settings(run: RunDirectory, config: Config) -> None:
    """Of a configuration that was resolved, or as it was given: then the number of classes may be open."""
    old, new = _effective(run.read()[0]), _effective(config)
    is_open = MAY_CHANGE_ON_RESUME | ({"model.num_classes"} if new.get("model.num_classes") == 0 else set())
    changed = [key for key in new if old.get(key) != new[key] and key not in is_open]
    if changed:
        differences = ", ".join(f"{key} was {old.get(key)!r}, now {new[key]!r}" for key in changed)
        raise ConfigError(f"{run.path} holds another run: {differences}; give the same settings, or another --out")


def _effective(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name: tau as the layers get it, and nothing of AN where there is none."""
    settings = configuration.flatten(config)
    if not config.model.context.startswith("an"):
        return {name: value for name, value in settings.items() if not name.startswith("model.an.")}
    return settings | {"model.an.temperature": config.model.temperature}


def _open(run: RunDirectory, config: Config, images: ImageSet, state: TrainingState) -> list[str]:
    """Creates the run directory, or brings `state` to its last good checkpoint; what is to be said of that."""
    data = {
        "source": images.source,
        "num_images": len(images),
        "classes": list(images.classes),
        "fingerprint": images.fingerprint,
        "note": images.note,
    }
    said = run.set_aside_damaged()
    if not run.checkpoints():  # nothing to lose: a run that never got so far may have had settings that cannot work
        run.create(config, data)
        return said
    _require_same_settings(run, config)
    _, old_data = run.read()
    if old_data["fingerprint"] != data["fingerprint"]:
        raise ConfigError(
            f"{run.path} was trained on other data ({old_data['num_images']} images of {old_data['source']}, now "
            f"{data['num_images']} of {data['source']}); give the same data, or another --out"
        )
    tensors, header = read_checkpoint(run.checkpoints()[-1])
    try:
        state.load_tensors(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{run.checkpoints()[-1]} does not fit its run: {error}") from error
    state.images_seen, state.seconds = header.images_seen, header.seconds
    threads = torch.get_num_threads()
    if header.threads not in (0, threads):
        said.append(
            f"the run went so far with {header.threads} threads and goes on with {threads}: its numbers are rounded "
            f"otherwise, not as without a stop (OMP_NUM_THREADS={header.threads} would go on with as many)"
        )
    return said


def _loop(
    task: Task,
    config: Config,
    images: ImageSet,
    run: RunDirectory,
    device: torch.device,
    console: Console,
) -> Outcome:
    state, settings = task.state, config.run
    stream = Stream(config, images, device)
    intervals = (
        settings.log_every_images,
        settings.layout_every_images,
        settings.validate_every_images,
        settings.grid_every_images,
        settings.checkpoint_every_images,
    )
    uniform_for: dict[str, int] = {}
    saved_at = state.images_seen if run.checkpoints() else -1
    first_bad_step = torch.zeros((), dtype=torch.int64, device=device)  # 0: none; read only when something is due

    def save() -> None:
        nonlocal saved_at
        tensors = state.tensors()
        # A loss may be finite and its gradient not: no later step would mend the weights.
        bad = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
        if bad is not None:
            raise failure(f"{bad} is not finite after", state.images_seen // settings.batch_size)
        threads = torch.get_num_threads()
        header = Header(config, images.classes, state.images_seen, state.seconds, images.note, threads)
        save_checkpoint(run.checkpoint_file(state.images_seen), tensors, header)
        run.keep_last(settings.keep_checkpoints)
        saved_at = state.images_seen

    def look() -> None:
        seed_step(settings.seed, state.images_seen)
        statistics = task.layout_statistics(stream.batch(task.position(state.images_seen)))
        if statistics:
            report.row(state.images_seen, statistics)
        for key, value in statistics.items():
            if key.endswith("/entropy") and isinstance(value, float):
                uniform_for[key] = uniform_for.get(key, 0) + 1 if value > UNIFORM_LAYOUT else 0
                if uniform_for[key] == 3:
                    report.say(
                        f"warning: {key} stays above {UNIFORM_LAYOUT} ({value:.3f}): the layout is uniform and AN is "
                        "instance normalization; try model.an.temperature=auto, or a larger number"
                    )

    def validate() -> None:
        values = task.validate(state.images_seen)
        if values:
            report.row(state.images_seen, values)

    def draw() -> None:
        grid = task.grid()
        report.grid(state.images_seen, grid, columns=8)

    def is_due(every: int) -> bool:
        return state.images_seen // every != (state.images_seen - settings.batch_size) // every

    def is_out_of_time() -> bool:
        return 0 < settings.max_minutes * 60 <= state.seconds

    def failure(what: str, step: int) -> TrainingError:
        last_good = run.checkpoints()[-1] if run.checkpoints() else "none"
        return TrainingError(
            f"{what} step {step} (images seen: {step * settings.batch_size:,}); last good checkpoint: {last_good}. "
            "Try a lower learning rate (optim.g_lr, optim.d_lr) or precision float32 in a new run"
        )

    def require_finite() -> None:
        if first_bad_step.item():
            raise failure("a loss was not finite at", int(first_bad_step.item()))

    with (
        _stop_on_signals() as stop,
        Report(run, settings, resumed_at=state.images_seen if saved_at >= 0 else None, console=console) as report,
    ):
        if state.images_seen == 0:
            look()
            validate()
            draw()
        clock = time.perf_counter()
        while state.images_seen < settings.duration_images and not stop and not is_out_of_time():
            step = state.images_seen // settings.batch_size + 1
            seed_step(settings.seed, state.images_seen)
            logged: dict[str, Tensor] = {}
            for index, phase in enumerate(task.phases(state.images_seen)):
                batch = stream.batch(task.position(state.images_seen) + index * settings.batch_size)
                loss, values = run_phase(phase, state, batch, settings.precision)
                first_bad_step = torch.where((first_bad_step == 0) & ~loss.isfinite(), step, first_bad_step)
                logged |= values
            task.finish_step(step)
            state.images_seen += settings.batch_size
            now = time.perf_counter()
            seconds, clock = now - clock, now  # pictures, saves and a GPU's queue included
            state.seconds += seconds
            report.advance(state.images_seen, seconds, state.seconds)

            if any(map(is_due, intervals)):
                require_finite()
            if is_due(settings.log_every_images):
                numbers = {name: value.item() for name, value in logged.items()}
                extra = {"step": step, "seconds": state.seconds, "images_per_second": report.speed}
                report.row(state.images_seen, numbers | extra)
            if is_due(settings.layout_every_images):
                look()
            if is_due(settings.validate_every_images):
                validate()
            if is_due(settings.grid_every_images):
                draw()
            if is_due(settings.checkpoint_every_images):
                save()
        require_finite()
        if saved_at != state.images_seen:
            save()
        if not stop and not run.sample_file(state.images_seen).exists():
            draw()

    finished = state.images_seen >= settings.duration_images
    reason: Literal["finished", "out of time", "interrupted"] = (
        "finished" if finished else "interrupted" if stop else "out of time"
    )
    return Outcome(reason, state.images_seen, run.checkpoints()[-1])


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


class Stream:
    """The endless stream of training images: shuffled epochs, squares cut at random, mirrored if that is set.

    It depends on seed and position alone, so that runs of different models see the same images.
    """

    def __init__(self, config: Config, images: ImageSet, device: torch.device) -> None:
        self.config, self.images, self.device = config, images, device
        everything = np.arange(len(images))
        self.indices = np.delete(everything, held_out_indices(len(images), config.data.held_out_every))

    def batch(self, position: int) -> Batch:
        """The images from `position` on."""
        settings, side = self.config.run, self.config.model.image_size
        size = settings.batch_size
        order = shuffled_indices(len(self.indices), position, size, seed=settings.seed)
        random = torch.Generator().manual_seed(seed_of(settings.seed, position, 0, 1))  # not one of a step's
        pixels, labels = (self._to_device(part) for part in self.images.batch(self.indices[order]))
        room = [length - side for length in pixels.shape[2:]]
        if any(room):
            tops, lefts = (self._to_device(torch.randint(most + 1, (size,), generator=random)) for most in room)
            pixels = cut_squares(pixels, tops, lefts, side)
        real = to_float(pixels)
        if self.config.data.flip:
            mirrored = self._to_device(torch.rand(size, generator=random) < 0.5)
            real = torch.where(mirrored[:, None, None, None], real.flip(3), real)
        if settings.channels_last:
            real = real.to(memory_format=torch.channels_last)
        return Batch(real, labels, position)

    def _to_device(self, part: Tensor) -> Tensor:
        if self.device.type == "cuda":  # pinned, so that the copy need not wait for the work that is queued
            return part.pin_memory().to(self.device, non_blocking=True)
        return part.to(self.device)


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
