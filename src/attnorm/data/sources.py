"""Where images come from: folders, zips and CIFAR-10's binary files are found and opened, and each file is decoded."""

import contextlib
import difflib
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

KINDS = (
    "'builtin', a folder of class folders, a folder of images, a .zip of either, "
    "or CIFAR-10's binary version (its folder or its .tar.gz)"
)
_IMAGE_NAME = re.compile(r"\.(avif|bmp|gif|jfif|jpe?g|pbm|pgm|png|ppm|tiff?|webp)\Z", re.IGNORECASE | re.ASCII)
_MAX_FILE_BYTES = 2**28  # no photograph is larger, and an archive may claim any size for a member
_CIFAR10_BATCHES = "data_batch_*.bin"
_CIFAR10_META = "batches.meta.txt"
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_RECORD = 1 + 3 * 32 * 32  # label, then the red, green and blue planes


@dataclass(frozen=True)
class Contents:
    """An open source: `files` holds (class name, file name), and `load(i)` decodes file i to RGB of any size."""

    files: list[tuple[str, str]]
    load: Callable[[int], Image.Image]
    expected_classes: set[str]
    skipped: list[str]


@dataclass(frozen=True)
class Source:
    """A source not opened yet; `stamp` is JSON that changes whenever the content may have changed."""

    stamp: list[Any]
    open: Callable[[], contextlib.AbstractContextManager[Contents]]


def find_source(path: Path) -> Source:
    """Tell what lies at `path`, decoding none of it; ValueError if that is nothing, or of another kind."""
    if path.is_dir():
        if batches := sorted(path.glob(_CIFAR10_BATCHES)):
            return _cifar_folder(path, batches)
        if (path / "data_batch_1").exists():
            raise ValueError(_pickle_refusal(path))
        return _folder(path)
    if not path.exists():
        siblings = [entry.name for entry in path.parent.glob("*")]
        near = difflib.get_close_matches(path.name, [*siblings, "builtin"], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{path} does not exist.{hint} Expected {KINDS}.")
    if zipfile.is_zipfile(path):
        return _zip(path)
    if tarfile.is_tarfile(path):
        return _cifar_archive(path)
    raise ValueError(f"{path} is neither a folder nor an archive that can be read; expected {KINDS}")


def _folder(root: Path) -> Source:
    entries: list[str] = []
    for directory, folders, files in os.walk(root, followlinks=True):
        here = Path(directory)
        # A link to a folder that contains it would be walked for ever.
        real = here.resolve()
        folders[:] = [name for name in folders if not real.is_relative_to((here / name).resolve())]
        prefix = "" if here == root else f"{here.relative_to(root).as_posix()}/"
        entries += [f"{prefix}{name}/" for name in folders]
        entries += [f"{prefix}{name}" for name in files]

    def read(name: str) -> bytes:
        file = root / name
        _check_size(file.stat().st_size)
        if not file.is_file():
            raise ValueError("not a regular file")
        return file.read_bytes()

    # Only the presence of other files matters: editing a read-me must not cost a decoding.
    visible = sorted(filter(_is_visible, entries))
    stamp = [[name, *_size_and_time(root / name)] if _IMAGE_NAME.search(name) else [name] for name in visible]
    return Source(["folder", *stamp], lambda: contextlib.nullcontext(_arrange(entries, read, root.resolve().name)))


def _zip(path: Path) -> Source:
    @contextlib.contextmanager
    def open_zip() -> Iterator[Contents]:
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is a damaged zip archive ({error}); copy or download it again") from error
        with archive:

            def read(name: str) -> bytes:
                _check_size(archive.getinfo(name).file_size)
                return archive.read(name)

            yield _arrange(archive.namelist(), read, path.stem, strip_root=True)

    return Source(["zip", *_size_and_time(path)], open_zip)


_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test"))


def _arrange(
    entries: Iterable[str], read: Callable[[str], bytes], root_name: str, *, strip_root: bool = False
) -> Contents:
    """Sort paths (folders end in "/") into classes: the first folder's name, or `root_name` where all are flat."""
    visible = sorted(set(filter(_is_visible, entries)))
    images = [name for name in visible if _IMAGE_NAME.search(name)]
    others = [name for name in visible if not _IMAGE_NAME.search(name) and not name.endswith("/")]
    skipped = [f"{name}: not an image file, by its name" for name in others]

    roots = {name[: name.find("/") + 1] for name in images}
    prefix = roots.pop() if strip_root and len(roots) == 1 else ""

    def class_of(name: str) -> str:
        return name.removeprefix(prefix).rpartition("/")[0].partition("/")[0]

    files = sorted((class_of(name), name) for name in images)
    if any(class_name for class_name, _ in files):
        skipped += [f"{name}: lies beside the class folders, in none" for class_name, name in files if not class_name]
        files = [(class_name, name) for class_name, name in files if class_name]
    else:
        files = [(prefix[:-1] or root_name, name) for _, name in files]
    folders = {class_of(name) for name in visible if name.startswith(prefix)} - {""}
    if len(folders) > 1 and folders <= _SPLITS:
        named = " and ".join(sorted(folders))
        raise ValueError(
            f"{root_name} holds {named}: splits of a data set, not classes; name one of them, as {root_name}/train"
        )
    return Contents(files, lambda index: _decode(read(files[index][1])), folders, skipped)


def _cifar_folder(root: Path, batches: list[Path]) -> Source:
    files = [*batches, root / _CIFAR10_META]
    return Source(
        ["cifar10", *([file.name, *_size_and_time(file)] for file in files)],
        lambda: contextlib.nullcontext(
            _cifar_contents({file.name: file.read_bytes() for file in files if file.exists()}, root)
        ),
    )


def _cifar_archive(path: Path) -> Source:
    def read() -> Contents:
        files: dict[str, bytes] = {}
        try:
            with tarfile.open(path) as archive:
                for member in filter(tarfile.TarInfo.isfile, archive):
                    place = PurePosixPath(member.name)
                    if place.name == "data_batch_1":
                        raise ValueError(_pickle_refusal(path))
                    if place.match(_CIFAR10_BATCHES) or place.name == _CIFAR10_META:
                        _check_size(member.size)
                        stream = archive.extractfile(member)
                        assert stream is not None
                        files[place.name] = stream.read()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{path} is a damaged archive ({error}); download it again") from error
        if not files.keys() - {_CIFAR10_META}:
            raise ValueError(
                f"{path} holds no {_CIFAR10_BATCHES}; of tar archives only CIFAR-10's binary version is read. "
                "Unpack any other and name its folder."
            )
        return _cifar_contents(files, path)

    return Source(["cifar10 archive", *_size_and_time(path)], lambda: contextlib.nullcontext(read()))


def _cifar_contents(files: dict[str, bytes], source: Path) -> Contents:
    meta = files.pop(_CIFAR10_META, b"").decode("utf-8", "replace").splitlines()
    classes = [line.strip() for line in meta if line.strip()] or _CIFAR10_CLASSES
    batches = sorted(files.items())
    for name, data in batches:
        if not data or len(data) % _CIFAR10_RECORD:
            raise ValueError(
                f"{name} in {source} has {len(data)} bytes, expected a multiple of {_CIFAR10_RECORD}; download it again"
            )
    records = np.frombuffer(b"".join(data for _, data in batches), np.uint8).reshape(-1, _CIFAR10_RECORD)
    labels, pixels = records[:, 0], records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    if labels.max() >= len(classes):
        raise ValueError(
            f"{source} has label {labels.max()} but only {len(classes)} class names; "
            "only CIFAR-10's binary version is read, so check that it is that one and download it again"
        )
    named = [(classes[label], f"record {index}") for index, label in enumerate(labels)]
    return Contents(named, lambda index: Image.fromarray(pixels[index]), set(classes), [])


def _pickle_refusal(path: Path) -> str:
    return (
        f"{path} is CIFAR-10's Python version, which is pickled; pickles can run any code and are never read. "
        "Take the binary version instead: cifar-10-binary.tar.gz, as it is or unpacked."
    )


def _is_visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


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
