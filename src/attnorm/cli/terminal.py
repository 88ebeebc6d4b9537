"""What the verbs share: the console, types of arguments, and checks that come before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import Progress

from attnorm.config import Config, ConfigError

if TYPE_CHECKING:
    from attnorm.data.images import ImageSet

console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Seed = Annotated[int, tyro.conf.arg(metavar="S")]
Overwrite = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Names = Annotated[str, tyro.conf.arg(metavar="NAME,...")]


def read_images(config: Config) -> ImageSet:
    from rich.progress import Progress

    from attnorm.data.images import load_images

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reading images", total=None)
        try:
            images = load_images(
                config.data.source,
                config.data.stored_size or config.model.image_size,
                fit=config.data.fit,
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
    num_classes = len(images.classes)
    console.print(
        f"{len(images):,} images of {num_classes} class{'es' if num_classes > 1 else ''} from {images.source}"
    )
    if images.skipped:
        named = "\n  ".join(images.skipped[:10])
        more = f"\n  and {len(images.skipped) - 10} more" if len(images.skipped) > 10 else ""
        console.print(f"skipped {len(images.skipped)}:\n  {named}{more}", style="yellow", markup=False)
    if images.note:
        console.print(images.note, style="yellow", markup=False)
    return images


def progress_bar() -> Progress:
    """A bar with the time left, on a terminal."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def require_seed(seed: int, count: int = 1) -> None:
    if not 0 <= seed <= 2**63 - count:
        raise ConfigError(f"--seed is {seed}; expected a whole number from 0 up to 2^63")


def require_free(out: Path, overwrite: bool, *, is_picture: bool = False) -> None:
    if is_picture and out.is_dir():
        raise ConfigError(f"{out} is a folder; expected a picture's name, for example {out / 'picture.png'}")
    occupied = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if occupied and not overwrite:
        raise ConfigError(f"{out} is already there; choose another --out, or say --overwrite")
    if out.suffix == "" and out.is_file():
        raise ConfigError(f"{out} is a file; expected a folder")


def no_such(kind: str, name: str, known: Sequence[str], remedy: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"there is no {kind} {name!r}; " + (f"did you mean {near[0]}? " if near else "") + remedy
