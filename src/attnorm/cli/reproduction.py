"""The subcommand that makes a whole table: reproduce."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.table import Table

from attnorm.cli.terminal import (
    Flag,
    Names,
    Settings,
    console,
    one_bar,
    one_bar_each,
    progress_bar,
    read_images,
    require_one_process,
    require_outside,
    require_writable,
    screen,
    split_names,
)
from attnorm.config import ConfigError
from attnorm.system.progress import humanize

if TYPE_CHECKING:
    from attnorm.metrics.features import Extractor
    from attnorm.reproduce.estimate import Estimate
    from attnorm.reproduce.execute import Result
    from attnorm.reproduce.plan import Plan


def reproduce(
    table: Annotated[
        Literal["table1", "table2", "table3", "table4", "table5"], tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")
    ],
    scale: Annotated[Literal["paper", "small", "smoke"], tyro.conf.arg(metavar="SCALE")],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    data: Annotated[str, tyro.conf.arg(metavar="SRC")] = "",
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 0,
    rows: Names = "",
    extractor: Annotated[str, tyro.conf.arg(metavar="E")] = "",
    inception_weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    num: Annotated[int, tyro.conf.arg(metavar="N")] = 0,
    device: str = "auto",
    settings: Settings = (),
    checkpoints: Literal["latest", "all"] = "latest",
    dry_run: Flag = False,
) -> None:
    """Make a table of the paper: train what is missing, measure it, report; the same command goes on where it stopped.

    First it says what there is to do and how long that will take here.

    Args:
        table: table1 (generators beside each other), table2 (class by class), table3 (inpainting), table4 (ablation of
            AN) or table5 (time of the layer).
        scale: paper: its sizes, steps and counts; small: minutes a run on two CPU cores; smoke: everything once, in
            little, on built-in photographs.
        out: Where runs, scores and report.md, report.html and report.json go; runs of tables 1, 2 and 4
            may share it, and the report is of the last of these.
        data: What to train on, as the subcommand train takes it; smoke has its own.
        seeds: Runs of each row: 2, or 1 by scale.
        rows: Rows by name, as in `attnorm presets`; the table's own unless named.
        extractor: inception or efficientnet-lite0; by default the former at the paper's scale.
        inception_weights: The file of Inception's weights, if it shall not be downloaded.
        num: Generated images a score: 50,000, 5,000 or 64 by scale. Table 2 takes 5,000, 500 or 16 of each class.
        device: auto, cpu, cuda or mps.
        settings: Change a setting of every run, for example --set run.batch_size=64.
        checkpoints: all: of tables 1 and 4, the Fréchet distance at every checkpoint that each run has kept, which the
            report draws against images seen and hours of training.
        dry_run: Say what there is to do and how long it will take, and stop.
    """
    from attnorm.reproduce import plan as planning

    require_one_process("reproduce")
    require_outside(out, data)
    plan = planning.make_plan(
        table,
        scale,
        out,
        data=data,
        rows=split_names(rows),
        seeds=seeds,
        extractor=extractor,
        num=num,
        device=device,
        settings=settings,
        all_checkpoints=checkpoints == "all",
    )
    if table in ("table3", "table5") and inception_weights is not None:
        raise ConfigError(f"--inception-weights is for generated images; leave it out of {table}")
    try:
        _make_table5(plan, dry_run) if table == "table5" else _make_table(plan, inception_weights, dry_run)
    except KeyboardInterrupt:
        _stop()


def _make_table(plan: Plan, inception_weights: Path | None, dry_run: bool) -> None:
    from attnorm.reproduce import estimate, execute
    from attnorm.reproduce import plan as planning
    from attnorm.system.devices import find_device
    from attnorm.system.files import file_lock

    find_device(plan.device)
    planning.require_own(plan, None)  # as far as can be told before minutes of decoding
    require_writable(plan.out)
    extractor = None if plan.table == "table3" else _load_extractor(plan, inception_weights, dry_run)
    images = read_images(plan.jobs[0].config)
    planning.require_own(plan, images)
    with _bar() as progress:
        left = estimate.estimate(plan, images, extractor, progress=progress)
    _say_plan(plan, left, num_images=len(images))
    if dry_run:
        return
    with file_lock(plan.out):
        result = execute.execute(plan, images, extractor, left, console=console, bar=_bar)
    if result.is_interrupted:
        _stop()
    _finish(plan, result)


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    with progress_bar() as progress:
        yield one_bar_each(progress)


def _load_extractor(plan: Plan, inception_weights: Path | None, dry_run: bool) -> Extractor | None:
    """None where a dry run would have to download its weights."""
    from attnorm.metrics.features import InceptionExtractor, load_extractor
    from attnorm.system.devices import find_device

    is_missing = inception_weights is None and not InceptionExtractor.kept_weights().exists()
    if dry_run and plan.extractor == InceptionExtractor.name and is_missing:
        return None
    return load_extractor(plan.extractor, device=find_device(plan.device), inception_weights=inception_weights)


def _say_plan(plan: Plan, left: Estimate, num_images: int) -> None:
    """Rows by seeds, what is done of them, and what is left in time."""
    from attnorm.reproduce.plan import images_seen, is_trained, read_failed
    from attnorm.system.devices import device_name, find_device

    failed = read_failed(plan)
    table = Table("run", "preset", "steps", "trained", "training left", "scores", box=None, pad_edge=False)
    for job in plan.jobs:
        settings, seen = job.config.run, images_seen(job)
        state = "not begun" if not seen else f"{seen:,} of {settings.duration_images:,} images"
        state = "failed" if job.name in failed else "yes" if is_trained(job) else state
        training, measuring = left.training[job.name], left.measuring.get(job.name)
        table.add_row(
            job.name,
            job.config.preset,
            f"{settings.duration_images // settings.batch_size:,} x {settings.batch_size} images",
            state,
            humanize(training) if training else "-",
            "of the whole test set" if measuring is None else humanize(measuring) if measuring else "-",
        )
    screen().print(table)
    counts = {
        "table2": f"; {plan.scale.fakes_per_class:,} generated images of each class, {plan.extractor}",
        "table3": "",
    }.get(plan.table, f"; {plan.num:,} generated images a score, {plan.extractor}")
    print(f"{plan.table} at scale {plan.scale_name} on {num_images:,} images{counts}")
    where = device_name(find_device(plan.device))
    if not left.total:
        print("nothing is left to train" + ("" if plan.table == "table3" else " or to measure"))
        return
    print(f"about {humanize(left.total)} left on {where}: an estimate, from a few steps of each row on few images")
    for note in left.notes:
        print(f"  {note}")


def _make_table5(plan: Plan, dry_run: bool) -> None:
    from attnorm.reproduce import execute
    from attnorm.reproduce import plan as planning

    planning.require_own(plan, None)
    is_there = (plan.out / "bench.json").is_file()
    cases, cells, seconds = planning.describe_table5(plan)
    print(f"table5 at scale {plan.scale_name}: {cells} measurements, of {cases}")
    left = f"at least {humanize(seconds)}; checking every result and warming up come on top of it"
    print("measured already" if is_there else left)
    if not dry_run:
        with progress_bar() as progress:
            execute.time_layers(plan, progress=one_bar(progress, "timing"))
        _finish(plan, execute.Result())


def _finish(plan: Plan, result: Result) -> None:
    """The report of the plan's table, with all runs that the folder holds, and what failed."""
    from attnorm.reports.figures import inpainting_figure, save_figure
    from attnorm.reports.report import build_report, write_report
    from attnorm.reproduce.plan import finished_runs

    if result.inpainting is not None:
        save_figure(inpainting_figure(*result.inpainting.grid), plan.out / "image-grid.png")
    is_generation = plan.table in ("table1", "table2", "table4")
    own = {job.name for job in plan.jobs}  # the folder may hold other tables' runs
    own_failures = {name: why for name, why in result.failed.items() if name in own}
    report = build_report(
        finished_runs(plan, result.failed) if is_generation else [],
        inpainting=[plan.out] if plan.table == "table3" and result.scored else [],
        benches=[plan.out] if plan.table == "table5" else [],
        tables=[int(plan.table.removeprefix("table"))],
        failed={
            plan.out / "runs" / name: why for name, why in (result.failed if is_generation else own_failures).items()
        },
    )
    with _bar() as progress:
        paths = write_report(report, plan.out, device=plan.device, progress=progress)
    for path in paths:
        print(path)
    for name, why in own_failures.items():
        console.print(f"failed: {name}: {why}", style="red")
    if own_failures:
        raise SystemExit(1)


def _stop() -> None:
    console.print("The same command goes on from here.")
    raise SystemExit(130) from None
