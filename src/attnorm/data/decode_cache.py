"""Decoding a whole source once: its pixels are kept in a cache folder, as STEM.npy, and all else as STEM.json."""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image

from attnorm.data.decoding import Decoders, Frame, is_the_systems, reason
from attnorm.data.sources import KINDS, Contents, find_source
from attnorm.system.files import default_cache_dir, write_atomically

_log = logging.getLogger(__name__)

_BLOCK = 256  # images that are hashed at once
_MANY = 2000  # files for which it pays to start processes
_MOST_WORKERS = 16
_FORMAT = 3  # raise it when decoding changes, so that no older cache is taken for a new one

Progress = Callable[[int, int], None]
Fit = Literal["square", "street-view"]


class _Labelling(NamedTuple):
    labels: np.ndarray
    classes: tuple[str, ...]
    skipped: tuple[str, ...]
    num_enlarged: int
    unread: list[int]  # files that the system did not give, by their numbers: no word on what they hold


@dataclass(frozen=True, eq=False)
class Decoded:
    """What `ImageSet` holds of a source, under the same names."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    skipped: tuple[str, ...]
    fingerprint: str
    num_enlarged: int = 0  # of the images: those whose files are smaller; 0 in caches of earlier versions


def load_decoded(
    source: str, image_size: int, fit: Fit, cache_dir: Path | None, max_memory_bytes: int, progress: Progress | None
) -> Decoded:
    """Read the images of `source` from the cache, or decode them; arguments as for `load_images`."""
    path = Path(source).expanduser()
    folder = cache_dir or default_cache_dir()
    found = find_source(path, folder)
    key = json.dumps([_FORMAT, str(path.resolve()), image_size, fit, found.stamp])
    stem = folder / f"images{image_size}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    kept = _read(stem, source, max_memory_bytes)
    if kept and not kept[1]:
        return kept[0]

    with found.open() as contents:
        if kept and not any(_is_given(contents, index) for index in kept[1]):
            return kept[0]
        frame = _street_view_frame(contents, source, image_size) if fit == "street-view" else Frame(image_size)
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
        labels, classes, skipped, num_enlarged, _ = decode(buffer.extend)
        images = np.frombuffer(buffer, np.uint8).reshape(-1, 3, image_size, frame.width)
        return Decoded(images, labels, classes, skipped, fingerprint(images, labels, classes), num_enlarged)


def fingerprint(images: np.ndarray, labels: np.ndarray, classes: Iterable[str]) -> str:
    """SHA-256 (hex) of images (uint8 [N, 3, H, W], which may be memory-mapped), labels (int [N]) and class names."""
    blocks = (images[start : start + _BLOCK].tobytes() for start in range(0, len(images), _BLOCK))
    return _hash(images.shape, labels, classes, blocks)


def _hash(shape: tuple[int, ...], labels: np.ndarray, classes: Iterable[str], pixels: Iterable[bytes]) -> str:
    digest = hashlib.sha256(json.dumps([shape, list(classes)]).encode())
    digest.update(labels.astype("<i8").tobytes())
    for block in pixels:
        digest.update(block)
    return digest.hexdigest()


def _probe(images: np.ndarray, labels: np.ndarray, classes: Iterable[str]) -> str:
    sample = np.unique(np.linspace(0, len(images) - 1, 256).astype(np.int64))
    return fingerprint(images[sample], labels, classes)


def _decode_all(
    contents: Contents, source: str, frame: Frame, progress: Progress | None, write: Callable[[bytes], object]
) -> _Labelling:
    """Decode every file in order, passing each one's pixels to `write`: on threads, and of many files in processes, one
    a thread. Neither changes a byte.
    """
    kept: list[str] = []
    unread: list[int] = []
    num_enlarged = 0
    skipped = [*contents.skipped]
    total = len(contents.files)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(_MOST_WORKERS, cores or 1)
    block = 64 * workers  # a whole map at once would let the threads run ahead and fill the memory
    with contextlib.ExitStack() as stack:
        # Filters are the process's, so they are set once, here, and not by the threads.
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        is_large = contents.read is not None and total >= _MANY
        decoders = stack.enter_context(Decoders(frame, workers)) if is_large else None
        pool = ThreadPoolExecutor(workers)
        stack.callback(pool.shutdown, cancel_futures=True)

        def pixels_or_reason(index: int) -> tuple[bytes, bool] | Exception:
            try:
                if decoders is None or contents.read is None:
                    image = contents.load(index)
                    return frame.cut(image).tobytes(), frame.enlarges(image)
                return decoders.pixels(contents.read(index))
            except Exception as error:  # a damaged file makes decoders fail in any way at all
                return error

        for start in range(0, total, block):
            results = pool.map(pixels_or_reason, range(start, min(start + block, total)))
            for index, result in enumerate(results, start):
                class_name, name = contents.files[index]
                if isinstance(result, Exception):
                    skipped.append(f"{name}: {reason(result)}")
                    if is_the_systems(result):
                        unread.append(index)
                else:
                    pixels, is_enlarged = result
                    write(pixels)
                    kept.append(class_name)
                    num_enlarged += is_enlarged
                if progress:
                    progress(index + 1, total)

    if not kept:
        reasons = f" Skipped {len(skipped)}, first: {'; '.join(skipped[:3])}." if skipped else ""
        raise ValueError(f"no readable image in {source}.{reasons} Expected {KINDS}.")
    classes = sorted(set(kept))
    missing = sorted(contents.expected_classes.difference(classes))
    skipped += [f"{name}: no readable image, so it is not a class" for name in missing]
    index_of = {name: index for index, name in enumerate(classes)}
    labels = np.array([index_of[name] for name in kept], np.int64)
    return _Labelling(labels, tuple(classes), tuple(skipped), num_enlarged, unread)


def _is_given(contents: Contents, index: int) -> bool:
    try:
        contents.load(index)
    except Exception as error:
        return not is_the_systems(error)
    return True


# Originals of Paris StreetView, and the smaller version that circulates: width and height in pixels.
STREET_VIEW_SIZES = (936, 537), (227, 227)


def _street_view_frame(contents: Contents, source: str, image_size: int) -> Frame:
    """The first readable file tells which version it is; files of another size are then skipped by name."""
    size = next((size for index in range(len(contents.files)) if (size := _size_of(contents, index))), None)
    if size not in (None, *STREET_VIEW_SIZES):
        raise ValueError(
            f"{source} is not Paris StreetView: its first image is {size[0]}x{size[1]}; expected 936x537 or 227x227. "
            "Read other photographs with data.fit=square"
        )
    return Frame(image_size, size or STREET_VIEW_SIZES[0])


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
            labels, classes, skipped, num_enlarged, unread = decode(file.write)
            # How many can be read is known only now. NumPy pads its header so that the first axis may change in place.
            end = write_header(file, len(labels))
        assert end == start
        images = np.lib.format.open_memmap(path, mode="r")
        with path.open("rb") as file:  # pages of a mapped file would count as this process's memory
            file.seek(start)
            blocks = iter(lambda: file.read(_BLOCK * math.prod(shape)), b"")
            whole = _hash(images.shape, labels, classes, blocks)
        record.update(
            fingerprint=whole,
            probe=_probe(images, labels, classes),
            classes=classes,
            skipped=skipped,
            num_enlarged=num_enlarged,
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
        found = tuple(record["skipped"]), record["fingerprint"], record.get("num_enlarged", 0)
        return Decoded(images, labels, classes, *found), record["unread"]
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
