"""The doing of a plan: what is missing is trained, and measured."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from attnorm.benchmark import run as bench_run
from attnorm.benchmark.results import read_results
from attnorm.config import InpaintingConfig
from attnorm.data.images import ImageSet
from attnorm.evaluation import inpainters
from attnorm.evaluation.generators import evaluate_generator
from attnorm.evaluation.test_set import make_manifest, read_examples, read_manifest
from attnorm.metrics.features import Extractor
from attnorm.reports.benchmark import write_report
from attnorm.reports.inpainting import write_scores_document
from attnorm.reports.pictures import IMAGE_GRIDS
from attnorm.reproduce.estimate import Estimate
from attnorm.reproduce.plan import METRICS, Bar, Job, Plan, Progress, is_measured, is_trained, read_failed
from attnorm.run_directory import RunDirectory, find_checkpoint
from attnorm.system.files import hash_file, write_json
from attnorm.system.progress import humanize
from attnorm.training.trainer import TrainingError, train


@dataclass
class Result:
    """How a plan went."""

    scored: list[Path] = field(default_factory=list)  # runs of the plan that are trained and measured
    failed: dict[str, str] = field(default_factory=dict)  # why, by the name of the run
    is_interrupted: bool = False
    inpainting: inpainters.Evaluation | None = None  # Table 3, where it was measured now


def execute(
    plan: Plan,
    images: ImageSet,
    extractor: Extractor | None,
    left: Estimate,
    *,
    console: Console,
    bar: Bar = lambda: nullcontext(lambda done, total, what: None),
) -> Result:
    """Trains what is missing and measures what has no score; run after run, so that a stop leaves whole rows.

    Args:
        extractor: Of generated images; None for Table 3.
        left: What `estimate` said, for what is said of the time left.

    Raises:
        ConfigError, CheckpointError: a run cannot be made or read.
    """
    result, start = Result(failed=read_failed(plan)), time.monotonic()
    for number, job in enumerate(plan.jobs, start=1):
        _say_where(plan, number, left, time.monotonic() - start, console)
        if job.name not in result.failed and not is_trained(job):
            try:
                outcome = train(job.config, images, job.path, console=console)
            except TrainingError as error:
                result.failed[job.name] = str(error)
                write_json(plan.out / "failed.json", result.failed)
            else:
                if outcome.reason == "interrupted":
                    result.is_interrupted = True
                    return result
                if outcome.reason == "out of time":
                    console.print(
                        f"{job.name} stopped at {outcome.images_seen:,} of {job.config.run.duration_images:,} images, "
                        "as run.max_minutes says: its scores are of fewer steps than others may have"
                    )
        if job.name in result.failed:
            console.print(
                f"{job.name} failed: {result.failed[job.name]}. It is left out; remove {job.path} to try it again"
            )
            continue
        if extractor is not None:
            if not is_measured(plan, job):
                console.print(f"measuring {job.name}")
            with bar() as progress:
                _measure(plan, job, images, extractor, progress)
        result.scored.append(job.path)
    if plan.table == "table3" and result.scored:
        with bar() as progress:
            result.inpainting = _measure_inpainters(plan, result.scored, images, progress)
    return result


def _say_where(plan: Plan, number: int, left: Estimate, elapsed: float, console: Console) -> None:
    """The whole's progress: what was estimated is corrected by how long the first runs really took."""
    job = plan.jobs[number - 1]
    costs = {name: left.training[name] + left.measuring.get(name, 0.0) for name in left.training}
    done = sum(costs[other.name] for other in plan.jobs[: number - 1])
    done += left.once if done else 0.0  # the first run that is measured pays for the real images
    remaining = max(left.total - done, 0.0) * (elapsed / done if done > 0 else 1.0)
    if costs[job.name]:
        console.print(f"run {number} of {len(plan.jobs)}: {job.name}; about {humanize(remaining)} left in all")


def _measure(plan: Plan, job: Job, images: ImageSet, extractor: Extractor, progress: Progress) -> None:
    def measure(checkpoint: Path, metrics: Sequence[str], name: str, *, intervals: bool) -> None:
        evaluate_generator(
            checkpoint,
            images,
            extractor,
            metrics=metrics,
            num=plan.num,
            fakes_per_class=plan.scale.fakes_per_class,
            classes=plan.classes,
            subset=plan.scale.subset,
            intervals=intervals,
            device=plan.device,
            progress=lambda done, total, what: progress(done, total, f"{name}: {what}"),
        )

    measure(job.path, METRICS[plan.table], job.name, intervals=plan.scale.intervals)
    if plan.all_checkpoints:
        for checkpoint in RunDirectory(job.path).sound_checkpoints()[:-1]:
            measure(checkpoint, ("frechet",), f"{job.name} at {int(checkpoint.stem):,}", intervals=False)


def _measure_inpainters(
    plan: Plan, runs: Sequence[Path], images: ImageSet, progress: Progress
) -> inpainters.Evaluation | None:
    """Table 3 on the images that all runs held out, written beside them; None where it and its grid, which the caller
    draws, are there already.
    """
    config, folder = plan.jobs[0].config, plan.out / "manifest"
    assert isinstance(config.model, InpaintingConfig)
    if not (folder / "manifest.json").is_file():
        make_manifest(
            folder,
            images,
            config.data,
            image_size=config.model.image_size,
            masks="centre",
            seed=0,
            every=config.data.held_out_every * plan.scale.tested,
        )
    manifest = read_manifest(folder)
    is_drawn = any((plan.out / grid).is_file() for grid in IMAGE_GRIDS)
    if is_drawn and _has_scores(plan.out / "scores.json", runs, manifest.sha256):
        return None
    examples = read_examples(manifest, images)
    evaluation = inpainters.evaluate_inpainters(runs, manifest, examples, device=plan.device, progress=progress)
    (plan.out / IMAGE_GRIDS[0]).unlink(missing_ok=True)  # of other runs
    inpainters.write_scores(evaluation, plan.out)
    write_scores_document(evaluation.scores, plan.out)
    return evaluation


def _has_scores(file: Path, runs: Sequence[Path], manifest_sha256: str) -> bool:
    """Whether scores.json is of the very checkpoints that the runs end with, and of this test set."""
    if not file.is_file():
        return False
    hashes = {name: hash_file(find_checkpoint(run)) for name, run in inpainters.name_runs(runs).items()}
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = {name: model["sha256"] for name, model in values["models"].items()}
        return found == hashes and values["manifest"]["sha256"] == manifest_sha256
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return False


def time_layers(plan: Plan, *, progress: bench_run.Progress) -> list[Path]:
    """Table 5: bench.json, bench.md and its picture in `plan.out`, where they are not there yet."""
    if (plan.out / "bench.json").is_file():
        read_results(plan.out / "bench.json")
        return []
    scale = plan.scale
    report = bench_run.run(cases=scale.cases, device=plan.device, seconds=scale.seconds, progress=progress)
    return write_report(report, plan.out)
