"""Which runs a table takes, and what of them is there already."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from attnorm.benchmark.cases import CASES, IMPLEMENTATIONS, MODES, find_named
from attnorm.benchmark.results import read_results
from attnorm.checkpoint import read_header
from attnorm.config import Config, ConfigError, did_you_mean
from attnorm.data.images import ImageSet
from attnorm.evaluation.feature_stats import SPLITS
from attnorm.evaluation.protocol import scores_file
from attnorm.evaluation.scores import read_scores
from attnorm.presets import INPAINTING_FAMILIES, PRESETS, rows_of
from attnorm.run_directory import RunDirectory, find_checkpoint
from attnorm.settings import override
from attnorm.system.devices import find_device
from attnorm.training.resume import require_same_settings
from attnorm.training.trainer import resolve

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
    scale = SCALES[scale_name]
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
    if table == "table3" and (extractor or num):
        raise ConfigError("--extractor and --num are for generated images; table3 measures every image of its test set")
    family, chosen = _choose_rows(table, scale, rows)
    more = ([f"data.source={data}"] if data else []) + ([f"run.device={device}"] if device != "auto" else [])
    jobs = []
    for number in range(seeds or scale.seeds):
        for row in chosen:
            config = override(PRESETS[f"{family}-{row}"][1], [*settings, *more])
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


def _choose_rows(table: Table, scale: Scale, rows: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The family of presets that the runs are of, and which of its rows."""
    if table == "table3":
        family = scale.inpainters
        known = INPAINTING_FAMILIES[family][1]
    else:
        family = scale.generators
        known = tuple(rows_of(family))
    chosen = rows or TABLE_ROWS[table]
    for row in chosen:
        if row not in known:
            raise ConfigError(f"there is no row {row!r}; {did_you_mean(row, known)}expected some of {', '.join(known)}")
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"--rows names a row twice: {', '.join(chosen)}; name each once")
    return family, chosen


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
        require_same_settings(run, resolve(job.config, images))
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
    if settings.max_minutes and checkpoint and read_header(checkpoint).seconds >= settings.max_minutes * 60:
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


def is_measured(plan: Plan, job: Job) -> bool:
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


def describe_table5(plan: Plan) -> tuple[str, int, float]:
    """Names of the input sizes, how many measurements they take, and the seconds that these will have at least."""
    cases = [case.name for case in find_named("case", plan.scale.cases, CASES)]
    cells = len(cases) * len(IMPLEMENTATIONS) * len(MODES)
    return ", ".join(cases), cells, cells * plan.scale.seconds
