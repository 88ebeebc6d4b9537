"""Differentiable augmentation (Zhao et al., NeurIPS 2020): what discriminators see of real and of generated images.

Each function takes images [N, 3, S, S] in [-1, 1] and draws from torch's global generator on the CPU, anew for every
image; what it returns may lie outside [-1, 1]. Gradients go through all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnorm.models.inpainting import crop_around
from attnorm.system.randomness import draw_for_images


def color(images: Tensor) -> Tensor:
    """Brightness + U(-0.5, 0.5); then saturation (the distance from the mean of a pixel's channels) times U(0, 2); then
    contrast (the distance from the mean of the image) times U(0.5, 1.5).
    """
    brightness, saturation, contrast = (
        part[:, None, None, None].to(images)
        for part in draw_for_images(len(images), lambda count: torch.rand(count, 3)).unbind(1)
    )
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (2 * saturation)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def translation(images: Tensor) -> Tensor:
    """Moved by at most an eighth of the side in either direction, zeros where nothing comes in."""
    side = images.shape[2]
    most = round(side / 8)
    corners = draw_for_images(len(images), lambda count: torch.randint(2 * most + 1, (count, 2))).to(images.device)
    return crop_around(F.pad(images, (most,) * 4), corners, side)


def cutout(images: Tensor) -> Tensor:
    """A square of half the side is zero, its centre anywhere, so that part of it may lie outside."""
    side = images.shape[2]
    centres = draw_for_images(len(images), lambda count: torch.randint(side, (count, 2))).to(images.device)
    offset = torch.arange(side, device=images.device) - centres[..., None]  # [N, 2, S]
    inside = (offset >= -(side // 4)) & (offset < side // 2 - side // 4)
    hole = inside[:, 0, :, None] & inside[:, 1, None, :]
    return images.masked_fill(hole[:, None], 0)


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "color": color,
    "translation": translation,
    "cutout": cutout,
}


def augment(images: Tensor, names: Sequence[str]) -> Tensor:
    """`images` after the augmentations of these names, in this order."""
    for name in names:
        images = AUGMENTATIONS[name](images)
    return images
