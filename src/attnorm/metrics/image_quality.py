"""How near a filled image is to the truth: PSNR, SSIM and MAE.

Everything is measured on images rounded to uint8, in float64, on the CPU.
"""

# N images, H height and W width.

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import distance_transform_cdt
from skimage.metrics import structural_similarity
from torch import Tensor

METRICS = ("psnr", "ssim", "mae")
REGIONS = ("pasted", "hole", "raw")
SCORES = tuple(f"{metric}_{region}" for region in REGIONS for metric in METRICS)
# PSNR of the missing pixels by how far they are from the nearest known one, in pixels, from one number to the other.
DISTANCES = ((1, 2), (3, 4), (5, 8), (9, 16), (17, None))
DISTANCE_SCORES = tuple(f"psnr_{first}-{last}" if last else f"psnr_{first}+" for first, last in DISTANCES)
SSIM_BORDER = 5  # pixels at each side that SSIM cannot judge: half of its window


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
    pasted = torch.where(mask, raw, truth)
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
    maps = [
        structural_similarity(
            first.double().numpy(),
            second.double().numpy(),
            data_range=255,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )[1]
        for first, second in zip(truth, image, strict=True)
    ]
    inside = slice(SSIM_BORDER, -SSIM_BORDER)
    return _mean_where(torch.from_numpy(np.stack(maps))[..., inside, inside], where[..., inside, inside])


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Over channels and the pixels that are True: [N, C, H, W], bool [N, 1, H, W] -> [N]."""
    return (values * where).sum((1, 2, 3)) / (values.shape[1] * where.sum((1, 2, 3)))
