"""What any model must beat: the mean colour, and Telea's inpainting of 2004, which know nothing of photographs."""

# N images, H height and W width.

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

TELEA_RADIUS = 5  # pixels


def mean_fill(images: Tensor, masks: Tensor) -> Tensor:
    """Each image's mean colour over its known pixels, in its hole. uint8 [N, 3, H, W] and bool [N, 1, H, W]."""
    known = (~masks).double()
    means = (images * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
    return torch.where(masks, means.round().to(torch.uint8), images)


def telea_fill(images: Tensor, masks: Tensor) -> Tensor:
    """OpenCV's form of "An Image Inpainting Technique Based on the Fast Marching Method" (Telea, 2004).

    From the border inwards missing pixels become a weighted mean of the known ones within TELEA_RADIUS.
    uint8 [N, 3, H, W] and bool [N, 1, H, W], True = missing.
    """
    return torch.stack([_telea(image, mask[0]) for image, mask in zip(images, masks, strict=True)])


def _telea(image: Tensor, mask: Tensor) -> Tensor:
    # OpenCV 4.10 to 5.0 read what a hole held that touches the image's edge (its issue 28648), but not where the edge
    # is missing itself: so there is one more missing pixel on each side.
    wide_image = np.pad(image.movedim(0, 2).numpy(), ((1, 1), (1, 1), (0, 0)), mode="edge")
    wide_mask = np.pad(mask.byte().numpy(), 1, constant_values=1)
    filled = cv2.inpaint(wide_image, wide_mask, TELEA_RADIUS, cv2.INPAINT_TELEA)
    return torch.from_numpy(filled[1:-1, 1:-1].copy()).movedim(2, 0)
