"""Published weights of feature networks, in torch's format: the project's only reader of it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import torch
from torch import Tensor

from attnorm.config import UserError


def read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a file whose content is as expected. What was verified is what is read, by torch's restricted
    reader, which makes tensors and calls nothing.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a file of weights") from error
    verify(str(path), content, sha256)
    state: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)  # noqa: TID251
    return state


def verify(what: str, content: bytes, sha256: str) -> None:
    """UserError unless that is the SHA-256 of `content`, of `what`."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(
            f"{what} has SHA-256 {found} ({len(content):,} bytes); expected {sha256}: it is damaged, or another file; "
            "remove it and get it again"
        )
