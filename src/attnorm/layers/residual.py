"""Residual blocks of the class-conditional networks (Miyato et al., 2018), with a slot for AN (Figure 6)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.layers.conditional_norm import ConditionalBatchNorm2d
from attnorm.layers.resampling import DownConv2d, UpConv2d


class UpBlock(nn.Module):
    """Generator block: norm, ReLU, x2, 3x3, norm, ReLU, 3x3; the shortcut is x2 and a 1x1; x2 is nearest or bilinear.

    With an AttentiveNorm2d it takes the place of the second norm ("replace"), or stands before it ("insert"): between
    the convolution and the activation, as section 4 says. `after` is applied to the block's sum (self-attention). With
    a `latent_dim` the norms depend on the latent too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_classes: int,
        *,
        an: AttentiveNorm2d | None = None,
        site: Literal["replace", "insert"] = "replace",
        after: nn.Module | None = None,
        latent_dim: int = 0,
        upsampling: Literal["nearest", "bilinear"] = "nearest",
    ) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm2d(in_channels, num_classes, latent_dim=latent_dim)
        self.conv1 = UpConv2d(in_channels, out_channels, upsampling=upsampling)
        self.an = an
        keeps_norm = an is None or site == "insert"
        norm2 = ConditionalBatchNorm2d(out_channels, num_classes, latent_dim=latent_dim) if keeps_norm else None
        self.norm2 = norm2
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.after = after
        self.upsampling = upsampling

    def forward(self, x: Tensor, condition: Tensor, z: Tensor | None = None) -> Tensor:
        """[N, in, H, W] -> [N, out, 2H, 2W]."""
        h = self.conv1(F.relu(self.norm1(x, condition, z)))
        if self.an is not None:
            h = self.an(h)
        if self.norm2 is not None:
            h = self.norm2(h, condition, z)
        h = self.conv2(F.relu(h))
        # A 1x1 convolution commutes with upsampling; done first it costs a quarter.
        h = h + F.interpolate(self.shortcut(x), scale_factor=2, mode=self.upsampling)
        return h if self.after is None else self.after(h)


class DownBlock(nn.Module):
    """Discriminator block: ReLU, 3x3, (AN), ReLU, 3x3, average pool; the shortcut is a 1x1 and the pool.

    The first block of a discriminator (`is_first`) has no leading ReLU and pools before the 1x1. The shortcut sees the
    raw input: an in-place ReLU here would rectify it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        downsample: bool = True,
        is_first: bool = False,
        an: AttentiveNorm2d | None = None,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.downsample, self.is_first = downsample, is_first
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.an = an
        conv2 = DownConv2d(out_channels, out_channels) if downsample else nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        self.conv2 = conv2
        has_shortcut = downsample or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if has_shortcut else None
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H/2, W/2], or [N, out, H, W] without downsampling."""
        h = self.conv1(x if self.is_first else F.relu(x))
        if self.an is not None:
            h = self.an(h)
        h = self.conv2(F.relu(h))
        skip = x
        if self.downsample:
            # Average pooling commutes with the 1x1 convolution, so the pool goes first in every block.
            skip = F.avg_pool2d(skip, 2)
        if self.shortcut is not None:
            skip = self.shortcut(skip)
        h = h + skip
        return h if self.after is None else self.after(h)
