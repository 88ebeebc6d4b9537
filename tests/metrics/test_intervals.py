"""The bootstrap against a loop and the normal law."""

# M images, R resamples.

from __future__ import annotations

import math

import numpy as np
import pytest

from attnorm.metrics.intervals import Difference, differences, interval_about, resampled_means


def test_resampled_means_equal_a_loop_over_the_drawn_images() -> None:
    values = np.random.default_rng(0).normal(size=(7, 2))
    stream = np.random.PCG64([3, 4])
    expected = []
    for _ in range(5):
        rows = [int(number) % 7 for number in stream.random_raw(7)]
        expected.append([sum(values[row, column] for row in rows) / 7 for column in range(2)])
    np.testing.assert_allclose(resampled_means(values, seed=3, resamples=5), expected, rtol=1e-12)


def scores_of(**values: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    return {name: {"psnr_pasted": value} for name, value in values.items()}


def test_the_interval_of_a_known_difference_is_that_of_the_normal_law() -> None:
    random = np.random.default_rng(0)
    images = random.normal(20, 5, 400)  # the images differ more than the models do: pairing is what tells them apart
    gain = random.normal(0.5, 1, 400)
    (difference,) = differences(scores_of(a=images + gain, b=images), [("a", "b")], seed=0)
    half = 1.96 * gain.std() / math.sqrt(400)
    assert difference.mean == pytest.approx(gain.mean())
    assert difference.low == pytest.approx(gain.mean() - half, abs=0.1 * half)
    assert difference.high == pytest.approx(gain.mean() + half, abs=0.1 * half)
    assert difference.is_supported


def test_intervals_are_symmetric_in_the_pair_and_depend_on_the_seed_alone() -> None:
    random = np.random.default_rng(1)
    scores = scores_of(a=random.normal(size=30), b=random.normal(size=30))
    (one,) = differences(scores, [("a", "b")], seed=5)
    (other,) = differences(scores, [("b", "a")], seed=5)
    assert (other.mean, other.low, other.high) == pytest.approx((-one.mean, -one.high, -one.low), abs=1e-12)
    assert differences(scores, [("a", "b")], seed=5) == [one]
    (elsewhere,) = differences(scores, [("a", "b")], seed=6)
    assert elsewhere.mean == one.mean and elsewhere.low != one.low


def test_only_an_interval_on_one_side_of_zero_supports_a_difference() -> None:
    flat = np.zeros(10)
    (equal,) = differences(scores_of(a=flat, b=flat), [("a", "b")], seed=0)
    assert (equal.low, equal.high, equal.is_supported) == (0, 0, False)
    (always,) = differences(scores_of(a=flat - 2, b=flat), [("a", "b")], seed=0)
    assert (always.low, always.high, always.is_supported) == (-2, -2, True)
    assert not Difference("a", "b", "mae_raw", 0.1, -0.1, 0.3).is_supported


def test_images_without_a_score_count_for_nothing() -> None:
    """As if they were not there, up to how often the others are drawn; and a score of one image has no interval."""
    random = np.random.default_rng(2)
    gain = random.normal(0.5, 1, 300)
    values = np.where(np.arange(300) % 3 == 0, np.nan, gain)
    there = gain[np.arange(300) % 3 != 0]
    (difference,) = differences(scores_of(a=values, b=values * 0), [("a", "b")], seed=0)
    half = 1.96 * there.std() / math.sqrt(len(there))
    assert difference.mean == pytest.approx(there.mean())
    assert difference.low == pytest.approx(there.mean() - half, abs=0.1 * half)
    assert difference.high == pytest.approx(there.mean() + half, abs=0.1 * half)
    one = np.array([1.0, np.nan, np.nan])
    assert differences(scores_of(a=one, b=one), [("a", "b")], seed=0) == []


def test_scores_that_one_side_lacks_are_left_out() -> None:
    scores = {"model": {"psnr_hole": np.ones(3), "psnr_raw": np.ones(3)}, "floor": {"psnr_hole": np.zeros(3)}}
    assert [d.score for d in differences(scores, [("model", "floor")], seed=0)] == ["psnr_hole"]
    with pytest.raises(ValueError, match="at least 2"):
        resampled_means(np.ones((1, 1)), seed=0)


def test_an_interval_lies_about_the_value_and_not_about_the_biased_resamples() -> None:
    resampled = 12 + np.linspace(-1, 1, 1001)
    low, high, bias = interval_about(10, resampled)
    assert (low, high, bias) == pytest.approx((10 - 0.95, 10 + 0.95, 2))
