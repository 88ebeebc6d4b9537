"""One checkpoint: a safetensors file that is written atomically and verified when it is read; no pickle.

It holds every tensor of the training state, and in its header the configuration, the classes and a checksum of each
tensor, beside one of the header itself: a checkpoint alone rebuilds its model, and damage is found.

Of a model in a folder as the Hugging Face Hub has them (`attnorm.hub`), the header is config.json, beside
model.safetensors, whose tensors are those of the averaged generator alone, without a prefix.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from attnorm.config import FORMAT_VERSION, Config, UserError
from attnorm.settings import from_dict, to_dict
from attnorm.system.files import write_atomically

HEADER_KEY, HEADER_CHECKSUM_KEY, CHECKSUMS_KEY = "attnorm", "attnorm_checksum", "attnorm_checksums"
CONFIG, WEIGHTS = "config.json", "model.safetensors"  # of a model in a folder
REMEDY = "take an earlier one, or remove it and resume"


class CheckpointError(UserError):
    """A run directory or checkpoint that cannot be used: the message says why and what to do."""


class DamagedError(CheckpointError):
    """A checkpoint whose content is not what was written: an earlier one may do."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file atomically, from tensors on any device.

    Raises:
        OSError: it cannot be written; the message says how large it is and how much room there is.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        write_atomically(path, lambda temporary: safetensors.torch.save_file(plain, temporary, metadata))
    except (OSError, safetensors.SafetensorError) as error:  # the latter of a full disk, and it is no OSError
        size = sum(tensor.nbytes for tensor in plain.values())
        try:
            room = f"{shutil.disk_usage(path.parent).free / 2**20:,.1f} MiB are free there"
        except OSError:
            room = "its folder cannot be reached"
        raise OSError(f"{path} ({size / 2**20:,.1f} MiB) cannot be written, {room}: {error}") from error


def checksum(tensor: Tensor) -> str:
    """BLAKE2b, 64 bits in hexadecimal, of a tensor's type, shape and bytes: it tells damage, not forgery."""
    tensor = tensor.detach().cpu().contiguous()
    return _digest(f"{tensor.dtype} {list(tensor.shape)}".encode(), tensor.reshape(-1).view(torch.uint8).numpy().data)


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself."""

    config: Config
    classes: tuple[str, ...]
    images_seen: int
    seconds: float  # of training, all legs together
    note: str = ""  # what a reader of the results must know of the data
    threads: int = 0  # of torch, in the process that wrote it: another number rounds otherwise; 0: not known
    processes: int = 1  # that trained together

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the version of the format; `_parse_header` is the inverse."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            "format_version": FORMAT_VERSION,
            **values,
            "config": to_dict(self.config),
            "classes": list(self.classes),
        }

    def public(self) -> Header:
        """Without where the data and an earlier run lay, which is no one else's business."""
        data, run = replace(self.config.data, source=""), replace(self.config.run, start_from="")
        return replace(self, config=replace(self.config, data=data, run=run))


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    """Writes one checkpoint file atomically; OSError, with what there is room for, where that fails."""
    text = json.dumps(header.to_dict() | {"checksums": _checksums(tensors)})
    write_tensors(path, tensors, {HEADER_KEY: text, HEADER_CHECKSUM_KEY: _digest(text.encode())})


def save_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a model's tensors by their own names, with a checksum of each, for a folder with a config.json."""
    write_tensors(path, tensors, {"format": "pt", CHECKSUMS_KEY: json.dumps(_checksums(tensors))})


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: checksum(tensor) for name, tensor in tensors.items()}


def read_checkpoint(path: Path, *, prefix: str = "") -> tuple[dict[str, Tensor], Header]:
    """The tensors whose names start with `prefix` (which is cut off), and the header.

    Raises:
        DamagedError: the file is not whole, its header or a tensor is not what was written, or one is not finite.
        CheckpointError: it is no checkpoint, or of a newer version.
    """
    with _opened(path) as (file, header, checksums):
        root = "" if HEADER_KEY in (file.metadata() or {}) else "ema."
        names = {(root + name).removeprefix(prefix): name for name in file.keys() if (root + name).startswith(prefix)}  # noqa: SIM118
        tensors = {short: _read_tensor(path, file, name, checksums) for short, name in names.items()}
    return tensors, header


def read_header(path: Path) -> Header:
    """What a checkpoint says of itself, without reading a tensor; errors as `read_checkpoint`."""
    with _opened(path) as (_, header, _):
        return header


def _read_tensor(path: Path, file: Any, name: str, checksums: Mapping[str, str]) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    if checksums and checksums.get(name) != checksum(tensor):
        raise DamagedError(f"{path} is damaged: {name} is not what was written; {REMEDY}")
    if not tensor.isfinite().all():
        raise DamagedError(f"{path} cannot be used: {name} is not finite; {REMEDY}")
    return tensor


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Header, dict[str, str]]]:
    """A checkpoint file, its header, and the checksum of each tensor (none in those of older versions)."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get(HEADER_KEY)
            if text is None and (config := path.with_name(CONFIG)).is_file() and path.name == WEIGHTS:
                header, _ = _parse_header(config, config.read_text(encoding="utf-8", errors="replace"))
                yield file, header, _stated_checksums(path, metadata)
                return
            if text is None:
                raise DamagedError(
                    f"{path} is a safetensors file, but not a checkpoint of attnorm: it has no header of ours"
                )
            if metadata.get(HEADER_CHECKSUM_KEY, _digest(text.encode())) != _digest(text.encode()):
                raise DamagedError(f"{path} is damaged: its header is not what was written; {REMEDY}")
            yield file, *_parse_header(path, text)
    except safetensors.SafetensorError as error:
        raise DamagedError(f"{path} cannot be read as a checkpoint ({error}); {REMEDY}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}); expected a checkpoint") from error


def _stated_checksums(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        return dict(json.loads(metadata.get(CHECKSUMS_KEY, "{}")))
    except (TypeError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: its checksums are not what was written; {REMEDY}") from error


def _parse_header(path: Path, text: str) -> tuple[Header, dict[str, str]]:
    try:
        values = json.loads(text)
        version = values["format_version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {version}; this version reads up to {FORMAT_VERSION}: update attnorm"
            )
        header = Header(
            config=from_dict(Config, values["config"]),
            classes=tuple(values["classes"]),
            images_seen=int(values["images_seen"]),
            seconds=float(values["seconds"]),
            note=values.get("note", ""),
            threads=values.get("threads", 0),
            processes=values.get("processes", 1),
        )
        if not all(isinstance(text, str) for text in (*header.classes, header.note)):
            raise TypeError("classes and note are not text")
        if not math.isfinite(header.seconds):
            raise ValueError("seconds are no number")
        return header, dict(values.get("checksums", {}))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedError(f"{path} has a damaged header ({error!r}); {REMEDY}") from error


def find_damage(path: Path) -> str:
    """Why a checkpoint file cannot be used, or nothing. All of it is read for that, once in a process.

    Raises:
        CheckpointError: as read_checkpoint, of what is no damage.
    """
    status = path.stat()
    return _find_damage(path, status.st_mtime_ns, status.st_size)


@cache
def _find_damage(path: Path, changed: int, size: int) -> str:
    try:
        with _opened(path) as (file, _, checksums):
            for name in file.keys():  # noqa: SIM118
                _read_tensor(path, file, name, checksums)
    except DamagedError as error:
        return str(error)
    return ""
