"""Class-conditional generator and discriminator (paper, section 4; SAGAN's networks) with a choice of context block."""

# N batch, Z latent dimension, Y classes, S image size.

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from attnorm.config import ClassConditionalConfig, InpaintingConfig
from attnorm.hub import HubModel
from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.layers.batch_norm import BatchNorm2d
from attnorm.layers.conditional_norm import ConditionalBatchNorm2d
from attnorm.layers.residual import DownBlock, UpBlock
from attnorm.layers.self_attention import SelfAttention2d
from attnorm.system.devices import no_autocast

# Channels in multiples of the width. G: the 4x4 map, then after each up-block. D: after each block, all but the flat
# ones at the end halve the map.
G_CHANNELS = {32: (4, 4, 4, 4), 64: (16, 8, 4, 2, 1), 128: (16, 16, 8, 4, 2, 1), 256: (16, 16, 8, 8, 4, 2, 1)}
D_CHANNELS = {32: (2, 2, 2, 2), 64: (1, 2, 4, 8, 16), 128: (1, 2, 4, 8, 16, 16), 256: (1, 2, 4, 8, 8, 16, 16)}
D_FLAT_BLOCKS = {32: 2, 64: 1, 128: 1, 256: 1}


class Generator(HubModel):
    """(z, class) -> image: a linear layer to 4x4, up-blocks that double the map, norm, ReLU, 3x3, tanh.

    The context block, attentive normalization or self-attention, is in (or after) the up-blocks `config.an_blocks`.
    """

    def __init__(self, config: ClassConditionalConfig) -> None:
        super().__init__(config)
        require_classes(config)
        multiples = config.g_channels or G_CHANNELS[config.image_size]
        channels = [multiple * config.width for multiple in multiples]
        self.latent_dim, self.num_classes, self.image_size = config.latent_dim, config.num_classes, config.image_size
        self.linear = nn.Linear(config.latent_dim, 16 * channels[0])
        self.blocks = nn.ModuleList()
        for number, (before, after) in enumerate(itertools.pairwise(channels), start=1):
            has_context = number in config.an_blocks
            block = UpBlock(
                before,
                after,
                config.num_classes,
                an=attentive_norm_of(after, config) if has_context and config.context == "an" else None,
                site=config.site,
                after=SelfAttention2d(after) if has_context and config.context == "self_attention" else None,
                latent_dim=config.latent_dim if config.latent_in_norms else 0,
                upsampling=config.upsampling,
            )
            self.blocks.append(block)
        self.norm = BatchNorm2d(channels[-1])
        self.to_rgb = nn.Conv2d(channels[-1], 3, 3, padding=1)
        _initialize(self, with_spectral_norm=config.g_spectral_norm)

    @staticmethod
    def is_built_from(config: ClassConditionalConfig | InpaintingConfig) -> bool:
        return isinstance(config, ClassConditionalConfig) and config.architecture == "sagan"

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Images [N, 3, S, S] in [-1, 1].

        Args:
            z: Latents, [N, Z], from N(0, I).
            condition: int64 labels [N], or float mixtures of classes [N, Y].
        """
        h = self.linear(z).unflatten(1, (-1, 4, 4))
        for block in self.blocks:
            h = block(h, condition, z)
        return torch.tanh(self.to_rgb(F.relu(self.norm(h))))


class SpectralNorm(parametrizations._SpectralNorm):
    """torch's, one power iteration a training forward; in full precision under autocast, which on NVIDIA's GPUs would
    make its matrix-vector products in bfloat16.
    """

    def forward(self, weight: Tensor) -> Tensor:
        with no_autocast(weight):
            return super().forward(weight)


class DiscriminatorOutput(NamedTuple):
    """What a discriminator says of images."""

    score: Tensor  # [N], high = real
    class_logits: Tensor | None  # [N, Y], of the auxiliary classifier


class Discriminator(nn.Module):
    """(image, class) -> score: down-blocks, ReLU, sum over positions, then a projection or classifier head.

    SAGAN's wide discriminator: a block's hidden map has its output's channels. AN is in the first block, between its
    two convolutions, at full resolution; self-attention is where the map is 32x32 (16x16 for 32-pixel images).
    """

    def __init__(self, config: ClassConditionalConfig) -> None:
        super().__init__()
        require_classes(config)
        channels = [multiple * config.width for multiple in D_CHANNELS[config.image_size]]
        num_down = len(channels) - D_FLAT_BLOCKS[config.image_size]
        if not config.d_last_flat:
            channels = channels[:-1]
        attention_size = min(32, config.image_size // 2)
        self.blocks = nn.ModuleList()
        for index, (before, after) in enumerate(zip([3, *channels[:-1]], channels, strict=True)):
            is_first = index == 0
            size_after = config.image_size >> min(index + 1, num_down)
            attends = config.context == "self_attention" and index < num_down and size_after == attention_size
            block = DownBlock(
                before,
                after,
                downsample=index < num_down,
                is_first=is_first,
                an=attentive_norm_of(after, config) if is_first and config.context == "an" else None,
                after=SelfAttention2d(after) if attends else None,
            )
            self.blocks.append(block)
        self.linear = nn.Linear(channels[-1], 1)
        has_classifier = config.head == "auxiliary"
        self.embedding = None if has_classifier else nn.Embedding(config.num_classes, channels[-1])
        self.classifier = nn.Linear(channels[-1], config.num_classes, bias=False) if has_classifier else None
        _initialize(self, with_spectral_norm=config.d_spectral_norm)

    def forward(self, images: Tensor, labels: Tensor) -> DiscriminatorOutput:
        """`images` are [N, 3, S, S] in [-1, 1], `labels` int64 [N] (not read by the auxiliary-classifier head)."""
        h = images
        for block in self.blocks:
            h = block(h)
        h = F.relu(h).sum((2, 3))
        score = self.linear(h)[:, 0]
        if self.embedding is not None:
            score = score + (self.embedding(labels) * h).sum(1)
        return DiscriminatorOutput(score, None if self.classifier is None else self.classifier(h))


def describe(config: ClassConditionalConfig, num_classes: int) -> tuple[str, int, int]:
    """Where the context blocks are, and the parameters of G and D; built without memory."""
    with torch.device("meta"):
        # Spectral norm adds no parameter, and setting it up would take minutes for the large networks.
        config = replace(config, num_classes=num_classes, g_spectral_norm=False, d_spectral_norm=False)
        generator, discriminator = Generator(config), Discriminator(config)
    sites = [
        f"{letter} block {int(name.split('.')[1]) + 1} ({module.num_features} channels)"
        for letter, network in (("G", generator), ("D", discriminator))
        for name, module in network.named_modules()
        if isinstance(module, AttentiveNorm2d | SelfAttention2d)
    ]
    g_parameters, d_parameters = (
        sum(p.numel() for p in network.parameters()) for network in (generator, discriminator)
    )
    return ", ".join(sites) or "none", g_parameters, d_parameters


def attentive_norm_of(num_features: int, config: ClassConditionalConfig) -> AttentiveNorm2d:
    """The layer as a model's settings have it."""
    return AttentiveNorm2d(num_features, **{**asdict(config.an), "temperature": config.temperature})


def _initialize(network: nn.Module, *, with_spectral_norm: bool) -> None:
    """Glorot-uniform weights and zero biases; then one power iteration a training forward (docs/paper.md, row 22).

    The entities of AN keep N(0, 1) and their norm; so do the tables of conditional norm keep theirs: normalizing them
    is what keeps several open SAGANs from reaching the published scores.
    """
    left_alone: set[nn.Module] = set()
    for module in network.modules():
        if isinstance(module, AttentiveNorm2d):
            left_alone.add(module.entities)
        elif isinstance(module, ConditionalBatchNorm2d):
            left_alone.update(module.children())
    for module in list(network.modules()):
        if module in left_alone or not isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            continue
        nn.init.xavier_uniform_(module.weight)
        if not isinstance(module, nn.Embedding) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if with_spectral_norm:
            register_parametrization(module, "weight", SpectralNorm(module.weight, eps=1e-12))


def require_classes(config: ClassConditionalConfig) -> None:
    """ValueError while the number of classes is still the data's to say."""
    if config.num_classes < 1:
        raise ValueError(f"model.num_classes is {config.num_classes}; expected at least 1 (the data set's) to build it")
