"""The subcommand watch: a training as it goes, in a terminal."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from attnorm.cli.terminal import Flag, Run, screen
from attnorm.config import printable
from attnorm.system.progress import clock

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnorm.run_directory import RunDirectory

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # of a curve, in characters
FEW = 6  # of the newest lines whose pace counts


def watch(
    run: Run,
    every: Annotated[float, tyro.conf.arg(metavar="S")] = 2.0,
    once: Flag = False,
) -> None:
    """Watch a training: how far it is, at what pace, its losses, layouts and checkpoints. Nothing is changed.

    Args:
        run: The run directory, while it is trained or afterwards.
        every: Seconds between looks.
        once: Look once and stop.
    """
    from rich.live import Live

    from attnorm.run_directory import RunDirectory

    directory = RunDirectory(Path(run))
    directory.read()  # a mistake is said at once
    if once:
        screen().print(render(directory))
        return
    try:
        with Live(render(directory), console=screen(), auto_refresh=False) as live:
            while True:
                time.sleep(max(every, 0.1))
                live.update(render(directory), refresh=True)
    except KeyboardInterrupt:
        return


def render(run: RunDirectory) -> RenderableType:
    """What is to be seen of a run, from its files alone."""
    from rich.console import Group
    from rich.table import Table

    config, data = run.read()
    rows = run.read_metrics()
    steps = [row for row in rows if "step" in row]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("run", f"{run.path}: {config.preset or config.task}, seed {config.run.seed}")
    table.add_row("data", printable(f"{data.get('num_images', '?')} images of {data.get('source', '?')}"))
    table.add_row("progress", progress_of(steps, config.run.duration_images, config.run.max_minutes))
    if steps and steps[-1]["images_seen"] < config.run.duration_images:
        table.add_row("last logged", _ago(run.metrics_file))  # long ago: nobody trains it any more
    checkpoints = run.checkpoints()
    newest = f"{checkpoints[-1].name}, {_ago(checkpoints[-1])}" if checkpoints else "none yet"
    table.add_row("checkpoint", newest)
    for name in curves_of(rows):
        values = [row[name] for row in rows if name in row]
        table.add_row(name, f"{sparkline(values)} {values[-1]:.4g}")
    for text in warnings_of(rows):
        table.add_row("warning", text, style="yellow")
    return Group(table)


def progress_of(steps: list[dict[str, Any]], duration: int, max_minutes: float) -> str:
    """Images seen and their share; the pace of the newest lines, and the time that is left at it."""
    if not steps:
        return f"nothing logged yet of {duration:,} images"
    seen = steps[-1]["images_seen"]
    text = f"{seen:,} of {duration:,} images ({seen / duration:.0%})"
    newest = steps[-FEW:]
    seconds = newest[-1].get("seconds", 0.0) - newest[0].get("seconds", 0.0)
    images = newest[-1]["images_seen"] - newest[0]["images_seen"]
    if len(newest) < 2 or seconds <= 0 or images <= 0:
        return text
    left = (duration - seen) * seconds / images
    if max_minutes:
        left = min(left, max(max_minutes * 60 - newest[-1]["seconds"], 0.0))
    ending = "done" if seen >= duration else f"{clock(left)} left"
    return f"{text}, {images / seconds:,.1f}/s, {ending}"


def curves_of(rows: list[dict[str, Any]]) -> list[str]:
    """Names that are worth a line, in the order in which they were first logged."""
    kinds = ("/loss", "/real_score", "/fake_score", "/distance", "/entropy", "/rho", "/hole_l1", "/diversity")
    names = dict.fromkeys(name for row in rows for name in row if name.endswith(kinds))
    return [name for name in names if any(isinstance(row.get(name), int | float) for row in rows)]


def sparkline(values: list[float], width: int = WIDTH) -> str:
    """Means of equal stretches, from the smallest to the largest of them."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    parts = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts if part]
    low, high = min(means), max(means)
    if not high - low > 0:  # all alike, or not a number
        return BLOCKS[0] * len(means)
    return "".join(BLOCKS[min(int((mean - low) / (high - low) * len(BLOCKS)), len(BLOCKS) - 1)] for mean in means)


def warnings_of(rows: list[dict[str, Any]]) -> list[str]:
    from attnorm.training.signs import UNIFORM_LAYOUT, collapse

    newest = {name: row[name] for row in rows for name in row}
    uniform = [name for name, value in newest.items() if name.endswith("/entropy") and value > UNIFORM_LAYOUT]
    found = [f"{name} is {newest[name]:.3f}: the layout is uniform" for name in uniform]
    return found + ([text] if (text := collapse(rows)) else [])


def _ago(path: Path) -> str:
    return f"{clock(max(time.time() - path.stat().st_mtime, 0.0))} ago"
