"""Where images come from: folders, zips, tar shards and CIFAR-10's binary files are found, opened, and decoded."""

import contextlib
import io
import itertools
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from attnorm.config import did_you_mean
from attnorm.data import shards
from attnorm.system.files import default_cache_dir

KINDS = (
    "'builtin', a folder of class folders, a folder of images, a .zip of either, tar shards (their folder, one .tar, "
    "or shards-{000..099}.tar), or CIFAR-10's binary version (its folder or its .tar.gz)"
)
_IMAGE_NAME = re.compile(r"\.(avif|bmp|gif|jfif|jpe?g|pbm|pgm|png|ppm|tiff?|webp)\Z", re.IGNORECASE | re.ASCII)
_MAX_FILE_BYTES = 2**28  # no photograph is larger, and an archive may claim any size for a member
_CIFAR10_BATCHES = "data_batch_*.bin"
_CIFAR10_META = "batches.meta.txt"
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_RECORD = 1 + 3 * 32 * 32  # label, then the red, green and blue planes


@dataclass(frozen=True)
class Contents:
    """An open source: `files` holds (class name, file name), and `load(i)` decodes file i to RGB of any size.

    `read(i)` gives the bytes that `load` decodes, where those are an image file.
    """

    files: list[tuple[str, str]]
    load: Callable[[int], Image.Image]
    expected_classes: set[str]
    skipped: list[str]
    read: Callable[[int], bytes] | None = None

    @classmethod
    def of_files(
        cls, files: list[tuple[str, str]], read: Callable[[int], bytes], expected: set[str], skipped: list[str]
    ) -> "Contents":
        return cls(files, lambda index: decode(read(index)), expected, skipped, read)


@dataclass(frozen=True)
class Source:
    """A source not opened yet; `stamp` is JSON that changes whenever the content may have changed."""

    stamp: list[Any]
    open: Callable[[], contextlib.AbstractContextManager[Contents]]


def find_source(path: Path, cache_dir: Path | None = None) -> Source:
    """Tell what lies at `path`, decoding none of it; ValueError if that is nothing, or of another kind.

    OSError where the system does not let it be read: that says nothing of what it holds. The index of shards is kept in
    `cache_dir`.
    """
    cache_dir = cache_dir or default_cache_dir()
    if path.is_dir():
        if batches := sorted(path.glob(_CIFAR10_BATCHES)):
            return _cifar_folder(path, batches)
        if (path / "data_batch_1").exists():
            raise ValueError(_pickle_refusal(path))
        if found := _shards_in(path):
            return _shards(found, path, cache_dir)
        return _folder(path)
    if found := shards.expand(path):
        return _shards(found, path, cache_dir)
    if not path.exists():
        siblings = [entry.name for entry in path.parent.glob("*")]
        hint = did_you_mean(path.name, [*siblings, "builtin"])
        raise ValueError(f"{path} does not exist; {hint}expected {KINDS}")
    if not path.is_file():  # a pipe would be waited for, a device read without end
        raise ValueError(f"{path} is neither a folder nor a regular file; expected {KINDS}")
    with path.open("rb"):  # is_zipfile takes what it may not read for another kind
        pass
    if zipfile.is_zipfile(path):
        return _zip(path)
    if tarfile.is_tarfile(path):
        is_cifar = not shards.can_be_sought(path) or _begins_as_cifar(path)
        return _cifar_archive(path) if is_cifar else _shards([path], path, cache_dir)
    raise ValueError(f"{path} is neither a folder nor an archive that can be read; expected {KINDS}")


def _folder(root: Path) -> Source:
    entries: list[str] = []
    unread: list[str] = []

    def note(error: OSError) -> None:
        if error.filename == str(root):
            raise error
        unread.append(f"{Path(error.filename).relative_to(root).as_posix()}/: {error.strerror}")

    for directory, folders, files in os.walk(root, onerror=note, followlinks=True):
        here = Path(directory)
        # A link to a folder that contains it would be walked for ever.
        real = here.resolve()
        folders[:] = [name for name in folders if not real.is_relative_to((here / name).resolve())]
        prefix = "" if here == root else f"{here.relative_to(root).as_posix()}/"
        entries += [f"{prefix}{name}/" for name in folders]
        entries += [f"{prefix}{name}" for name in files]

    def read(name: str) -> bytes:
        _check_size((root / name).stat().st_size)
        return read_regular(root / name)

    # Only the presence of other files matters: editing a read-me must not cost a decoding.
    visible = sorted(filter(_is_visible, entries))
    stamp = [[name, *_size_and_time(root / name)] if _IMAGE_NAME.search(name) else [name] for name in visible]
    return Source(["folder", *stamp], lambda: contextlib.nullcontext(_arrange(entries, read, root, unread)))


def _zip(path: Path) -> Source:
    @contextlib.contextmanager
    def open_zip() -> Iterator[Contents]:
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is a damaged zip archive ({error}); copy or download it again") from error
        with archive:
            members: dict[str, zipfile.ZipInfo] = {}
            twice = []
            for member in archive.infolist():
                name = _member_name(member.filename)
                if name in members and not name.endswith("/"):
                    twice.append(f"{name}: stands in the archive more than once; the last one is read")
                members[name] = member

            def read(name: str) -> bytes:
                _check_size(members[name].file_size)
                return archive.read(members[name])

            yield _arrange(members, read, path, sorted(set(twice)), is_archive=True)

    return Source(["zip", *_size_and_time(path)], open_zip)


def _member_name(name: str) -> str:
    """A member's name as others write it: older .NET parts it by backslashes, bsdtar begins it with "./"."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    return "/".join(parts) + ("/" if name.endswith(("/", "\\")) else "")


# Names that splits of a data set go by: Train, test_set, val2017, seg_test, trainA, DIV2K_valid_HR.
_SPLIT = re.compile(
    r"(?P<set>.*[^a-z])??(?P<split>train(?:ing)?|trn|val(?:id(?:ation)?)?|dev|test(?:ing)?|eval(?:uation)?|hold-?out)"
    r"(?:[ _-]?(?:set|split|data|images?|imgs?|hr|lr|[ab]))?[\d_-]*",
    re.IGNORECASE | re.DOTALL,
)


def _splits(folders: set[str]) -> list[str]:
    """Those of the folders that are splits of a data set: two of them, or one that is all there is.

    A single one among others is a class: trains are vehicles, too.
    """
    found = {name: match for name in sorted(folders) if (match := _SPLIT.fullmatch(name))}
    if len({match["split"].casefold() for match in found.values()}) > 1:
        return list(found)
    return [name for name, match in found.items() if len(folders) == 1 and not match["set"]]


def _arrange(
    entries: Iterable[str], read: Callable[[str], bytes], root: Path, skipped: list[str], *, is_archive: bool = False
) -> Contents:
    """Sort paths (folders end in "/") into classes: the first folder's name, or the root's where all are flat.

    An archive's root is the folder that holds all of its images, where there is one.
    """
    root_name = root.stem if is_archive else root.resolve().name
    visible = sorted(set(filter(_is_visible, entries)))
    images = [name for name in visible if _IMAGE_NAME.search(name)]
    others = [name for name in visible if not _IMAGE_NAME.search(name) and not name.endswith("/")]
    skipped = [*skipped, *(f"{name}: not an image file, by its name" for name in others)]

    roots = {name[: name.find("/") + 1] for name in images}
    prefix = roots.pop() if is_archive and len(roots) == 1 else ""

    def class_of(name: str) -> str:
        return name.removeprefix(prefix).rpartition("/")[0].partition("/")[0]

    files = sorted((class_of(name), name) for name in images)
    if any(class_name for class_name, _ in files):
        skipped += [f"{name}: lies beside the class folders, in none" for class_name, name in files if not class_name]
        files = [(class_name, name) for class_name, name in files if class_name]
        _require_no_splits({class_name for class_name, _ in files}, root, prefix, is_archive)
    else:
        files = [(prefix[:-1] or root_name, name) for _, name in files]
    folders = {class_of(name) for name in visible if name.startswith(prefix)} - {""}
    return Contents.of_files(files, lambda index: read(files[index][1]), folders, skipped)


def _require_no_splits(folders: set[str], root: Path, prefix: str, is_archive: bool) -> None:
    if splits := _splits(folders):
        named = " and ".join(splits)
        meant = next((name for name in splits if "train" in name.casefold()), splits[0])
        remedy = f"use --data {(root.with_suffix('') if is_archive else root) / prefix / meant}"
        raise ValueError(
            f"{root} holds {named}: {'a split' if len(splits) == 1 else 'splits'} of a data set, not "
            f"{'a class' if len(splits) == 1 else 'classes'}; say which is meant: "
            + (f"unpack it, and {remedy}" if is_archive else remedy)
        )


def _shards_in(folder: Path) -> list[Path]:
    """The shards of a folder that holds nothing else that could be images."""
    entries = [entry for entry in folder.iterdir() if _is_visible(entry.name)]
    found = [entry for entry in entries if entry.suffix == ".tar" and entry.is_file()]
    if not found or any(entry.is_dir() or _IMAGE_NAME.search(entry.name) for entry in entries):
        return []
    return sorted(found, key=shards.order_of)


def _shards(paths: list[Path], root: Path, cache_dir: Path) -> Source:
    """Images in the order in which they lie in the shards: these are read from the front to the back."""

    @contextlib.contextmanager
    def open_shards() -> Iterator[Contents]:
        index = shards.read_index(paths, _IMAGE_NAME, cache_dir)

        def read(number: int) -> bytes:
            _check_size(index.sizes[number])
            return shards.read_part(paths[index.shards[number]], index.offsets[number], index.sizes[number])

        yield _arrange_shards(index, paths, read, root)

    return Source(["shards", *([path.name, *_size_and_time(path)] for path in paths)], open_shards)


def _arrange_shards(index: shards.Index, paths: list[Path], read: Callable[[int], bytes], root: Path) -> Contents:
    """The class of an image: what stands beside it, else its first folder, below one that holds all; else the root."""
    roots = {name[: name.find("/") + 1] for name in index.names}
    prefix = roots.pop() if len(roots) == 1 else ""
    folders = [name.removeprefix(prefix).rpartition("/")[0].partition("/")[0] for name in index.names]
    classes = [said or folder for said, folder in zip(index.classes, folders, strict=True)]
    if not any(index.classes):
        _require_no_splits(set(folders) - {""}, root, prefix, is_archive=True)
    names = [f"{paths[shard].name}/{name}" for shard, name in zip(index.shards, index.names, strict=True)]
    skipped = index.skipped
    if any(classes):
        skipped = [*skipped, *(f"{name}: has no class" for name, own in zip(names, classes, strict=True) if not own)]
    else:
        classes = [prefix[:-1] or root.stem.partition("{")[0].rstrip("-_.") or "images"] * len(names)
    kept = [number for number, class_name in enumerate(classes) if class_name]
    files = [(classes[number], names[number]) for number in kept]
    return Contents.of_files(files, lambda number: read(kept[number]), set(), skipped)


def _begins_as_cifar(path: Path) -> bool:
    """Whether CIFAR-10's files are among the first of an archive."""
    with contextlib.suppress(tarfile.TarError), tarfile.open(path) as archive:
        return any(PurePosixPath(member.name).match("data_batch_*") for member in itertools.islice(archive, 16))
    return False


def _cifar_folder(root: Path, batches: list[Path]) -> Source:
    files = [*batches, root / _CIFAR10_META]
    return Source(
        ["cifar10", *([file.name, *_size_and_time(file)] for file in files)],
        lambda: contextlib.nullcontext(
            _cifar_contents({file.name: read_regular(file) for file in files if file.exists()}, root)
        ),
    )


def _cifar_archive(path: Path) -> Source:
    def read() -> Contents:
        files: dict[str, bytes] = {}
        try:
            with tarfile.open(path) as archive:
                for member in filter(tarfile.TarInfo.isfile, archive):
                    place = PurePosixPath(_member_name(member.name))
                    if place.name == "data_batch_1":
                        raise ValueError(_pickle_refusal(path))
                    if place.match(_CIFAR10_BATCHES) or place.name == _CIFAR10_META:
                        _check_size(member.size)
                        if place.name in files:
                            raise ValueError(f"{path} holds {place.name} twice; unpack it and name the folder meant")
                        stream = archive.extractfile(member)
                        assert stream is not None
                        files[place.name] = stream.read()
        except (tarfile.TarError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # the system's, not the archive's
                raise
            raise ValueError(f"{path} is a damaged archive ({error}); download it again") from error
        if not files.keys() - {_CIFAR10_META}:
            raise ValueError(
                f"{path} holds no {_CIFAR10_BATCHES}; of compressed tar archives only CIFAR-10's binary version is "
                "read. Unpack any other and name its folder, or make it a .tar without compression."
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


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file; ValueError for a pipe, which would be waited for, a device, a folder."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
    return path.read_bytes()


def require_pixels(image: Image.Image, max_pixels: int) -> None:
    """ValueError for an opened image of more pixels; nothing of it has been decoded by then."""
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"it has {width}x{height} pixels, more than the {max_pixels:,} that are decoded")


def _check_size(num_bytes: int) -> None:
    if num_bytes > _MAX_FILE_BYTES:
        raise ValueError(f"{num_bytes} bytes, more than the {_MAX_FILE_BYTES} that are read from one file")


def decode(data: bytes) -> Image.Image:
    """An image file's first frame, upright, as 8-bit RGB over white."""
    with Image.open(io.BytesIO(data)) as file:
        file.load()
        correct_transparency(file, data)
        image: Image.Image = ImageOps.exif_transpose(file)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if image.mode.startswith("I"):
            grey = deep_grey(np.asarray(image), file)
            key = image.info.get("transparency")
            image = Image.fromarray(np.rint(grey / 257).astype(np.uint8))  # Pillow itself would clip at 255
            if key is not None:
                image.putalpha(Image.fromarray(np.where(grey == key, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def deep_grey(pixels: np.ndarray, file: Image.Image) -> np.ndarray:
    """Integer pixels [H, W] of a file with more than eight bits, scaled from the depth that it declares to 0 .. 65535;
    uint16, white at the top.

    Integers of 32 bits, and those with a sign, come from programs that never filled them: up to 255 they are eight bits
    in a larger cell, and of 32 bits up to 65535 sixteen.

    Raises:
        ValueError: Nothing says which value is white.
    """
    tags = getattr(file, "tag_v2", {})  # TIFF: Pillow gives the samples as they are stored
    depth, is_signed = max(tags.get(258, (16,))), 2 in tags.get(339, (1,))
    least, most = int(pixels.min()), int(pixels.max())
    if depth > 16 or is_signed:
        depth = 8 if most <= 255 else 16 if most <= 65535 and depth > 16 else 0
    if not depth or least < 0 or most > 65535:
        raise ValueError(f"integer pixels from {least} to {most}, whose range is not known: save it with 8 or 16 bits")
    grey = pixels if depth == 16 else np.rint(pixels * (65535 / (2**depth - 1)))
    return (65535 - grey if tags.get(262) == 0 else grey).astype(np.uint16)  # 262, 0: white is zero


def correct_transparency(file: ImageFile.ImageFile, data: bytes) -> None:
    """In a loaded PNG, the colour that stands for transparency made comparable with Pillow's pixels: Pillow scales
    grey of 2 or 4 bits to 8 and halves colours of 16, but not that colour.
    """
    key = file.info.get("transparency")
    if file.format != "PNG" or key is None:
        return
    depth, colour_type = data[24:26]
    if colour_type == 0 and 1 < depth < 8:
        file.info["transparency"] = key * (255 // (2**depth - 1))
    elif colour_type == 2 and depth == 16:
        opaque = (deep_png(data) != key).any(2)
        del file.info["transparency"]
        file.putalpha(Image.fromarray(opaque.astype(np.uint8) * np.uint8(255)))


def deep_png(data: bytes) -> np.ndarray:
    """uint16 [rows, columns, channels] of a PNG file with 16 bits a channel in colour or with alpha.

    Pillow keeps the upper eight of them; but it can be made to see the lower eight too.
    """
    if data[25] == 4:  # grey and alpha of 16 bits are four bytes, as red, green, blue and alpha of 8 are
        header = data[12:24] + b"\x08\x06" + data[26:29]
        with Image.open(io.BytesIO(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])) as image:
            return np.array(image).view(">u2").astype(np.uint16)
    with Image.open(io.BytesIO(data)) as image:
        upper = np.asarray(image)
    with Image.open(io.BytesIO(data)) as image:
        # Little-endian samples have their upper half where these have their lower one.
        image.tile = [tile._replace(args=f"{image.mode};16L") for tile in image.tile]
        return (upper.astype(np.uint16) << 8) + np.asarray(image)
