"""Images whose regions tell what is hidden elsewhere: the task of `regional_statistics.py`, which says what it is."""

# N images, K textures, G cells a side, S pixels a side.

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 4  # pixels of a cell's side


@dataclass(frozen=True)
class Setting:
    """One point of the sweep."""

    num_textures: int = 8  # K
    distance: int = 3  # least Chebyshev distance, in cells, of a hidden cell from the seen ones of its texture
    num_entities: int = 16  # n of AN

    @property
    def name(self) -> str:
        return f"K{self.num_textures}-d{self.distance}-n{self.num_entities}"


class Examples(NamedTuple):
    """Images and what is shown of them."""

    shown: Tensor  # [N, 3 + 1 + 16 + 1, S, S]: colours where seen, texture, its whole cell, 1 where hidden
    images: Tensor  # [N, 3, S, S], what is to be predicted
    hidden: Tensor  # bool [N, 1, S, S]
    textures: Tensor  # int64 [N, G, G]; -1 where a cell is blank, for want of a texture that may be there


@cache
def texture_bank() -> Tensor:
    """[64, CELL, CELL]: halves of 1 and -1, so mean 0 and variance 1; any two differ in at least 4 of 16 pixels."""
    generator = torch.Generator().manual_seed(0)
    bank: list[Tensor] = []
    while len(bank) < 64:
        texture = torch.ones(CELL**2)
        texture[torch.randperm(CELL**2, generator=generator)[: CELL**2 // 2]] = -1
        if all((texture != other).sum() >= 4 for other in bank):
            bank.append(texture)
    return torch.stack(bank).view(-1, CELL, CELL)


def draw_cells(num_images: int, side: int, setting: Setting, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Textures, int64 [N, G, G], -1 where blank, and whether a cell is hidden, bool [N, G, G].

    Each texture divides the grid by a line of random direction: on the smaller side its cells are
    hidden, on the other they are seen, and in a band between it has none: the band is so wide that no hidden cell has
    a seen one of its texture nearer than `setting.distance`. A cell takes one of the textures that may be there. A
    texture that is seen nowhere in an image is not hidden there.
    """
    num_textures = setting.num_textures
    angle = 2 * math.pi * torch.rand(num_images, num_textures, 1, 1, generator=generator)
    line = side * (0.25 * torch.rand(num_images, num_textures, 1, 1, generator=generator) - 0.35)
    cosine, sine = angle.cos(), angle.sin()
    at = torch.arange(side) - (side - 1) / 2
    # One step to any of the eight neighbours changes this by at most 1.
    along = (cosine * at + sine * at[:, None]) / (cosine.abs() + sine.abs())  # [N, K, G, G]
    margin = (setting.distance - 1) / 2 + 1e-4
    may_hide, may_show = along < line - margin, along > line + margin
    is_free = may_hide | may_show
    textures = (torch.rand(is_free.shape, generator=generator) + is_free.float()).argmax(1)
    chosen = F.one_hot(textures, num_textures).movedim(3, 1).bool()
    is_seen_somewhere = (chosen & may_show).flatten(2).any(2)[..., None, None]
    hidden = (chosen & may_hide & is_seen_somewhere).any(1)
    return torch.where(is_free.any(1), textures, -1), hidden


def draw_examples(num_images: int, size: int, setting: Setting, generator: torch.Generator) -> Examples:
    """Images of `size` pixels a side, colours uniform in [-1, 1] and contrasts in [0.2, 1]. float32."""
    textures, hidden_cells = draw_cells(num_images, size // CELL, setting, generator)
    colours = 2 * torch.rand(num_images, setting.num_textures, 3, generator=generator) - 1
    contrasts = 0.2 + 0.8 * torch.rand(num_images, setting.num_textures, 1, generator=generator)
    # The last texture of each list is the blank one.
    colours, contrasts = F.pad(colours, (0, 0, 0, 1)), F.pad(contrasts, (0, 0, 0, 1))
    bank = F.pad(texture_bank()[: setting.num_textures].flatten(1), (0, 0, 0, 1))

    def pixels(cells: Tensor) -> Tensor:  # [N, G, G, ...] -> [N, ..., S, S]
        return cells.movedim(3, 1).repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)

    images_of_cells = torch.arange(num_images)[:, None, None]
    tiles = bank[textures]  # [N, G, G, 16]
    luminance = tiles.unflatten(3, (CELL, CELL)).transpose(2, 3).reshape(num_images, 1, size, size)
    hidden = pixels(hidden_cells[..., None])
    images = luminance * pixels(contrasts[images_of_cells, textures]) + pixels(colours[images_of_cells, textures])
    shown = torch.cat([images.masked_fill(hidden, 0), luminance, pixels(tiles), hidden.float()], 1)
    return Examples(shown, images, hidden, textures)


def hidden_error(predicted: Tensor, examples: Examples) -> Tensor:
    """Mean |predicted - image| over the hidden pixels of all images and their three channels, a scalar."""
    difference = (predicted - examples.images).abs() * examples.hidden
    return difference.sum() / (3 * examples.hidden.sum()).clamp_min(1)


def as_picture(image: Tensor) -> np.ndarray:
    """[3, H, W], of which [-2, 2] is shown, to uint8 [H, W, 3]: colours reach to 1 beside 0, contrasts to 1 more."""
    return ((image / 4 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
