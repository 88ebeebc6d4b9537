"""What scores of several seeds say: by how much two rows of a table differ, and how many seeds it would take to tell.

Two-sided, at 5%: Welch's t test of rows with variances of their own, or Student's of the differences seed by seed where
two runs of a seed share everything but what is compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from attnorm.evaluation.scores import METRICS, Metric
from attnorm.reports.runs import LABELS, Run, columns, titles

COMPARED = ("frechet", "intra-frechet", "is1", "kid")  # is10 says what is1 does
LEVEL = 0.05
POWER = 0.8
MOST_SEEDS = 1000
HEADER = ("rows", "score", "seeds", "means", "difference [95%]", "reading", "seeds a row to decide")


@dataclass(frozen=True)
class SeedComparison:
    """Two rows in one score, one value a seed; of each row at least two."""

    first: str
    second: str
    metric: Metric
    score: str  # as shown
    values: tuple[tuple[float, ...], tuple[float, ...]]
    has_equal_training: bool = True  # the same number of images seen
    is_paired: bool = False  # values at the same place are of the same seed

    @property
    def means(self) -> tuple[float, float]:
        return float(np.mean(self.values[0])), float(np.mean(self.values[1]))

    @property
    def deviations(self) -> tuple[float, float]:
        """Standard deviations over seeds, of samples (divided by one less than their number)."""
        return float(np.std(self.values[0], ddof=1)), float(np.std(self.values[1], ddof=1))

    @property
    def difference(self) -> float:
        """First minus second, of the means."""
        return self.means[0] - self.means[1]

    @property
    def deviation_of_pairs(self) -> float:
        """Standard deviation over seeds of the difference within a seed."""
        return float(np.std(np.subtract(*self.values), ddof=1))

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the difference; a point where nothing varies. Paired, with s of `deviation_of_pairs`:
        difference +- t(n - 1) s / sqrt(n). Otherwise Welch's: with v = s^2 / n of each row,
        difference +- t(df) sqrt(v1 + v2),  df = (v1 + v2)^2 / (v1^2 / (n1 - 1) + v2^2 / (n2 - 1)).
        """
        n1, n2 = map(len, self.values)
        if self.is_paired:
            half = float(stats.t.ppf(1 - LEVEL / 2, n1 - 1)) * self.deviation_of_pairs / math.sqrt(n1)
            return self.difference - half, self.difference + half
        v1, v2 = self.deviations[0] ** 2 / n1, self.deviations[1] ** 2 / n2
        if v1 + v2 == 0:
            return self.difference, self.difference
        share = v1 / (v1 + v2)  # the form of df that tiny variances do not underflow
        df = 1 / (share**2 / (n1 - 1) + (1 - share) ** 2 / (n2 - 1))
        half = float(stats.t.ppf(1 - LEVEL / 2, df)) * math.sqrt(v1 + v2)
        return self.difference - half, self.difference + half

    @property
    def is_decided(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.interval[0] <= 0 <= self.interval[1]

    @property
    def better(self) -> str:
        return self.first if (self.difference < 0) == self.metric.is_less_better else self.second

    @cached_property
    def seeds_needed(self) -> int | None:
        """`pairs_needed` or `seeds_needed` of what was observed."""
        if self.is_paired:
            return pairs_needed(self.difference, self.deviation_of_pairs)
        return seeds_needed(self.difference, *self.deviations)

    def row(self) -> tuple[str, ...]:
        """The cells below HEADER."""
        d = self.metric.digits
        counts = [len(values) for values in self.values]
        seeds = f"{counts[0]} each" if counts[0] == counts[1] else f"{counts[0]} and {counts[1]}"
        if self.is_paired:
            seeds += ", paired"
        if not self.has_equal_training:
            seeds += ", after unlike numbers of images"
        low, high = self.interval
        said = f"{self.better} is better ({'lower' if self.metric.is_less_better else 'higher'})"
        needed = "-" if self.is_decided else seeds_in_words(self.seeds_needed, self.difference)
        return (
            f"{self.first} - {self.second}",
            self.score,
            seeds,
            f"{self.means[0]:.{d}f} and {self.means[1]:.{d}f}",
            f"{self.difference:+.{d}f} [{low:+.{d}f}, {high:+.{d}f}]",
            said if self.is_decided else "undecided",
            needed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "first": self.first,
            "second": self.second,
            "score": self.score,
            "values": self.values,
            "difference": self.difference,
            "interval": self.interval,
            "is_decided": self.is_decided,
            "seeds_needed": None if self.is_decided else self.seeds_needed,
            "has_equal_training": self.has_equal_training,
            "is_paired": self.is_paired,
        }


def seeds_needed(difference: float, first_deviation: float, second_deviation: float) -> int | None:
    """The fewest seeds a row (from 2) with which Welch's test finds a true `difference` of the means with POWER, given
    the standard deviations of the rows over seeds; None where MOST_SEEDS do not suffice, as for a difference of 0.

    With s1, s2 the deviations and n seeds a row, the statistic is noncentral t with

        ncp = |difference| / sqrt((s1^2 + s2^2) / n),  df = (n - 1) (s1^2 + s2^2)^2 / (s1^4 + s2^4)

    (Welch's degrees of freedom); the power is what of it lies beyond the central t's quantiles.
    """
    if difference == 0:
        return None
    largest = max(first_deviation, second_deviation)
    if largest == 0:
        return 2
    squares = (first_deviation / largest) ** 2, (second_deviation / largest) ** 2  # in [0, 1]: no overflow
    n = np.arange(2, MOST_SEEDS + 1)
    df = (n - 1) * sum(squares) ** 2 / (squares[0] ** 2 + squares[1] ** 2)
    return _fewest(n, df, min(abs(difference) / largest, 1e9) * np.sqrt(n / sum(squares)))


def pairs_needed(difference: float, deviation: float) -> int | None:
    """As `seeds_needed`, of Student's test of differences seed by seed, which have a standard deviation: with n seeds
    ncp = |difference| sqrt(n) / deviation, df = n - 1.
    """
    if difference == 0:
        return None
    if deviation == 0:
        return 2
    n = np.arange(2, MOST_SEEDS + 1)
    return _fewest(n, n - 1, min(abs(difference) / deviation, 1e9) * np.sqrt(n))


def _fewest(n: NDArray[Any], df: NDArray[Any], ncp: NDArray[Any]) -> int | None:
    """The first of `n` seeds with which a noncentral t of `df` and `ncp` has POWER; None where none has."""
    # At ncp = 30 the power is 0.98 even with one degree of freedom: a larger one changes no answer.
    ncp = np.minimum(ncp, 30.0)
    beyond = stats.t.ppf(1 - LEVEL / 2, df)
    power = stats.nct.sf(beyond, df, ncp) + stats.nct.cdf(-beyond, df, ncp)
    enough = np.flatnonzero(power >= POWER)
    return int(n[enough[0]]) if enough.size else None


def seeds_in_words(needed: int | None, difference: float) -> str:
    if difference == 0:
        return "no number would: the observed difference is 0"
    return f">{MOST_SEEDS}" if needed is None else str(needed)


def explanation(num_comparisons: int) -> str:
    """What a reader of the table must know."""
    return (
        "Rows of two seeds or more, two by two: the difference of their means (first minus second) with the 95% "
        "interval over seeds, decided where it leaves out 0; of Welch's t test, or, where it says paired, of Student's "
        "for the differences of runs that share a seed, and with it images and masks of one size and the first weights "
        "of all that their networks have in common. Beside what is undecided: the seeds a "
        f"row with which that test would find a difference as large as the observed one in {POWER:.0%} of the cases, "
        "with the spreads observed (noncentral t). Difference and spreads are themselves of few seeds, and so is that "
        f"number. The intervals are not corrected for the number of comparisons, here {num_comparisons}."
    )


def rows_by_seed(scored: Iterable[tuple[str, int, float, int]]) -> dict[str, dict[int, tuple[float, int]]]:
    """What `compare` takes: by label, for each seed, value and images seen.

    A label that has a seed more than once becomes a row for each number of images seen; what that does not tell apart
    differs in something that is not known here, and is left out.

    Args:
        scored: Label, seed, value and images seen of each run.
    """
    by_label: dict[str, list[tuple[int, float, int]]] = {}
    for label, *rest in scored:
        by_label.setdefault(label, []).append(tuple(rest))  # type: ignore[arg-type]
    rows = {}
    for label, found in by_label.items():
        parts = {label: found}
        if len({seed for seed, _, _ in found}) < len(found):
            parts = {
                f"{label}, {images:,} images": [one for one in found if one[2] == images]
                for images in dict.fromkeys(images for _, _, images in found)
            }
        for name, part in parts.items():
            values = {seed: (value, images) for seed, value, images in part}
            if len(values) == len(part):
                rows[name] = values
    return rows


def compare(
    metric: Metric, score: str, rows: Mapping[str, Mapping[int, tuple[float, int]]], *, paired: bool = False
) -> list[SeedComparison]:
    """Every two of `rows` that have two seeds or more, in their order.

    Args:
        score: Its name, as shown.
        rows: By label, for each seed: the value and the number of images seen.
        paired: Runs of a seed share all but what is compared: seed by seed, over the seeds that both rows have, where
            these are two or more.
    """
    found = []
    for first, second in itertools.combinations(rows, 2):
        common = rows[first].keys() & rows[second].keys()
        is_paired = paired and len(common) >= 2
        seeds = [sorted(common if is_paired else rows[label]) for label in (first, second)]
        sides = [[rows[label][seed] for seed in own] for label, own in zip((first, second), seeds, strict=True)]
        if min(map(len, sides)) < 2:
            continue
        if not all(math.isfinite(value) for side in sides for value, _ in side):
            continue  # nothing to compare: a score that is no number
        values = tuple(tuple(value for value, _ in side) for side in sides)
        num_seen = {seen for side in sides for _, seen in side}
        pair = values[0], values[1]
        found.append(SeedComparison(first, second, metric, score, pair, len(num_seen) == 1, is_paired))
    return found


def compare_runs(runs: Sequence[Run]) -> list[SeedComparison]:
    """Every two rows of a training configuration in every column that both have several seeds in; subset estimates are
    left out.
    """
    order = {label: number for number, label in enumerate(LABELS.values())}
    in_order = sorted(runs, key=lambda run: order.get(run.label, len(order)))
    shown = columns(runs, COMPARED)
    found = []
    for column, title in zip(shown, titles(shown), strict=True):
        if column.subset:
            continue
        scored = [(run, score) for run in in_order if (score := run.find(column)) is not None]
        rows = rows_by_seed((run.label, run.config.run.seed, score.value, run.shown_at) for run, score in scored)
        found += compare(METRICS[column.metric], title, rows)
    return found
