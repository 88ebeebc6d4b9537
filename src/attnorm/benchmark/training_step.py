"""What a step of a training costs: measured on a few images, before anything is begun."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from attnorm.benchmark.timing import peak_bytes
from attnorm.config import ClassConditionalConfig, Config
from attnorm.data.images import ImageSet
from attnorm.data.stream import BatchesAhead, Stream
from attnorm.system.devices import find_precision, temporary_tf32
from attnorm.system.randomness import seed_step
from attnorm.training.task import Task
from attnorm.training.trainer import make_task, resolve, run_phase

PIXELS = {"cpu": 4 * 32**2, "cuda": 8 * 128**2}  # of a measured batch, or two images
POINTS = 101  # of a run, at which it is asked what its steps are


@dataclass(frozen=True)
class Estimate:
    state_bytes: int  # of weights, averages and Adam's moments
    step_bytes: int  # the most that a step holds beside them: gradients, and what the backward pass needs
    images_per_second: float  # of one process
    seconds: float  # of the whole run

    @property
    def bytes(self) -> int:
        return self.state_bytes + self.step_bytes


def estimate(config: Config, device: torch.device, *, processes: int = 1) -> Estimate:
    """Memory of each process and duration of a whole run, from a few measured steps on random images.

    A step's time and memory are taken to be linear in its images, which flatters a GPU that few images leave idle.
    Where the second phase of inpainting waits for a plateau, all steps count as the first one's.
    """
    images_at_once = max(1, config.run.batch_size // (processes * config.run.accumulate))
    pixels = PIXELS.get(device.type, PIXELS["cpu"])
    few = min(images_at_once, max(2, pixels // config.model.image_size**2))
    with temporary_tf32(config.run.tf32):
        torch.manual_seed(0)
        images = random_images(config)
        config = resolve(config, images)
        task = make_task(config, images, device)
        shares, step_bytes, seconds_an_image = kinds_of_steps(task, config), 0.0, 0.0
        for seen, share in shares.items():
            step = measured_step(task, config, images, few, seen, device)
            step()  # the first one makes the optimiser's moments, and compiles what is compiled
            one = measured_step(task, config, images, max(1, few // 2), seen, device)
            held, held_of_half = peak_bytes(step, device), peak_bytes(one, device)
            growth = max(held - held_of_half, 0) / max(few - max(1, few // 2), 1)
            step_bytes = max(step_bytes, held + growth * (images_at_once - few))
            begun = time.perf_counter()
            step()
            seconds_an_image += share * (time.perf_counter() - begun) / few
    return Estimate(
        state_bytes=sum(tensor.nbytes for tensor in task.state.tensors().values()),
        step_bytes=int(step_bytes),
        images_per_second=1 / seconds_an_image,
        seconds=config.run.duration_images * seconds_an_image / processes,
    )


def random_images(config: Config) -> ImageSet:
    """Noise of the size of the data, as many as a task asks for."""
    size, classes = config.model.image_size, 1
    if isinstance(config.model, ClassConditionalConfig):
        classes = config.model.num_classes or 10
    count = max(16, classes, 2 * config.data.held_out_every)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    names = tuple(map(str, range(classes)))
    return ImageSet(pixels, np.arange(count, dtype=np.int64) % classes, names, "noise", "")


def kinds_of_steps(task: Task, config: Config) -> dict[int, float]:
    """Where in a run, in images seen, a step of another kind is found, and which share of the steps is of that kind."""
    last = max(config.run.duration_images - config.run.batch_size, 0)
    kinds: Counter[tuple[str, ...]] = Counter()
    first_seen: dict[tuple[str, ...], int] = {}
    for seen in np.linspace(0, last, POINTS).astype(int).tolist():
        kind = tuple(phase.network for phase in task.phases(seen))
        kinds[kind] += 1
        first_seen.setdefault(kind, seen)
    return {first_seen[kind]: count / POINTS for kind, count in kinds.items()}


def measured_step(
    task: Task, config: Config, images: ImageSet, count: int, seen: int, device: torch.device
) -> Callable[[], None]:
    """A whole step of `count` images, of the kind that stands at `seen` in a run."""
    precision = find_precision(config.run.precision, device)
    stream = Stream(replace(config, run=replace(config.run, batch_size=count)), images, device)
    ahead = BatchesAhead(stream, enabled=config.run.prefetch)

    def step() -> None:
        seed_step(0, seen)
        phases = task.phases(seen)
        for index, phase in enumerate(phases):
            batches = ahead.batches(index * count, [None], then=(index + 1) % len(phases) * count)
            run_phase(phase, task.state, *batches, precision=precision)
        task.state.finish_step(count)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step
