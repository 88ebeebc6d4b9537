"""What scores of several seeds say: where two rows of a table differ by more than seeds and samples do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from attnorm.evaluation.runs import LABELS, LESS_IS_BETTER, SCORE_DIGITS, Column, Run, Score, columns

COMPARED = ("frechet", "intra-frechet", "is1", "kid")  # in the readings; is10 says what is1 does


class Range(NamedTuple):
    low: float
    high: float

    def overlaps(self, other: Range) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Reading:
    """Two rows in one column, each with several seeds."""

    first: str
    second: str
    column: Column
    num_seeds: tuple[int, int]
    values: tuple[Range, Range]  # over seeds
    intervals: tuple[Range, Range] | None  # from the lowest end to the highest; None unless every seed has one
    has_equal_training: bool  # the same number of images seen

    @property
    def is_separated(self) -> bool:
        """Whether neither the ranges over seeds nor the intervals overlap."""
        return not any(first.overlaps(second) for first, second in filter(None, (self.values, self.intervals)))

    @property
    def better(self) -> str:
        is_first_lower = self.values[0].low < self.values[1].low
        return self.first if is_first_lower == (self.column.metric in LESS_IS_BETTER) else self.second


def readings_of(runs: Sequence[Run]) -> list[Reading]:
    """Every two rows of a recipe, in every column that both have several seeds in; quick looks are left out."""
    found = []
    rows: dict[str, list[Run]] = {}
    order = {label: number for number, label in enumerate([*LABELS.values()])}
    for run in sorted(runs, key=lambda run: order.get(run.label, len(order))):
        rows.setdefault(run.label, []).append(run)
    shown = [column for column in columns(runs, COMPARED) if not column.subset]
    for (first, second), column in itertools.product(itertools.combinations(rows, 2), shown):
        sides = []
        for label in (first, second):
            by_seed = {run.config.run.seed: (run, score) for run in rows[label] if (score := run.find(column))}
            sides.append(list(by_seed.values()))
        if min(map(len, sides)) < 2:
            continue
        values = tuple(_range([score["value"] for _, score in side]) for side in sides)
        has_intervals = all(_has_interval(score) for side in sides for _, score in side)
        intervals = tuple(
            _range([score[end] for _, score in side for end in ("low", "high")]) for side in sides if has_intervals
        )
        found.append(
            Reading(
                first,
                second,
                column,
                (len(sides[0]), len(sides[1])),
                (values[0], values[1]),
                (intervals[0], intervals[1]) if intervals else None,
                len({run.shown_at for side in sides for run, _ in side}) == 1,
            )
        )
    return found


def _has_interval(score: Score) -> bool:
    return score.get("low") is not None and score.get("high") is not None


def _range(values: Sequence[float]) -> Range:
    return Range(min(values), max(values))


def sentence(reading: Reading, title: str) -> str:
    """What a reading says, in words."""
    digits = SCORE_DIGITS[reading.column.metric]
    first, second = (f"{value.low:.{digits}f} to {value.high:.{digits}f}" for value in reading.values)
    seeds = (
        f"{reading.num_seeds[0]} seeds each"
        if len(set(reading.num_seeds)) == 1
        else f"{reading.num_seeds[0]} and {reading.num_seeds[1]} seeds"
    )
    do_values_overlap = reading.values[0].overlaps(reading.values[1])
    if reading.intervals is None:
        overlap = "the ranges over seeds overlap" if do_values_overlap else "the ranges over seeds do not overlap"
        overlap += " (no intervals were measured)"
    else:
        do_intervals_overlap = reading.intervals[0].overlaps(reading.intervals[1])
        if do_values_overlap:
            overlap = "the ranges over seeds overlap"
        elif do_intervals_overlap:
            overlap = "the ranges over seeds do not overlap, but the bootstrap intervals do"
        else:
            overlap = "neither the ranges over seeds nor the bootstrap intervals overlap"
    direction = "lower" if reading.column.metric in LESS_IS_BETTER else "higher"
    verdict = f"separated, {reading.better} is better ({direction})" if reading.is_separated else "not separated"
    unequal = "" if reading.has_equal_training else ", after unlike numbers of images"
    return (
        f"{reading.first} against {reading.second}, {title}: {first} against {second} ({seeds}{unequal}); {overlap}: "
        f"{verdict}."
    )
