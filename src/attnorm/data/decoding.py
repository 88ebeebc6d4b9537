"""From the bytes of an image file to the pixels of a set: in this process, or in others that do nothing else."""

import contextlib
import functools
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import IO, Self

import numpy as np
from PIL import Image, UnidentifiedImageError

from attnorm.data.sources import decode

_PIXELS, _ENLARGED, _DAMAGED, _SYSTEMS = range(4)  # what an answer is: pixels, too few of them, or why there are none
_HEADER = struct.Struct("<BQ")  # that, and its length


@dataclass(frozen=True)
class Frame:
    """What every image of a source becomes: RGB, `image_size` high.

    Args:
        original: Width and height of Paris StreetView's images, whose width is kept; None: squares are cut of anything.
    """

    image_size: int
    original: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        if self.original is None:
            return self.image_size
        width, height = self.original
        # Even room beside a centre square.
        return self.image_size + (self.image_size * width // height - self.image_size) // 2 * 2

    def enlarges(self, image: Image.Image) -> bool:
        """Whether squares are made of fewer pixels than they have."""
        return self.original is None and min(image.size) < self.image_size

    def cut(self, image: Image.Image) -> np.ndarray:
        """uint8 [3, image_size, width] of an RGB image; ValueError for one of another size than `original`."""
        return self._square(image) if self.original is None else self._street_view(image, self.original)

    def _square(self, image: Image.Image) -> np.ndarray:
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side))
        # Pillow does not resample what has the size already.
        small = image.resize((self.image_size, self.image_size), Image.Resampling.LANCZOS)
        return np.asarray(small).transpose(2, 0, 1)

    def _street_view(self, image: Image.Image, original: tuple[int, int]) -> np.ndarray:
        """936x537 is reduced by area to S high, its width kept: a square cut from the result is a 537 square reduced to
        S, without keeping four times the pixels. 227x227 is enlarged bicubically to S x S.
        """
        (width, height), size = original, self.image_size
        if image.size != original:
            raise ValueError(f"{image.width}x{image.height} pixels, unlike the others of {width}x{height}")
        margin = (width - self.width * height / size) / 2  # left off, so that nothing is distorted
        if size >= height:
            box = (margin, 0.0, width - margin, float(height))
            return np.asarray(image.resize((self.width, size), Image.Resampling.BICUBIC, box)).transpose(2, 0, 1)
        rows, columns = _area_weights(height, size, 0.0), _area_weights(width, self.width, margin)
        planes = np.asarray(image, np.float32).transpose(2, 0, 1)
        return np.rint(rows @ planes @ columns.T).clip(0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=4)
def _area_weights(length: int, size: int, margin: float) -> np.ndarray:
    """float32 [size, length]: by how much each of `length` pixels counts in the mean over each of `size` equal parts of
    what is between the margins. Pillow's box filter counts pixels as a whole or not at all.
    """
    edges = np.linspace(margin, length - margin, size + 1)
    pixels = np.arange(length)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (covered.clip(0) / (edges[1] - edges[0])).astype(np.float32)


def reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image that can be read"
    return (isinstance(error, OSError) and error.strerror) or f"{error}" or type(error).__name__


def is_the_systems(error: Exception) -> bool:
    """Whether a file could not be had (permissions, a share that is away, no memory), whatever it holds."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


class Decoders:
    """Processes that decode. They see no file but what they are sent, end with this process however it ends, and know
    neither torch nor who else decodes.

    Args:
        count: How many, each of which works for one thread at a time.
    """

    def __init__(self, frame: Frame, count: int) -> None:
        self.frame, self.count = frame, count
        self.free: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        for _ in range(self.count):
            self.free.put(self._start())
        return self

    def __exit__(self, *error: object) -> None:
        for _ in range(self.count):
            _end(self.free.get())

    def pixels(self, data: bytes) -> tuple[bytes, bool]:
        """As `Frame.cut` and `enlarges` of the decoded image; ValueError where that cannot be, MemoryError where a
        process died of it: the next image gets another.
        """
        process = self.free.get()
        try:
            if process is None:
                process = self._start()
            kind, content = _ask(process, data)
        except (OSError, EOFError) as error:
            _end(process)
            process = None
            raise MemoryError("the process that was to decode it has died") from error
        finally:
            self.free.put(process)
        if kind in (_PIXELS, _ENLARGED):
            return content, kind == _ENLARGED
        raise (MemoryError if kind == _SYSTEMS else ValueError)(content.decode())

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: nothing that lies in the current folder is imported.
        command = [sys.executable, "-P", "-c", "from attnorm.data.decoding import serve; serve()"]
        path = os.pathsep.join(filter(None, sys.path))
        return subprocess.Popen(
            [*command, json.dumps(asdict(self.frame))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
        )


def _ask(process: subprocess.Popen[bytes], data: bytes) -> tuple[int, bytes]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(struct.pack("<Q", len(data)) + data)
    process.stdin.flush()
    kind, length = _HEADER.unpack(_exactly(process.stdout, _HEADER.size))
    return kind, _exactly(process.stdout, length)


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is None:
        return
    process.kill()  # it holds nothing
    with contextlib.suppress(OSError):
        process.communicate()


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data


def serve() -> None:
    """What such a process does until its input ends: a length and so many bytes in, an answer out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that asks
    answers, questions = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)  # whatever a library prints
    settings = json.loads(sys.argv[1])
    frame = Frame(settings["image_size"], settings["original"] and tuple(settings["original"]))
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    with contextlib.suppress(BrokenPipeError):
        while size := questions.read(8):
            kind, content = _answer(frame, questions.read(struct.unpack("<Q", size)[0]))
            answers.write(_HEADER.pack(kind, len(content)) + content)
            answers.flush()


def _answer(frame: Frame, data: bytes) -> tuple[int, bytes]:
    try:
        image = decode(data)
        return _ENLARGED if frame.enlarges(image) else _PIXELS, frame.cut(image).tobytes()
    except Exception as error:  # a damaged file makes decoders fail in any way at all
        return _SYSTEMS if is_the_systems(error) else _DAMAGED, reason(error).encode()
