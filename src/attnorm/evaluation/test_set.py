"""A frozen test set for inpainting: which images, at which size, with which masks, each known by its hash.

    DIR/manifest.json         where the images come from; for each one its file, its mask, and SHA-256 of both
    DIR/masks/00000.png       white = missing

The pixels of the photographs stay where they are; so a manifest can be published where they cannot.
"""

# M images of the manifest, S their size.

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attnorm.checkpoint import CheckpointError
from attnorm.config import (
    Config,
    ConfigError,
    DataConfig,
    InpaintingConfig,
    InpaintingTaskConfig,
    UserError,
    require_seed,
)
from attnorm.data.images import ImageSet, cut_centres, held_out_indices
from attnorm.data.masks import centre_mask, free_form_mask, read_mask, rectangle_mask
from attnorm.data.sources import find_source
from attnorm.metrics.image_quality import SSIM_BORDER
from attnorm.settings import from_dict
from attnorm.system.files import hash_file, write_atomically, write_json

FORMAT_VERSION = 1

Masks = Literal["centre", "rectangle", "free-form"]


@dataclass(frozen=True)
class Entry:
    """One image of the test set, and its mask."""

    file: str  # relative to the data; "CLASS/NUMBER" for the built-in ones
    sha256: str  # of the pixels at the manifest's size: uint8 [3, S, S], row by row
    mask: str  # relative to the manifest's folder
    mask_sha256: str  # of its pixels: one byte each, 1 = missing


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says."""

    folder: Path
    data: DataConfig  # how the images are read; its held_out_every is not used
    every: int  # which of them: number `every`, 2 * every, ... in the order of their names
    image_size: int  # S
    masks: Masks
    seed: int  # of the masks; number i of the manifest has mask number i
    fingerprint: str  # of all images of the data, tested or not
    note: str  # what a reader of results must know of the data
    entries: tuple[Entry, ...]

    @property
    def sha256(self) -> str:
        """Of manifest.json, which holds the hashes of all else."""
        return hash_file(_file(self.folder))

    @property
    def reading(self) -> Config:
        """A configuration that has its images read."""
        return reading(self.data, self.image_size)


class Examples(NamedTuple):
    """The test set itself."""

    images: Tensor  # uint8 [M, 3, S, S]
    masks: Tensor  # bool [M, 1, S, S], True = missing


def reading(data: DataConfig, image_size: int) -> Config:
    """A configuration that has `data` read for inpainting at `image_size`; ConfigError where that cannot be."""
    return Config(
        task="inpainting",
        model=InpaintingConfig(image_size=image_size),
        inpainting=InpaintingTaskConfig(),
        data=data,
    )


def make_manifest(
    folder: Path, images: ImageSet, data: DataConfig, *, image_size: int, masks: Masks, seed: int, every: int
) -> Manifest:
    """Freezes every `every`-th image (1: all of them) at its centre square of S pixels, with a mask each.

    With the run's `held_out_every`, these are the images that it never trains on.

    Args:
        images: What `data` says, read.
        folder: Made where missing; what it holds of an older manifest is replaced.
    """
    if every < 1:
        raise ConfigError(f"every is {every}; expected 1 (all images) or more")
    require_seed("seed", seed)
    chosen = held_out_indices(len(images), every)
    if len(chosen) < 2:
        raise ConfigError(
            f"of the {len(images)} images of {images.source}, every {every}th is {len(chosen)}; expected at least 2 "
            "to compare models on: give more images, or a smaller --every"
        )
    names = _names(images)
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    entries = []
    for number, index in enumerate(chosen.tolist()):
        pixels = cut_centres(images.batch(np.array([index]))[0], image_size)[0]
        mask = _draw(masks, image_size, seed, number)
        _check_mask(mask, f"mask number {number}")
        name = f"masks/{number:05d}.png"
        picture = Image.fromarray(mask[0].to(torch.uint8).mul(255).numpy())
        write_atomically(folder / name, partial(picture.save, format="PNG"))
        entries.append(Entry(names[index], _hash(pixels), name, _hash(mask)))
    manifest = Manifest(folder, data, every, image_size, masks, seed, images.fingerprint, images.note, tuple(entries))
    values = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    del values["folder"]
    write_json(_file(folder), values)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`; CheckpointError where there is none that can be read."""
    file = _file(folder)
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no manifest.json; `attnorm manifest` makes one")
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = values.pop("format_version")
        if version > FORMAT_VERSION:
            raise CheckpointError(f"{file} has format {version}; this version reads up to {FORMAT_VERSION}")
        values["data"] = from_dict(DataConfig, values["data"], prefix="data.")
        values["entries"] = tuple(Entry(**entry) for entry in values["entries"])
        return Manifest(folder=folder, **values)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error!r}); make it again with `attnorm manifest`") from error


def read_examples(manifest: Manifest, images: ImageSet) -> Examples:
    """The test set, once every image and every mask has been found to be what the manifest says.

    Raises:
        UserError: something is missing or has another hash. Nothing is measured then.
    """
    place = {name: index for index, name in enumerate(_names(images))}
    found, masks, wrong = [], [], []
    for entry in manifest.entries:
        if entry.file not in place:
            wrong.append(f"{entry.file} is not there")
            continue
        batch = images.batch(np.array([place[entry.file]]))[0]
        pixels = cut_centres(batch, manifest.image_size)[0].clone()
        mask = read_mask(manifest.folder / entry.mask)
        if _hash(pixels) != entry.sha256:
            wrong.append(f"{entry.file} has other pixels")
        if mask.shape != (1, manifest.image_size, manifest.image_size) or _hash(mask) != entry.mask_sha256:
            wrong.append(f"{entry.mask} is another mask")
        found.append(pixels)
        masks.append(mask)
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{images.source} and {manifest.folder} do not match the manifest: {'; '.join(wrong[:3])}{more}. Name the "
            "data that it was made from with --data, restore the masks, or make a new manifest"
        )
    for entry, mask in zip(manifest.entries, masks, strict=True):
        _check_mask(mask, entry.mask)
    return Examples(torch.stack(found), torch.stack(masks))


def _draw(kind: Masks, size: int, seed: int, index: int) -> Tensor:
    match kind:
        case "centre":
            return centre_mask(size).mask
        case "rectangle":
            return rectangle_mask(size, seed=seed, index=index).mask
        case "free-form":
            return free_form_mask(size, seed=seed, index=index).mask


def _check_mask(mask: Tensor, name: str) -> None:
    inner = mask[:, SSIM_BORDER:-SSIM_BORDER, SSIM_BORDER:-SSIM_BORDER]
    if bool(mask.all()) or not bool(inner.any()):
        raise UserError(
            f"{name} leaves nothing to measure: {int(mask.sum())} of {mask.numel()} pixels are missing; expected some "
            f"that are known, and some missing ones {SSIM_BORDER} pixels or more from the border"
        )


def _names(images: ImageSet) -> Sequence[str]:
    """The file of each image, relative to the data, in the set's order."""
    if images.source == "builtin":
        counts = np.bincount(images.labels, minlength=len(images.classes))
        return [f"{name}/{i}" for name, count in zip(images.classes, counts, strict=True) for i in range(count)]
    with find_source(Path(images.source).expanduser()).open() as contents:
        skipped = [reason.partition(": ")[0] for reason in images.skipped]
        names = [name for _, name in contents.files if name not in skipped]
    if len(names) != len(images):
        raise UserError(
            f"{images.source} has {len(names)} images that should be readable, but {len(images)} were read; "
            "it changed meanwhile, or holds names with ': ' in them"
        )
    return names


def _hash(pixels: Tensor) -> str:
    """SHA-256 (hex) of the bytes of uint8 or bool pixels."""
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


def _file(folder: Path) -> Path:
    return folder / "manifest.json"
