"""Every table of the paper from one command: which runs it takes, what they will cost, and the doing of it.

    DIR/runs/an-s0/       a run of each row and seed, as `attnorm train` makes them, with its scores
    DIR/manifest/         Table 3: the frozen test set
    DIR/estimate.json     what an image costs on each device, measured once
    DIR/failed.json       runs that collapsed, and how: they are not tried again

Tables 1, 2 and 4 of one scale share their runs where they are made in one folder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console

from attnorm import config as configuration
from attnorm.benchmark import run as bench_run
from attnorm.benchmark.cases import CASES, IMPLEMENTATIONS, MODES
from attnorm.benchmark.results import read_results
from attnorm.checkpoint import find_damage, read_checkpoint
from attnorm.config import (
    MAY_CHANGE_ON_RESUME,
    ClassConditionalConfig,
    Config,
    ConfigError,
    InpaintingConfig,
    did_you_mean,
)
from attnorm.data.images import ImageSet, held_out_indices
from attnorm.data.stream import Stream
from attnorm.evaluation import inpainters
from attnorm.evaluation.classes import TABLE_2_CLASSES
from attnorm.evaluation.feature_stats import FRECHET_RESAMPLES, SPLITS
from attnorm.evaluation.generators import evaluate_generator
from attnorm.evaluation.protocol import LAYOUT_IMAGES, scores_file
from attnorm.evaluation.scores import read_scores
from attnorm.evaluation.test_set import make_manifest, read_examples, read_manifest
from attnorm.metrics.features import Extractor
from attnorm.metrics.generative import Gaussian, frechet_distance, frechet_interval
from attnorm.presets import INPAINTING_FAMILIES, PRESETS, rows_of
from attnorm.reports.benchmark import write_report
from attnorm.reports.inpainting import write_scores_document
from attnorm.reports.pictures import IMAGE_GRIDS
from attnorm.run_directory import RunDirectory, find_checkpoint
from attnorm.system.devices import device_name, find_device, find_precision, set_tf32
from attnorm.system.files import hash_file, write_json
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.inpainting import InpaintingTask
from attnorm.training.trainer import TrainingError, resolve, run_phase, train

Table = Literal["table1", "table2", "table3", "table4", "table5"]
ScaleName = Literal["paper", "small", "smoke"]
Progress = Callable[[int, int, str], None]  # done, in all, what
# A bar for the while of a measurement: training shows its own, and a terminal has room for one.
Bar = Callable[[], AbstractContextManager[Progress]]

# In the paper's order. Table 3 has a third row here: what is left without any block for context.
TABLE_ROWS: dict[str, tuple[str, ...]] = {
    "table1": ("acgan", "sngan", "sngan-star", "sagan", "an"),
    "table2": ("sngan", "sagan", "an"),
    "table3": ("contextual", "an", "none"),
    "table4": ("an-bn", "an-no-orth", "an-no-ssr", "an-n8", "an", "an-n32"),
    "table5": (),
}
METRICS: dict[str, tuple[str, ...]] = {
    "table1": ("frechet", "intra-frechet", "is"),
    "table2": ("intra-frechet",),
    "table4": ("frechet", "is", "layout"),
}


@dataclass(frozen=True)
class Scale:
    """How much of the paper's effort is made."""

    generators: str  # family of the runs of Tables 1, 2 and 4
    inpainters: str  # family of those of Table 3
    extractor: str
    num: int  # generated images a score
    fakes_per_class: int
    subset: int  # real images that they are compared with (intra-class: of each class); 0: all
    intervals: bool
    seeds: int  # runs of each row
    tested: int  # Table 3: of the images held out, every so-many-th is measured
    cases: str  # of the benchmark, for Table 5
    seconds: float  # spent on each of its cells


SCALES: dict[str, Scale] = {
    "paper": Scale(
        "paper-imagenet128", "paper-streetview256", "inception", 50_000, 5_000, 0, False, 2, 1, "table5", 1.0
    ),
    "small": Scale("small32", "inpaint64", "efficientnet-lite0", 5_000, 500, 0, True, 2, 1, "table5", 0.2),
    "smoke": Scale("smoke", "inpaint-smoke", "efficientnet-lite0", 64, 16, 32, False, 1, 4, "smoke,table5-128", 0.02),
}


@dataclass(frozen=True)
class Job:
    """One run of the plan: a row with a seed."""

    row: str
    config: Config
    path: Path

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Plan:
    """Everything that makes one table."""

    table: Table
    scale_name: ScaleName
    out: Path
    jobs: tuple[Job, ...]  # all rows of the first seed, then all of the second: the table is whole as soon as can be
    extractor: str
    num: int
    device: str
    all_checkpoints: bool = False  # measure the distance at those before the last too, for curves

    @property
    def scale(self) -> Scale:
        return SCALES[self.scale_name]

    @property
    def classes(self) -> tuple[str, ...]:
        """Of the intra-class distance: Table 2's eight, which ImageNet alone has; elsewhere all."""
        return ("table2",) if (self.table, self.scale_name) == ("table2", "paper") else ()


def make_plan(
    table: Table,
    scale_name: ScaleName,
    out: Path,
    *,
    data: str = "",
    rows: Sequence[str] = (),
    seeds: int = 0,
    extractor: str = "",
    num: int = 0,
    device: str = "auto",
    settings: Sequence[str] = (),
    all_checkpoints: bool = False,
) -> Plan:
    """The runs of a table, none of which is begun by this.

    Args:
        data: What all of them are trained on; only the scale smoke has data of its own.
        rows: By name, of the table or of any other one with the same task; () for the table's own.
        seeds: Runs of each row: the first has the preset's seed (0), the next one more. 0: as many as the scale has.
        extractor, num: Empty or 0 for the scale's.
        settings: "key=value", as `--set` takes them, for every run.
        all_checkpoints: Measure the Fréchet distance, without interval, at every checkpoint that a run has kept.

    Raises:
        ConfigError: a name, number or setting that cannot be meant, or no data.
    """
    scale, is_inpainting = SCALES[scale_name], table == "table3"
    if table == "table5":
        if rows or settings or data or extractor or num:
            raise ConfigError(
                "--rows, --set, --data, --extractor and --num are for trained models; table5 times layers alone"
            )
        return Plan(table, scale_name, out, (), "", 0, device)
    if seeds < 0 or (num != 0 and num < SPLITS):
        raise ConfigError(
            f"--seeds is {seeds}, --num {num}; expected at least 1 and {SPLITS}, or 0 for as many as the scale has"
        )
    if table == "table2" and num:
        raise ConfigError(
            f"--num is for scores over all classes; table2 takes {scale.fakes_per_class:,} images of each class at the "
            f"scale {scale_name}; leave it out"
        )
    if all_checkpoints and "frechet" not in METRICS.get(table, ()):
        raise ConfigError(
            f"--checkpoints is for the Fréchet distance over all classes, which {table} lacks; leave it out"
        )
    if is_inpainting and (extractor or num):
        raise ConfigError("--extractor and --num are for generated images; table3 measures every image of its test set")
    family = scale.inpainters if is_inpainting else scale.generators
    known = INPAINTING_FAMILIES[family][1] if is_inpainting else tuple(rows_of(family))
    chosen = rows or TABLE_ROWS[table]
    for row in chosen:
        if row not in known:
            raise ConfigError(f"there is no row {row!r}; {did_you_mean(row, known)}expected some of {', '.join(known)}")
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"--rows names a row twice: {', '.join(chosen)}; name each once")
    more = ([f"data.source={data}"] if data else []) + ([f"run.device={device}"] if device != "auto" else [])
    jobs = []
    for number in range(seeds or scale.seeds):
        for row in chosen:
            config = configuration.override(PRESETS[f"{family}-{row}"][1], [*settings, *more])
            seed = config.run.seed + number
            config = replace(config, run=replace(config.run, seed=seed))
            jobs.append(Job(row, config, out / "runs" / f"{row}-s{seed}"))
    if not jobs[0].config.data.source:
        raise ConfigError(
            f"--data is missing: the scale {scale_name} needs a folder, a zip or CIFAR-10's files; only --scale smoke "
            "brings its own"
        )
    return Plan(
        table,
        scale_name,
        out,
        tuple(jobs),
        extractor or scale.extractor,
        num or scale.num,
        jobs[0].config.run.device,
        all_checkpoints,
    )


# What there is already


def require_own(plan: Plan, images: ImageSet | None) -> None:
    """Before anything is made: is `plan.out` free or an earlier call's, and are its runs those of the plan?

    Raises:
        ConfigError: it holds something else, or runs of other settings or data.
    """
    out, ours = plan.out, ("runs", "estimate.json", "failed.json", "bench.json")
    if out.is_file():
        raise ConfigError(f"{out} is a file; expected a folder")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in ours):
        raise ConfigError(f"{out} is not empty and holds no table of ours; choose another --out")
    if plan.table == "table5":
        _require_own_bench(plan)
    for job in plan.jobs:
        run = RunDirectory(job.path)
        if images is None or not run.checkpoints():  # a run without any may begin anew
            continue
        before, data = run.read()
        if before.preset != job.config.preset:
            raise ConfigError(f"{job.path} is a run of {before.preset}, not of {job.config.preset}; take another --out")
        old, new = configuration.flatten(before), configuration.flatten(resolve(job.config, images))
        changed = [key for key in new if old.get(key) != new[key] and key not in MAY_CHANGE_ON_RESUME]
        if changed:
            differences = ", ".join(f"{key} was {old.get(key)!r}, now {new[key]!r}" for key in changed)
            raise ConfigError(f"{job.path} holds another run: {differences}; give the same settings, or another --out")
        if data["fingerprint"] != images.fingerprint:
            raise ConfigError(f"{job.path} was trained on other data ({data['source']}); take these, or another --out")


def _require_own_bench(plan: Plan) -> None:
    file = plan.out / "bench.json"
    if not file.is_file():
        return
    report = read_results(file)
    names, seconds = ", ".join(case.name for case in report.cases), report.environment["seconds_a_cell"]
    there = f"{names}, {seconds:g} s each, on {torch.device(report.environment['device']).type}"
    wanted = f"{describe_table5(plan)[0]}, {plan.scale.seconds:g} s each, on {find_device(plan.device).type}"
    if there != wanted:
        raise ConfigError(f"{file} is of {there}; expected {wanted}; choose another --out")


def finished_runs(plan: Plan, failed: Mapping[str, str]) -> list[Path]:
    """All runs of the folder that have scores or have failed, of this plan or of another table or rows before."""
    runs = [path for path in sorted((plan.out / "runs").iterdir()) if RunDirectory(path).exists()]
    return [path for path in runs if path.name in failed or (path / "evaluation" / "metrics.jsonl").is_file()]


def images_seen(job: Job) -> int:
    """How far a run has come: the clock of its last checkpoint."""
    checkpoint = RunDirectory(job.path).latest()
    return int(checkpoint.stem) if checkpoint else 0


def is_trained(job: Job) -> bool:
    """Whether training would end at once: all images are seen, or its time is up."""
    settings, checkpoint = job.config.run, RunDirectory(job.path).latest()
    if settings.max_minutes and checkpoint:
        _, header = read_checkpoint(checkpoint, prefix="header alone")
        if header.seconds >= settings.max_minutes * 60:
            return True
    return images_seen(job) >= settings.duration_images


def read_failed(plan: Plan) -> dict[str, str]:
    """Why a run failed, by its name. One whose folder was removed is no longer among them, and is tried again."""
    file = plan.out / "failed.json"
    if not file.is_file():
        return {}
    try:
        values: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
        return {name: why for name, why in values.items() if RunDirectory(plan.out / "runs" / name).exists()}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); remove it, and failed runs are tried again") from error


def _is_measured(plan: Plan, job: Job) -> bool:
    """Whether the latest checkpoint of a finished run has all of the table's scores, for the estimate."""
    if not is_trained(job):
        return False
    checkpoint, found = find_checkpoint(job.path).name, set()
    for score in read_scores(scores_file(job.path)):
        is_ours = Path(score.checkpoint).name == checkpoint
        is_ours &= score.extractor is None or score.extractor.name == plan.extractor
        if is_ours and (score.metric not in ("frechet", "is1") or score.num_fakes == plan.num):
            found.add(score.metric)
    wanted = {"is1" if metric == "is" else metric for metric in METRICS[plan.table]}
    return wanted - ({"layout"} if job.config.model.context != "an" else set()) <= found


# What it will cost

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
        measuring[job.name] = 0.0 if job.name in failed or _is_measured(plan, job) else seconds
    return Estimate(training, measuring, chosen * one if any(measuring.values()) else 0.0, tuple(notes))


def _describe(row: str, config: Config, images: ImageSet) -> str:
    """Names what was timed: the row, and a hash of everything in its settings that a step's cost may depend on."""
    values = configuration.flatten(config)
    kept = [f"{key}={value}" for key, value in values.items() if key.partition(".")[0] in ("task", "model", "optim")]
    kept += [f"{key}={values[key]}" for key in ("run.batch_size", "run.precision", "run.tf32", "run.channels_last")]
    text = "\n".join([*kept, str(len(images.classes)), str(images.images.shape[2:])])
    return f"{row} {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _time_run(config: Config, images: ImageSet, device: torch.device) -> dict[str, float]:
    """Seconds an image of training ("step"; of inpainting's first phase, "first"), and of sampling ("sample")."""
    config = resolve(config, images)
    set_tf32(config.run.tf32)
    size = config.model.image_size
    count = min(config.run.batch_size, max(2, TIMED_PIXELS.get(device.type, TIMED_PIXELS["cpu"]) // size**2))
    precision = find_precision(config.run.precision, device)
    config = replace(config, run=replace(config.run, batch_size=count))
    torch.manual_seed(config.run.seed)
    stream = Stream(config, images, device)

    def step(task: ClassConditionalTask | InpaintingTask, seen: int) -> None:
        for index, phase in enumerate(task.phases(seen)):
            run_phase(phase, task.state, stream.batch(seen + index * count), precision=precision)
        task.state.finish_step(count)

    if config.inpainting is not None:
        switched = replace(config, inpainting=replace(config.inpainting, switch_images=count))
        inpainter = InpaintingTask(switched, device)
        first, second = (_time(partial(step, inpainter, seen), device) / count for seen in (0, count))
        return {"first": first, "step": second}
    task = ClassConditionalTask(config, device)
    assert isinstance(config.model, ClassConditionalConfig)
    latents = torch.randn(count, config.model.latent_dim, device=device)
    labels = torch.arange(count, device=device) % config.model.num_classes

    @torch.no_grad()
    def sample() -> None:
        task.average.network(latents, labels)

    return {"step": _time(partial(step, task, 0), device) / count, "sample": _time(sample, device) / count}


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
    times: list[float] = []
    while not times or (len(times) < 2 and times[0] < 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _training_seconds(config: Config, seen: int, pace: Mapping[str, float]) -> float:
    duration = config.run.duration_images
    switch = min(config.inpainting.switch_images, duration) if config.inpainting is not None else 0
    first, second = max(switch - seen, 0), max(duration - max(seen, switch), 0)
    return first * pace.get("first", 0.0) + second * pace["step"]


def in_words(seconds: float) -> str:
    """A time that is known roughly: "40 s", "12 min", "5.2 h", "9 days", "14 months", "3.1 years"."""
    day = 24 * 3600.0
    units = ((90.0, 1.0, "s"), (5400.0, 60.0, "min"), (2 * day, 3600.0, "h"), (60 * day, day, "days"))
    for limit, unit, name in (*units, (730 * day, 30.44 * day, "months")):
        if seconds < limit:
            return f"{seconds / unit:.{'0' if name in ('s', 'min') else '1'}f} {name}"
    return f"{seconds / (365.25 * day):,.1f} years"


# The doing


@dataclass
class Result:
    """How a plan went."""

    scored: list[Path] = field(default_factory=list)  # runs of the plan that are trained and measured
    failed: dict[str, str] = field(default_factory=dict)  # why, by the name of the run
    is_interrupted: bool = False
    inpainting: inpainters.Evaluation | None = None  # Table 3, where it was measured now


def carry_out(
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
            if not _is_measured(plan, job):
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
        console.print(f"run {number} of {len(plan.jobs)}: {job.name}; about {in_words(remaining)} left in all")


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
        for checkpoint in [file for file in RunDirectory(job.path).checkpoints() if not find_damage(file)][:-1]:
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


def describe_table5(plan: Plan) -> tuple[str, int, float]:
    """Names of the input sizes, how many measurements they take, and the seconds that these will have at least."""
    groups = plan.scale.cases.split(",")
    names = [case.name for case in CASES]
    cases = [name for name in names if any(name == group or name.startswith(f"{group}-") for group in groups)]
    cells = len(cases) * len(IMPLEMENTATIONS) * len(MODES)
    return ", ".join(cases), cells, cells * plan.scale.seconds


def time_layers(plan: Plan, *, progress: bench_run.Progress) -> list[Path]:
    """Table 5: bench.json, bench.md and its picture in `plan.out`, where they are not there yet."""
    if (plan.out / "bench.json").is_file():
        read_results(plan.out / "bench.json")
        return []
    scale = plan.scale
    report = bench_run.run(cases=scale.cases, device=plan.device, seconds=scale.seconds, progress=progress)
    return write_report(report, plan.out)
