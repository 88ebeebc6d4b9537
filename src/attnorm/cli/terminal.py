"""What the verbs share: the console, types of arguments, and checks that come before any work."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.progress import Progress, TaskID

from attnorm.config import Config, ConfigError

if TYPE_CHECKING:
    from attnorm.data.images import ImageSet

SECONDS_BETWEEN_LINES = 15.0  # of progress, without a terminal

console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Seed = Annotated[int, tyro.conf.arg(metavar="S")]
Overwrite = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Names = Annotated[str, tyro.conf.arg(metavar="NAME,...")]


def read_images(config: Config) -> ImageSet:
    from attnorm.data.images import load_images

    with progress_bar() as progress:
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


class _Lines(Progress):
    """For logs, where no bar can be drawn: a line now and then, with the time left."""

    def __init__(self) -> None:
        super().__init__(console=console, disable=True)
        self._last_line = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        task = self._tasks[task_id]
        if not task.finished and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            of = f" of {task.total:,.0f}" if task.total is not None else ""
            left = f", {datetime.timedelta(seconds=task.time_remaining)} left" if task.time_remaining else ""
            console.print(f"{task.description}: {task.completed:,.0f}{of}{left}")


def progress_bar() -> Progress:
    """A bar with the time left on a terminal, lines elsewhere."""
    return Progress(console=console, transient=True) if console.is_terminal else _Lines()


def one_bar(progress: Progress, what: str) -> Callable[[int, int, str], None]:
    """A bar over all that is done, whose text says what is being done."""
    bar = progress.add_task(what)
    return lambda done, total, what: progress.update(bar, completed=done, total=total, description=what)


def one_bar_each(progress: Progress) -> Callable[[int, int, str], None]:
    """A bar for what is being done, with the time that is left of this."""
    bars: dict[str, TaskID] = {}

    def tell(done: int, total: int, what: str) -> None:
        if what not in bars:
            for bar in bars.values():
                progress.remove_task(bar)
            bars.clear()
            bars[what] = progress.add_task(what, total=total)
        progress.update(bars[what], completed=done)

    return tell


def require_one_process(verb: str) -> None:
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1":
        raise ConfigError(
            f"`attnorm {verb}` was started in {count} processes, which would write over each other; start it in one, "
            "without torchrun"
        )


def require_free(out: Path, overwrite: bool, *, is_picture: bool = False) -> None:
    if is_picture and out.is_dir():
        raise ConfigError(f"{out} is a folder; expected a picture's name, for example {out / 'picture.png'}")
    occupied = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if occupied and not overwrite:
        raise ConfigError(f"{out} is already there; choose another --out, or say --overwrite")
    if out.suffix == "" and out.is_file():
        raise ConfigError(f"{out} is a file; expected a folder")
    if out.exists() and not out.is_file() and not out.is_dir():
        raise ConfigError(f"{out} is a pipe or a device; choose another --out")


def require_outside(out: Path | None, data: str) -> None:
    """Whatever is written inside a folder of data would be read as data the next time."""
    if out is None or data in ("", "builtin"):
        return
    folder = Path(data).expanduser()
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"--out {out} is inside the data {data}, and what is written there would be read as data; choose another"
        )


def no_such(kind: str, name: str, known: Sequence[str], remedy: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"there is no {kind} {name!r}; " + (f"did you mean {near[0]}? " if near else "") + remedy
