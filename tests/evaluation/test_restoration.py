"""PSNR, SSIM and MAE against scikit-image, closed forms and loops; the bootstrap against a loop and the normal law."""

# N images, S their size.

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from attnorm.data.masks import free_form_mask
from attnorm.evaluation.restoration import (
    DISTANCE_SCORES,
    SCORES,
    Difference,
    differences,
    hole_distances,
    mae,
    measure,
    psnr,
    resampled_means,
    ssim,
)

SIZE = 40


def pictures(count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Truth, a disturbed copy, masks."""
    random = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=random, dtype=torch.uint8)
    noise = torch.randint(-40, 41, truth.shape, generator=random)
    masks = torch.stack([free_form_mask(SIZE, seed=1, index=i).mask for i in range(count)])
    return truth, (truth.int() + noise).clamp(0, 255).to(torch.uint8), masks


def everywhere(images: Tensor) -> Tensor:
    return torch.ones(len(images), 1, *images.shape[2:], dtype=torch.bool)


def test_psnr_and_ssim_equal_those_of_scikit_image() -> None:
    truth, image, _ = pictures()
    ours = psnr(truth, image, everywhere(truth)), ssim(truth, image, everywhere(truth))
    for i in range(len(truth)):
        pair = [part[i].permute(1, 2, 0).numpy() for part in (truth, image)]
        assert ours[0][i].item() == pytest.approx(peak_signal_noise_ratio(*pair, data_range=255), rel=1e-12)
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
        expected = structural_similarity(*pair, channel_axis=2, **settings)
        assert ours[1][i].item() == pytest.approx(expected, rel=1e-9)
        assert 0.1 < expected < 0.99


def test_the_ssim_of_a_hole_is_the_mean_of_scikit_images_map_there() -> None:
    truth, image, masks = pictures()
    ours = ssim(truth, image, masks)
    for i in range(len(truth)):
        pair = [part[i].permute(1, 2, 0).numpy() for part in (truth, image)]
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
        _, similarity = structural_similarity(*pair, channel_axis=2, full=True, **settings)
        inner = np.zeros((SIZE, SIZE), bool)
        inner[5:-5, 5:-5] = masks[i, 0, 5:-5, 5:-5]
        assert ours[i].item() == pytest.approx(similarity[inner].mean(), rel=1e-9)


@pytest.mark.parametrize("offset", [1, 7, 100])
def test_a_constant_offset_has_scores_in_closed_form(offset: int) -> None:
    truth = torch.full((1, 3, SIZE, SIZE), 90, dtype=torch.uint8)
    image = truth + offset
    assert psnr(truth, image, everywhere(truth)).item() == pytest.approx(20 * math.log10(255 / offset))
    assert mae(truth, image, everywhere(truth)).item() == pytest.approx(offset / 255)
    c1 = (0.01 * 255) ** 2  # without variance, SSIM is its factor of luminance
    luminance = (2 * 90 * (90 + offset) + c1) / (90**2 + (90 + offset) ** 2 + c1)
    assert ssim(truth, image, everywhere(truth)).item() == pytest.approx(luminance)


def test_scores_of_the_hole_equal_loops_over_its_pixels() -> None:
    truth, raw, masks = pictures()
    scores = measure(truth, raw, masks)
    for i in range(len(truth)):
        squares, absolutes = [], []
        for row, column in masks[i, 0].nonzero().tolist():
            for channel in range(3):
                error = int(truth[i, channel, row, column]) - int(raw[i, channel, row, column])
                squares.append(error**2)
                absolutes.append(abs(error))
        mse = sum(squares) / len(squares)
        assert scores["psnr_hole"][i].item() == pytest.approx(10 * math.log10(255**2 / mse))
        assert scores["mae_hole"][i].item() == pytest.approx(sum(absolutes) / len(absolutes) / 255)


def test_distances_are_steps_to_the_nearest_known_pixel() -> None:
    mask = (
        torch.rand(4, 1, 9, 8, generator=torch.Generator().manual_seed(0))
        < torch.tensor([0.3, 0.9, 0.97, 2.0])[:, None, None, None]
    )
    mask[2, 0, 0, 0] = False
    distances = hole_distances(mask)
    for n, row, column in ((n, row, column) for n in range(4) for row in range(9) for column in range(8)):
        known = (~mask[n, 0]).nonzero().tolist()
        steps = [max(abs(row - r), abs(column - c)) for r, c in known]
        assert distances[n, 0, row, column] == min(steps, default=-1)
    assert distances.max() >= 7


def test_psnr_by_distance_is_that_of_the_pixels_so_far_from_the_edge() -> None:
    """A square hole of 11 pixels with an error of 1 at its edge, 2 inside of it, and so on to 6 in its centre."""
    truth = torch.full((2, 3, SIZE, SIZE), 90, dtype=torch.uint8)
    masks = torch.zeros(2, 1, SIZE, SIZE, dtype=torch.bool)
    masks[0, :, 3:14, 20:31] = True
    masks[1, :, 5, 5:9] = True  # none is farther than a step
    raw = truth.clone()
    for ring in range(6):
        raw[0, :, 3 + ring : 14 - ring, 20 + ring : 31 - ring] = 90 + ring + 1
    raw[1, :, 5, 5:9] = 97
    raw[:, :, 30:] = 0  # outside of the holes nothing counts
    scores = measure(truth, raw, masks)
    rings = [40, 32, 24, 16, 8, 1]  # pixels

    def decibels(*errors: int) -> float:
        return 10 * math.log10(255**2 / (sum(rings[e - 1] * e**2 for e in errors) / sum(rings[e - 1] for e in errors)))

    expected = {"psnr_1-2": decibels(1, 2), "psnr_3-4": decibels(3, 4), "psnr_5-8": decibels(5, 6)}
    for name in DISTANCE_SCORES:
        first, second = scores[name].tolist()
        assert first == pytest.approx(expected[name]) if name in expected else math.isnan(first)
        assert second == pytest.approx(20 * math.log10(255 / 7)) if name == "psnr_1-2" else math.isnan(second)


def test_pasted_scores_see_the_hole_only_and_raw_ones_everything() -> None:
    truth, raw, masks = pictures()
    scores = measure(truth, raw, masks)
    share = masks.double().mean((1, 2, 3))
    torch.testing.assert_close(scores["mae_pasted"], share * scores["mae_hole"])
    torch.testing.assert_close(scores["psnr_pasted"], scores["psnr_hole"] - 10 * torch.log10(share))
    everything = measure(truth, raw, everywhere(truth))
    for metric in ("psnr", "ssim", "mae"):
        torch.testing.assert_close(scores[f"{metric}_raw"], everything[f"{metric}_pasted"])
    assert set(scores) == {*SCORES, *DISTANCE_SCORES} and (scores["ssim_raw"] < scores["ssim_pasted"]).all()
    outside = measure(truth, torch.where(masks, raw, 255 - raw), masks)
    torch.testing.assert_close(outside["psnr_pasted"], scores["psnr_pasted"], rtol=0, atol=0)
    assert (outside["psnr_raw"] < scores["psnr_raw"]).all()


def test_an_equal_image_counts_as_one_value_off_by_one_level() -> None:
    truth, _, masks = pictures(1)
    scores = measure(truth, truth, masks)
    assert scores["psnr_pasted"].item() == pytest.approx(20 * math.log10(255) + 10 * math.log10(3 * SIZE * SIZE))
    assert scores["psnr_hole"].item() == pytest.approx(20 * math.log10(255) + 10 * math.log10(3 * masks.sum().item()))
    assert scores["ssim_pasted"].item() == pytest.approx(1) and scores["mae_raw"].item() == 0
    almost = truth.clone()
    almost[0, 0, 0, 0] ^= 1
    torch.testing.assert_close(psnr(truth, almost, everywhere(truth)), psnr(truth, truth, everywhere(truth)))


def test_images_that_were_not_rounded_are_refused() -> None:
    truth, _, masks = pictures(1)
    with pytest.raises(ValueError, match=r"float32.*expected uint8"):
        measure(truth, truth.float(), masks)
    with pytest.raises(ValueError, match="masks; expected bool"):
        measure(truth, truth, masks[:, :, :8])


# Intervals


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
