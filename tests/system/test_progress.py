"""How far a work is, in lines of a log, and how long it takes in words."""

from __future__ import annotations

import re

import pytest

from attnorm.cli import terminal
from attnorm.system import progress
from attnorm.system.progress import clock, humanize


def test_a_rough_time_in_words_and_a_clock_of_hours_minutes_and_seconds() -> None:
    day = 86400
    times = (0, 89.4, 90, 3600, 5400, 3 * day, 90 * day, 1000 * 365.25 * day * 2)
    words = ["0 s", "89 s", "2 min", "60 min", "1.5 h", "3.0 days", "3.0 months", "2,000.0 years"]
    assert [humanize(seconds) for seconds in times] == words
    assert [clock(seconds) for seconds in (0.4, 59.6, 3723, 360_000)] == ["0:00:00", "0:01:00", "1:02:03", "100:00:00"]


def test_every_class_has_a_bar_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with terminal.progress_bar() as bars:
        tell = terminal.one_bar_each(bars)
        for name in ("a", "b"):
            tell(1000, 4000, name)
            tell(4000, 4000, name)
    line = r"{}: 1,000 of 4,000(, \d:\d\d:\d\d left)?\n"
    assert re.fullmatch(line.format("a") + line.format("b"), capsys.readouterr().err)


def test_a_work_of_seconds_is_done_without_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress_bar() as bars:
        bars.update(bars.add_task("real images", total=4000), completed=1000)
    assert capsys.readouterr().err == ""
