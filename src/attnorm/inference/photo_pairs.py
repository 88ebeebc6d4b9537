"""Which mask belongs to which photograph, and what the filled photograph may be called."""

from __future__ import annotations

import contextlib
import unicodedata
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from attnorm.config import UserError
from attnorm.data.masks import MaskFile, decode_mask_file, read_mask_file
from attnorm.inference.photo_files import SUFFIXES, Photograph, decode_photograph, read_photograph


def read_with_mask(
    image: Path, mask: Path, *, threshold: int | None = None, invert: bool = False
) -> tuple[Photograph, Tensor]:
    """A photograph, and its mask as bool [1, H, W] (see `read_mask`): both as they are shown.

    Raises:
        UserError: one of them cannot be read, their sizes differ, or the mask is of nothing or of everything.
    """
    return _fitting(read_photograph(image), image, read_mask_file(mask, threshold, invert), mask, threshold)


def decode_with_mask(
    image: bytes, mask: bytes, *, image_name: str, max_pixels: int, invert: bool = False
) -> tuple[Photograph, Tensor]:
    """`read_with_mask` of the files' contents, such as someone sends: nothing of more than `max_pixels` is decoded."""
    photograph = decode_photograph(Path(image_name), image, max_pixels=max_pixels)
    read = decode_mask_file("mask", mask, None, invert, max_pixels=max_pixels)
    return _fitting(photograph, photograph.path, read, Path("mask"), None)


def _fitting(
    photograph: Photograph, image: Path, read: MaskFile, mask: Path, threshold: int | None
) -> tuple[Photograph, Tensor]:
    (height, width), (mask_height, mask_width) = photograph.size, read.missing.shape[1:]
    if (height, width) != (mask_height, mask_width):
        turned = f", turned as its EXIF data say (orientation {photograph.orientation})"
        raise UserError(
            f"the mask {mask} has {mask_width}x{mask_height} pixels, but {image} has {width}x{height}"
            f"{turned if photograph.orientation > 1 else ''}; expected equal sizes"
        )
    if not read.missing.any() or read.missing.all():
        fault = f"all of {image} is missing" if read.missing.all() else f"nothing of {image} is missing"
        if read.least == read.most:
            remedy = f"its pixels are all of grey {read.most}; expected white where something is missing, else black"
        else:
            side = f"{read.most} or less" if read.most < (threshold or 128) else f"more than {read.least}"
            remedy = f"its greys go from {read.least} to {read.most} of 255; say --threshold T, with T {side}"
        raise UserError(f"by the mask {mask} {fault}: {remedy}")
    return photograph, read.missing


def output_format(photograph: Photograph, out: Path) -> str:
    """The format that the name `out` asks for: the photograph's own, PNG or TIFF.

    Raises:
        UserError: another one.
    """
    allowed = dict.fromkeys((photograph.format, "PNG", "TIFF"))
    for format in allowed:
        if out.suffix.lower() in SUFFIXES[format]:
            return format
    expected = ", ".join(suffix for format in allowed for suffix in SUFFIXES[format])
    raise UserError(
        f"{out} does not say how to write it: {photograph.path} is {photograph.format}; expected a name in {expected}"
    )


def lossless_name(path: Path) -> str:
    """What a photograph is to be called so that nothing of it is lost: its own name, of a JPEG file one of PNG, or of
    TIFF where it is CMYK. Of a file that cannot be read its own, too.
    """
    with contextlib.suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        if path.is_file():
            with Image.open(path) as image:
                if image.format in ("JPEG", "MPO"):
                    return path.with_suffix(".tif" if image.mode == "CMYK" else ".png").name
    return path.name


class Pairs(NamedTuple):
    """The images of a folder, each with its mask, and what was left over."""

    pairs: list[tuple[Path, Path]]
    images_left: list[Path]
    masks_left: list[Path]


def pair_files(images: Path, masks: Path) -> Pairs:
    """Pairs each image of a folder with the mask of the same stem in the folder `masks`, or with the one file `masks`.

    Files are images if their suffix is in `SUFFIXES`; subfolders and hidden files are left alone.

    Raises:
        UserError: a place is missing, nothing matched, or several masks have the stem of an image.
    """
    found = _images_in(images, "--images")
    if masks.is_file():
        return Pairs([(image, masks) for image in found if not image.samefile(masks)], [], [])
    if masks.is_dir() and masks.samefile(images):
        raise UserError(f"images and masks are both in {images}; expected a folder for each")
    candidates = _images_in(masks, "--masks")
    by_stem: dict[str, list[Path]] = {}
    for mask in candidates:
        by_stem.setdefault(_composed(mask.stem), []).append(mask)
    pairs, images_left = [], []
    for image in found:
        alike = by_stem.get(_composed(image.stem), [])
        fitting = [mask for mask in alike if mask.stem == image.stem] or alike
        if len(fitting) > 1:
            named = " and ".join(mask.name for mask in fitting)
            raise UserError(f"{image.name} has several masks in {masks}: {named}; expected one")
        if fitting:
            pairs.append((image, fitting[0]))
        else:
            images_left.append(image)
    if not pairs:
        raise UserError(
            f"no mask in {masks} has the name of an image in {images}; "
            f"expected for example {found[0].stem}.png beside {found[0].name}"
        )
    used = {mask for _, mask in pairs}
    return Pairs(pairs, images_left, [mask for mask in candidates if mask not in used])


def _composed(name: str) -> str:
    """A name in the one of Unicode's equal spellings that most systems write; macOS writes the other."""
    return unicodedata.normalize("NFC", name)


def _images_in(folder: Path, option: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{option} is {folder}, which is not a folder; expected one with image files")
    suffixes = {suffix for group in SUFFIXES.values() for suffix in group}
    found = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")
    )
    if not found:
        raise UserError(f"{folder} holds no image; expected files that end in {', '.join(sorted(suffixes))}")
    return found
