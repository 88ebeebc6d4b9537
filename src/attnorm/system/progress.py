"""How far a work is: a bar on a terminal, a line now and then in a log, and durations in words."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TaskID

SECONDS_BETWEEN_LINES = 15.0  # without a terminal


def clock(seconds: float) -> str:
    """ "1:02:03" """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def humanize(seconds: float) -> str:
    """A time that is known roughly: "40 s", "12 min", "5.2 h", "9 days", "14 months", "3.1 years"."""
    day = 24 * 3600.0
    units = ((90.0, 1.0, "s"), (5400.0, 60.0, "min"), (2 * day, 3600.0, "h"), (60 * day, day, "days"))
    for limit, unit, name in (*units, (730 * day, 30.44 * day, "months")):
        if seconds < limit:
            return f"{seconds / unit:.{'0' if name in ('s', 'min') else '1'}f} {name}"
    return f"{seconds / (365.25 * day):,.1f} years"


def count_of(task: Task) -> str:
    """ "real images: 1,000 of 4,000, 0:00:12 left" """
    of = f" of {task.total:,.0f}" if task.total is not None else ""
    left = f", {clock(task.time_remaining)} left" if task.time_remaining else ""
    return f"{task.description}: {task.completed:,.0f}{of}{left}"


class _Lines(Progress):
    def __init__(self, console: Console, line: Callable[[Task], str], at_once: bool) -> None:
        super().__init__(console=console, disable=True)
        self._line = line
        self._last = time.monotonic() - (2 * SECONDS_BETWEEN_LINES if at_once else 0)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        task = self._tasks[task_id]
        if not task.finished and time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self.console.print(self._line(task), highlight=False)


def progress_bar(
    console: Console,
    *columns: ProgressColumn,
    line: Callable[[Task], str] = count_of,
    at_once: bool = False,
    transient: bool = False,
) -> Progress:
    """A bar of these columns on a terminal; elsewhere the `line` of a task every quarter of a minute.

    Args:
        at_once: The first line comes with the first update.
        transient: The bar goes away when it is done.
    """
    if console.is_terminal:
        return Progress(*columns, console=console, transient=transient)
    return _Lines(console, line, at_once)
