"""Region Normalization (Yu et al., AAAI 2020, "Region Normalization for Image Inpainting"), AN's rival there."""

# N batch, C channels.

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from attnorm.ops.dispatch import at_least_float32
from attnorm.system.devices import no_autocast


class RegionNorm2d(nn.Module):
    """Normalizes two regions of each image, missing and known, by their own mean and variance in each channel.

    regions="mask", RN-B: the regions are those of a mask that is known; each has its own gamma and beta a channel.

        y = gamma_r * (x - mean_r) / sqrt(var_r + eps) + beta_r, of the region r that the pixel is in

    regions="learned", RN-L: the regions are found from the features, and gamma and beta are of each pixel:

        response = sigmoid(conv7x7([max over C of x, mean over C of x]))    one channel
        a pixel is of the first region where response > 0.8, else of the second; both are normalized as above
        y = (1 + conv7x7(response)) * normalized + conv7x7(response)        the same in every channel

    The threshold has no gradient: the response learns through gamma and beta.

    Ours: in which size the kernels of gamma and beta are (7x7, as that of the response); the 1 that is added to the
    gamma of RN-L, so that a new layer lets features pass; a region without pixels adds nothing, and one of a single
    pixel normalizes it to 0. The paper has RN-B in a network's early layers and RN-L in the later ones.

    Args:
        num_features: C.
        regions: "mask" or "learned".
        threshold: Of the response, in (0, 1).
        eps: Added to the variance.
    """

    def __init__(
        self,
        num_features: int,
        *,
        regions: Literal["mask", "learned"] = "mask",
        threshold: float = 0.8,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_features < 1 or regions not in ("mask", "learned") or not 0 < threshold < 1:
            raise ValueError(
                f"num_features is {num_features}, regions {regions!r}, threshold {threshold}; "
                "expected at least 1, one of mask, learned, and 0 < threshold < 1"
            )
        self.num_features, self.regions, self.threshold, self.eps = num_features, regions, threshold, eps
        if regions == "mask":
            self.weight = nn.Parameter(torch.ones(2, num_features))  # gamma: of the known region, of the missing one
            self.bias = nn.Parameter(torch.zeros(2, num_features))  # beta
        else:
            self.response = nn.Conv2d(2, 1, 7, padding=3, bias=False)
            self.gamma = nn.Conv2d(1, 1, 7, padding=3)
            self.beta = nn.Conv2d(1, 1, 7, padding=3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x` is [N, C, H, W], floating; so is what is returned, in its dtype and memory format.

        Args:
            mask: [N, 1, H, W], bool or number, 0 = known, anything else = missing; for regions="mask" alone.
        """
        if x.ndim != 4 or x.shape[1] != self.num_features or not x.is_floating_point():
            raise ValueError(
                f"got {x.dtype} {tuple(x.shape)}; expected a floating feature map [N, {self.num_features}, H, W]"
            )
        if self.regions == "learned":
            if mask is not None:
                raise ValueError('got a mask, but regions="learned" finds its own; leave it out, or say regions="mask"')
            pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
            response = torch.sigmoid(self.response(pooled))
            gamma, beta = 1 + self.gamma(response), self.beta(response)
            with no_autocast(x):
                x_bar = normalize_regions(x, response > self.threshold, eps=self.eps)
                return (x_bar * gamma + beta).to(x.dtype)
        if mask is None or mask.shape != (x.shape[0], 1, *x.shape[2:]):
            raise ValueError(
                f"got a mask {None if mask is None else tuple(mask.shape)} for {tuple(x.shape)}; "
                "expected [N, 1, H, W], 0 = known"
            )
        with no_autocast(x):
            is_missing = mask != 0
            x_bar = normalize_regions(x, is_missing, eps=self.eps)
            weight, bias = (
                torch.where(is_missing, map[1, :, None, None], map[0, :, None, None])
                for map in (self.weight, self.bias)
            )
            return (x_bar * weight + bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, regions={self.regions!r}"


def normalize_regions(x: Tensor, mask: Tensor, *, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) of the region that each pixel is in, for each image and channel.

    Args:
        x: [N, C, H, W].
        mask: bool [N, 1, H, W]: where it is true is one region, the rest another.

    Returns:
        [N, C, H, W], float32 at least.
    """
    x = x.to(at_least_float32(x))

    def moments(region: Tensor) -> tuple[Tensor, Tensor]:
        share = region.to(x.dtype) / region.sum((2, 3), keepdim=True).clamp_min(1)  # of the region, 1 in all
        mean = (x * share).sum((2, 3), keepdim=True)
        return mean, ((x - mean).square() * share).sum((2, 3), keepdim=True)  # two passes: offsets lose no digits

    (mean, variance), (other_mean, other_variance) = moments(mask), moments(~mask)
    scale = torch.where(mask, variance + eps, other_variance + eps).rsqrt()
    return (x - torch.where(mask, mean, other_mean)) * scale
