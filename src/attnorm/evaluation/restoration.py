"""How near a filled image is to the truth: PSNR, SSIM and MAE, and what their differences between models are worth.

Everything is measured on images rounded to uint8, in float64, on the CPU.
"""

# N images, H height and W width, M test images, R resamples.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_cdt
from torch import Tensor

from attnorm.evaluation.manifest import SSIM_BORDER
from attnorm.models.inpainting import paste
from attnorm.system.randomness import resampled_counts

METRICS = ("psnr", "ssim", "mae")
REGIONS = ("pasted", "hole", "raw")
SCORES = tuple(f"{metric}_{region}" for region in REGIONS for metric in METRICS)
# PSNR of the missing pixels by how far they are from the nearest known one, in pixels, from one number to the other.
DISTANCES = ((1, 2), (3, 4), (5, 8), (9, 16), (17, None))
DISTANCE_SCORES = tuple(f"psnr_{first}-{last}" if last else f"psnr_{first}+" for first, last in DISTANCES)
SSIM_SIGMA = 1.5
RESAMPLES = 10_000
CONFIDENCE = 0.95


def measure(truth: Tensor, raw: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Every score of each image, float64 [N], by the names in SCORES and DISTANCE_SCORES.

    pasted: the whole image, with the truth outside the hole; hole: the missing pixels alone (of SSIM, its map there);
    raw: the whole of what the model made, without pasting. By distance: the missing pixels that are so far from the
    nearest known one (`hole_distances`); NaN for an image that has none.

    Args:
        truth, raw: uint8 [N, 3, H, W].
        mask: bool [N, 1, H, W], True = missing.
    """
    for name, images in (("truth", truth), ("raw", raw)):
        if images.dtype != torch.uint8 or images.shape != truth.shape or images.shape[1] != 3:
            raise ValueError(f"got {images.dtype} {tuple(images.shape)} for {name}; expected uint8 [N, 3, H, W]")
    if mask.dtype != torch.bool or mask.shape != (len(truth), 1, *truth.shape[2:]):
        raise ValueError(f"got {mask.dtype} {tuple(mask.shape)} for the masks; expected bool [N, 1, H, W]")
    pasted = paste(truth, raw, mask)
    everywhere = torch.ones_like(mask)
    scores = {}
    for region, image, where in (("pasted", pasted, everywhere), ("hole", pasted, mask), ("raw", raw, everywhere)):
        scores[f"psnr_{region}"] = psnr(truth, image, where)
        scores[f"ssim_{region}"] = ssim(truth, image, where)
        scores[f"mae_{region}"] = mae(truth, image, where)
    distances = hole_distances(mask)
    for name, (first, last) in zip(DISTANCE_SCORES, DISTANCES, strict=True):
        where = (distances >= first) & (distances <= (last or distances.max()))
        scores[name] = torch.where(where.any(3).any(2)[:, 0], psnr(truth, pasted, where), torch.nan)
    return scores


def hole_distances(mask: Tensor) -> Tensor:
    """Steps from each missing pixel to the nearest known one, to any of the eight neighbours at each step: 1 at the
    hole's edge. 0 where a pixel is known, -1 where none of the image is. The image's border is no edge of a hole.

    bool [N, 1, H, W] -> int64 [N, 1, H, W].
    """
    images = [distance_transform_cdt(image.numpy(), metric="chessboard") for image in mask[:, 0].cpu()]
    return torch.from_numpy(np.stack(images)).long()[:, None]


def psnr(truth: Tensor, image: Tensor, where: Tensor) -> Tensor:
    """Decibels, 10 log10(255^2 / MSE), over all channels of the pixels that are True in `where`; [N].

    Two equal images would have infinitely many, and then means and differences would be infinite or undefined. They
    count as if one value was off by one level, the least error that there is: 95.05 dB for 128x128 pixels.
    """
    least = 1 / (truth.shape[1] * where.sum((1, 2, 3)).double())
    mse = _mean_where((truth.double() - image.double()).square(), where).maximum(least)
    return 10 * torch.log10(255**2 / mse)


def mae(truth: Tensor, image: Tensor, where: Tensor) -> Tensor:
    """Mean absolute error of values in [0, 1], over all channels of the pixels that are True in `where`; [N]."""
    return _mean_where((truth.double() - image.double()).abs(), where) / 255


def ssim(truth: Tensor, image: Tensor, where: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) in its published form, over the pixels that are True in `where`; [N].

    Gaussian window of 11x11 with sigma 1.5, K 0.01 and 0.03, range 255, population moments, mean of the colours; only
    where the window lies inside the image, so 5 pixels from the border on.
    """
    first, second = (_blurred(images.double()) for images in (truth, image))
    variance1 = _blurred(truth.double().square()) - first.square()
    variance2 = _blurred(image.double().square()) - second.square()
    covariance = _blurred(truth.double() * image.double()) - first * second
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = ((2 * first * second + c1) * (2 * covariance + c2)) / (
        (first.square() + second.square() + c1) * (variance1 + variance2 + c2)
    )
    border = SSIM_BORDER
    return _mean_where(similarity, where[..., border:-border, border:-border])


def _blurred(images: Tensor) -> Tensor:
    """Gaussian means where the window fits: [N, C, H, W] -> [N, C, H - 10, W - 10]."""
    steps = torch.arange(-SSIM_BORDER, SSIM_BORDER + 1, dtype=images.dtype)
    weights = torch.exp(-steps.square() / (2 * SSIM_SIGMA**2))
    weights = (weights / weights.sum())[None, None]
    planes = images.flatten(0, 1)[:, None]
    planes = F.conv2d(F.conv2d(planes, weights[:, :, :, None]), weights[:, :, None])
    return planes.unflatten(0, images.shape[:2])[:, :, 0]


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Over channels and the pixels that are True: [N, C, H, W], bool [N, 1, H, W] -> [N]."""
    return (values * where).sum((1, 2, 3)) / (values.shape[1] * where.sum((1, 2, 3)))


@dataclass(frozen=True)
class Difference:
    """Mean over the test images of one contestant's score minus another's, with its bootstrap interval."""

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
        scores: By contestant and name, float [M] each.
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
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(resampled_means(matrix, seed=seed), (tail, 100 - tail), axis=0)
    return [
        Difference(first, second, name, np.nanmean(values).item(), low[i].item(), high[i].item())
        for i, (first, second, name, values) in enumerate(columns)
    ]


def resampled_means(values: np.ndarray, *, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of the rows drawn with replacement, as many as there are: [M, columns] -> [R, columns].

    A value that is NaN counts for nothing; a mean is NaN where no other was drawn.
    """
    num_rows = len(values)
    if num_rows < 2:
        raise ValueError(f"got {num_rows} images; expected at least 2 to resample")
    means = np.empty((resamples, values.shape[1]))
    is_there = np.isfinite(values)
    values, is_there = np.where(is_there, values, 0.0), is_there.astype(np.float64)
    for number, counts in enumerate(resampled_counts(num_rows, resamples, np.random.PCG64([seed, 4]))):
        with np.errstate(invalid="ignore"):
            means[number] = (counts @ values) / (counts @ is_there)
    return means
