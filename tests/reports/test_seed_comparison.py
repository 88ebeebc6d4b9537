"""How two rows differ over seeds, and how many would tell: against tables of t and of power, and by drawing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from attnorm.evaluation.scores import Metric
from attnorm.reports.seed_comparison import SeedComparison, compare, pairs_needed, seeds_in_words, seeds_needed


def comparison(first: tuple[float, ...], second: tuple[float, ...], is_less_better: bool = True) -> SeedComparison:
    return SeedComparison("first", "second", Metric("x", "score", 2, is_less_better), "score", (first, second))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # Equal variances: n1 + n2 - 2 = 4 degrees of freedom, whose quantile is 2.77645 in every table.
        ((1, 2, 3), (4, 5, 6), -3 + 2.776445 * math.sqrt(2 / 3) * np.array([-1, 1])),
        # One row that does not vary: those of the other alone, 2, with 4.30265.
        ((5, 5, 5), (1, 2, 3), 3 + 4.302653 * math.sqrt(1 / 3) * np.array([-1, 1])),
    ],
)
def test_the_interval_is_welchs(first: tuple[float, ...], second: tuple[float, ...], expected: np.ndarray) -> None:
    found = comparison(first, second)
    assert found.interval == pytest.approx(expected, abs=1e-5)
    assert found.is_decided and found.difference == np.mean(first) - np.mean(second)


def test_rows_without_a_difference_are_undecided_and_no_number_of_seeds_helps() -> None:
    for first, second in (((1.0, 3.0), (2.0, 2.0)), ((2.0, 2.0), (2.0, 2.0))):
        found = comparison(first, second)
        assert not found.is_decided and found.seeds_needed is None
        assert found.row()[-2:] == ("undecided", "no number would: the observed difference is 0")


@pytest.mark.parametrize(("effect", "expected"), [(0.2, 394), (0.8, 26)])
def test_seeds_needed_are_those_of_the_tables_of_power_where_variances_are_equal(effect: float, expected: int) -> None:
    """As printed for the two-sample t test, two-sided at 5%, 80% power: 393.4, 63.8, 25.5 and 16.7 a group."""
    assert seeds_needed(effect, 1.0, 1.0) == seeds_needed(-7 * effect, 7.0, 7.0) == expected


@pytest.mark.parametrize(("difference", "s1", "s2"), [(11.2, 5.3, 4.3), (20.0, 5.0, 15.0), (6.0, 0.0, 5.0)])
def test_drawn_rows_are_told_apart_four_times_in_five_with_the_seeds_needed(
    difference: float, s1: float, s2: float
) -> None:
    """Welch's test on normal draws, its degrees of freedom from each draw's own variances."""
    needed = seeds_needed(difference, s1, s2)
    assert needed is not None and 4 <= needed <= 12

    def share_found(n: int) -> float:
        rng = np.random.default_rng(0)
        first, second = (rng.normal(mean, s, (20_000, n)) for mean, s in ((difference, s1), (0.0, s2)))
        v1, v2 = first.var(1, ddof=1) / n, second.var(1, ddof=1) / n
        df = (v1 + v2) ** 2 / ((v1**2 + v2**2) / (n - 1))
        t = (first.mean(1) - second.mean(1)) / np.sqrt(v1 + v2)
        return float(np.mean(np.abs(t) > stats.t.ppf(0.975, df)))

    assert share_found(needed) > 0.78 and share_found(needed - 1) < 0.8 < share_found(needed + 1)


def test_extremes_have_an_answer() -> None:
    assert seeds_needed(1e-3, 1.0, 1.0) is None
    assert seeds_in_words(None, 1e-3) == ">1000" and seeds_in_words(12, 1.0) == "12"
    assert seeds_needed(5.0, 0.0, 0.0) == seeds_needed(1e300, 1e-300, 0.0) == seeds_needed(1e9, 1.0, 1.0) == 2
    # Just below and just above the limit: d = 2.8016 sqrt(2 / n).
    assert seeds_needed(0.1254, 1.0, 1.0) in range(995, 1001) and seeds_needed(0.125, 1.0, 1.0) is None


def test_only_rows_of_two_seeds_and_finite_scores_are_compared() -> None:
    rows = {
        "a": {0: (1.0, 64), 1: (2.0, 64)},
        "one": {0: (1.0, 64)},
        "b": {0: (8.5, 64), 5: (8.5, 32), 2: (8.5, 64)},
        "nan": {0: (math.nan, 64), 1: (1.0, 64)},
    }
    (found,) = compare(Metric("x", "distance", 1, is_less_better=True), "distance", rows)
    assert (found.first, found.second, found.values) == ("a", "b", ((1.0, 2.0), (8.5, 8.5, 8.5)))
    assert found.row()[:3] == ("a - b", "distance", "2 and 3, after unlike numbers of images")
    # One degree of freedom: 12.706 times 1/2.
    assert found.row()[3:] == ("1.5 and 8.5", "-7.0 [-13.4, -0.6]", "a is better (lower)", "-")


def test_the_better_row_follows_the_scores_direction() -> None:
    for is_less_better, better in ((True, "second"), (False, "first")):
        assert comparison((8.0, 8.1), (5.0, 5.1), is_less_better).better == better


@pytest.mark.parametrize(("effect", "expected"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_pairs_needed_are_those_of_the_tables_of_power(effect: float, expected: int) -> None:
    """As printed for the paired t test, two-sided at 5%, 80% power: 198.2, 33.4 and 14.3 pairs."""
    assert pairs_needed(effect, 1.0) == pairs_needed(-7 * effect, 7.0) == expected
    assert pairs_needed(0.0, 1.0) is None and pairs_needed(1.0, 0.0) == 2


def test_runs_of_a_seed_are_paired_over_the_seeds_that_both_rows_have() -> None:
    rows = {
        "a": {1: (20.0, 64), 0: (10.0, 64), 2: (31.0, 64)},
        "b": {0: (9.0, 64), 5: (500.0, 32), 1: (18.0, 64), 2: (28.0, 64)},
        "others": {0: (9.0, 64), 7: (18.0, 64)},
    }
    metric = Metric("x", "score", 2, is_less_better=False)
    found = compare(metric, "score", rows, paired=True)
    assert [comparison.is_paired for comparison in found] == [True, False, False]
    # Differences 1, 2 and 3: 2 +- 4.30265 * 1 / sqrt(3). Unpaired they would drown in 10 from seed to seed.
    assert found[0].interval == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert found[0].seeds_needed == pairs_needed(2.0, 1.0)
    assert found[0].values == ((10.0, 20.0, 31.0), (9.0, 18.0, 28.0)) and found[0].has_equal_training
    assert found[0].row()[2] == "3 each, paired" and found[0].to_dict()["is_paired"]
    (unpaired, *_) = compare(metric, "score", rows)
    assert unpaired.interval[1] > 20 and not unpaired.is_paired
