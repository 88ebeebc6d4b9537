"""Masks of what is missing: rectangles, free-form strokes, files. 1 (True) = missing, always.

A drawn mask depends on (size, seed, index) alone: neither on the masks drawn before it nor on the machine. NumPy
promises the raw stream of a bit generator for ever, and what is made of it here is integer arithmetic.
"""

# S image size.

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from attnorm.config import UserError
from attnorm.data.sources import correct_transparency, deep_grey, read_regular, require_pixels

# Brushes, steps and coverage of free-form masks. DeepFill v2's brushes are 12 to 40 of 256 pixels wide.
_RADIUS = (6 / 256, 20 / 256)  # of the image size
_STEP = 1 / 4  # of the image size: the longest step of a walk, in either direction
_NUM_STEPS = (1, 8)  # a stroke
_TARGET_PERCENT = (10, 35)  # strokes are added until so much is missing
_MAX_PERCENT = 40  # a step that would take more away is not made


class DrawnMask(NamedTuple):
    """A mask of S x S pixels, and where its local crop is."""

    mask: Tensor  # bool [1, S, S], True = missing
    box: tuple[int, int]  # top and left of the local crop, a square of S // 2 pixels that lies inside the image


def rectangle_mask(
    size: int, *, seed: int, index: int, side: int | None = None, shrink: int | None = None
) -> DrawnMask:
    """One rectangle, uniform over the image; the local crop contains it.

    Args:
        size: S, at least 8 pixels.
        seed, index: Which mask; at least 0.
        side: Of the square that is shrunk, at most S // 2, which is the default (128 of 256).
        shrink: Up to so many pixels are taken off opposite sides alike, drawn for rows and columns; default S // 16
            (16 of 256; DeepFill v1).
    """
    side = size // 2 if side is None else side
    shrink = size // 16 if shrink is None else shrink
    _check(size, seed, index)
    if not 0 < side <= size // 2 or not 0 <= 2 * shrink < side:
        raise ValueError(
            f"got side={side}, shrink={shrink} for {size} pixels; expected a side from 1 to {size // 2}, "
            "which is the local crop, and twice the shrinkage below it"
        )
    numbers = _numbers(seed, index, kind=1)
    top, left = _between(numbers, 0, size - side), _between(numbers, 0, size - side)
    less_high, less_wide = _between(numbers, 0, shrink), _between(numbers, 0, shrink)
    mask = np.zeros((size, size), bool)
    mask[top + less_high : top + side - less_high, left + less_wide : left + side - less_wide] = True
    return DrawnMask(torch.from_numpy(mask)[None], _box_around(top + side // 2, left + side // 2, size))


def free_form_mask(size: int, *, seed: int, index: int) -> DrawnMask:
    """Strokes of a thick brush until 10 to 40 % of the image are missing (the free-form masks of Yu et al., 2019).

    A stroke is a random walk from a uniform point with one brush, round at its joints and ends. The local crop is
    around the centre of mass, as far as the image allows; strokes may reach beyond it.

    Args:
        size: S, at least 8 pixels.
        seed, index: Which mask; at least 0.
    """
    _check(size, seed, index)
    numbers = _numbers(seed, index, kind=2)
    target = size * size * _between(numbers, *_TARGET_PERCENT)  # in hundredths of a pixel
    mask, num_missing = np.zeros((size, size), bool), 0
    while 100 * num_missing < target:
        radius = _between(numbers, *(max(int(share * size), 1) for share in _RADIUS))
        row, column = _between(numbers, 0, size - 1), _between(numbers, 0, size - 1)
        reach = max(int(_STEP * size), 1)
        for _ in range(_between(numbers, *_NUM_STEPS)):
            start = row, column
            row = min(max(row + _between(numbers, -reach, reach), 0), size - 1)
            column = min(max(column + _between(numbers, -reach, reach), 0), size - 1)
            window, line = _line(size, start, (row, column), radius)
            num_new = int(np.count_nonzero(line & ~mask[window]))
            if 100 * (num_missing + num_new) > size * size * _MAX_PERCENT:
                break
            mask[window] |= line
            num_missing += num_new
            if 100 * num_missing >= target:
                break
    rows, columns = np.nonzero(mask)
    box = _box_around(int(rows.sum()) // len(rows), int(columns.sum()) // len(columns), size)
    return DrawnMask(torch.from_numpy(mask)[None], box)


def centre_mask(size: int) -> DrawnMask:
    """The centre square of S // 2 pixels, which is its own local crop: 128 of 256, the usual mask of tests."""
    _check(size, 0, 0)
    start, side = (size - size // 2) // 2, size // 2
    mask = np.zeros((size, size), bool)
    mask[start : start + side, start : start + side] = True
    return DrawnMask(torch.from_numpy(mask)[None], (start, start))


class MaskFile(NamedTuple):
    """A mask as a file has it."""

    missing: Tensor  # bool [1, H, W], True = missing
    least: int  # grey of the darkest pixel, of 255
    most: int  # and of the lightest


def read_mask(path: str | Path, threshold: int | None = None, invert: bool = False) -> Tensor:
    """A mask from an image file of any mode: bool [1, H, W], True (missing) where it is white.

    Colours count by their luminance, transparent pixels as black; the file is turned upright as EXIF says.

    Args:
        threshold: The least grey, of 0 to 255, that is missing; 16-bit files are scaled to 255. None: 128, but of a
            mask with two greys, whatever they are, the darker is black and the lighter white.
        invert: Black is missing instead: the complement of what would be returned without.

    Raises:
        UserError: If the file cannot be read as an image, or the threshold is not in 1 to 255.
    """
    return read_mask_file(path, threshold, invert).missing


def read_mask_file(path: str | Path, threshold: int | None = None, invert: bool = False) -> MaskFile:
    """`read_mask`, with the range of its greys."""
    try:
        data = read_regular(Path(path))
    except FileNotFoundError:
        raise UserError(f"there is no mask {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the mask {path}: {error}; expected an image, white where it is missing") from None
    return decode_mask_file(path, data, threshold, invert)


def decode_mask_file(
    path: str | Path,
    data: bytes,
    threshold: int | None = None,
    invert: bool = False,
    *,
    max_pixels: int | None = None,
) -> MaskFile:
    """`read_mask_file` of a file's content; one of more than `max_pixels` is refused before it is decoded."""
    if threshold is not None and not 1 <= threshold <= 255:
        raise UserError(f"the mask's threshold is {threshold}; expected 1 to 255, the least grey that is missing")
    try:
        grey = _grey(data, max_pixels)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes decoders fail in any way at all
        raise UserError(f"cannot read the mask {path}: {error}; expected an image, white where it is missing") from None
    least, most = grey.min(), grey.max()
    if threshold is None and least < most and ((grey == least) | (grey == most)).all():
        white = grey == most
    else:
        white = grey >= (threshold or 128)
    return MaskFile(torch.from_numpy(white != invert)[None], int(least), int(most))


def _grey(data: bytes, max_pixels: int | None) -> np.ndarray:
    """[H, W] in 0 to 255, fractions included; upright."""
    with Image.open(io.BytesIO(data)) as file:
        if max_pixels is not None:
            require_pixels(file, max_pixels)
        file.load()
        correct_transparency(file, data)
        image: Image.Image = file
        with contextlib.suppress(Exception):  # of EXIF data that cannot be read: as it is stored
            image = ImageOps.exif_transpose(file)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if image.mode.startswith("I"):
            pixels = np.asarray(image)
            # Of a mask only light and dark matter: what leaves all of 16 bits but the lowest eight is one of 8.
            grey = pixels.astype(float) if 0 <= pixels.min() <= pixels.max() < 257 else deep_grey(pixels, file) / 257
            key = image.info.get("transparency")
            return grey if key is None else np.where(pixels == key, 0, grey)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer).convert("RGB")
    return np.asarray(image.convert("L"))


def _line(
    size: int, start: tuple[int, int], end: tuple[int, int], radius: int
) -> tuple[tuple[slice, slice], np.ndarray]:
    """The pixels within `radius` of a segment, in a window around it. Distances are compared as whole numbers."""
    (top, bottom), (left, right) = (
        (max(min(a, b) - radius, 0), min(max(a, b) + radius + 1, size)) for a, b in zip(start, end, strict=True)
    )
    rows = np.arange(top, bottom, dtype=np.int64)[:, None] - start[0]
    columns = np.arange(left, right, dtype=np.int64) - start[1]
    high, wide = end[0] - start[0], end[1] - start[1]
    length2 = high * high + wide * wide
    along = rows * high + columns * wide  # times the length
    beside = rows * wide - columns * high  # times the length
    near_ends = np.minimum(rows**2 + columns**2, (rows - high) ** 2 + (columns - wide) ** 2) <= radius**2
    near_middle = (along >= 0) & (along <= length2) & (beside**2 <= radius**2 * length2) & (length2 > 0)
    return (slice(top, bottom), slice(left, right)), near_ends | near_middle


def _box_around(row: int, column: int, size: int) -> tuple[int, int]:
    """Top and left of the local crop with its middle at a pixel, moved into the image."""
    side = size // 2
    return min(max(row - side // 2, 0), size - side), min(max(column - side // 2, 0), size - side)


def _numbers(seed: int, index: int, *, kind: int) -> Iterator[int]:
    """An endless stream of 64-bit numbers that belongs to one mask."""
    stream = np.random.PCG64([seed, index, kind])  # `kind` is not 0: trailing zeros do not change a seed
    while True:
        yield from stream.random_raw(64).tolist()


def _between(numbers: Iterator[int], least: int, most: int) -> int:
    """Uniform over least .. most, both included: 64 bits are so many that the remainder's bias cannot be seen."""
    return least + next(numbers) % (most - least + 1)


def _check(size: int, seed: int, index: int) -> None:
    if size < 8 or seed < 0 or index < 0:
        raise ValueError(f"got size={size}, seed={seed}, index={index}; expected 8 pixels or more, nothing negative")
