"""What the studio's work comes to, and the files that are made of it: PNG, GIF, zip."""

# N images, K entities, H height and W width of a photograph, h and w of a map.

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attnorm.inference.inpainter import View
from attnorm.inference.photo_files import Photograph


class Picture(NamedTuple):
    """One generated image."""

    label: str
    seed: int
    pixels: Tensor  # uint8 [3, S, S]


class Walk(NamedTuple):
    """Images from class to class with one latent, and the map of each entity along them."""

    images: Tensor  # uint8 [N, 3, S, S]
    layout: Tensor | None  # [N, K, h, w] of the first site
    entity: int  # whose map varies most


class Repaired(NamedTuple):
    """A photograph without its hole."""

    photograph: Photograph
    mask: Tensor  # bool [1, H, W]
    data: bytes  # a file of `format`
    format: str
    image: Tensor  # [3, H, W], as `Photograph.rgb`
    views: list[View]  # none where the method is not a model, or has nothing to see
    scores: dict[str, float]  # of the hole, where what was under it is the truth
    note: str


def png(pixels: Tensor | np.ndarray) -> bytes:
    """A PNG file of uint8 [3, H, W], or of [H, W, 3] or [H, W, 4] in NumPy."""
    array = pixels.permute(1, 2, 0).numpy() if isinstance(pixels, Tensor) else pixels
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(stream, "PNG", compress_level=3)
    return stream.getvalue()


def grid(images: Sequence[Tensor], columns: int) -> Tensor:
    """uint8 images [3, S, S] in rows, two white pixels between: [3, H, W]."""
    side, gap = images[0].shape[1], 2
    rows = math.ceil(len(images) / columns)
    sheet = torch.full((3, rows * (side + gap) - gap, columns * (side + gap) - gap), 255, dtype=torch.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        top, left = row * (side + gap), column * (side + gap)
        sheet[:, top : top + side, left : left + side] = image
    return sheet


def archive(pictures: Sequence[Picture], recipe: dict[str, Any]) -> bytes:
    """A zip of PNG files, numbered, and of recipe.json with what each of them is."""
    stream = io.BytesIO()
    files = [f"{number:03d}.png" for number in range(len(pictures))]
    listed = [
        {"file": file, "class": picture.label, "seed": picture.seed}
        for file, picture in zip(files, pictures, strict=True)
    ]
    with zipfile.ZipFile(stream, "w") as out:
        for file, picture in zip(files, pictures, strict=True):
            out.writestr(zipfile.ZipInfo(file), png(picture.pixels))  # a fixed date: equal content, equal file
        out.writestr(zipfile.ZipInfo("recipe.json"), json.dumps(recipe | {"images": listed}, indent=2))
    return stream.getvalue()


def strip(walk: Walk) -> bytes:
    """The PNG file of a walk: its images in a row, and below them the maps of one entity, on one scale."""
    rows = list(walk.images)
    columns = len(rows)
    if walk.layout is not None:
        rows += list(_heat(walk))
    return png(grid(rows, columns))


def gif(walk: Walk) -> bytes:
    """An endless animation of a walk, there and back."""
    frames = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in walk.images]
    frames += frames[-2:0:-1]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=80, loop=0)
    return stream.getvalue()


def _heat(walk: Walk) -> Tensor:
    """The map of the entity of a walk, as large as its images: uint8 [N, 3, S, S]."""
    assert walk.layout is not None
    maps = walk.layout[:, walk.entity, None]
    low, high = maps.min(), maps.max()
    maps = torch.nn.functional.interpolate((maps - low) / (high - low).clamp_min(1e-12), walk.images.shape[2:])
    return (maps * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)


def preview(rgb: Tensor) -> bytes:
    """A PNG file of an image as `Photograph.rgb` gives it, reduced to at most 2048 pixels a side."""
    image = Image.fromarray(shallow(rgb).permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((2048, 2048), Image.Resampling.BOX)
    return png(np.asarray(image))


def patch(repaired: Repaired) -> tuple[tuple[int, int, int, int], bytes]:
    """Where the hole is (top, left, bottom, right), and what is there now: a PNG file, else transparent."""
    hole = repaired.mask[0].numpy()
    rows, columns = (np.flatnonzero(hole.any(axis)) for axis in (1, 0))
    top, left, bottom, right = (int(n) for n in (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1))
    colours = shallow(repaired.image[:, top:bottom, left:right]).permute(1, 2, 0).numpy()
    alpha = hole[top:bottom, left:right, None].astype(np.uint8) * 255
    return (top, left, bottom, right), png(np.concatenate([colours, alpha], 2))


def shallow(rgb: Tensor) -> Tensor:
    """uint8 of uint8 or uint16."""
    return (rgb.int() >> 8).to(torch.uint8) if rgb.dtype == torch.uint16 else rgb


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def to_bytes(layout: Tensor) -> bytes:
    """Shares of entities as bytes, 255 for all: uint8 [K, h, w] in this order."""
    return (layout * 255).round().to(torch.uint8).contiguous().numpy().tobytes()
