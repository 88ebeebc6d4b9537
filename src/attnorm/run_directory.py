"""What lies in a run directory, and which checkpoint a path or a name means.

    RUN/config.json              the resolved configuration and what the data were
    RUN/metrics.jsonl            one line per logged step
    RUN/evaluation/metrics.jsonl one line per score
    RUN/samples/000064000.png    fixed latents and classes, by images seen
    RUN/tensorboard/, RUN/wandb/
    RUN/checkpoints/000064000.safetensors

Whatever else lies there is someone else's: it is neither read nor removed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from attnorm.checkpoint import CONFIG, WEIGHTS, CheckpointError, find_damage
from attnorm.config import FORMAT_VERSION, Config, UserError, did_you_mean
from attnorm.pretrained import shipped
from attnorm.settings import from_dict, to_dict
from attnorm.system.files import read_lines, write_json

# A run's own: none may be an output of anything but training. What is measured may stand in evaluation.
PARTS_OF_A_RUN = ("config.json", "metrics.jsonl", "samples", "tensorboard", "wandb", "checkpoints")
CHECKPOINT_NAME = re.compile(r"(\d{9}|[1-9]\d{9,})\.safetensors")  # images seen; beyond nine digits the names grow
UNFINISHED_NAME = re.compile(rf"\.{CHECKPOINT_NAME.pattern}\.\w{{8}}\.tmp")  # what a kill leaves of write_atomically

_log = logging.getLogger(__name__)

_DATA = {"source": str, "fingerprint": str, "note": str, "classes": list}  # of config.json's data

_NUMBER = (int, float)


def _is_of(value: Any, kinds: tuple[type, ...]) -> bool:
    """Of one of the types, a number finite, and what a list or a group holds numbers."""
    if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
        return False
    parts = value if isinstance(value, list) else ()
    return all(_is_of(part, _NUMBER) for part in parts)


def _is_logged(name: str, value: Any) -> bool:
    if name.endswith(("/usage", "/t")):
        return _is_of(value, (list,))
    return type(value) in _NUMBER


@cache
def _warn_once(text: str) -> None:
    _log.warning("%s", text)


class RunDirectory:
    """Paths and bookkeeping of one run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def scores_file(self) -> Path:
        return self.path / "evaluation" / "metrics.jsonl"

    def read_metrics(self) -> list[dict[str, Any]]:
        """What training logged: at each time a number of images, and numbers by name, or lists of them (usage of the
        entities, t); what is neither is left out.
        """
        return [
            {name: value for name, value in row.items() if _is_logged(name, value)}
            for row in read_lines(self.metrics_file)
            if type(row.get("images_seen")) is int
        ]

    def exists(self) -> bool:
        return self.config_file.is_file() and not is_saved_model(self.path)

    def create(self, config: Config, data: dict[str, Any]) -> None:
        """Makes the directory, or begins one anew; raises CheckpointError where there is already something else."""
        self.require_free_or_run()
        for folder in ("checkpoints", "samples"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        values = {"format_version": FORMAT_VERSION, "config": to_dict(config), "data": data}
        write_json(self.config_file, values)

    def require_free_or_run(self) -> None:
        """Raises CheckpointError where there is already something else than a run."""
        if self.exists() or not self.path.exists():
            return
        if not self.path.is_dir() or any(not _is_remnant(entry) for entry in self.path.iterdir()):
            raise CheckpointError(f"{self.path} is already there and is not a run; choose another --out")

    def read(self) -> tuple[Config, dict[str, Any]]:
        """The configuration and the description of the data that the run was made with."""
        if not self.exists():
            raise CheckpointError(f"{self.path} is not a run directory: it has no config.json")
        try:
            values = json.loads(self.config_file.read_text(encoding="utf-8"))
            if values["format_version"] > FORMAT_VERSION:
                raise CheckpointError(
                    f"{self.config_file} has format {values['format_version']}; this version reads up to "
                    f"{FORMAT_VERSION}: update attnorm"
                )
            data = dict(values["data"])
            wrong = [name for name, kinds in _DATA.items() if name in data and type(data[name]) is not kinds]
            if wrong or not all(isinstance(name, str) for name in data.get("classes", [])):
                raise TypeError(f"its data have other kinds of {', '.join(wrong) or 'classes'}")
            return from_dict(Config, values["config"]), data
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise CheckpointError(f"{self.config_file} cannot be read ({error!r}); restore it from a copy") from error

    def checkpoints(self) -> list[Path]:
        """Those with a name of ours, oldest first; not copies of other names."""
        folder = self.path / "checkpoints"
        files = [file for file in folder.iterdir() if CHECKPOINT_NAME.fullmatch(file.name)] if folder.is_dir() else []
        return sorted(files, key=lambda file: int(file.stem))

    def sound_checkpoints(self) -> list[Path]:
        return [file for file in self.checkpoints() if not find_damage(file)]

    def latest(self) -> Path | None:
        """The newest checkpoint that is not damaged, or None without any; damaged newer ones are named in the log.

        Raises:
            CheckpointError: all of them are damaged.
        """
        damages: list[str] = []
        for file in reversed(self.checkpoints()):
            try:
                damage = find_damage(file)
            except FileNotFoundError:  # training goes on meanwhile, and keeps the newest alone
                continue
            if not damage:
                if damages:
                    _warn_once(f"{file} is taken, as newer ones cannot be: {'; '.join(damages)}")
                return file
            damages.append(damage)
        if damages:
            raise CheckpointError(f"{self.path} has no checkpoint that can be used: {damages[0]}")
        return None

    def checkpoint_file(self, images_seen: int) -> Path:
        return self.path / "checkpoints" / f"{images_seen:09d}.safetensors"

    def sample_file(self, images_seen: int) -> Path:
        return self.path / "samples" / f"{images_seen:09d}.png"

    def scores_of(self, images_seen: int) -> tuple[str, ...]:
        """What was measured of the averaged weights of one checkpoint, a line a score of images."""
        return tuple(
            f"{row.get('name') or row.get('metric')} {row['value']:.4g} ({row.get('protocol', 'no protocol')})"
            for row in read_lines(self.scores_file)
            if row.get("images_seen") == images_seen
            and row.get("weights", "ema") == "ema"
            and not row.get("site")
            and _is_of(row.get("value"), _NUMBER)
        )

    def keep_last(self, count: int) -> None:
        """Removes older checkpoints, and what a kill left of unfinished ones."""
        folder = self.path / "checkpoints"
        unfinished = [file for file in folder.iterdir() if UNFINISHED_NAME.fullmatch(file.name)]
        for old in [*self.checkpoints()[:-count], *unfinished]:
            old.unlink(missing_ok=True)

    def set_aside_damaged(self, *, affordable: int = 0) -> list[str]:
        """Renames damaged checkpoints newer than the latest good one, so that they are ours no more, and says why.

        Raises:
            CheckpointError: all are damaged, and the newest has seen more than `affordable` images. A run that would
                lose no more than that begins anew.
        """
        files, reasons = self.checkpoints(), []
        is_young = bool(files) and int(files[-1].stem) <= affordable
        good = None if is_young and all(map(find_damage, files)) else self.latest()
        for file in reversed(files):
            if file == good:
                break
            aside = file.with_name(f"{file.name}.damaged")
            reasons.append(f"{find_damage(file)}; it is kept as {aside.name}")
            os.replace(file, aside)
        return reasons


def _is_remnant(entry: Path) -> bool:
    """Whether a kill while a run directory was made may have left this: nothing in it is anyone's work."""
    if entry.name in ("checkpoints", "samples"):
        return entry.is_dir() and not any(entry.iterdir())
    return entry.name.startswith(".config.json.") and entry.name.endswith(".tmp")


def is_saved_model(folder: Path) -> bool:
    """Whether `save_pretrained` wrote it (`attnorm.hub`), or huggingface_hub had it from the Hub."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def find_checkpoint(path: Path | str) -> Path:
    """The checkpoint that `path` means: a file itself, a run directory's latest that is not damaged, the weights in a
    folder of `save_pretrained`, or, where nothing of that name is there, the model of that name that comes with the
    package.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path} is no checkpoint; expected a run directory, or a file from one's checkpoints that ends in "
                ".safetensors"
            )
        return path
    if not path.exists():
        models = shipped()
        if str(path) in models:
            return models[str(path)]
        hint = did_you_mean(str(path), models)
        raise CheckpointError(
            f"{path} does not exist; {hint}expected a run directory, a checkpoint file or the name of a model "
            "(`attnorm models`)"
        )
    if is_saved_model(path):
        return path / WEIGHTS
    run = RunDirectory(path)
    if not run.exists():
        raise CheckpointError(f"{path} is not a run directory: it has no config.json")
    checkpoint = run.latest()
    if checkpoint is None:
        raise CheckpointError(f"{path} has no checkpoint yet; train it first, or wait for its first one")
    return checkpoint
