"""Tar shards in WebDataset's layout: where each image lies in them, found once and kept in the cache folder."""

import contextlib
import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attnorm.system.files import write_atomically

_log = logging.getLogger(__name__)

_FORMAT = 1  # raise it when indexing changes
_MAX_LABEL_BYTES = 2**20
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_FIELDS_OF_JSON = ("class", "label", "cls")


@dataclass
class Index:
    """Of every image, in the shards' order: its shard, its name there, its class ("" where it is not said), and the
    bytes that are its file. Columns of equal length.
    """

    shards: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # "shard/name: reason"

    def __len__(self) -> int:
        return len(self.names)


def expand(path: Path) -> list[Path]:
    """The shards that "shards-{000..099}.tar" stands for, in order; none where there is no such range in it.

    Raises:
        ValueError: One of them is not there.
    """
    if path.exists() or not _RANGE.search(str(path)):
        return []
    found = [Path(name) for name in _expand(str(path))]
    missing = [shard for shard in found if not shard.is_file()]
    if missing:
        raise ValueError(
            f"{missing[0]} does not exist: {len(missing)} of the {len(found)} shards of {path} are missing"
        )
    return found


def _expand(text: str) -> Iterator[str]:
    match = _RANGE.search(text)
    if match is None:
        yield text
        return
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from _expand(f"{text[: match.start()]}{number:0{len(match[1])}}{text[match.end() :]}")


def can_be_sought(path: Path) -> bool:
    """Whether a file is a tar archive without compression, of which any part can be read alone."""
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.TarError:
        return False


def read_index(paths: Sequence[Path], is_image: re.Pattern[str], folder: Path) -> Index:
    """The index of shards: read from `folder`, or made of the shards' headers and kept there, where that can be.

    Raises:
        ValueError: A shard is damaged.
    """
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps([_FORMAT, states]).encode()).hexdigest()[:32]
    file = folder / f"shards-{key}.json"
    kept = _read(file, [size for _, size, _ in states])
    if kept is not None:
        return kept
    index = Index()
    for number, path in enumerate(paths):
        _add(index, number, path, is_image)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(index), separators=(",", ":"))
        write_atomically(file, lambda temporary: temporary.write_text(text), mode=0o600)
    except OSError as error:
        _log.warning("the index of %s cannot be kept in %s (%s)", paths[0], folder, error)
    return index


def read_part(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on; ValueError where it has become shorter."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise ValueError(f"{path} ends within it")
    return data


def _read(file: Path, sizes: Sequence[int]) -> Index | None:
    """None where there is none, or none that fits shards of these sizes."""
    if not file.exists():
        return None
    try:
        index = Index(**json.loads(file.read_bytes()))
        columns = (index.shards, index.names, index.classes, index.offsets, index.sizes)
        rows = zip(*columns, strict=True)
        if all(offset >= 0 and size >= 0 and offset + size <= sizes[shard] for shard, _, _, offset, size in rows):
            return index
    except (OSError, ValueError, TypeError, IndexError):
        pass
    _log.warning("indexing shards again: %s is damaged", file)
    return None


def _add(index: Index, number: int, path: Path, is_image: re.Pattern[str]) -> None:
    """The images of one shard. Files of one sample have a key in common: the path up to the name's first dot."""
    images: dict[str, dict[str, tuple[int, int]]] = {}  # by key, then by name: where they lie
    classes: dict[str, str] = {}

    def skip(name: str, reason: str) -> None:
        index.skipped.append(f"{path.name}/{name}: {reason}")

    for archive, member, name in _members(path):
        key = _key(name)
        if member.issparse():
            skip(name, "a sparse file, which does not lie in one piece")
        elif is_image.search(name):
            if name in images.get(key, ()):
                skip(name, "stands in the shard more than once; the last one is read")
            images.setdefault(key, {})[name] = (member.offset_data, member.size)
        elif name.endswith((".cls", ".json")):
            class_name = _class_in(archive, member)
            if name.endswith(".cls") or key not in classes:  # .cls says it best
                classes[key] = class_name
        else:
            skip(name, "not an image file, by its name")
    for key, found in images.items():
        plain = {name for name in found if "." not in name.removeprefix(key)[1:]}
        for name in found.keys() - plain if plain else ():  # a mask, perhaps: key.mask.png
            skip(name, f"stands beside {min(plain)}")
        for name in filter(plain.__contains__, found) if plain else found:
            index.shards.append(number)
            index.names.append(name)
            index.classes.append(classes.get(key, ""))
            index.offsets.append(found[name][0])
            index.sizes.append(found[name][1])


def _members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo, str]]:
    """The visible files of a shard, by their names without "./"."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # or it would remember all of them
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                if member.isfile() and not any(part.startswith(".") for part in parts):
                    yield archive, member, "/".join(parts)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is a damaged shard ({error}); copy or download it again") from error


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}" if folder else base.partition(".")[0]


def _class_in(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """What a .cls file says, or one of the known fields of a .json; "" where that is no number and no word."""
    stream = archive.extractfile(member) if member.size <= _MAX_LABEL_BYTES else None
    text = stream.read().decode("utf-8", "replace").strip() if stream else ""
    if member.name.endswith(".cls"):
        return text
    found: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
    values = (found.get(key) for key in _FIELDS_OF_JSON) if isinstance(found, dict) else ()
    return next((str(value) for value in values if type(value) in (str, int) and str(value)), "")


def order_of(path: Path) -> list[str | int]:
    """A key by which shard 10 comes after shard 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", os.fspath(path.name))]
