"""PSNR, SSIM and MAE against scikit-image, their formulas and loops."""

# N images, S their size.

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

from attnorm.data.masks import free_form_mask
from attnorm.metrics.image_quality import DISTANCE_SCORES, SCORES, hole_distances, measure, psnr, ssim

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


def similarity_map(truth: Tensor, image: Tensor) -> np.ndarray:
    """SSIM's formula (Wang et al., 2004) at every place where its window of 11x11 fits, mean of the channels."""
    steps = np.arange(-5, 6)
    weights = np.exp(-(steps[:, None] ** 2 + steps**2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    side = truth.shape[1] - 10
    values = np.empty((3, side, side))
    for channel, row, column in np.ndindex(values.shape):
        x, y = (part[channel, row : row + 11, column : column + 11].double().numpy() for part in (truth, image))
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        covariance = (weights * (x - mx) * (y - my)).sum()
        alike = (2 * mx * my + c1) * (2 * covariance + c2)
        values[channel, row, column] = alike / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return values.mean(0)


def test_psnr_equals_scikit_images_and_ssim_its_formula_on_the_image_and_on_the_hole() -> None:
    truth, image, masks = pictures(2)
    whole = everywhere(truth)
    for i in range(len(truth)):
        pair = [part[i].permute(1, 2, 0).numpy() for part in (truth, image)]
        expected = peak_signal_noise_ratio(*pair, data_range=255)
        assert psnr(truth, image, whole)[i].item() == pytest.approx(expected, rel=1e-12)
        similarity = similarity_map(truth[i], image[i])
        assert 0.1 < similarity.mean() < 0.99
        assert ssim(truth, image, whole)[i].item() == pytest.approx(similarity.mean(), rel=1e-9)
        hole = masks[i, 0, 5:-5, 5:-5].numpy()
        assert ssim(truth, image, masks)[i].item() == pytest.approx(similarity[hole].mean(), rel=1e-9)


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
    shares = torch.tensor([0.3, 0.9, 0.97, 2.0])[:, None, None, None]
    mask = torch.rand(4, 1, 9, 8, generator=torch.Generator().manual_seed(0)) < shares
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
