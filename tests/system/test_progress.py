"""How far a work is, in lines of a log, and how long it takes in words."""

from __future__ import annotations

import re

import pytest

from attnorm.cli import terminal
from attnorm.system import progress
from attnorm.system.progress import clock, humanize


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (3600, "60 min"),
        (5400, "1.5 h"),
        (3 * 86400, "3.0 days"),
        (90 * 86400, "3.0 months"),
        (1000 * 365.25 * 86400 * 2, "2,000.0 years"),
    ],
)
def test_a_rough_time_in_words(seconds: float, text: str) -> None:
    assert humanize(seconds) == text


def test_a_clock_counts_hours_minutes_and_seconds() -> None:
    assert [clock(seconds) for seconds in (0.4, 59.6, 3723, 360_000)] == ["0:00:00", "0:01:00", "1:02:03", "100:00:00"]


def test_every_class_has_a_bar_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with terminal.progress_bar() as bars:
        tell = terminal.one_bar_each(bars)
        for name in ("a", "b"):
            tell(5, 10, name)
            tell(10, 10, name)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["a: 5 of 10", "b: 5 of 10"]


def test_progress_in_a_log_is_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with terminal.progress_bar() as bars:
        task = bars.add_task("real images", total=4000)
        bars.update(task, completed=1000)
        bars.update(task, completed=4000)
    assert re.fullmatch(r"real images: 1,000 of 4,000(, \d:\d\d:\d\d left)?\n", capsys.readouterr().err)


def test_a_work_of_seconds_is_done_without_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress_bar() as bars:
        bars.update(bars.add_task("real images", total=4000), completed=1000)
    assert capsys.readouterr().err == ""
