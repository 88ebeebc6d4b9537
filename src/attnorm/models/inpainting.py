"""Two-stage inpainting generator and its critics (paper, section 4; the networks of DeepFill v1, Yu et al., 2018)."""

# N batch, H height and W width of an image, S side of a training image, L = S // 2 side of its local crop.

from __future__ import annotations

import math
from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.config import ClassConditionalConfig, InpaintingConfig
from attnorm.hub import HubModel
from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.layers.contextual_attention import ContextualAttention
from attnorm.layers.region_norm import RegionNorm2d
from attnorm.layers.resampling import UpConv2d
from attnorm.layers.self_attention import SelfAttention2d

# Channels in multiples of the width: of the six convolutions of each encoder, the first stage's and the two of the
# second stage, which are narrower; then of the critics' four.
COARSE_CHANNELS = (1, 2, 2, 4, 4, 4)
DILATED_CHANNELS = (1, 1, 2, 2, 4, 4)
CONTEXT_CHANNELS = (1, 1, 2, 4, 4, 4)
ENCODER_STRIDES = (1, 2, 1, 2, 1, 1)
DILATIONS = (2, 4, 8, 16)
GLOBAL_CHANNELS = (2, 4, 8, 8)
LOCAL_CHANNELS = (2, 4, 8, 16)


class Inpainting(NamedTuple):
    """What the generator makes of the whole image: neither is pasted into it yet."""

    coarse: Tensor  # [N, 3, H, W] in [-1, 1], of the first stage
    refined: Tensor  # [N, 3, H, W] in [-1, 1], of the second


class InpaintingGenerator(HubModel):
    """(image, mask) -> coarse and refined images; the context block is in the second stage.

    Both stages are encoder, dilated convolutions, decoder, with ELU and no normalization. The second stage has two
    encoders side by side, of which one is dilated and the other holds the context block, where the map has a quarter of
    the image's sides and 4 * width channels. That branch is six convolutions, the block, and two more 3x3 with ELU:

        "contextual"             ... sixth convolution -> ReLU -> contextual attention -> 3x3, ELU -> 3x3, ELU
        the others               ... sixth convolution ->        block        -> ELU   -> 3x3, ELU -> 3x3, ELU

    with AN, self-attention, Region Normalization ("region": of the hole and of the rest) or nothing for the block. So
    the swap is of the block and of the activation beside it, which each block has where it was published: the
    convolutions are the same. Networks of one seed start with the same weights around any of these five blocks; and as
    AN and self-attention start as the identity, "an", "self_attention" and "none" compute the same at first.

    "an-wide" is the authors' released network: AN, with both encoders of the second stage as wide as the first stage's.
    What it gains over the others need not be AN's doing.

    Any size with sides that are multiples of 8 goes in, whatever `config.image_size` is.
    """

    def __init__(self, config: InpaintingConfig) -> None:
        super().__init__(config)
        width = config.width
        is_wide = config.context == "an-wide"
        self.coarse = nn.Sequential(*_encoder(width, COARSE_CHANNELS), *_dilated(width), *_decoder(4 * width, width))
        self.dilated_branch = nn.Sequential(
            *_encoder(width, COARSE_CHANNELS if is_wide else DILATED_CHANNELS), *_dilated(width)
        )
        before_context = _encoder(width, COARSE_CHANNELS if is_wide else CONTEXT_CHANNELS)
        self.before_context = nn.Sequential(*before_context[:-1])  # without the last activation
        self.after_context = nn.Sequential(*_conv(4 * width, 4 * width), *_conv(4 * width, 4 * width))
        self.decoder = nn.Sequential(*_decoder(8 * width, width))
        _initialize(self)
        # Last, so that its random numbers come after those of what surrounds it.
        self.context = _context(config)
        _initialize(self.context)
        if config.contextual_release == "pytorch":
            for module in self.modules():
                if isinstance(module, SameConv2d):
                    module.is_symmetric = True

    @staticmethod
    def is_built_from(config: ClassConditionalConfig | InpaintingConfig) -> bool:
        return isinstance(config, InpaintingConfig)

    def forward(self, image: Tensor, mask: Tensor) -> Inpainting:
        """Both stages; what the hole of `image` holds has no influence.

        Args:
            image: [N, 3, H, W] in [-1, 1], H and W multiples of 8.
            mask: [N, 1, H, W], bool or number: 0 = known, anything else = missing.

        Raises:
            ValueError: what differs of shapes, dtype or sides.
        """
        _check(image, mask)
        is_missing = mask != 0
        hole = is_missing.to(image.dtype)
        extra = torch.cat([torch.ones_like(hole), hole], 1)
        known = image.masked_fill(is_missing, 0)
        coarse = self.coarse(torch.cat([known, extra], 1)).clamp(-1, 1)
        x = torch.cat([paste(known, coarse, is_missing), extra], 1)  # the second stage trains the first one too
        h = self.before_context(x)
        if isinstance(self.context, ContextualAttention):
            h = self.context(F.relu(h), self.context.reduce_mask(hole))
        elif isinstance(self.context, RegionNorm2d):
            # Of the mask's pixels a feature stands for 4x4; it is missing if one of them is, lest thin strokes vanish.
            h = F.elu(self.context(h, F.max_pool2d(hole, 4)))
        else:
            h = F.elu(self.context(h))
        h = torch.cat([self.dilated_branch(x), self.after_context(h)], 1)
        return Inpainting(coarse, self.decoder(h).clamp(-1, 1))


def paste(image: Tensor, filled: Tensor, mask: Tensor) -> Tensor:
    """`filled` where `mask` ([N, 1, H, W]) is not 0; elsewhere exactly the values of `image`. [N, 3, H, W]."""
    return torch.where(mask != 0, filled, image)


class Scores(NamedTuple):
    """What the critics say of images, high = real; their sum is D of Eq. 9 and 10."""

    whole: Tensor  # [N]
    local: Tensor  # [N]


class Critic(nn.Module):
    """DeepFill v1's global and local critic: four 5x5 convolutions with stride 2, leaky ReLU 0.2, a linear layer.

    They see pasted images, without the mask. No normalization, so a gradient penalty is per image.
    """

    def __init__(self, config: InpaintingConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.whole = nn.Sequential(*_critic(config.width, GLOBAL_CHANNELS, config.image_size))
        self.local = nn.Sequential(*_critic(config.width, LOCAL_CHANNELS, config.image_size // 2))
        _initialize(self)

    def forward(self, image: Tensor, crops: Tensor) -> Scores:
        """`image` is [N, 3, S, S] and `crops` [N, 3, L, L], both in [-1, 1]; L is S // 2."""
        side = self.image_size
        if image.shape[1:] != (3, side, side) or crops.shape != (image.shape[0], 3, side // 2, side // 2):
            raise ValueError(
                f"got images {tuple(image.shape)} and crops {tuple(crops.shape)}; "
                f"expected [N, 3, {side}, {side}] and [N, 3, {side // 2}, {side // 2}]"
            )
        return Scores(self.whole(image)[:, 0], self.local(crops)[:, 0])


def crop_around(images: Tensor, tops_lefts: Tensor, side: int) -> Tensor:
    """A square of `side` pixels from each image, [N, C, side, side].

    Args:
        images: [N, C, H, W].
        tops_lefts: int64 [N, 2], the first row and column of each square; the square lies inside the image.
    """
    num_images, num_channels, height, width = images.shape
    if tops_lefts.shape != (num_images, 2) or tops_lefts.dtype != torch.int64:
        raise ValueError(
            f"got {tops_lefts.dtype} {tuple(tops_lefts.shape)} for {num_images} images; "
            f"expected int64 [{num_images}, 2]"
        )
    if not 0 < side <= min(height, width):
        raise ValueError(f"got side={side} for images of {height}x{width}; expected 1 to {min(height, width)}")
    offsets = torch.arange(side, device=images.device)
    tops, lefts = tops_lefts.to(images.device)[:, :, None].unbind(1)
    rows = (tops + offsets)[:, None, :, None].expand(-1, num_channels, -1, width)
    columns = (lefts + offsets)[:, None, None, :].expand(-1, num_channels, side, -1)
    return images.gather(2, rows).gather(3, columns)


class SameConv2d(nn.Conv2d):
    """Zero padding to a side of ceil(side / stride), as TensorFlow's SAME does: an odd pixel goes right and below.

    Where stride 2 halves an even map, the kernel's middle so is on the odd pixels; symmetric padding would have it on
    the even ones. It is DeepFill v1's choice, kept because nothing speaks against it. Stride 1 is symmetric; so is
    stride 2 in the port to PyTorch (`is_symmetric`).
    """

    is_symmetric = False

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, dilation: int = 1
    ) -> None:
        padding = dilation * (kernel_size // 2) if stride == 1 else 0
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, ceil(H / stride), ceil(W / stride)]."""
        stride, kernel = self.stride[0], self.kernel_size[0]
        if stride > 1 and self.is_symmetric:
            x = F.pad(x, [kernel // 2] * 4)
        elif stride > 1:
            (left, right), (top, bottom) = (_same_padding(size, kernel, stride) for size in (x.shape[3], x.shape[2]))
            x = F.pad(x, (left, right, top, bottom))
        return super().forward(x)


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _conv(before: int, after: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    return [SameConv2d(before, after, kernel, stride=stride, dilation=dilation), nn.ELU(inplace=True)]


def _up_conv(before: int, after: int) -> list[nn.Module]:
    """x2 (nearest), 3x3, ELU; the first stands for the doubling in the numbers by which weights are named."""
    return [nn.Identity(), UpConv2d(before, after), nn.ELU(inplace=True)]


def _encoder(width: int, multiples: tuple[int, ...]) -> list[nn.Module]:
    """Known pixels, ones, mask (5 channels) -> 4 * width channels, a quarter of the sides."""
    channels = [5, *(multiple * width for multiple in multiples)]
    layers = []
    for index, stride in enumerate(ENCODER_STRIDES):
        layers += _conv(channels[index], channels[index + 1], 3 if index else 5, stride=stride)
    return layers


def _dilated(width: int) -> list[nn.Module]:
    return [layer for dilation in DILATIONS for layer in _conv(4 * width, 4 * width, dilation=dilation)]


def _decoder(before: int, width: int) -> list[nn.Module]:
    """`before` channels -> an image (not clipped yet), four times the sides."""
    half = max(width // 2, 1)
    return [
        *_conv(before, 4 * width),
        *_conv(4 * width, 4 * width),
        *_up_conv(4 * width, 2 * width),
        *_conv(2 * width, 2 * width),
        *_up_conv(2 * width, width),
        *_conv(width, half),
        SameConv2d(half, 3, 3),
    ]


def _critic(width: int, multiples: tuple[int, ...], side: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    before = 3
    for multiple in multiples:
        layers += [SameConv2d(before, multiple * width, 5, stride=2), nn.LeakyReLU(0.2)]
        before, side = multiple * width, math.ceil(side / 2)
    return [*layers, nn.Flatten(), nn.Linear(before * side * side, 1)]


def _context(config: InpaintingConfig) -> nn.Module:
    channels = 4 * config.width
    match config.context:
        case "an" | "an-wide":
            return AttentiveNorm2d(channels, **{**asdict(config.an), "temperature": config.temperature})
        case "contextual":
            return ContextualAttention(config.contextual_release)
        case "self_attention":
            return SelfAttention2d(channels)
        case "region":
            return RegionNorm2d(channels, regions="mask")
        case "none":
            return nn.Identity()


def _initialize(network: nn.Module) -> None:
    """Glorot-uniform weights and zero biases, DeepFill's; the entities of AN keep N(0, 1) (docs/paper.md, row 4)."""
    entities = {module.entities for module in network.modules() if isinstance(module, AttentiveNorm2d)}
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module not in entities:
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _check(image: Tensor, mask: Tensor) -> None:
    expected = "expected floating images [N, 3, H, W] and one mask each, [N, 1, H, W]"
    if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
        raise ValueError(f"got {image.dtype} {tuple(image.shape)} for images; {expected}")
    if mask.shape != (image.shape[0], 1, *image.shape[2:]):
        raise ValueError(f"got masks {tuple(mask.shape)} for images {tuple(image.shape)}; {expected}")
    if image.shape[2] % 8 or image.shape[3] % 8:
        height, width = image.shape[2:]
        raise ValueError(
            f"got images of {height}x{width} pixels; expected multiples of 8: pad them, and crop the result"
        )
