"""What a plan will cost, from a few steps of each row on few images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from attnorm.benchmark.timing import seconds_of
from attnorm.benchmark.training_step import measured_step
from attnorm.config import ClassConditionalConfig, Config, ConfigError
from attnorm.data.images import ImageSet, held_out_indices
from attnorm.evaluation.classes import TABLE_2_CLASSES
from attnorm.evaluation.feature_stats import FRECHET_RESAMPLES
from attnorm.evaluation.protocol import LAYOUT_IMAGES
from attnorm.metrics.features import Extractor
from attnorm.metrics.generative import Gaussian, frechet_distance, frechet_interval
from attnorm.reproduce.plan import METRICS, Plan, Progress, images_seen, is_measured, is_trained, read_failed
from attnorm.settings import flatten
from attnorm.system.devices import device_name, find_device, set_tf32
from attnorm.system.files import write_json
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.inpainting import InpaintingTask
from attnorm.training.task import Task
from attnorm.training.trainer import resolve

# A step is timed on as many images as have so many pixels together, at least two.
TIMED_PIXELS = {"cpu": 16 * 32**2, "cuda": 64 * 128**2}


class Estimate(NamedTuple):
    """Seconds that are left, if all goes at the pace that was measured."""

    training: dict[str, float]  # by job
    measuring: dict[str, float]  # by job
    once: float  # for what all scores share: the features of the real images
    notes: tuple[str, ...]  # what is not in it

    @property
    def total(self) -> float:
        return sum(self.training.values()) + sum(self.measuring.values()) + self.once


@dataclass
class Timings:
    """Seconds an image by what is done with it and where, kept in a file so that they are measured once."""

    file: Path
    device: torch.device
    _known: dict[str, dict[str, float]] = field(init=False)

    def __post_init__(self) -> None:
        try:
            self._known = json.loads(self.file.read_text(encoding="utf-8"))["seconds"] if self.file.exists() else {}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.file} cannot be read ({error!r}); remove it to have it measured again") from error

    def get(self, what: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        key = f"{device_name(self.device)}, {torch.get_num_threads()} threads: {what}"
        if key not in self._known:
            self._known[key] = measure()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            about = "measured on a few images and taken as linear in their number; nothing but estimates rests on it"
            write_json(self.file, {"about": about, "seconds": self._known})
        return self._known[key]


def estimate(
    plan: Plan,
    images: ImageSet,
    extractor: Extractor | None,
    *,
    progress: Progress = lambda done, total, name: None,
) -> Estimate:
    """What is left to do of the plan, in seconds on its device: some steps of every row are made for it, on few images.

    Args:
        extractor: None where it is not at hand; then its time is missing, which the notes say.
    """
    device = find_device(plan.device)
    timings = Timings(plan.out / "estimate.json", device)
    failed, notes = read_failed(plan), ["pictures, checkpoints and what else runs on this machine are not counted"]
    if plan.all_checkpoints:
        notes.append("measuring the checkpoints before the last is not counted")
    pace: dict[str, dict[str, float]] = {}
    rows = {job.row: job.config for job in plan.jobs}
    for number, (row, config) in enumerate(rows.items()):
        progress(number, len(rows) + 1, f"timing a step of {row}")
        pace[row] = timings.get(_describe(row, config, images), partial(_time_run, config, images, device))
    training = {
        job.name: 0.0
        if job.name in failed or is_trained(job)
        else _training_seconds(job.config, images_seen(job), pace[job.row])
        for job in plan.jobs
    }
    if plan.table == "table3":
        if any(job.config.inpainting and not job.config.inpainting.switch_images for job in plan.jobs):
            notes.append("how long the cheaper first phase will be is not known: all steps count as the second's")
        notes.append("measuring the test set is not counted")
        return Estimate(training, {}, 0.0, tuple(notes))

    progress(len(rows), len(rows) + 1, "timing a score")
    size, scale, metrics = images.images.shape[-1], plan.scale, METRICS[plan.table]
    one, distance, interval = 0.0, 0.0, 0.0
    if extractor is None:
        notes.append(f"features of {plan.extractor} are not counted: its weights are not at hand yet")
    else:
        counts = f"{scale.fakes_per_class} and {plan.num} fakes" + (", intervals" if scale.intervals else "")
        timed = timings.get(
            f"{extractor.name} at {size} pixels, {counts}", partial(_time_scores, plan, images, extractor, device)
        )
        one, distance, interval = timed["feature"], timed["distance"], timed["interval"]
    held_out = held_out_indices(len(images), plan.jobs[0].config.data.held_out_every)
    num_reals = len(images) - len(held_out)
    num_classes = len(TABLE_2_CLASSES if plan.classes else images.classes)
    chosen = min(scale.subset or num_reals, num_reals) if "frechet" in metrics else 0
    if "intra-frechet" in metrics:  # a subset is of each class there
        of_class = num_reals // len(images.classes)
        chosen += num_classes * min(scale.subset or of_class, of_class)
    measuring = {}
    for job in plan.jobs:
        fake, seconds = pace[job.row]["sample"] + one, 0.0
        if "frechet" in metrics or "is" in metrics:
            seconds += plan.num * fake + distance + (FRECHET_RESAMPLES * interval if scale.intervals else 0)
        if "intra-frechet" in metrics:
            seconds += num_classes * (scale.fakes_per_class * fake + distance)
        if "layout" in metrics:
            seconds += min(plan.num, LAYOUT_IMAGES) * pace[job.row]["sample"]
        measuring[job.name] = 0.0 if job.name in failed or is_measured(plan, job) else seconds
    return Estimate(training, measuring, chosen * one if any(measuring.values()) else 0.0, tuple(notes))


COSTS = {  # of `run`: what a step's cost may depend on
    f"run.{name}"
    for name in (
        *("batch_size", "accumulate", "batch_norm_group", "precision", "tf32", "channels_last", "compile"),
        *("fused_adam", "foreach_ema", "joint_pass", "fused_resampling", "prefetch"),
    )
}


def _describe(row: str, config: Config, images: ImageSet) -> str:
    """Names what was timed: the row, and a hash of everything in its settings that a step's cost may depend on."""
    values = flatten(config)
    groups = ("task", "recipe", "model", "optim", "projected", "relativistic", "inpainting")
    kept = [f"{key}={value}" for key, value in values.items() if key.partition(".")[0] in groups or key in COSTS]
    text = "\n".join([*kept, str(len(images.classes)), str(images.images.shape[2:])])
    return f"{row} {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _time_run(config: Config, images: ImageSet, device: torch.device) -> dict[str, float]:
    """Seconds an image of training ("step"; of inpainting's first phase, "first"), and of sampling ("sample")."""
    config = resolve(config, images)
    set_tf32(config.run.tf32)
    size = config.model.image_size
    count = min(config.run.batch_size, max(2, TIMED_PIXELS.get(device.type, TIMED_PIXELS["cpu"]) // size**2))
    torch.manual_seed(config.run.seed)

    def seconds_an_image(task: Task, seen: int) -> float:
        return _time(measured_step(task, config, images, count, seen, device), device) / count

    if config.inpainting is not None:
        switched = replace(config, inpainting=replace(config.inpainting, switch_images=count))
        inpainter = InpaintingTask(switched, device)
        return {"first": seconds_an_image(inpainter, 0), "step": seconds_an_image(inpainter, count)}
    task = ClassConditionalTask(config, device)
    assert isinstance(config.model, ClassConditionalConfig)
    latents = torch.randn(count, config.model.latent_dim, device=device)
    labels = torch.arange(count, device=device) % config.model.num_classes

    @torch.no_grad()
    def sample() -> None:
        task.average.network(latents, labels)

    return {"step": seconds_an_image(task, 0), "sample": _time(sample, device) / count}


def _time_scores(plan: Plan, images: ImageSet, extractor: Extractor, device: torch.device) -> dict[str, float]:
    """Seconds of one image's features, of one Fréchet distance, and of one resample of its interval."""
    size, dimensions, scale = images.images.shape[-1], extractor.dimensions, plan.scale
    count = 4 if device.type == "cpu" else 50
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)

    def gaussian(num: int) -> Gaussian:
        """Any law of the rank that so many images leave."""
        return Gaussian.from_features(torch.randn(max(2, min(num, dimensions + 1)), dimensions, device=device))

    metrics = METRICS[plan.table]
    num_fakes = scale.fakes_per_class if "intra-frechet" in metrics else plan.num
    num_reals = len(images) // len(images.classes) if "intra-frechet" in metrics else len(images)
    reals = gaussian(scale.subset or num_reals)
    interval = 0.0
    if scale.intervals and "frechet" in metrics:
        fakes = torch.randn(plan.num, dimensions, device=device)
        interval = _time(lambda: frechet_interval(fakes, reals, 0.0, resamples=2, seed=0), device, warm=False) / 2
    return {
        "feature": _time(lambda: extractor(pixels), device) / count,
        "distance": _time(lambda: frechet_distance(gaussian(num_fakes), reals), device, warm=False),
        "interval": interval,
    }


def _time(function: Callable[[], object], device: torch.device, *, warm: bool = True) -> float:
    """Seconds of one call, after one that pays for what is paid once; of a short one, the better of two."""
    if warm:
        function()
    times = [seconds_of(function, device)]
    if times[0] < 2:
        times.append(seconds_of(function, device))
    return min(times)


def _training_seconds(config: Config, seen: int, pace: Mapping[str, float]) -> float:
    duration = config.run.duration_images
    switch = min(config.inpainting.switch_images, duration) if config.inpainting is not None else 0
    first, second = max(switch - seen, 0), max(duration - max(seen, switch), 0)
    return first * pace.get("first", 0.0) + second * pace["step"]
