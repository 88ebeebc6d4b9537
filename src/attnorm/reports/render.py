"""A document of tables and pictures, written as Markdown for GitHub, as one HTML page, or as plain JSON."""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2

from attnorm.config import printable
from attnorm.system.files import write_text

LONG_CELL = 30  # characters from which on a cell of a page may wrap
NOT_RUN = "not run"


class Strong(str):
    """A cell that stands out."""


@dataclass(frozen=True)
class Table:
    """Text as it is shown; every row has as many cells as the header, where there is one."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A file below the document's folder."""

    file: str
    caption: str


@dataclass(frozen=True)
class Section:
    """In this order."""

    title: str = ""
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    points: tuple[str, ...] = ()  # a list
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Document:
    title: str
    sections: tuple[Section, ...]


def to_markdown(document: Document) -> str:
    return _environment().get_template("document.md.jinja").render(document=document)


def to_html(document: Document, folder: Path, *, embed: bool) -> str:
    """One page; with `embed` its pictures, read from `folder`, are in it, else they stand beside it."""

    def source(picture: Picture) -> str:
        if not embed:
            return picture.file
        return "data:image/png;base64," + base64.b64encode((folder / picture.file).read_bytes()).decode("ascii")

    return _environment().get_template("document.html.jinja").render(document=document, source=source)


def write_document(
    document: Document, out: Path, name: str, kinds: Sequence[Literal["md", "html"]] = ("md",), *, embed: bool = True
) -> list[Path]:
    """NAME.md and NAME.html, as asked for, in the folder `out`; returns their paths."""
    for kind in kinds:
        text = to_markdown(document) if kind == "md" else to_html(document, out, embed=embed)
        write_text(out / f"{name}.{kind}", text)
    return [out / f"{name}.{kind}" for kind in kinds]


def in_markdown(text: str) -> str:
    """As text in Markdown, in a cell too: no emphasis, HTML or new cell comes of a name."""
    shown = text
    for character in "\\|*<`":
        shown = shown.replace(character, f"\\{character}")
    shown = " ".join(printable(shown).split())
    return f"**{shown}**" if isinstance(text, Strong) else shown


def _kind_of_cell(text: str) -> str:
    return "none" if text in ("-", NOT_RUN) else "text" if len(text) > LONG_CELL else ""


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attnorm.reports"),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"markdown": in_markdown, "printable": printable, "kind": _kind_of_cell}
    environment.tests["strong"] = lambda text: isinstance(text, Strong)
    return environment
