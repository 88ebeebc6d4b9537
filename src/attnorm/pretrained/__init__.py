"""Models that come with the package: a checkpoint of averaged weights in half precision each, and its card beside it.

pretrained/NAME.safetensors
pretrained/NAME.json         what is known of it: see `Card`
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnorm.checkpoint import read_checkpoint, save_checkpoint
from attnorm.config import ConfigError
from attnorm.settings import from_dict, to_dict
from attnorm.system.files import write_json

FOLDER = Path(__file__).parent
LARGEST = 16 * 2**20  # bytes of one model; all together have 40 MiB


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a user must know of a model before believing it. Text is plain."""

    what: str  # in a line
    data: str  # which images, how many, at which size
    licence: str  # the data's
    recipe: str  # preset, and what differs from it
    images_seen: int
    hours: float  # of training
    machine: str
    commit: str  # that trained it
    score: str  # the most telling one, in a few words
    scores: tuple[str, ...]  # each with its protocol
    limits: tuple[str, ...]  # what it cannot do
    nearest: str  # whether samples are memory: the nearest training images, and how they were found

    def __post_init__(self) -> None:
        empty = [name for name, value in asdict(self).items() if value in ("", ())]
        if empty:
            raise ConfigError(f"a card says nothing of {', '.join(empty)}; expected a text for each")


def shipped() -> dict[str, Path]:
    """The checkpoint file of every model, by its name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.safetensors"))}


def read_card(name: str) -> Card:
    """The card of a model of `shipped`."""
    return from_dict(Card, json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def ship(checkpoint: Path, name: str, card: Card, folder: Path = FOLDER) -> Path:
    """Writes NAME.safetensors, a checkpoint's averaged weights in half precision, and NAME.json; returns the former.

    Matrices and filters become float16; what is one number a channel (norms' tables and running moments, biases), whose
    range half precision may lack, stays as it is. Where the data and the run lay is left out.

    Raises:
        ConfigError: it would be larger than LARGEST.
    """
    tensors, header = read_checkpoint(checkpoint, prefix="ema.")
    small = {f"ema.{key}": _halved(tensor) for key, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in small.values())
    if size > LARGEST:
        raise ConfigError(f"{name} would have {size / 2**20:.1f} MiB; expected at most {LARGEST // 2**20}: ship less")
    file = folder / f"{name}.safetensors"
    save_checkpoint(file, small, header.public())
    write_json(folder / f"{name}.json", to_dict(card))
    return file


def card_text(name: str, card: Card) -> str:
    """A card as Markdown."""
    lines = [f"# {name}", "", f"{card.what[0].upper()}{card.what[1:]}.", ""]
    facts: dict[str, Any] = {
        "data": card.data,
        "licence of the data": card.licence,
        "recipe": card.recipe,
        "training": f"{card.images_seen:,} images in {card.hours:.1f} hours, {card.machine}",
        "commit": card.commit,
    }
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    for title, points in (("Scores", card.scores), ("What it cannot do", card.limits)):
        lines += ["", f"## {title}", "", *(f"- {point}" for point in points)]
    return "\n".join([*lines, "", "## Is it memory?", "", card.nearest, ""])


def _halved(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float16) if tensor.is_floating_point() and tensor.ndim >= 2 else tensor
