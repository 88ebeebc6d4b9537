"""Models at hand: run directories, folders of saved models, and what comes with the package."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from attnorm.checkpoint import read_header
from attnorm.config import Config, UserError, printable
from attnorm.pretrained import read_card, shipped
from attnorm.run_directory import RunDirectory, find_checkpoint, is_saved_model


@dataclass(frozen=True)
class Model:
    """A network that can be used, or a run that has none yet."""

    id: str
    path: Path
    task: str  # "class_conditional" or "inpainting"; "" where the configuration cannot be read
    context: str
    image_size: int
    classes: tuple[str, ...]
    num_entities: int  # 0 without AN
    preset: str
    source: str  # "run", or "shipped" with the package
    problem: str  # why it cannot be used; empty if it can
    about: str = ""  # what is known of a shipped model


def run_directories(places: Iterable[Path]) -> dict[str, Path]:
    """Run directories, and folders of saved models, by name: each place is one, or a folder of them. A second one of a
    name gets a number.
    """
    found: dict[str, Path] = {}
    for place in places:
        folders = [place]
        if not _is_model(place) and place.is_dir():
            folders = sorted(folder for folder in place.iterdir() if _is_model(folder))
        for folder in folders:
            name = printable(folder.name if folder.name not in ("", "..") else folder.resolve().name) or "run"
            names = [name, *(f"{name}-{number}" for number in range(2, len(found) + 3))]
            found[next(name for name in names if name not in found)] = folder
    return found


def _is_model(folder: Path) -> bool:
    return RunDirectory(folder).exists() or is_saved_model(folder)


def available_models(places: Iterable[Path]) -> list[Model]:
    """Every model at hand: runs in the order of their places, then those that come with the package."""
    models = [_model_of(name, path) for name, path in run_directories(places).items()]
    taken = {model.id for model in models}
    return models + [_shipped(name, path) for name, path in shipped().items() if name not in taken]


@functools.cache  # the package's files do not change
def _shipped(name: str, path: Path) -> Model:
    header, card = read_header(path), read_card(name)
    about = f"{card.what}. Trained on {card.data}. {card.limits[0]}."
    return _described(name, path, header.config, header.classes, source="shipped", about=about)


def _model_of(name: str, path: Path) -> Model:
    problem = ""
    try:
        if is_saved_model(path):
            header = read_header(find_checkpoint(path))
            config, data = header.config, {"classes": header.classes}
        else:
            config, data = RunDirectory(path).read()
            problem = "" if RunDirectory(path).checkpoints() else "it has no checkpoint yet"
    except UserError as error:
        return Model(name, path, "", "", 0, (), 0, "", "run", str(error))
    classes = tuple(data.get("classes", ())) if config.task == "class_conditional" else ()
    return _described(name, path, config, classes, source="run", problem=problem)


def _described(
    name: str, path: Path, config: Config, classes: tuple[str, ...], *, source: str, problem: str = "", about: str = ""
) -> Model:
    settings = config.model
    return Model(
        name,
        path,
        config.task,
        settings.context,
        settings.image_size,
        classes,
        settings.an.num_entities if settings.context.startswith("an") else 0,
        config.preset,
        source,
        problem,
        about,
    )
