"""Files: written whole or not at all, locked by one process, JSON and JSON Lines, hashes, the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attnorm.config import ConfigError, UserError


def write_atomically(path: Path, write: Callable[[Path], object], *, mode: int = 0o644) -> None:
    """Calls `write` with a temporary path in the same folder and moves the result to `path` in one step.

    Whatever happens, a reader sees the old file or the whole new one.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:  # which names the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        temporary.chmod(mode)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or isinstance(error, UserError):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # by the name that the user knows
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, indented, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, none where there is no file; a line that a kill cut short is left out, as is
    one that no machine can have written.
    """
    rows = []
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""  # cut within a letter, perhaps
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]], *, allow_nan: bool = False) -> None:
    """Writes a JSON Lines file atomically; ValueError where a number is not finite, unless those are allowed."""
    write_text(path, "".join(json.dumps(row, allow_nan=allow_nan) + "\n" for row in rows))


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends whole lines to a JSON Lines file in one write, whatever a kill has left of an earlier one.

    Raises:
        ValueError: a number is not finite.
    """
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with path.open("ab+") as file:
        is_torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write(b"\n" * is_torn + text.encode())
        file.flush()
        os.fsync(file.fileno())


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def file_lock(folder: Path) -> Iterator[None]:
    """Keeps other processes that ask for it too out of a folder, which is made where missing; for as long as this one
    lives at most, and only as far as the file system has locks.

    Raises:
        ConfigError: another one is there.
    """
    if not folder.exists():  # a file is for the caller to refuse
        folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # of file systems without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"another process is at work in {folder}; wait until it has ended, or choose another --out"
                ) from None
        yield
    finally:
        os.close(descriptor)


def default_cache_dir() -> Path:
    """Where what can be made again is kept: $ATTNORM_CACHE, else attnorm in $XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("ATTNORM_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnorm"
