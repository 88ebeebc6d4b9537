"""What the subcommands share: the console, types of arguments, and checks that come before any work."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from attnorm.config import Config, ConfigError, printable
from attnorm.system import progress

if TYPE_CHECKING:
    from attnorm.data.images import ImageSet
    from attnorm.reports.render import Table


class _Messages(Console):
    """Messages may quote names of files and classes, and these are anything."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(part) if isinstance(part, str) else part for part in objects), **options)


console = _Messages(stderr=True, highlight=False, soft_wrap=True, markup=False)


def screen() -> Console:
    """For tables on the standard output: as wide as the terminal or COLUMNS, and elsewhere wide enough for them all."""
    is_known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return Console(highlight=False, markup=False, width=None if is_known else 200)


def counted(count: int, singular: str, plural: str = "") -> str:
    """ "1 image", "2,560 images"."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def print_table(table: Table) -> None:
    """A report's table, on the standard output."""
    import rich.table

    title = printable(table.title) or None
    shown = rich.table.Table(*table.header, title=title, title_justify="left", box=None, pad_edge=False)
    for row in table.rows:
        shown.add_row(*map(printable, row))
    screen().print(shown)


def split_names(names: str) -> list[str]:
    """Those of an option, with commas between."""
    return [name.strip() for name in names.split(",") if name.strip()]


Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Seed = Annotated[int, tyro.conf.arg(metavar="S")]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Names = Annotated[str, tyro.conf.arg(metavar="NAME,...")]
Settings = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set", metavar="KEY=VALUE")]


def read_images(config: Config) -> ImageSet:
    from attnorm.data.images import load_images

    with progress_bar() as bars:
        bar = bars.add_task("reading images", total=None)
        try:
            images = load_images(
                config.data.source,
                config.data.stored_size or config.model.image_size,
                fit=config.data.fit,
                progress=lambda done, total: bars.update(bar, completed=done, total=total),
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
    _say_what_was_found(images.labels.tolist(), "image", images.source, images.skipped)
    if images.note:
        console.print(images.note, style="yellow", markup=False)
    return images


def say_what_is_there(source: str) -> None:
    """What `read_images` would read, by the names of the files: none is decoded."""
    from attnorm.data.sources import KINDS, find_source

    try:
        with find_source(Path(source).expanduser()).open() as contents:
            classes, skipped = [class_name for class_name, _ in contents.files], contents.skipped
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not classes:
        raise ConfigError(f"no image in {source}; expected {KINDS}")
    _say_what_was_found(classes, "image file", source, skipped)


def _say_what_was_found(classes: Sequence[object], what: str, source: str, skipped: Sequence[str]) -> None:
    """`classes`: the class of each image."""
    sizes = Counter(classes).values()
    spread = f", {min(sizes):,} to {max(sizes):,} a class" if min(sizes) < max(sizes) else ""
    num_classes = counted(len(sizes), "class", "classes")
    console.print(f"{counted(len(classes), what)} of {num_classes} from {source}{spread}")
    if skipped:
        named = "\n  ".join(skipped[:10])
        more = f"\n  and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        console.print(f"skipped {len(skipped)}:\n  {named}{more}", style="yellow", markup=False)


def progress_bar() -> Progress:
    """A bar with the time left on a terminal, lines elsewhere."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return progress.progress_bar(console, *columns, transient=True)


def one_bar(bars: Progress, what: str) -> Callable[[int, int, str], None]:
    """A bar over all that is done, whose text says what is being done."""
    bar = bars.add_task(what)
    return lambda done, total, what: bars.update(bar, completed=done, total=total, description=what)


def one_bar_each(bars: Progress) -> Callable[[int, int, str], None]:
    """A bar for what is being done, with the time that is left of this."""
    shown: dict[str, TaskID] = {}

    def tell(done: int, total: int, what: str) -> None:
        if what not in shown:
            for bar in shown.values():
                bars.remove_task(bar)
            shown.clear()
            shown[what] = bars.add_task(printable(what), total=total)
        bars.update(shown[what], completed=done)

    return tell


def require_one_process(subcommand: str) -> None:
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1":
        raise ConfigError(
            f"`attnorm {subcommand}` was started in {count} processes, which would write over each other; start one, "
            "without torchrun"
        )


def require_free(out: Path, overwrite: bool, *, is_picture: bool = False) -> None:
    if is_picture and out.is_dir():
        raise ConfigError(f"{out} is a folder; expected a picture's name, for example {out / 'picture.png'}")
    require_not_of_a_run(out)
    require_writable(out)
    occupied = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if occupied and not overwrite:
        raise ConfigError(f"{out} is already there; choose another --out, or say --overwrite")
    if out.suffix == "" and out.is_file():
        raise ConfigError(f"{out} is a file; expected a folder")
    if out.exists() and not out.is_file() and not out.is_dir():
        raise ConfigError(f"{out} is a pipe or a device; choose another --out")


def require_writable(out: Path) -> None:
    """Whether `out` can be made, as far as can be told without making it."""
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if place != out and not place.is_dir():
        raise ConfigError(f"{place} is a file; expected a folder there; choose another --out")
    if not os.access(place, os.W_OK):
        raise ConfigError(f"{place} cannot be written to; choose another --out, or have its permissions changed")


def require_ending(out: Path, form: str, ending: str) -> None:
    """Of a file's name, before anything is made: by it others tell what the file is."""
    if out.suffix.lower() != ending:
        raise ConfigError(f"{out} is written as {form}; let its name end in {ending}")


def require_not_of_a_run(out: Path) -> None:
    """What a run needs is no place for anything else, whether it would replace a file or stand beside it."""
    from attnorm.run_directory import PARTS_OF_A_RUN, RunDirectory

    place = Path(os.path.realpath(out))
    for folder in (place, *place.parents):
        below = place.relative_to(folder).parts[:1]
        if RunDirectory(folder).exists() and (not below or below[0] in PARTS_OF_A_RUN):
            raise ConfigError(f"{out} is a run directory, or a part of one ({folder}); choose another --out")


def out_of_memory(error: BaseException) -> str:
    """What is said of an error that means too little memory, with what was asked for; "" of any other one."""
    text = str(error)
    found = re.search(r"llocate (?:memory: you tried to allocate )?([\d.]+) ?(bytes|[KMGTPE]?i?B)", text)
    # The latter is torch's, which is not imported.
    is_meant = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not (is_meant or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text))):
        return ""
    asked = f" for {float(found[1]):,.15g} {found[2]} more" if found else ""
    return (
        f"the device is out of memory{asked}; a smaller batch, model or picture needs less, as does --device cpu and "
        "in training run.precision=bfloat16. What was saved is whole"
    )


_NO_MEMORY = re.compile(
    "can't allocate memory|not enough memory|Storage size calculation overflowed|multiplication overflow"
)


def describe_os_error(error: OSError) -> str:
    """In words, with a remedy where there is one for certain."""
    if error.strerror is None:
        return str(error)
    if error.filename is None:
        return error.strerror.lower()
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    remedies = {
        errno.ENOSPC: "make room there",
        errno.EDQUOT: "make room there",
        errno.EACCES: "choose another place, or have its permissions changed",
        errno.EPERM: "choose another place, or have its permissions changed",
        errno.EROFS: "choose another place",
        errno.ENOTDIR: "choose another place: a part of this name is a file",
        errno.ENAMETOOLONG: "choose a shorter name",
    }
    remedy = remedies.get(error.errno or 0, "choose another place")
    return f"{name} cannot be read or written ({error.strerror.lower()}); {remedy}"


def require_outside(out: Path | None, data: str) -> None:
    """Whatever is written inside a folder of data would be read as data the next time."""
    if out is None or data in ("", "builtin"):
        return
    folder = Path(data).expanduser()
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"--out {out} is inside the data {data}, and what is written there would be read as data; choose another"
        )
