"""Published weights of networks, in torch's format: the project's only reader of it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from attnorm.config import UserError


def read_weights(path: Path, sha256: str = "", *, part: str = "") -> dict[str, Tensor]:
    """The tensors of a file, a safetensors one or torch's, by its restricted reader, which makes tensors and calls
    nothing; UserError of any other file.

    Args:
        sha256: What the file's must be; what was verified is what is read. "": any.
        part: Where the file has a group of that name, that alone is read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a file of weights") from error
    if sha256:
        verify(str(path), content, sha256)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(content)
        state: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:  # that of a pickle which calls something is named in a module that is banned here
        raise UserError(  # not torch's own words, which advise to run it
            f"{path} cannot be read as weights without running what is in it, or is damaged; expected a safetensors "
            "file, or torch's of tensors alone"
        ) from error
    state = state.get(part, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(weight, Tensor) for weight in state.values()):
        raise UserError(f"{path} holds something else than tensors by name; expected a file of weights")
    return dict(state)


def verify(what: str, content: bytes, sha256: str) -> None:
    """UserError unless that is the SHA-256 of `content`, of `what`."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(
            f"{what} has SHA-256 {found} ({len(content):,} bytes); expected {sha256}: it is damaged, or another file; "
            "remove it and get it again"
        )
