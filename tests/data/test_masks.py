"""Masks: seeded and in any order, sizes and coverage as promised, files of every mode."""

# S image size.

from __future__ import annotations

import hashlib
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from attnorm.config import UserError
from attnorm.data import masks
from attnorm.data.masks import centre_mask, free_form_mask, read_mask, rectangle_mask

KINDS = {"rectangle": rectangle_mask, "free-form": free_form_mask}


def extent(mask: Tensor) -> tuple[slice, slice]:
    """The rows and columns of the smallest rectangle around what is missing."""
    _, rows, columns = mask.nonzero(as_tuple=True)
    return slice(int(rows.min()), int(rows.max()) + 1), slice(int(columns.min()), int(columns.max()) + 1)


# Drawn masks


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_mask_depends_on_its_seed_and_index_alone(kind: masks.DrawnMask) -> None:
    forwards = [kind(64, seed=5, index=index) for index in range(12)]
    for index in reversed(range(12)):
        again = kind(64, seed=5, index=index)
        assert torch.equal(again.mask, forwards[index].mask) and again.box == forwards[index].box
    for first, second in itertools.combinations([*forwards, *(kind(64, seed=6, index=i) for i in range(12))], 2):
        assert not torch.equal(first.mask, second.mask)


def test_masks_are_the_same_on_every_machine() -> None:
    """Held by a hash of the pixels: a change here changes every manifest of evaluation masks."""
    digest = hashlib.sha256()
    for kind, size, index in itertools.product(KINDS.values(), (64, 256), range(8)):
        mask, box = kind(size, seed=1, index=index)
        digest.update(np.packbits(mask.numpy()).tobytes() + repr(box).encode())
    assert digest.hexdigest()[:16] == "9f523ed0fc11d2de"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("size", [8, 17, 256])
def test_boxes_lie_inside_the_image(kind: masks.DrawnMask, size: int) -> None:
    for index in range(20):
        mask, (top, left) = kind(size, seed=0, index=index)
        assert mask.shape == (1, size, size) and mask.dtype == torch.bool and mask.any()
        assert 0 <= top <= size - size // 2 and 0 <= left <= size - size // 2


@pytest.mark.parametrize(("size", "side", "shrink"), [(256, None, None), (65, 13, 2), (64, 31, 0)])
def test_rectangles_are_shrunk_squares_inside_their_crop(size: int, side: int | None, shrink: int | None) -> None:
    largest, most = side or size // 2, size // 16 if shrink is None else shrink
    heights, widths, corners = set(), set(), set()
    for index in range(400):
        mask, (top, left) = rectangle_mask(size, seed=3, index=index, side=side, shrink=shrink)
        rows, columns = extent(mask)
        assert mask[0, rows, columns].all()  # a rectangle
        assert top <= rows.start and rows.stop <= top + size // 2
        assert left <= columns.start and columns.stop <= left + size // 2
        if side is None:  # the crop is the square before it was shrunk
            assert rows.start - top == top + size // 2 - rows.stop
            assert columns.start - left == left + size // 2 - columns.stop
        heights.add(rows.stop - rows.start)
        widths.add(columns.stop - columns.start)
        corners.add((top, left))
    expected = {largest - 2 * less for less in range(most + 1)}
    assert heights == widths == expected  # every size is drawn, and no other
    assert len(corners) > 200


def test_rectangles_are_uniform_over_the_image() -> None:
    """Of 33 places along an axis each is drawn about 2000 / 33 = 61 times; 5 standard deviations are 38."""
    tops, lefts = zip(*(rectangle_mask(64, seed=0, index=index).box for index in range(2000)), strict=True)
    for places in (tops, lefts):
        counts = np.bincount(places, minlength=33)
        assert len(counts) == 33 and np.abs(counts - 2000 / 33).max() < 38
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.1


@pytest.mark.parametrize("size", [8, 64])  # at 8 a step may be so large that it must not be made
def test_strokes_cover_10_to_40_percent(size: int) -> None:
    coverage = [float(free_form_mask(size, seed=4, index=index).mask.float().mean()) for index in range(200)]
    assert 0.10 <= min(coverage) < 0.13 and 0.33 < max(coverage) <= 0.40
    assert 0.20 < np.mean(coverage) < 0.30


def test_the_crop_of_strokes_is_around_their_centre_of_mass() -> None:
    moved = 0
    for index in range(50):
        mask, box = free_form_mask(64, seed=7, index=index)
        centre = mask[0].nonzero().double().mean(0)
        wanted = [int(value) - 16 for value in centre]
        assert box == tuple(min(max(value, 0), 32) for value in wanted)
        moved += box != tuple(wanted)
    assert 0 <= moved < 25


@pytest.mark.parametrize(
    ("start", "end"), [((5, 6), (24, 19)), ((24, 19), (5, 6)), ((2, 10), (2, 25)), ((30, 0), (0, 31)), ((9, 9), (9, 9))]
)
def test_a_line_is_every_pixel_near_the_segment(start: tuple[int, int], end: tuple[int, int]) -> None:
    """Distances to 2,001 points along the segment, in floating point; the pixels at the very edge are not compared."""
    radius, size = 4, 32
    points = np.linspace(start, end, 2001)
    places = np.stack(tuple(np.mgrid[:size, :size]), -1).reshape(-1, 1, 2)
    distance = np.sqrt(((places - points) ** 2).sum(-1)).min(1).reshape(size, size)
    drawn = np.zeros((size, size), bool)
    window, line = masks._line(size, start, end, radius)
    drawn[window] = line
    assert drawn[distance < radius - 1e-3].all() and not drawn[distance > radius + 1e-3].any()
    assert drawn[start]


def test_the_centre_mask_is_the_square_of_half_the_side() -> None:
    mask, box = centre_mask(256)
    assert extent(mask) == (slice(64, 192), slice(64, 192)) and int(mask.sum()) == 128 * 128 and box == (64, 64)
    assert int(centre_mask(33).mask.sum()) == 16 * 16


def test_impossible_masks_are_told_what_was_expected() -> None:
    for call in (
        lambda: rectangle_mask(4, seed=0, index=0),
        lambda: free_form_mask(64, seed=-1, index=0),
        lambda: free_form_mask(64, seed=0, index=-1),
        lambda: centre_mask(7),
    ):
        with pytest.raises(ValueError, match=r"got size=-?\d+, seed=-?\d+, index=-?\d+; expected 8 pixels or more"):
            call()
    for side, shrink in ((33, 0), (0, 0), (10, 5), (10, -1)):
        with pytest.raises(ValueError, match=rf"side={side}, shrink={shrink} for 64 pixels; expected a side from 1 to"):
            rectangle_mask(64, seed=0, index=0, side=side, shrink=shrink)


# Mask files

PIXELS = np.array([[0, 127, 128], [255, 64, 200]], np.uint8)
EXPECTED = PIXELS >= 128


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def rgba(colour: int, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([np.full((*alpha.shape, 3), colour, np.uint8), alpha]))


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(PIXELS),
        Image.fromarray(PIXELS).convert("RGB"),
        Image.fromarray(PIXELS.astype(np.uint16) * 257),
        Image.fromarray(np.where(EXPECTED, 255, 0).astype(np.uint8)).convert("1"),
        Image.fromarray(np.where(EXPECTED, 255, 0).astype(np.uint8)).convert("P"),
        Image.merge("LA", (Image.fromarray(PIXELS), Image.new("L", (3, 2), 255))),
        rgba(255, PIXELS),  # painted white on nothing
    ],
    ids=["grey", "RGB", "16-bit", "1-bit", "palette", "grey-alpha", "alpha-only"],
)
def test_white_is_missing_in_a_file_of_any_mode(tmp_path: Path, image: Image.Image) -> None:
    mask = read_mask(save(tmp_path / "mask.png", image))
    assert mask.dtype == torch.bool and mask.shape == (1, 2, 3)
    assert np.array_equal(mask[0], EXPECTED)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    mask = read_mask(save(tmp_path / "mask.png", image, exif=exif))
    assert np.array_equal(mask[0], np.rot90(EXPECTED, -1))


def test_cmyk_is_read_too(tmp_path: Path) -> None:
    image = Image.fromarray(np.where(np.arange(32)[:, None] < 16, 255, 0).astype(np.uint8).repeat(32, 1))
    mask = read_mask(save(tmp_path / "mask.jpg", image.convert("CMYK")))
    assert mask[0, :16].all() and not mask[0, 16:].any()


def test_the_threshold_is_the_least_grey_that_is_missing(tmp_path: Path) -> None:
    path = save(tmp_path / "mask.png", Image.fromarray(PIXELS))
    for threshold in (1, 64, 65, 127, 128, 255):
        assert np.array_equal(read_mask(path, threshold)[0], threshold <= PIXELS)
    assert torch.equal(read_mask(str(path), invert=True), ~read_mask(path))


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(EXPECTED.astype(np.uint8)),
        Image.fromarray(EXPECTED.astype(np.uint16) * 255),
        Image.fromarray(EXPECTED.astype(np.uint16)),
        Image.fromarray(EXPECTED.astype(np.uint8) * 55 + 200),
        Image.fromarray(EXPECTED[..., None] * np.array([128, 0, 0], np.uint8)),  # a label's colour
    ],
    ids=["0-1", "16-bit-255", "16-bit-1", "200-255", "dark-red"],
)
def test_of_two_greys_the_lighter_is_white_unless_a_threshold_is_said(tmp_path: Path, image: Image.Image) -> None:
    path = save(tmp_path / "mask.png", image)
    assert np.array_equal(read_mask(path)[0], EXPECTED)
    assert np.array_equal(read_mask(path, invert=True)[0], ~EXPECTED)
    top = np.asarray(image.convert("L") if image.mode == "RGB" else image).max()
    assert read_mask(path, 128).any() == (top >= 128)  # a threshold that is said counts
    save(path, Image.fromarray(np.array([[0, 1, 2]], np.uint16)))  # of three only a threshold tells
    assert not read_mask(path).any() and read_mask(path, 2).tolist() == [[[False, False, True]]]


def test_a_file_that_is_no_mask_is_one_clear_line(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", Image.fromarray(np.tile(PIXELS, (50, 50)))).read_bytes()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    save(tmp_path / "float.tiff", Image.fromarray(PIXELS.astype(np.float32)))
    os.mkfifo(tmp_path / "pipe.png")  # which is not waited for
    for name in ("text.png", "cut.png", "empty.png", "float.tiff", "pipe.png", ""):
        with pytest.raises(UserError, match=r"^cannot read the mask .*; expected an image, white where it is missing$"):
            read_mask(tmp_path / name)
    with pytest.raises(UserError, match=r"^there is no mask .*absent\.png$"):
        read_mask(tmp_path / "absent.png")
    for threshold in (0, 256):
        with pytest.raises(UserError, match=f"threshold is {threshold}; expected 1 to 255"):
            read_mask(tmp_path / "good.png", threshold)
