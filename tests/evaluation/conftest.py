"""Images of a few classes, and an extractor that costs nothing in place of those that recognise photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnorm.data.images import ImageSet, fingerprint
from attnorm.metrics.features import Extractor, Features

CPU = torch.device("cpu")
CLASSES = ("bird", "cat", "dog")


def make_images(counts: tuple[int, ...] = (20, 20, 20), size: int = 32, source: str = "photographs") -> ImageSet:
    """Smooth pictures, darker from class to class."""
    random = torch.Generator().manual_seed(0)
    small = torch.rand(sum(counts), 3, 4, 4, generator=random)
    labels = np.repeat(np.arange(len(counts)), counts)
    scale = torch.from_numpy(255 / (1.0 + labels)).float()[:, None, None, None]
    images = (F.interpolate(small, (size, size), mode="bilinear") * scale).to(torch.uint8).numpy()
    classes = CLASSES[: len(counts)]
    return ImageSet(images, labels, classes, source, fingerprint(images, labels, classes), note="of no variety")


class TinyExtractor(Extractor):
    """Twelve rectified random projections of a thumbnail, and five logits of them; it counts what it has seen."""

    name, title, is_standard, dimensions = "tiny", "Tiny", False, 12
    preprocessing, weights_sha256 = "mean over 4x4", "0" * 64

    def __init__(self, device: torch.device = CPU, weights: Path | None = None) -> None:
        self.device, self.num_seen = device, 0
        random = torch.Generator().manual_seed(1)
        self.projection = torch.randn(48, 12, generator=random)
        self.classifier = torch.randn(12, 5, generator=random)

    def __call__(self, images: Tensor) -> Features:
        assert images.dtype == torch.uint8
        self.num_seen += len(images)
        # In float64, so that the size of a batch does not show in the last digits.
        thumbnails = F.adaptive_avg_pool2d(images.double() / 255, 4).flatten(1)
        pooled = (thumbnails @ self.projection.double()).relu().float()
        return Features(pooled, pooled @ self.classifier)

    _find_weights = _build = _extract = None  # type: ignore[assignment]
