"""Real images as one uint8 array, whatever they come from, decoded once.

Every source (folder, zip, tar shards, CIFAR-10's binary files, the built-in photographs) becomes the same `ImageSet`.
The project's only conversion between uint8 and [-1, 1] lives here too, and so does the order in which training sees the
images.
"""

import contextlib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attnorm.data import builtin
from attnorm.data.decode_cache import Decoded, Fit, load_decoded
from attnorm.data.decode_cache import fingerprint as fingerprint
from attnorm.system.randomness import permutation


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one size, in memory or memory-mapped.

    Attributes:
        images: RGB pixels, uint8 [N, 3, H, W], square but for Paris StreetView; a read-only `np.memmap` where they are
            too large for memory.
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
        """Copy the images at `indices` (int [B]) and their labels: uint8 [B, 3, H, W] and int64 [B]."""
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


def cut_squares(images: Tensor, tops: Tensor, lefts: Tensor, side: int) -> Tensor:
    """Squares [B, C, side, side] of images [B, C, H, W], their corners at tops and lefts (int64 [B], same device)."""
    steps = torch.arange(side, device=images.device)
    rows, columns = (tops[:, None] + steps)[:, None, :, None], (lefts[:, None] + steps)[:, None, None, :]
    numbers = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[numbers, channels, rows, columns]


def cut_centres(images: Tensor, side: int) -> Tensor:
    """Centre squares [B, C, side, side] of images [B, C, H, W]."""
    top, left = (images.shape[2] - side) // 2, (images.shape[3] - side) // 2
    return images[:, :, top : top + side, left : left + side]


def held_out_indices(num_images: int, every: int) -> np.ndarray:
    """Images that are never trained on (int64): number 10, 20, ... in the set's order if `every` is 10; 0: none.

    The set's order is that of the names of the files that can be read, class by class; of shards, their own.
    """
    return np.arange(every - 1, num_images, every) if every else np.empty(0, np.int64)


def trained_indices(num_images: int, every: int) -> np.ndarray:
    """All others (int64)."""
    return np.delete(np.arange(num_images), held_out_indices(num_images, every))


def spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the indices (0: all), spread evenly."""
    if not 0 < most < len(indices):
        return indices
    return indices[np.unique(np.linspace(0, len(indices) - 1, most).astype(np.int64))]


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
    return permutation(np.random.PCG64([seed, epoch]), num_images)


def load_images(
    source: str | Path,
    image_size: int,
    *,
    fit: Fit = "square",
    cache_dir: Path | None = None,
    max_memory_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Load images as squares of `image_size` pixels, decoding them only the first time.

    Paris StreetView (fit="street-view") keeps its width: `image_size` high, so that squares can be cut at any place;
    which of its two versions was found is in the set's `note`. All else:

    Larger sides are cropped at the centre, and the square is resized with Lanczos unless it has the size already. Files
    that cannot be read are listed in `skipped`. Class folders are searched to any depth; where there are some, images
    beside them are skipped. Hidden files are ignored.

    Args:
        source: "builtin"; a folder of class folders; a folder of images (one class); a .zip of either; tar shards
            (their folder, one .tar, or "shards-{000..099}.tar"); the folder or the .tar.gz of CIFAR-10's binary version
            (its training images). A `Path` is always a place, never "builtin".
        image_size: Side in pixels, at least 1.
        fit: "square", or "street-view" for images of 936x537 or of 227x227 pixels.
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
        if fit != "square":
            raise ValueError("the built-in photographs are not Paris StreetView; name its folder, or fit=square")
        return builtin_images(image_size)
    if max_memory_bytes is None:
        max_memory_bytes = _available_memory() // 2
    decoded = load_decoded(str(source), image_size, fit, cache_dir, max_memory_bytes, progress)
    return _as_set(str(source), decoded, _street_view_note(decoded.images) if fit == "street-view" else "")


def builtin_images(image_size: int) -> ImageSet:
    """The built-in data set at `image_size` pixels: the same 256 views of each photograph every time.

    Raises:
        ValueError: If `image_size` is not positive or the installed scikit-image lacks a photograph.
    """
    return _as_set("builtin", builtin.builtin_views(image_size), builtin.NOTE)


def _as_set(source: str, decoded: Decoded, note: str) -> ImageSet:
    if decoded.num_enlarged:
        size, all_of_them = decoded.images.shape[2], len(decoded.labels)
        note = f"{decoded.num_enlarged:,} of {all_of_them:,} images are smaller than {size} pixels, and were enlarged."
    fields = {key: value for key, value in vars(decoded).items() if key != "num_enlarged"}
    return ImageSet(source=source, note=note, **fields)


def _street_view_note(images: np.ndarray) -> str:
    height, width = images.shape[2:]
    if width > height:
        return (
            f"Paris StreetView, originals of 936x537: random 537 squares reduced by area to {height} for training, "
            "the centre square for tests."
        )
    return (
        f"Paris StreetView in its version of 227x227, resized to {height}: results are not comparable with those "
        "on the originals of 936x537."
    )


def _available_memory() -> int:
    """Bytes that can be allocated without swapping, as Linux estimates them; 4 GiB elsewhere."""
    with contextlib.suppress(OSError):
        if available := re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE):
            return int(available[1]) * 1024
    return 2**32
