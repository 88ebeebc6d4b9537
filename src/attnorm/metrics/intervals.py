"""Between which values a score or a difference lies: if the images are drawn again (the bootstrap), or the seeds."""

# M images, R resamples.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from attnorm.system.randomness import resampled_counts

CONFIDENCE = 0.95
RESAMPLES = 10_000
_PAIRED = 4  # what tells these draws from others of the same seed; `generative` has 5 to 7


class Interval(NamedTuple):
    low: float
    high: float
    bias: float  # mean of the resampled values minus the value itself


def tails() -> tuple[float, float]:
    """The percentiles between which CONFIDENCE lies."""
    tail = 100 * (1 - CONFIDENCE) / 2
    return tail, 100 - tail


def interval_about(value: float, resampled: np.ndarray) -> Interval:
    """The percentiles of the distance to the resamples' mean, about `value`: so their bias does not shift it.

    Args:
        resampled: The score of each resample, [R], R at least 2.
    """
    if len(resampled) < 2:
        raise ValueError(f"got {len(resampled)} resamples; expected at least 2")
    mean = resampled.mean().item()
    low, high = np.percentile(resampled - mean, tails()).tolist()
    return Interval(value + low, value + high, mean - value)


@dataclass(frozen=True)
class Difference:
    """Mean over the test images of one method's score minus another's, with its bootstrap interval."""

    first: str
    second: str
    score: str
    mean: float
    low: float
    high: float

    @property
    def is_supported(self) -> bool:
        """Whether the interval leaves no doubt about the sign."""
        return self.low > 0 or self.high < 0


def differences(
    scores: Mapping[str, Mapping[str, np.ndarray]], pairs: Sequence[tuple[str, str]], *, seed: int
) -> list[Difference]:
    """Paired bootstrap: the test images are drawn again R times, for every pair and score the same, and the interval
    lies between the percentiles of the mean difference. Scores that one of a pair does not have are left out; so are
    images without a score (NaN), and a score that fewer than two images have.

    Args:
        scores: By method and name, float [M] each.
        seed: Of the resamples.
    """
    columns = [
        (first, second, name, scores[first][name] - scores[second][name])
        for first, second in pairs
        for name in scores[first]
        if name in scores[second] and np.isfinite(scores[first][name]).sum() >= min(2, len(scores[first][name]))
    ]
    if not columns:
        return []
    matrix = np.stack([values for *_, values in columns], 1)
    low, high = np.nanpercentile(resampled_means(matrix, seed=seed), tails(), axis=0)
    return [
        Difference(first, second, name, np.nanmean(values).item(), low[i].item(), high[i].item())
        for i, (first, second, name, values) in enumerate(columns)
    ]


def resampled_means(values: np.ndarray, *, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of the rows drawn with replacement, as many as there are: [M, columns] -> [R, columns].

    A value that is NaN counts for nothing; a mean is NaN where no other was drawn.
    """
    if len(values) < 2:
        raise ValueError(f"got {len(values)} images; expected at least 2 to resample")
    means = np.empty((resamples, values.shape[1]))
    is_there = np.isfinite(values)
    values, is_there = np.where(is_there, values, 0.0), is_there.astype(np.float64)
    for number, counts in enumerate(resampled_counts(len(values), resamples, np.random.PCG64([seed, _PAIRED]))):
        with np.errstate(invalid="ignore"):
            means[number] = (counts @ values) / (counts @ is_there)
    return means


class Mean(NamedTuple):
    """Over seeds, with Student's 95% interval, of mean +- half; NaN where one seed says nothing of it."""

    mean: float
    half: float
    num: int

    def text(self, digits: int = 3, *, sign: str = "") -> str:
        """ "0.123 ± 0.004"; with the sign "+", as a difference."""
        return f"{self.mean:{sign}.{digits}f}" + ("" if math.isnan(self.half) else f" ± {self.half:.{digits}f}")

    @property
    def is_supported(self) -> bool:
        """Whether the interval leaves no doubt about the sign."""
        return abs(self.mean) > self.half


def mean_of(values: Sequence[float]) -> Mean:
    """mean +- t(n - 1) s / sqrt(n), of at least one value."""
    num = len(values)
    if num == 1:
        return Mean(values[0], math.nan, 1)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, num - 1) * np.std(values, ddof=1) / math.sqrt(num)
    return Mean(float(np.mean(values)), float(half), num)
