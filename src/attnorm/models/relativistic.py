"""Generator and discriminator of R3GAN (Huang et al., NeurIPS 2024): grouped residual blocks without normalization."""

# N batch, Z latent dimension, Y classes, S image size, C channels of a stage.

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.config import ClassConditionalConfig, InpaintingConfig
from attnorm.hub import HubModel
from attnorm.layers.self_attention import SelfAttention2d
from attnorm.models.class_conditional import Generator, attentive_norm_of, require_classes

BLOCKS = 2  # of a stage
EXPANSION = 2  # of a block's hidden channels
GROUP = 16  # hidden channels that a grouped convolution connects
SLOPE = 0.2
GAIN = math.sqrt(2 / (1 + SLOPE**2))  # of the leaky ReLU: with it a layer keeps the variance


class GroupedBlock(nn.Module):
    """x + 1x1(act(grouped 3x3(act(1x1(x))))) with a bias in each activation, leaky ReLU.

    As Fixup (Zhang et al., 2019) has it the last convolution starts at 0, and the first two at L^(-1/4) of what keeps
    the variance, in a network of L such blocks.
    """

    def __init__(self, channels: int, num_blocks: int) -> None:
        super().__init__()
        hidden = EXPANSION * channels
        self.conv1 = nn.Conv2d(channels, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=max(hidden // GROUP, 1))
        self.conv3 = nn.Conv2d(hidden, channels, 1, bias=False)
        for layer, gain in ((self.conv1, GAIN), (self.conv2, GAIN), (self.conv3, 0.0)):
            _initialize(layer, gain * num_blocks**-0.25)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        h = F.leaky_relu(self.conv1(x), SLOPE)
        h = F.leaky_relu(self.conv2(h), SLOPE)
        return x + self.conv3(h)


class RelativisticGenerator(Generator):
    """(z, class) -> image: learnt 4x4 maps, scaled by a linear map of z and of the class's row; two blocks a stage,
    a 1x1 where channels change and a bilinear doubling between stages; 1x1 to RGB.

    The context block stands at the end of the stages `config.an_blocks`: stage 1 has 8x8 pixels, the first one 4x4.
    """

    def __init__(self, config: ClassConditionalConfig) -> None:
        HubModel.__init__(self, config)  # another network to the same purpose
        require_classes(config)
        channels = [multiple * config.width for multiple in config.g_channels]
        self.latent_dim, self.num_classes, self.image_size = config.latent_dim, config.num_classes, config.image_size
        self.embedding = nn.Linear(config.num_classes, config.latent_dim, bias=False)
        self.basis = nn.Parameter(torch.randn(channels[0], 4, 4))
        self.linear = nn.Linear(2 * config.latent_dim, channels[0], bias=False)
        self.stages, self.contexts, self.changes = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for number, after in enumerate(channels):
            before = channels[number - 1] if number else after
            self.changes.append(nn.Conv2d(before, after, 1, bias=False) if before != after else nn.Identity())
            self.stages.append(nn.Sequential(*(GroupedBlock(after, BLOCKS * len(channels)) for _ in range(BLOCKS))))
            self.contexts.append(_context(after, config) if number in config.an_blocks else nn.Identity())
        self.to_rgb = nn.Conv2d(channels[-1], 3, 1, bias=False)
        for layer in (self.embedding, self.linear, *self.changes, self.to_rgb):
            _initialize(layer)

    @staticmethod
    def is_built_from(config: ClassConditionalConfig | InpaintingConfig) -> bool:
        return isinstance(config, ClassConditionalConfig) and config.architecture == "grouped"

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Images [N, 3, S, S]; nothing but training keeps them in [-1, 1].

        Args:
            z: Latents, [N, Z], from N(0, I).
            condition: int64 labels [N], or float mixtures of classes [N, Y].
        """
        if not condition.is_floating_point():
            condition = F.one_hot(condition, self.num_classes)
        scale = self.linear(torch.cat([z, self.embedding(condition.to(z.dtype))], 1))
        h = self.basis * scale[:, :, None, None]
        for number, (change, stage, context) in enumerate(zip(self.changes, self.stages, self.contexts, strict=True)):
            h = change(h)
            if number:
                h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
            h = context(stage(h))
        return self.to_rgb(h)


class RelativisticDiscriminator(nn.Module):
    """(image, class) -> score: the generator's mirror image; a 4x4 depthwise convolution and a linear map at the end,
    whose product with the class's row is the score.

    Args:
        has_context: Whether the context blocks of the generator have their like here, at maps of the same size.
    """

    def __init__(self, config: ClassConditionalConfig, *, has_context: bool = False) -> None:
        super().__init__()
        channels = [multiple * config.width for multiple in reversed(config.g_channels)]
        last = len(channels) - 1
        self.from_rgb = nn.Conv2d(3, channels[0], 1, bias=False)
        self.stages, self.contexts, self.changes = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for number, before in enumerate(channels):
            after = channels[number + 1] if number < last else before
            is_site = has_context and last - number in config.an_blocks
            self.stages.append(nn.Sequential(*(GroupedBlock(before, BLOCKS * len(channels)) for _ in range(BLOCKS))))
            self.contexts.append(_context(before, config) if is_site else nn.Identity())
            self.changes.append(nn.Conv2d(before, after, 1, bias=False) if before != after else nn.Identity())
        self.pool = nn.Conv2d(channels[-1], channels[-1], 4, groups=channels[-1], bias=False)
        self.linear = nn.Linear(channels[-1], channels[-1], bias=False)
        self.embedding = nn.Linear(config.num_classes, channels[-1], bias=False)
        for layer in (self.from_rgb, *self.changes, self.pool, self.linear):
            _initialize(layer)
        _initialize(self.embedding, 1 / math.sqrt(channels[-1]))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Scores [N], high = real, of [N, 3, S, S] and int64 labels [N]."""
        h = self.from_rgb(images)
        for number, (stage, context, change) in enumerate(zip(self.stages, self.contexts, self.changes, strict=True)):
            h = context(stage(h))
            if number < len(self.stages) - 1:
                h = F.interpolate(h, scale_factor=0.5, mode="bilinear", align_corners=False)
            h = change(h)
        h = self.linear(self.pool(h).flatten(1))
        return (h * self.embedding.weight.T[labels]).sum(1)


def _context(channels: int, config: ClassConditionalConfig) -> nn.Module:
    match config.context:
        case "an":
            return attentive_norm_of(channels, config)
        case "self_attention":
            return SelfAttention2d(channels)
        case "none":
            return nn.Identity()


def _initialize(layer: nn.Module, gain: float = 1.0) -> None:
    """N(0, gain^2 / fan-in), biases 0."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
