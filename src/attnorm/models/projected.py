"""Discriminators on mixed features of a fixed network (Projected GANs: Sauer et al., NeurIPS 2021)."""

# N batch, C channels of an image's mixed map, S side of the images, Y classes, L numbers that are said of an image.

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from attnorm.config import ProjectedConfig
from attnorm.models.class_conditional import SpectralNorm
from attnorm.models.feature_network import CHANNELS, FeatureNetwork

# Channels of the mixed maps in multiples of the width, the largest map first; and of what a discriminator makes of its
# map each time that it halves it.
MIXED_CHANNELS = (1, 2, 4, 8)
LAST_SIDE = 4  # at which a discriminator stops halving its map


class Projector(nn.Module):
    """image -> four mixed feature maps. Nothing of it learns.

    Each of the network's maps goes through a random 1x1 convolution (mixing across channels); then, from the smallest
    map up, each gets a random 3x3 convolution of the next smaller mixed map, enlarged (mixing across scales). So every
    discriminator sees parts of what lies deeper too, and none can rely on a few channels.
    """

    def __init__(self, config: ProjectedConfig) -> None:
        super().__init__()
        self.features = FeatureNetwork()
        self.feature_size = config.feature_size
        channels = [multiple * config.width for multiple in MIXED_CHANNELS]
        for scale, (before, after) in enumerate(zip(CHANNELS, channels, strict=True)):
            self.register_buffer(f"mix_channels_{scale}", _random_filters(after, before, 1))
        for scale, (larger, smaller) in enumerate(itertools.pairwise(channels)):
            self.register_buffer(f"mix_scales_{scale}", _random_filters(larger, smaller, 3))

    def forward(self, images: Tensor) -> list[Tensor]:
        """[N, 3, S, S] in [-1, 1] -> maps [N, C, s, s], the largest first, of the type of the network's weights."""
        if images.shape[2] != self.feature_size:
            images = F.interpolate(images, (self.feature_size,) * 2, mode="bilinear", align_corners=False)
        maps = self.features(images)
        mixed: list[Tensor] = []
        for scale in reversed(range(len(maps))):
            h = F.conv2d(maps[scale], getattr(self, f"mix_channels_{scale}").to(maps[scale].dtype))
            if mixed:
                deeper = F.conv2d(mixed[0], getattr(self, f"mix_scales_{scale}").to(h.dtype), padding=1)
                deeper = F.interpolate(deeper, h.shape[2:], mode="bilinear", align_corners=False)
                h = (h + deeper) * 0.5**0.5  # of about unit variance again
            mixed.insert(0, h)
        return mixed


class ProjectedDiscriminator(nn.Module):
    """Four small discriminators, one for each mixed map, with spectral norm and projection of the class."""

    def __init__(self, config: ProjectedConfig, num_classes: int) -> None:
        super().__init__()
        self.projector = Projector(config)
        channels = [multiple * config.width for multiple in MIXED_CHANNELS]
        sides = [-(-config.feature_size // stride) for stride in (4, 8, 16, 32)]
        self.heads = nn.ModuleList(
            _Head(before, side, num_classes, channels[-1]) for before, side in zip(channels, sides, strict=True)
        )
        for module in list(self.heads.modules()):
            if isinstance(module, nn.Conv2d | nn.Embedding):
                register_parametrization(module, "weight", SpectralNorm(module.weight, eps=1e-12))

    def forward(self, maps: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Scores [N, L], high = real: one a place of each head's last map.

        Args:
            maps: What `projector` makes of the images.
            labels: int64 [N].
        """
        return torch.cat([head(h, labels) for head, h in zip(self.heads, maps, strict=True)], 1)


class _Head(nn.Module):
    def __init__(self, before: int, side: int, num_classes: int, most_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while side > LAST_SIDE:
            after = min(2 * before, most_channels)
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.LeakyReLU(0.2)]
            before, side = after, side // 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, before, 3, padding=1), nn.LeakyReLU(0.2))
        self.score = nn.Conv2d(before, 1, 1)
        self.embedding = nn.Embedding(num_classes, before)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.layers(x)
        projection = (self.embedding(labels)[:, :, None, None].to(h.dtype) * h).sum(1, keepdim=True)
        return (self.score(h) + projection).flatten(1)


def _random_filters(after: int, before: int, side: int) -> Tensor:
    """[after, before, side, side] that keeps the variance of what it is convolved with."""
    return torch.randn(after, before, side, side) / (before * side * side) ** 0.5
