"""3x3 convolutions with a doubling before or a halving after, in training both in one, for 4/9 of the products.

Doubling by nearest neighbours makes copies, and a convolution multiplies each copy by several weights in turn. The sums
of these, made once for all places, are a 4x4 kernel on the small map; so it is with a convolution and the mean over 2x2
pixels. In evaluation images often come one by one, for which making the sums takes longer than they save.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.system.devices import no_autocast


class _Resampling3x3(nn.Conv2d):
    is_fused = True

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def _kernel(self) -> Tensor:
        """The weight convolved with 2x2 ones, [out, in, 4, 4]: along an axis w0, w0 + w1, w1 + w2, w2."""
        weight = self.weight  # once: under spectral norm each look in training is a power iteration
        with no_autocast(weight):  # summed before they are rounded
            wide = F.pad(weight, (0, 1)) + F.pad(weight, (1, 0))
            return F.pad(wide, (0, 0, 0, 1)) + F.pad(wide, (0, 0, 1, 0))


class UpConv2d(_Resampling3x3):
    """A 3x3 convolution, padded with zeros, of the doubled map; a Conv2d by its weights.

    Args:
        upsampling: How the map is doubled; bilinear makes no copies, so it is always done by itself.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, upsampling: Literal["nearest", "bilinear"] = "nearest"
    ) -> None:
        super().__init__(in_channels, out_channels)
        self.upsampling = upsampling

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, 2H, 2W]."""
        if self.training and self.is_fused and self.upsampling == "nearest":
            kernel = self._kernel().flip(2, 3).transpose(0, 1)
            return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)
        return super().forward(F.interpolate(x, scale_factor=2, mode=self.upsampling))


class DownConv2d(_Resampling3x3):
    """The mean over 2x2 pixels of a 3x3 convolution, padded with zeros; a Conv2d by its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H // 2, W // 2]."""
        if self.training and self.is_fused:
            return F.conv2d(x, self._kernel() / 4, self.bias, stride=2, padding=1)
        return F.avg_pool2d(super().forward(x), 2)


def resample_apart(network: nn.Module) -> None:
    """Lets every such convolution of `network` be two steps in training, too."""
    for module in network.modules():
        if isinstance(module, _Resampling3x3):
            module.is_fused = False
