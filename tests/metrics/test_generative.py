"""Scores against closed forms, against torch-fidelity and SciPy on the same features, by hand, and in parts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from attnorm.config import UserError
from attnorm.metrics.generative import (
    Gaussian,
    InceptionScore,
    Moments,
    frechet_distance,
    frechet_interval,
    inception_score,
    kernel_distance,
    precision_recall,
    score_interval,
)
from attnorm.metrics.intervals import interval_about


def normal(count: int, dimensions: int, *, seed: int = 0) -> Tensor:
    """Correlated features of unequal spread, with a mean; float64 [N, D]. Every seed has the same law."""
    law = torch.Generator().manual_seed(100)
    mixing = torch.randn(dimensions, dimensions, generator=law, dtype=torch.float64)
    mixing *= torch.linspace(0.1, 2, dimensions, dtype=torch.float64)
    noise = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise @ mixing + 0.5


def gaussian(mean: list[float], covariance: list[list[float]]) -> Gaussian:
    """The law of these moments, exactly; by way of Moments, as if of many images."""
    moments = Moments()
    moments.count, moments.mean = 10_001, torch.tensor(mean, dtype=torch.float64)
    moments.scatter = 10_000 * torch.tensor(covariance, dtype=torch.float64)
    return Gaussian.from_moments(moments)


# Moments


def moments_of(*parts: Tensor) -> Moments:
    moments = Moments()
    for part in parts:
        moments.add(part)
    return moments


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_in_parts_equal_numpys_whatever_the_mean(offset: float) -> None:
    features = normal(101, 7)
    expected = np.cov(features.numpy(), rowvar=False)
    found = moments_of(*(features + offset).split([1, 40, 0, 57, 3]))
    assert found.count == 101
    np.testing.assert_allclose(found.mean.numpy() - offset, features.mean(0).numpy(), rtol=0, atol=1e-11)
    np.testing.assert_allclose(found.covariance.numpy(), expected, rtol=0, atol=1e-11 * np.abs(expected).max())


def test_moments_merge_in_any_order_and_through_their_state() -> None:
    """Of float32 features, which are summed in float64; what is merged does not change."""
    parts = [(part + 1e4).float() for part in normal(60, 5).split([10, 30, 20])]
    whole = moments_of(*parts)
    np.testing.assert_allclose(whole.covariance, np.cov(torch.cat(parts).double().T), rtol=1e-9, atol=1e-9)
    for order in itertools.permutations(parts):
        merged = Moments(5)
        for part in order:
            merged.merge(Moments.from_state(moments_of(part).state()))
        other, before = moments_of(parts[0]), moments_of(parts[0])
        empty = Moments()
        empty.merge(other)
        empty.merge(merged)
        assert torch.equal(other.mean, before.mean) and other.count == 10
        merged.merge(Moments(5))
        assert merged.count == 60
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-10, atol=1e-10)


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ValueError, match="3 dimensions after 2"):
        moments_of(normal(4, 2), normal(4, 3))
    with pytest.raises(ValueError, match="3 dimensions after 2"):
        Moments(2).add(normal(4, 3))
    with pytest.raises(ValueError, match=r"got \(4,\) for features; expected \[N, D\]"):
        Moments().add(torch.zeros(4))
    with pytest.raises(ValueError, match="got 1 images; expected at least 2"):
        moments_of(normal(1, 2)).covariance  # noqa: B018
    with pytest.raises(ValueError, match="N at least 2"):
        Gaussian.from_features(normal(1, 2))


# Fréchet distance


def test_the_distance_of_equal_laws_is_0_and_of_shifted_ones_the_square_of_the_shift() -> None:
    law = Gaussian.from_features(normal(200, 6))
    assert frechet_distance(law, law) == pytest.approx(0, abs=1e-10)
    shifted = Gaussian(law.mean + 3, law.factor, law.count)
    assert frechet_distance(law, shifted) == pytest.approx(6 * 9)


def test_the_distance_is_exact_for_singular_covariances() -> None:
    flat = gaussian([0, 0], [[4, 0], [0, 0]])  # all on one axis
    other = gaussian([0, 0], [[0, 0], [0, 9]])  # all on the other: Tr sqrt(S1 S2) = 0
    assert flat.factor.shape == (2, 1)
    assert frechet_distance(flat, other) == pytest.approx(4 + 9)
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-12)
    # On lines at an angle a: Tr sqrt(S1 S2) = sd1 sd2 |cos a|.
    c, s = math.cos(0.3), math.sin(0.3)
    tilted = gaussian([0, 0], [[9 * c * c, 9 * c * s], [9 * c * s, 9 * s * s]])
    assert frechet_distance(flat, tilted) == pytest.approx(4 + 9 - 2 * 2 * 3 * c)
    with pytest.raises(ValueError, match="got 2 and 1 dimensions"):
        frechet_distance(flat, gaussian([0], [[1]]))


@pytest.mark.parametrize(("fakes", "reals"), [(300, 500), (20, 500), (20, 30)], ids=["full", "N<D", "both<D"])
def test_the_distance_equals_torch_fidelitys_and_scipys(fakes: int, reals: int) -> None:
    pair = normal(fakes, 48, seed=1) + 0.1, 1.2 * normal(reals, 48, seed=2)
    found = frechet_distance(*map(Gaussian.from_features, pair))
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, pair), verbose=False)
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    first, second = (np.cov(features.numpy(), rowvar=False) for features in pair)
    root = scipy.linalg.sqrtm(first @ second)
    shift = (pair[0].mean(0) - pair[1].mean(0)).square().sum().item()
    expected = shift + np.trace(first) + np.trace(second) - 2 * np.trace(root).real
    assert found == pytest.approx(expected, rel=1e-3 if min(fakes, reals) < 48 else 1e-8)


def test_both_kinds_of_factor_give_the_same_law() -> None:
    features = normal(30, 48)
    thin, full = Gaussian.from_features(features), Gaussian.from_moments(moments_of(features))
    assert thin.factor.shape == (48, 30) and full.factor.shape == (48, 29)  # the mean took one
    torch.testing.assert_close(full.factor @ full.factor.T, thin.factor @ thin.factor.T)
    other = Gaussian.from_features(normal(100, 48, seed=1))
    assert other.factor.shape == (48, 48) and other.count == 100
    assert frechet_distance(full, other) == pytest.approx(frechet_distance(thin, other), rel=1e-9)
    assert frechet_distance(other, thin) == pytest.approx(frechet_distance(thin, other), rel=1e-9)


@pytest.mark.parametrize("images", [40, 60], ids=["thin", "full"])
def test_a_law_read_back_gives_the_last_digit_of_the_law_that_was_kept(images: int) -> None:
    """Files hold tensors contiguous, and a product of other strides rounds another way."""
    other = Gaussian.from_features(normal(30, 48, seed=1))
    for seed in range(5):
        law = Gaussian.from_features(normal(images, 48, seed=seed))
        factor = torch.frombuffer(bytearray(law.factor.numpy().tobytes()), dtype=torch.float64)
        read = Gaussian(law.mean.clone(), factor.view(law.factor.shape), law.count)
        assert frechet_distance(other, law) == frechet_distance(other, read)
        assert law.factor.stride() == read.factor.stride()


# Inception Score


def logits_of(count: int, *, seed: int = 0, classes: int = 12) -> Tensor:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("splits", [1, 4, 10])
def test_the_score_equals_torch_fidelitys(splits: int) -> None:
    logits = logits_of(103)
    theirs = isc_features_to_metric(logits, splits, shuffle=False)
    expected = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert inception_score(logits, splits) == pytest.approx(expected, rel=1e-12)


def test_the_score_in_parts_and_of_several_processes_equals_that_of_all_at_once() -> None:
    logits = logits_of(103)
    ends = [0, 7, 7, 50, 51, 103]
    processes = [InceptionScore(103, 10) for _ in range(3)]
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        processes[number % 2].add(logits[start:end], start)
    merged = InceptionScore(103, 10)
    for process in reversed(processes):  # one of which has seen nothing
        merged.merge(InceptionScore.from_state(process.state()))
    assert merged.score(10) == pytest.approx(inception_score(logits, 10), rel=1e-12)
    assert merged.score(1) == pytest.approx(inception_score(logits, 1), rel=1e-12)


def test_a_score_of_other_images_than_were_promised_is_refused() -> None:
    score = InceptionScore(10, 5)
    score.add(logits_of(8), 0)
    with pytest.raises(ValueError, match=r"got \[2, 2, 2, 2, 0\] images in the splits; expected \[2, 2, 2, 2, 2\]"):
        score.score(5)
    with pytest.raises(ValueError, match="got images 8 to 10; expected numbers from 0 to 9"):
        score.add(logits_of(3), 8)
    with pytest.raises(ValueError, match="got 2 splits; expected 1 or the 5"):
        score.score(2)
    with pytest.raises(ValueError, match="got 2 splits of 10 images; expected 5 of 10"):
        score.merge(InceptionScore(10, 2))
    with pytest.raises(ValueError, match="got 11 splits of 10 images"):
        InceptionScore(10, 11)


# Kernel distance


def test_the_kernel_distance_of_all_samples_equals_torch_fidelitys() -> None:
    fakes, reals = normal(60, 16, seed=1) / 4, normal(60, 16, seed=2) / 4 + 0.5
    # One subset of everything: what is drawn is an order, which does not matter.
    settings = {"kid_subsets": 1, "kid_subset_size": 60, "rng_seed": 0, "verbose": False}
    theirs = kid_features_to_metric(fakes, reals, **settings)["kernel_inception_distance_mean"]
    mean, spread = kernel_distance(fakes, reals, subsets=1, subset_size=1000, seed=3)
    assert mean == pytest.approx(theirs, rel=1e-10) and spread == 0
    assert mean > 0.01


def test_the_kernel_distance_is_without_bias_and_depends_on_the_seed_alone() -> None:
    fakes, reals = normal(400, 8, seed=1) / 4, normal(400, 8, seed=2) / 4
    mean, spread = kernel_distance(fakes, reals, subsets=50, subset_size=40, seed=0)
    assert abs(mean) < spread / 2  # one law: 0 on average
    biased = kernel_distance(fakes, fakes, subsets=1, subset_size=400, seed=0)[0]
    assert biased < 0  # the same images on both sides: those that meet themselves count in one of the three means only
    assert kernel_distance(fakes, reals, subsets=50, subset_size=40, seed=0) == (mean, spread)
    assert kernel_distance(fakes, reals, subsets=50, subset_size=40, seed=1) != (mean, spread)
    far, _ = kernel_distance(fakes + 1, reals, subsets=50, subset_size=40, seed=0)
    assert far > 4 * spread
    with pytest.raises(ValueError, match="of 1 images"):
        kernel_distance(fakes, reals, subset_size=1, seed=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused_by_every_score(bad: float) -> None:
    good = normal(12, 3)
    wrong = good.clone()
    wrong[4, 1] = bad
    moments, law = Moments(), Gaussian.from_features(good)
    for score in (
        lambda: inception_score(wrong, 2),
        lambda: InceptionScore(12, 2).add(wrong, 0),
        lambda: moments.add(wrong),
        lambda: Gaussian.from_features(wrong),
        lambda: frechet_interval(wrong, law, 0.0, seed=0),
        lambda: score_interval(wrong, seed=0),
        lambda: kernel_distance(good, wrong, seed=0),
        lambda: precision_recall(good, wrong),
    ):
        with pytest.raises(UserError, match="of 1 of 12 images are not finite, so there is no score"):
            score()
    assert moments.count == 0


# Precision and recall


def test_precision_and_recall_by_hand() -> None:
    # One neighbour. The reals' balls: 0 +- 1, 1 +- 1, 3 +- 2; the fakes': 2 +- 4, 6 +- 4, 20 +- 14.
    reals = torch.tensor([[0.0], [1], [3]])
    fakes = torch.tensor([[2.0], [6], [20]])
    found = precision_recall(reals, fakes, neighbours=1)
    assert found.precision == pytest.approx(1 / 3)  # only 2, which is in the balls of 1 (on its border) and of 3
    assert found.density == pytest.approx(2 / 3)
    assert found.recall == 1 and found.coverage == pytest.approx(2 / 3)
    swapped = precision_recall(fakes, reals, neighbours=1)
    assert (swapped.precision, swapped.recall) == (found.recall, found.precision)
    with pytest.raises(ValueError, match=r"for fakes; expected .* at least 4"):
        precision_recall(reals.repeat(2, 1), fakes, neighbours=3)


@pytest.mark.parametrize("block", [7, 2048])
def test_precision_and_recall_equal_torch_fidelitys_in_blocks_of_any_size(block: int) -> None:
    reals, fakes = normal(120, 6, seed=1) + 30, 0.7 * normal(90, 6, seed=2) + 30.5
    settings = {"prc_neighborhood": 3, "prc_batch_size": 1000, "save_cpu_ram": False, "verbose": False}
    theirs = prc_features_to_metric(fakes, reals, **settings)
    found = precision_recall(reals, fakes, block=block)
    assert (found.precision, found.recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
    assert 0.2 < found.recall < found.precision < 1


@pytest.mark.parametrize(("block", "num", "copies"), [(26, 23, 4), (30, 23, 4), (33, 9, 4), (33, 40, 5)])
def test_a_set_is_all_of_itself_in_any_order_and_blocks(block: int, num: int, copies: int) -> None:
    """With as many copies as neighbours all radii are 0: rounding must not put an image beside itself."""
    for dimensions in (3, 100):
        random = torch.Generator().manual_seed(0)
        once = torch.randn(num, dimensions, generator=random).exp() * 50 + 100
        features = once.repeat(copies, 1)
        found = precision_recall(features, features[torch.randperm(len(features), generator=random)], block=block)
        assert found == (1, 1, copies / 3, 1)


def test_images_that_are_near_but_not_in_a_ball_are_not_counted() -> None:
    """What is allowed for rounding is far less than images ever differ by."""
    reals = torch.tensor([0.0, 1, 2, 3], dtype=torch.float64)[:, None] * torch.ones(1, 64, dtype=torch.float64)
    fakes = reals[-1:] + torch.tensor([1, 1 + 1e-9, 9, 99], dtype=torch.float64)[:, None]
    assert precision_recall(reals, fakes, neighbours=1).precision == 1 / 4


# Intervals


@pytest.mark.parametrize(("fakes", "reals"), [(40, 100), (15, 100), (40, 9)], ids=["full", "N<D", "M<D"])
def test_the_interval_equals_a_loop_over_the_drawn_images(fakes: int, reals: int) -> None:
    features, law = normal(fakes, 16, seed=1), Gaussian.from_features(normal(reals, 16, seed=2))
    value, resampled, said = frechet_distance(Gaussian.from_features(features), law), [], []
    stream = np.random.PCG64([5, 6])
    for _ in range(7):
        rows = [int(number) % fakes for number in stream.random_raw(fakes)]
        resampled.append(frechet_distance(Gaussian.from_features(features[rows]), law))
    found = frechet_interval(features, law, value, resamples=7, seed=5, progress=lambda *counts: said.append(counts))
    assert found == pytest.approx(interval_about(value, np.array(resampled)), rel=1e-6)
    assert said == [(number, 7) for number in range(1, 8)]
    low, high = np.percentile(resampled, (2.5, 97.5))
    assert found.high - found.low == pytest.approx(high - low, rel=1e-6)
    assert found.bias == pytest.approx(np.mean(resampled) - value, rel=1e-6) and found.bias > 0


def test_the_interval_of_the_score_equals_a_loop_over_the_drawn_images() -> None:
    logits = logits_of(50)
    stream = np.random.PCG64([5, 7])
    resampled = []
    for _ in range(100):
        rows = [int(number) % 50 for number in stream.random_raw(50)]
        resampled.append(inception_score(logits[rows], 1)[0])
    value = inception_score(logits, 1)[0]
    found = score_interval(logits, resamples=100, seed=5)
    assert found == pytest.approx(interval_about(value, np.array(resampled)), rel=1e-9)
    assert found.low < value < found.high and found.bias < 0
    with pytest.raises(ValueError, match="got 1 resamples"):
        score_interval(logits, resamples=1, seed=5)
