"""Decoding a whole source once: its pixels are kept in a cache folder, as STEM.npy, and all else as STEM.json."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from attnorm.data.sources import KINDS, Contents, find_source
from attnorm.system.files import default_cache_dir, write_atomically

_log = logging.getLogger(__name__)

_FORMAT = 3  # raise it when decoding changes, so that no older cache is taken for a new one

Progress = Callable[[int, int], None]
Fit = Literal["square", "street-view"]


class _Labelling(NamedTuple):
    labels: np.ndarray
    classes: tuple[str, ...]
    skipped: tuple[str, ...]
    unread: list[int]  # files that the system did not give, by their numbers: no word on what they hold


@dataclass(frozen=True, eq=False)
class Decoded:
    """What `ImageSet` holds of a source, under the same names."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    skipped: tuple[str, ...]
    fingerprint: str


class _Frame(NamedTuple):
    """What every image of a source becomes: `cut` makes uint8 [3, S, width] of an RGB image, S high."""

    width: int
    cut: Callable[[Image.Image], np.ndarray]


def load_decoded(
    source: str, image_size: int, fit: Fit, cache_dir: Path | None, max_memory_bytes: int, progress: Progress | None
) -> Decoded:
    """Read the images of `source` from the cache, or decode them; arguments as for `load_images`."""
    path = Path(source).expanduser()
    found = find_source(path)
    folder = cache_dir or default_cache_dir()
    key = json.dumps([_FORMAT, str(path.resolve()), image_size, fit, found.stamp])
    stem = folder / f"images{image_size}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    kept = _read(stem, source, max_memory_bytes)
    if kept and not kept[1]:
        return kept[0]

    with found.open() as contents:
        if kept and not any(_is_given(contents, index) for index in kept[1]):
            return kept[0]
        frame = _street_view_frame(contents, source, image_size) if fit == "street-view" else _square_frame(image_size)
        decode = functools.partial(_decode_all, contents, source, frame, progress)
        try:
            _write(stem, (3, image_size, frame.width), decode)
            if kept := _read(stem, source, max_memory_bytes):
                return kept[0]
        except OSError as error:
            _log.warning("decoded images cannot be kept in %s (%s): decoding into memory", folder, error)

        needed = len(contents.files) * 3 * image_size * frame.width
        if needed > max_memory_bytes:
            raise ValueError(
                f"{source} needs {needed} bytes, more than the {max_memory_bytes} allowed in memory, and the cache "
                "folder cannot be written; name one that can, with ATTNORM_CACHE, or choose a smaller image size"
            )
        buffer = bytearray()
        labels, classes, skipped, _ = decode(buffer.extend)
        images = np.frombuffer(buffer, np.uint8).reshape(-1, 3, image_size, frame.width)
        return Decoded(images, labels, classes, skipped, fingerprint(images, labels, classes))


def fingerprint(images: np.ndarray, labels: np.ndarray, classes: Iterable[str]) -> str:
    """SHA-256 (hex) of images (uint8 [N, 3, H, W], which may be memory-mapped), labels (int [N]) and class names."""
    digest = hashlib.sha256(json.dumps([images.shape, list(classes)]).encode())
    digest.update(labels.astype("<i8").tobytes())
    for start in range(0, len(images), 256):
        digest.update(images[start : start + 256].tobytes())
    return digest.hexdigest()


def _probe(images: np.ndarray, labels: np.ndarray, classes: Iterable[str]) -> str:
    sample = np.unique(np.linspace(0, len(images) - 1, 256).astype(np.int64))
    return fingerprint(images[sample], labels, classes)


def _decode_all(
    contents: Contents, source: str, frame: _Frame, progress: Progress | None, write: Callable[[bytes], object]
) -> _Labelling:
    """Decode every file in order on a few threads, passing each one's pixels to `write`."""

    def pixels_or_reason(index: int) -> bytes | Exception:
        try:
            return frame.cut(contents.load(index)).tobytes()
        except Exception as error:  # a damaged file makes decoders fail in any way at all
            return error

    kept: list[str] = []
    unread: list[int] = []
    skipped = [*contents.skipped]
    total = len(contents.files)
    workers = min(8, os.cpu_count() or 1)
    block = 64 * workers  # a whole map at once would let the threads run ahead and fill the memory
    # Filters are the process's, so they are set once, here, and not by the threads.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, total, block):
            results = pool.map(pixels_or_reason, range(start, min(start + block, total)))
            for index, result in enumerate(results, start):
                class_name, name = contents.files[index]
                if isinstance(result, Exception):
                    skipped.append(f"{name}: {_reason(result)}")
                    if _is_the_systems(result):
                        unread.append(index)
                else:
                    write(result)
                    kept.append(class_name)
                if progress:
                    progress(index + 1, total)

    if not kept:
        reasons = f" Skipped {len(skipped)}, first: {'; '.join(skipped[:3])}." if skipped else ""
        raise ValueError(f"no readable image in {source}.{reasons} Expected {KINDS}.")
    classes = sorted(set(kept))
    missing = sorted(contents.expected_classes.difference(classes))
    skipped += [f"{name}: no readable image, so it is not a class" for name in missing]
    index_of = {name: index for index, name in enumerate(classes)}
    return _Labelling(np.array([index_of[name] for name in kept], np.int64), tuple(classes), tuple(skipped), unread)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image that can be read"
    return (isinstance(error, OSError) and error.strerror) or f"{error}" or type(error).__name__


def _is_the_systems(error: Exception) -> bool:
    """Whether a file could not be had (permissions, a share that is away, no memory), whatever it holds."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def _is_given(contents: Contents, index: int) -> bool:
    try:
        contents.load(index)
    except Exception as error:
        return not _is_the_systems(error)
    return True


def _square_frame(image_size: int) -> _Frame:
    def cut(image: Image.Image) -> np.ndarray:
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side))
        # Pillow does not resample what has the size already.
        return np.asarray(image.resize((image_size, image_size), Image.Resampling.LANCZOS)).transpose(2, 0, 1)

    return _Frame(image_size, cut)


# Originals of Paris StreetView, and the smaller version that circulates: width and height in pixels.
STREET_VIEW_SIZES = (936, 537), (227, 227)


def _street_view_frame(contents: Contents, source: str, image_size: int) -> _Frame:
    """The first readable file tells which version it is; files of another size are then skipped by name.

    936x537 is reduced by area to S high, its width kept: a square cut from the result is a 537 square reduced to S,
    without keeping four times the pixels. 227x227 is enlarged bicubically to S x S.
    """
    size = next((size for index in range(len(contents.files)) if (size := _size_of(contents, index))), None)
    if size not in (None, *STREET_VIEW_SIZES):
        raise ValueError(
            f"{source} is not Paris StreetView: its first image is {size[0]}x{size[1]}; expected 936x537 or 227x227. "
            "Read other photographs with data.fit=square"
        )
    width, height = size or STREET_VIEW_SIZES[0]
    kept_width = image_size + (image_size * width // height - image_size) // 2 * 2  # even room beside a centre square
    margin = (width - kept_width * height / image_size) / 2  # left off, so that nothing is distorted
    rows = _area_weights(height, image_size, 0.0)
    columns = _area_weights(width, kept_width, margin)

    def cut(image: Image.Image) -> np.ndarray:
        if image.size != (width, height):
            raise ValueError(f"{image.width}x{image.height} pixels, unlike the others of {width}x{height}")
        if image_size >= height:
            box = (margin, 0.0, width - margin, float(height))
            return np.asarray(image.resize((kept_width, image_size), Image.Resampling.BICUBIC, box)).transpose(2, 0, 1)
        planes = np.asarray(image, np.float32).transpose(2, 0, 1)
        return np.rint(rows @ planes @ columns.T).clip(0, 255).astype(np.uint8)

    return _Frame(kept_width, cut)


def _area_weights(length: int, size: int, margin: float) -> np.ndarray:
    """float32 [size, length]: by how much each of `length` pixels counts in the mean over each of `size` equal parts of
    what is between the margins. Pillow's box filter counts pixels as a whole or not at all.
    """
    edges = np.linspace(margin, length - margin, size + 1)
    pixels = np.arange(length)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (covered.clip(0) / (edges[1] - edges[0])).astype(np.float32)


def _size_of(contents: Contents, index: int) -> tuple[int, int] | None:
    try:
        return contents.load(index).size
    except Exception:  # reported by name when all are decoded
        return None


def _write(stem: Path, shape: tuple[int, int, int], decode: Callable[[Callable[[bytes], object]], _Labelling]) -> None:
    """Decode into the cache. Any number of processes may do so at once: each replaces whole files by equal ones."""
    record: dict[str, Any] = {}

    def write_header(file: BinaryIO, num_images: int) -> int:
        file.seek(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        return file.tell()

    def write_images(path: Path) -> None:
        with path.open("wb") as file:
            start = write_header(file, 0)
            labels, classes, skipped, unread = decode(file.write)
            # How many can be read is known only now. NumPy pads its header so that the first axis may change in place.
            end = write_header(file, len(labels))
        assert end == start
        images = np.lib.format.open_memmap(path, mode="r")
        record.update(
            fingerprint=fingerprint(images, labels, classes),
            probe=_probe(images, labels, classes),
            classes=classes,
            skipped=skipped,
            unread=unread,
            labels=labels.tolist(),
        )

    stem.parent.mkdir(parents=True, exist_ok=True)
    _remove_debris(stem.parent)
    private = 0o600  # whoever may not read the source may not read it here
    write_atomically(stem.with_suffix(".npy"), write_images, mode=private)
    write_atomically(stem.with_suffix(".json"), lambda path: path.write_text(json.dumps(record)), mode=private)


def _read(stem: Path, source: str, max_memory_bytes: int) -> tuple[Decoded, list[int]] | None:
    """What `_write` left, and the files that could not be had then; None where there is nothing or it is damaged."""
    if not os.path.exists(stem.with_suffix(".json")):
        return None
    try:
        record = json.loads(stem.with_suffix(".json").read_bytes())
        classes, labels = tuple(record["classes"]), np.array(record["labels"], np.int64)
        images: np.ndarray = np.lib.format.open_memmap(stem.with_suffix(".npy"), mode="r")
        if images.nbytes <= max_memory_bytes:
            images = np.array(images)
            intact = fingerprint(images, labels, classes) == record["fingerprint"]
        else:
            # Reading all of it would take minutes at every start.
            intact = _probe(images, labels, classes) == record["probe"]
        if not intact:
            raise ValueError("its content has changed")
        return Decoded(images, labels, classes, tuple(record["skipped"]), record["fingerprint"]), record["unread"]
    except Exception as error:  # whatever the damage, the remedy is the same
        _log.warning("decoding %s again: its cache %s is damaged (%s)", source, stem.with_suffix(".npy"), error)
        return None


def _remove_debris(folder: Path) -> None:
    """Delete what killed processes left of `write_atomically`: a living one has written to its file within the day."""
    name = f"images*-{'[0-9a-f]' * 32}"  # the folder may hold other people's files, too
    for file in [*folder.glob(f".{name}.*.tmp"), *folder.glob(f"{name}-*.tmp")]:  # the latter of older versions
        with contextlib.suppress(OSError):  # another process may be doing the same
            if time.time() - file.stat().st_mtime > 24 * 60 * 60:
                file.unlink()
