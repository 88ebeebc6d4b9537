"""Real images as one uint8 array: read from where they lie, decoded once, kept in a cache.

Every source (folder, zip, CIFAR-10's binary files, the built-in photographs) becomes the same `ImageSet`. The project's
only conversion between uint8 and [-1, 1] lives here too, and so does the order in which training sees the images.
"""

import contextlib
import difflib
import functools
import hashlib
import io
import json
import logging
import os
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

_log = logging.getLogger(__name__)

_CACHE_FORMAT = 1  # raise it when decoding changes, so that no older cache is taken for a new one
_IMAGE_SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jfif",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
_MAX_FILE_BYTES = 2**28  # no photograph is larger, and an archive may claim any size for a member
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_RECORD = 1 + 3 * 32 * 32  # label, then the red, green and blue planes
_KINDS = (
    "'builtin', a folder of class folders, a folder of images, a .zip of either, "
    "or CIFAR-10's binary version (its folder or its .tar.gz)"
)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled square images, in memory or memory-mapped.

    Attributes:
        images: RGB pixels, uint8 [N, 3, S, S]; a read-only `np.memmap` where they are too large for memory.
        labels: int64 [N], indices into `classes`.
        classes: Class names, sorted; each has at least one image.
        source: What the user named.
        fingerprint: SHA-256 (hex) of pixels, labels and class names: equal content, equal fingerprint.
        skipped: "path: reason" of every file that is not among the images, and of every class left without one.
        note: What a reader of results must know about the data; empty if nothing.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    source: str
    fingerprint: str
    skipped: tuple[str, ...] = ()
    note: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Copy the images at `indices` (int [B]) and their labels: uint8 [B, 3, S, S] and int64 [B]."""
        return torch.from_numpy(np.asarray(self.images[indices])), torch.from_numpy(self.labels[indices])


def to_float(images: Tensor) -> Tensor:
    """Map uint8 pixels in [0, 255] to float32 in [-1, 1]; any shape."""
    if images.dtype != torch.uint8:
        raise ValueError(f"got {images.dtype} pixels, expected torch.uint8 in [0, 255]; floats are converted already")
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Map floats in [-1, 1] to uint8 in [0, 255], rounded to nearest; what lies outside is clamped. Any shape."""
    if not images.is_floating_point():
        raise ValueError(f"got {images.dtype} pixels, expected floats in [-1, 1]; integers are not converted")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def shuffled_indices(num_images: int, start: int, count: int, *, seed: int) -> np.ndarray:
    """Positions `start` .. `start + count - 1` of the endless stream of shuffled epochs.

    Epoch e is a permutation of all images drawn from (seed, e) alone, so any position can be entered without replaying
    those before it, and the stream does not depend on how it is cut into batches.

    Args:
        num_images: Length of an epoch, at least 1.
        start: Position in images seen, at least 0.
        count: How many, at least 0; may straddle epochs.
        seed: At least 0.
    Returns:
        int64 [count], each in [0, num_images).
    """
    if num_images < 1 or start < 0 or count < 0 or seed < 0:
        raise ValueError(
            f"got num_images={num_images}, start={start}, count={count}, seed={seed}; "
            "expected at least one image and nothing negative"
        )
    pieces = [np.empty(0, np.int64)]
    stop = start + count
    while start < stop:
        epoch, offset = divmod(start, num_images)
        pieces.append(_permutation(num_images, seed, epoch)[offset : offset + stop - start])
        start += len(pieces[-1])
    return np.concatenate(pieces)


@functools.lru_cache(maxsize=2)  # a batch needs the current epoch and, at its end, the next
def _permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    # NumPy promises the raw stream of a bit generator for ever, but not what Generator.permutation makes of it.
    keys = np.random.PCG64([seed, epoch]).random_raw(num_images)
    return np.argsort(keys, kind="stable").astype(np.int64)


def load_images(
    source: str | Path,
    image_size: int,
    *,
    cache_dir: Path | None = None,
    max_memory_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Load images as squares of `image_size` pixels, decoding them only the first time.

    Larger sides are cropped at the centre, and the square is resized with Lanczos unless it has the size already. Files
    that cannot be read are listed in `skipped`. Class folders are searched to any depth; where there are some, images
    beside them are skipped. Hidden files are ignored.

    Args:
        source: "builtin"; a folder of class folders; a folder of images (one class); a .zip of either; the folder or
            the .tar.gz of CIFAR-10's binary version (its training images). A `Path` is always a place, never "builtin".
        image_size: Side in pixels, at least 1.
        cache_dir: Where decoded pixels are kept; by default $ATTNORM_CACHE, $XDG_CACHE_HOME/attnorm or
            ~/.cache/attnorm. If it cannot be written, images are decoded into memory each time.
        max_memory_bytes: Pixels beyond this stay memory-mapped; by default half of the memory that is available.
        progress: Called with (done, total) after each decoded file; not called where the cache is used.
    Raises:
        ValueError: If the source does not exist, is of another kind, or holds no readable image.
    """
    if image_size < 1:
        raise ValueError(f"got image_size={image_size}, expected at least 1 pixel")
    if source == "builtin":
        from attnorm.data.builtin import builtin_images

        return builtin_images(image_size)

    path = Path(source).expanduser()
    found = _find(path)
    if max_memory_bytes is None:
        max_memory_bytes = _available_memory() // 2
    key = json.dumps([_CACHE_FORMAT, str(path.resolve()), image_size, found.stamp])
    folder = cache_dir or _default_cache_dir()
    stem = folder / f"images{image_size}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"

    images = _read_cache(stem, str(source), image_size, max_memory_bytes)
    if images is None:
        with found.open() as contents:
            try:
                _write_cache(stem, contents, str(source), image_size, progress)
                images = _read_cache(stem, str(source), image_size, max_memory_bytes)
            except OSError as error:
                _log.warning("decoded images cannot be kept in %s (%s): decoding into memory", folder, error)
            if images is None:
                images = _decode_into_memory(contents, str(source), image_size, max_memory_bytes, progress)
    return images


@dataclass(frozen=True)
class _Contents:
    """An open source: `load(i)` decodes file `names[i]` of class `class_names[i]` to an RGB image of any size."""

    names: list[str]
    class_names: list[str]
    load: Callable[[int], Image.Image]
    expected_classes: frozenset[str] = frozenset()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    """A source not opened yet; `stamp` is JSON that changes whenever the content may have changed."""

    stamp: list[Any]
    open: Callable[[], AbstractContextManager[_Contents]]


def _find(path: Path) -> _Source:
    if path.is_dir():
        if list(path.glob("data_batch_*.bin")):
            return _cifar_folder(path)
        if (path / "data_batch_1").exists():
            raise ValueError(_pickle_refusal(path))
        return _folder(path)
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, [*siblings, "builtin"], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{path} does not exist.{hint} Expected {_KINDS}.")
    if zipfile.is_zipfile(path):
        return _zip(path)
    if tarfile.is_tarfile(path):
        return _cifar_archive(path)
    raise ValueError(f"{path} is neither a folder nor an archive that can be read; expected {_KINDS}")


def _folder(root: Path) -> _Source:
    entries: list[str] = []
    stamp: list[Any] = []
    for directory, folders, files in os.walk(root, followlinks=True):
        here = Path(directory)
        # A link to a folder that contains it would be walked for ever.
        real = here.resolve()
        folders[:] = [name for name in folders if not real.is_relative_to((here / name).resolve())]
        prefix = "" if here == root else f"{here.relative_to(root).as_posix()}/"
        entries += [f"{prefix}{name}/" for name in folders]
        entries += [f"{prefix}{name}" for name in files]
    for name in sorted(filter(_is_visible, entries)):
        # Only the presence of other files matters: editing a read-me must not cost a decoding.
        stamp.append([name, *_size_and_time(root / name)] if _is_image_name(name) else [name])

    @contextlib.contextmanager
    def open_folder() -> Iterator[_Contents]:
        def read(name: str) -> bytes:
            file = root / name
            if file.exists() and not file.is_file():
                raise ValueError("not a regular file")
            _check_size(file.stat().st_size)
            return file.read_bytes()

        yield _arrange(entries, read, root.resolve().name)

    return _Source(["folder", *stamp], open_folder)


def _zip(path: Path) -> _Source:
    @contextlib.contextmanager
    def open_zip() -> Iterator[_Contents]:
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is a damaged zip archive ({error}); copy or download it again") from error
        with archive:

            def read(name: str) -> bytes:
                _check_size(archive.getinfo(name).file_size)
                return archive.read(name)

            yield _arrange(archive.namelist(), read, path.stem, strip_root=True)

    return _Source(["zip", *_size_and_time(path)], open_zip)


def _arrange(
    entries: Iterable[str], read: Callable[[str], bytes], root_name: str, *, strip_root: bool = False
) -> _Contents:
    """Sort paths (folders end in "/") into classes: the first folder's name, or `root_name` where all are flat."""
    visible = sorted(set(filter(_is_visible, entries)))
    images = [name for name in visible if _is_image_name(name)]
    others = [name for name in visible if not _is_image_name(name) and not name.endswith("/")]
    skipped = [f"{name}: not an image file, by its name" for name in others]

    prefix = ""
    roots = {name.partition("/")[0] for name in images}
    if strip_root and len(roots) == 1 and all("/" in name for name in images):
        root_name = roots.pop()
        prefix = f"{root_name}/"
    class_of = {name: _first_folder(name.removeprefix(prefix)) for name in images}
    if any(class_of.values()):
        skipped += [f"{name}: lies beside the class folders, in none" for name in images if not class_of[name]]
        pairs = sorted((class_name, name) for name, class_name in class_of.items() if class_name)
    else:
        pairs = [(root_name, name) for name in images]

    names = [name for _, name in pairs]
    folders = {_first_folder(name.removeprefix(prefix)) for name in visible if name.startswith(prefix)} - {""}
    return _Contents(
        names,
        [class_name for class_name, _ in pairs],
        lambda index: _decode(read(names[index])),
        frozenset(folders),
        tuple(skipped),
    )


def _cifar_folder(root: Path) -> _Source:
    files = [*sorted(root.glob("data_batch_*.bin")), root / "batches.meta.txt"]

    @contextlib.contextmanager
    def open_files() -> Iterator[_Contents]:
        yield _cifar_contents({file.name: file.read_bytes() for file in files if file.exists()}, root)

    return _Source(["cifar10", *([file.name, *_size_and_time(file)] for file in files)], open_files)


def _cifar_archive(path: Path) -> _Source:
    @contextlib.contextmanager
    def open_archive() -> Iterator[_Contents]:
        files: dict[str, bytes] = {}
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    name = PurePosixPath(member.name).name
                    if member.isfile() and name == "data_batch_1":
                        raise ValueError(_pickle_refusal(path))
                    if member.isfile() and (_is_cifar_batch(name) or name == "batches.meta.txt"):
                        _check_size(member.size)
                        stream = archive.extractfile(member)
                        assert stream is not None
                        files[name] = stream.read()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{path} is a damaged archive ({error}); download it again") from error
        if not any(map(_is_cifar_batch, files)):
            raise ValueError(
                f"{path} holds no data_batch_*.bin; of tar archives only CIFAR-10's binary version is read. "
                "Unpack any other and name its folder."
            )
        yield _cifar_contents(files, path)

    return _Source(["cifar10 archive", *_size_and_time(path)], open_archive)


def _cifar_contents(files: dict[str, bytes], source: Path) -> _Contents:
    meta = files.pop("batches.meta.txt", b"").decode("utf-8", "replace").splitlines()
    classes = tuple(line.strip() for line in meta if line.strip()) or _CIFAR10_CLASSES
    names: list[str] = []
    for name, data in sorted(files.items()):
        if not data or len(data) % _CIFAR10_RECORD:
            raise ValueError(
                f"{name} in {source} has {len(data)} bytes, expected a multiple of {_CIFAR10_RECORD}; download it again"
            )
        names += [f"{name}[{index}]" for index in range(len(data) // _CIFAR10_RECORD)]
    records = np.frombuffer(b"".join(data for _, data in sorted(files.items())), np.uint8).reshape(-1, _CIFAR10_RECORD)
    labels, pixels = records[:, 0], records[:, 1:].reshape(-1, 3, 32, 32)
    if labels.max() >= len(classes):
        raise ValueError(
            f"{source} has label {labels.max()} but only {len(classes)} class names; "
            "only CIFAR-10's binary version is read, so check that it is that one and download it again"
        )
    return _Contents(
        names,
        [classes[label] for label in labels],
        lambda index: Image.fromarray(np.ascontiguousarray(pixels[index].transpose(1, 2, 0))),
        frozenset(classes),
    )


def _pickle_refusal(path: Path) -> str:
    return (
        f"{path} is CIFAR-10's Python version, which is pickled; pickles can run any code and are never read. "
        "Take the binary version instead: cifar-10-binary.tar.gz, as it is or unpacked."
    )


def _is_cifar_batch(name: str) -> bool:
    return name.startswith("data_batch_") and name.endswith(".bin")


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(_IMAGE_SUFFIXES)


def _is_visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _first_folder(name: str) -> str:
    folder, slash, _ = name.partition("/")
    return folder if slash else ""


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:  # a dangling link, say: decoding will name it
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _check_size(num_bytes: int) -> None:
    if num_bytes > _MAX_FILE_BYTES:
        raise ValueError(f"{num_bytes} bytes, more than the {_MAX_FILE_BYTES} that are read from one file")


def _decode(data: bytes) -> Image.Image:
    """An image file's first frame, upright, as 8-bit RGB over white."""
    with Image.open(io.BytesIO(data)) as file:
        image: Image.Image = ImageOps.exif_transpose(file)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"integer pixels from {grey.min()} to {grey.max()}, expected 0 to 65535")
        image = Image.fromarray(np.rint(grey / 257).astype(np.uint8))  # Pillow itself would clip at 255
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def _square(image: Image.Image, image_size: int) -> np.ndarray:
    """Centre crop and resize an RGB image: uint8 [3, S, S]."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != image_size:
        image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1)


@dataclass(frozen=True)
class _Labelling:
    labels: np.ndarray
    classes: tuple[str, ...]
    skipped: tuple[str, ...]


def _decode_all(
    contents: _Contents,
    source: str,
    image_size: int,
    write: Callable[[bytes], object],
    progress: Callable[[int, int], None] | None,
) -> _Labelling:
    """Decode every file in order on a few threads, passing each one's pixels to `write`."""

    def pixels_or_reason(index: int) -> bytes | str:
        try:
            return _square(contents.load(index), image_size).tobytes()
        except UnidentifiedImageError:
            return "not an image that can be read"
        except Exception as error:  # a damaged file makes decoders fail in any way at all
            return (isinstance(error, OSError) and error.strerror) or f"{error}" or type(error).__name__

    kept: list[str] = []
    skipped = list(contents.skipped)
    total = len(contents.names)
    workers = min(8, os.cpu_count() or 1)
    block = 64 * workers  # a whole map at once would let the threads run ahead and fill the memory
    # Filters are the process's, so they are set once, here, and not by the threads.
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, total, block):
            indices = range(start, min(start + block, total))
            for index, result in zip(indices, pool.map(pixels_or_reason, indices), strict=True):
                if isinstance(result, str):
                    skipped.append(f"{contents.names[index]}: {result}")
                else:
                    write(result)
                    kept.append(contents.class_names[index])
                if progress:
                    progress(index + 1, total)

    if not kept:
        reasons = f" Skipped {len(skipped)}, first: {'; '.join(skipped[:3])}." if skipped else ""
        raise ValueError(f"no readable image in {source}.{reasons} Expected {_KINDS}.")
    classes = sorted(set(kept))
    missing = sorted(contents.expected_classes.difference(classes))
    skipped += [f"{name}: no readable image, so it is not a class" for name in missing]
    index_of = {name: index for index, name in enumerate(classes)}
    return _Labelling(np.array([index_of[name] for name in kept], np.int64), tuple(classes), tuple(skipped))


def _decode_into_memory(
    contents: _Contents,
    source: str,
    image_size: int,
    max_memory_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> ImageSet:
    needed = len(contents.names) * 3 * image_size**2
    if needed > max_memory_bytes:
        raise ValueError(
            f"{source} needs {needed} bytes, more than the {max_memory_bytes} allowed in memory, and the cache folder "
            "cannot be written; name one that can, with ATTNORM_CACHE, or choose a smaller image size"
        )
    buffer = bytearray()
    labelling = _decode_all(contents, source, image_size, buffer.extend, progress)
    images = np.frombuffer(buffer, np.uint8).reshape(-1, 3, image_size, image_size)
    return _image_set(images, labelling, source)


def fingerprint(images: np.ndarray, labels: np.ndarray, classes: Iterable[str]) -> str:
    """SHA-256 (hex) of images (uint8 [N, 3, S, S], which may be memory-mapped), labels (int [N]) and class names."""
    digest = hashlib.sha256(json.dumps([images.shape, list(classes)]).encode())
    digest.update(labels.astype("<i8").tobytes())
    for start in range(0, len(images), 256):
        digest.update(images[start : start + 256].tobytes())
    return digest.hexdigest()


def _image_set(images: np.ndarray, labelling: _Labelling, source: str) -> ImageSet:
    digest = fingerprint(images, labelling.labels, labelling.classes)
    return ImageSet(images, labelling.labels, labelling.classes, source, digest, labelling.skipped)


def _default_cache_dir() -> Path:
    if folder := os.environ.get("ATTNORM_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnorm"


def _available_memory() -> int:
    """Bytes that can be allocated without swapping, as the system estimates them; 4 GiB where it does not."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**32


def _write_cache(
    stem: Path,
    contents: _Contents,
    source: str,
    image_size: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Decode into STEM.npy (pixels) and STEM.json (all else).

    Any number of processes may do so at once: each replaces whole files by equal ones.
    """

    def write_header(file: io.BufferedIOBase, num_images: int) -> int:
        file.seek(0)
        shape = (num_images, 3, image_size, image_size)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return file.tell()

    stem.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(stem.with_suffix(".npy")) as file:
        start = write_header(file, len(contents.names))
        labelling = _decode_all(contents, source, image_size, file.write, progress)
        # How many can be read is known only now. NumPy pads its header so that the first axis may change in place.
        assert write_header(file, len(labelling.labels)) == start
        file.flush()
        pixels = np.lib.format.open_memmap(file.name, mode="r")
        record = {
            "fingerprint": fingerprint(pixels, labelling.labels, labelling.classes),
            "probe": _probe(pixels, labelling.labels, labelling.classes),
            "classes": labelling.classes,
            "skipped": labelling.skipped,
            "labels": labelling.labels.tolist(),
        }
    with _replacing(stem.with_suffix(".json")) as file:
        file.write(json.dumps(record).encode())


def _read_cache(stem: Path, source: str, image_size: int, max_memory_bytes: int) -> ImageSet | None:
    """What `_write_cache` left, or None where there is nothing or where it is damaged."""
    try:
        text = stem.with_suffix(".json").read_bytes()
    except OSError:
        return None
    try:
        record = json.loads(text)
        classes, labels = tuple(record["classes"]), np.array(record["labels"], np.int64)
        images: np.ndarray = np.lib.format.open_memmap(stem.with_suffix(".npy"), mode="r")
        if images.dtype != np.uint8 or images.shape != (len(labels), 3, image_size, image_size):
            raise ValueError(f"{images.dtype} {images.shape} for {len(labels)} labels")
        if images.nbytes <= max_memory_bytes:
            images = np.array(images)
            intact = fingerprint(images, labels, classes) == record["fingerprint"]
        else:
            # Reading all of it would take minutes at every start.
            intact = _probe(images, labels, classes) == record["probe"]
        if not intact:
            raise ValueError("its content has changed")
        return ImageSet(images, labels, classes, source, record["fingerprint"], tuple(record["skipped"]))
    except Exception as error:  # whatever the damage, the remedy is the same
        _log.warning("decoding %s again: its cache %s is damaged (%s)", source, stem.with_suffix(".npy"), error)
        return None


def _probe(images: np.ndarray, labels: np.ndarray, classes: Iterable[str]) -> str:
    sample = np.unique(np.linspace(0, len(images) - 1, 256).astype(np.int64))
    return fingerprint(images[sample], labels, classes)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A binary file that becomes `path` when the block ends well, and vanishes when it does not."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.stem}-", suffix=".tmp", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
