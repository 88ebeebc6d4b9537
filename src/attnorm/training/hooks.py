"""What happens beside the steps of a training: logs, validation, pictures, checkpoints, each every so many images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnorm.checkpoint import Header, save_checkpoint
from attnorm.config import Config, RunConfig
from attnorm.data.images import ImageSet
from attnorm.data.stream import Stream, parts_of_batch
from attnorm.layers.observe import observe_layouts
from attnorm.run_directory import RunDirectory
from attnorm.system.process_group import ProcessGroup
from attnorm.system.randomness import seed_step
from attnorm.training.logger import Logger
from attnorm.training.signs import UNIFORM_LAYOUT, collapse
from attnorm.training.task import Task

COLUMNS = 8  # of a picture of samples
NONE = torch.iinfo(torch.int64).max  # a step that never comes


class TrainingError(RuntimeError):
    """Training cannot go on: the message says where it stopped and what the last good checkpoint is."""


@dataclass
class Training:
    """A training under way, as its hooks see it."""

    config: Config  # with the precision and the device that are really used
    images: ImageSet
    task: Task
    stream: Stream
    run: RunDirectory
    group: ProcessGroup
    logger: Logger | None  # the first process's
    first_bad_step: Tensor  # whose loss was not finite, or NONE; on the device, and read only when something is due
    logged: dict[str, Tensor] = field(default_factory=dict)  # what the phases of the last step returned
    warned: set[str] = field(default_factory=set)  # what was said of a collapse
    uniform_for: Counter[str] = field(default_factory=Counter)  # how many times in a row a layout was found uniform

    @property
    def images_seen(self) -> int:
        return self.task.state.images_seen

    @property
    def batch_size(self) -> int:
        return self.config.run.batch_size

    def failure(self, what: str, step: int) -> TrainingError:
        kept = self.run.checkpoints()
        seen = step * self.batch_size
        return TrainingError(
            f"{what} step {step} (images seen: {seen:,}); last good checkpoint: {kept[-1] if kept else 'none'}. "
            "Try a lower learning rate (optim.g_lr, optim.d_lr) or precision float32 in a new run"
        )


class Hook(NamedTuple):
    every: int  # images
    run: Callable[[Training], None]


def hooks_of(settings: RunConfig) -> list[Hook]:
    """In the order in which they run where several are due; a checkpoint comes last, so that it knows what a validation
    has decided.
    """
    return [
        Hook(settings.log_every_images, log_losses),
        Hook(settings.layout_every_images, log_layouts),
        Hook(settings.validate_every_images, log_validation),
        Hook(settings.grid_every_images, save_samples),
        Hook(settings.checkpoint_every_images, save),
    ]


def run_hooks(hooks: Iterable[Callable[[Training], None]], training: Training) -> None:
    """The first process does what is due, and the others wait for it; a validation is the work of all."""
    for run in hooks:
        if run is log_validation:
            run(training)
        else:
            training.group.together(lambda run=run: run(training) if training.logger else None)  # type: ignore[misc]


def due(hooks: Sequence[Hook], images_seen: int, batch_size: int) -> list[Hook]:
    """Those that the step which has just ended, of `batch_size` images, brought to their turn."""
    return [hook for hook in hooks if images_seen // hook.every != (images_seen - batch_size) // hook.every]


def require_finite(training: Training) -> None:
    """Raises TrainingError, in every process, where a loss of the steps so far was not finite in one."""
    step = int(training.group.smallest(training.first_bad_step).item())
    if step != NONE:
        raise training.failure("a loss was not finite at", step)


def require_equal(training: Training) -> None:
    """Raises TrainingError where the processes no longer have the same weights: they are all updated alike."""
    group = training.group
    if group.count == 1:
        return
    parameters = [p for network in training.task.state.networks.values() for p in network.parameters()]
    total = torch.stack([parameter.detach().double().sum() for parameter in parameters]).sum()
    if group.smallest(total).item() != -group.smallest(-total).item():
        raise training.failure("the processes' weights differ after", training.images_seen // training.batch_size)


def log_losses(training: Training) -> None:
    assert training.logger
    state = training.task.state
    values: dict[str, Any] = {name: value.item() for name, value in training.logged.items()}
    values["step"] = state.images_seen // training.batch_size
    values |= {"seconds": state.seconds, "images_per_second": training.logger.speed}
    training.logger.log(state.images_seen, values)


def log_layouts(training: Training) -> None:
    """What the layouts look like on the next batch, or on its first part; says so where one stays uniform."""
    assert training.logger
    settings = training.config.run
    part = parts_of_batch(settings.batch_size, processes=training.group.count, accumulate=settings.accumulate)[0]
    seed_step(settings.seed, training.images_seen)
    batch = training.stream.batch(training.task.position(training.images_seen), part)
    statistics = training.task.layout_statistics(batch)
    if statistics:
        training.logger.log(training.images_seen, statistics)
    for key, value in statistics.items():
        if not (key.endswith("/entropy") and isinstance(value, float)):
            continue
        training.uniform_for[key] = training.uniform_for[key] + 1 if value > UNIFORM_LAYOUT else 0
        if training.uniform_for[key] == 3:
            training.logger.warn(
                f"{key} stays above {UNIFORM_LAYOUT} ({value:.3f}): the layout is uniform and AN is instance "
                "normalization; try model.an.temperature=auto, or a larger number",
                training.images_seen,
            )


def log_validation(training: Training) -> None:
    """In every process, each with its share of the images."""
    values = training.task.validate(training.images_seen, training.group)
    if values and training.logger:
        training.logger.log(training.images_seen, values)


def save_samples(training: Training) -> None:
    """A picture of samples, and how much those of a row differ; says so where the generator has collapsed."""
    assert training.logger
    with observe_layouts(training.task.average.network) as seen:
        grid = training.task.sample_grid(columns=COLUMNS)
    training.logger.save_grid(training.images_seen, grid, columns=COLUMNS)
    layouts = {site: observation.layout for site, observation in seen.items()}
    training.logger.show_layouts(training.images_seen, layouts, columns=COLUMNS)
    spread = grid.unflatten(0, (-1, COLUMNS)).std(1).mean().item()
    training.logger.log(training.images_seen, {"samples/diversity": spread})
    text = collapse(training.run.read_metrics())
    if text and text[:20] not in training.warned:
        training.warned.add(text[:20])
        training.logger.warn(text, training.images_seen)


def save_missing(training: Training) -> None:
    """The last checkpoint, unless it has just been due."""
    if not training.run.checkpoint_file(training.images_seen).exists():
        save(training)


def save_missing_samples(training: Training) -> None:
    if training.logger and not training.run.sample_file(training.images_seen).exists():
        training.logger.save_grid(training.images_seen, training.task.sample_grid(), columns=COLUMNS)


def save(training: Training) -> None:
    """A checkpoint; TrainingError where a tensor of the state is not finite."""
    config, state, run = training.config, training.task.state, training.run
    tensors = state.tensors()
    # A loss may be finite and its gradient not: no later step would mend the weights.
    bad = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise training.failure(f"{bad} is not finite after", state.images_seen // training.batch_size)
    header = Header(
        config,
        training.images.classes,
        state.images_seen,
        state.seconds,
        training.images.note,
        torch.get_num_threads(),
        training.group.count,
    )
    save_checkpoint(run.checkpoint_file(state.images_seen), tensors, header)
    run.keep_last(config.run.keep_checkpoints)
