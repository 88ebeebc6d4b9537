"""A report as files: Markdown, one HTML page that holds its pictures, JSON; and the figures of the paper from the runs.

The same runs give the same bytes, on the same machine with the same number of threads. The tables are made in
`evaluation.report`; what draws figures is above both.
"""

from __future__ import annotations

import base64
import html
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from attnorm.benchmark.report import pixels_figure
from attnorm.config import printable
from attnorm.evaluation.paper_tables import FIGURE_7_CLASSES, FIGURE_8_CLASSES, NUM_IMAGENET_CLASSES
from attnorm.evaluation.report import NOT_RUN, Report, Section, Table, to_dict
from attnorm.evaluation.runs import Run
from attnorm.figures import (
    curves_figure,
    interpolation_figure,
    most_telling_entity,
    samples_figure,
    save_figure,
    write_layouts,
)
from attnorm.inference import Sampler
from attnorm.page import STYLE
from attnorm.run_directory import RunDirectory
from attnorm.system.files import write_atomically, write_json, write_text

TITLE = "Attentive Normalization: the paper's tables and figures, measured"
REPORT_STYLE = """
body { max-width: 90rem; } .wide { overflow-x: auto; margin-bottom: 1rem; }
h3 { font-size: 1rem; font-weight: normal; margin: 1.2rem 0 0.3rem; }
th, td { padding: 0.15rem 1rem 0.15rem 0; text-align: left; vertical-align: bottom; font-size: 0.85rem; }
th { border-bottom: 1px solid #999; } th.text { overflow-wrap: anywhere; min-width: 9rem; }
td { border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { white-space: normal; min-width: 14rem; } td.none { color: #999; }
@media (prefers-color-scheme: dark) { td { border-color: #333; } td.none { color: #777; } }
"""
LONG_CELL = 30  # characters from which on a cell may wrap
PICTURES = "pictures"
MOST_CLASSES, COLUMNS, INTERPOLATION_STEPS = 10, 8, 5

Progress = Callable[[int, int, str], None]  # pictures done, in all, what is being drawn


class Picture(NamedTuple):
    """One figure, written or to be written."""

    section: str
    file: str  # in the folder of pictures
    caption: str


class Job(NamedTuple):
    """What draws one or several figures into a folder and says what they are."""

    what: str
    draw: Callable[[Path], list[Picture]]


def write_report(
    report: Report,
    out: Path,
    *,
    device: str = "auto",
    progress: Progress = lambda done, total, what: None,
) -> list[Path]:
    """Writes report.md, report.html, report.json and pictures/ into `out`; returns the paths of the first three.

    Args:
        device: Where the images of Figures 4, 5, 7 and 8 are made: auto, cpu, cuda or mps.
    """
    folder = out / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    jobs = _jobs(report, device)
    pictures: list[Picture] = []
    for number, job in enumerate(jobs):
        progress(number, len(jobs), job.what)
        pictures += job.draw(folder)
    progress(len(jobs), len(jobs), "pictures")
    # The order of the paper's figures; sorting keeps what is in one section in the order in which it was drawn.
    pictures.sort(key=lambda picture: picture.section)
    write_json(out / "report.json", {**to_dict(report), "pictures": [picture._asdict() for picture in pictures]})
    for name, text in (("report.md", markdown(report, pictures)), ("report.html", page(report, pictures, folder))):
        write_text(out / name, text)
    return [out / "report.md", out / "report.html", out / "report.json"]


# Figures


def _jobs(report: Report, device: str) -> list[Job]:
    jobs: list[Job] = []
    trained = [run for run in report.runs if RunDirectory(run.path).checkpoints()]
    with_an = next((r for r in sorted(trained, key=lambda r: r.row != "an") if r.model.context == "an"), None)
    firsts = {(run.label, str(run.recipe)): run for run in reversed(trained)}  # of each row, its first run
    shown = [run for run in trained if run in firsts.values()]
    if with_an is not None:
        jobs.append(Job(f"what {with_an.name} sees", partial(_draw_an, with_an, device)))
    jobs += [Job(f"samples of {run.name}", partial(_draw_samples, run, device, i)) for i, run in enumerate(shown, 1)]
    jobs += [
        Job(f"inpainting of {name}", partial(_copy_sheet, name, path / "sheet.png", number))
        for number, (name, (path, _)) in enumerate(report.inpainting.items(), 1)
        if (path / "sheet.png").is_file()
    ]
    for number, (name, bench) in enumerate(report.benches.items(), 1):
        caption = f"{name}: time against pixels, both logarithmic; the paper's Table 5 in grey."
        picture = Picture("Table 5, drawn", f"table-5-{number}.png", caption)
        jobs.append(Job(f"times of {name}", partial(_draw, picture, partial(pixels_figure, bench))))
    logged = {run.name: run.path for run in report.runs if RunDirectory(run.path).metrics_file.is_file()}
    if logged:
        caption = (
            "What training logged, against images seen. Fréchet distances, as evaluate measured them, against images "
            "seen and hours of training; quick looks at subsets are left out."
        )
        picture = Picture("Training", "curves.png", caption)
        jobs.append(Job("curves", partial(_draw, picture, partial(curves_figure, logged))))
    return jobs


def _draw(picture: Picture, make: Callable[[], Figure], folder: Path) -> list[Picture]:
    save_figure(make(), folder / picture.file)
    return [picture]


def _classes_of(sampler: Sampler) -> list[int]:
    if len(sampler.classes) == NUM_IMAGENET_CLASSES:
        return list(FIGURE_7_CLASSES)
    return list(range(min(len(sampler.classes), MOST_CLASSES)))


def _draw_samples(run: Run, device: str, number: int, folder: Path) -> list[Picture]:
    sampler = Sampler(run.path, device=device)
    caption = (
        f"{run.label}, {run.name}, after {sampler.header.images_seen:,} images: a class a row, a latent a column, by "
        "the averaged generator."
    )
    picture = Picture("Figure 7. Samples", f"figure-7-{number}.png", caption)
    return _draw(picture, partial(samples_figure, sampler, _classes_of(sampler), columns=COLUMNS), folder)


def _draw_an(run: Run, device: str, folder: Path) -> list[Picture]:
    """Figures 4, 5 and 8."""
    sampler = Sampler(run.path, device=device)
    who = f"{run.label}, {run.name}"
    pictures = []
    for path in write_layouts(sampler, _classes_of(sampler), 0, folder):
        if path.stem.startswith("layouts") and path.suffix == ".png":
            caption = f"{who}: image, the entity that wins each pixel, and the map of every entity."
            pictures.append(Picture("Figure 5. Layouts", path.name, caption))
        elif path.stem.startswith("statistics"):
            caption = (
                f"{who}: mean and standard deviation of the feature map that enters AN, on the whole and on the pixels "
                "that an entity wins; the largest regions."
            )
            pictures.append(Picture("Figure 4. Statistics of the regions", path.name, caption))
    is_imagenet = len(sampler.classes) == NUM_IMAGENET_CLASSES
    walk = FIGURE_8_CLASSES if is_imagenet else [i % len(sampler.classes) for i in range(3)]
    images, layouts = sampler.interpolate(0, walk, INTERPOLATION_STEPS)
    layout = next(iter(layouts.values())).layout
    entity = most_telling_entity(layout)
    titles = ["" for _ in images]
    for index, label in enumerate(walk):
        titles[index * (INTERPOLATION_STEPS - 1)] = sampler.classes[label]
    caption = (
        f"{who}: one latent; the statistics of conditional normalization are mixed linearly from class to class. "
        f"Below, the map of entity {entity}."
    )
    picture = Picture("Figure 8. From class to class", "figure-8.png", caption)
    return pictures + _draw(picture, partial(interpolation_figure, images, layout, entity, titles), folder)


def _copy_sheet(name: str, sheet: Path, number: int, folder: Path) -> list[Picture]:
    caption = f"{name}: the input with its hole in white, as each model and floor fills it, and as it was."
    picture = Picture("Figure 9. Inpainting", f"figure-9-{number}.png", caption)
    data = sheet.read_bytes()
    write_atomically(folder / picture.file, lambda path: path.write_bytes(data))
    return [picture]


# Documents


def markdown(report: Report, pictures: Sequence[Picture] = ()) -> str:
    """The report as GitHub shows it; pictures by their names in the folder beside it."""
    lines = [f"# {TITLE}"]
    for section in report.sections:
        lines += ["", f"## {_escaped(section.title)}"]
        for paragraph in section.paragraphs:
            lines += ["", _escaped(paragraph)]
        for table in section.tables:
            lines += _markdown_table(table)
        if section.points:
            lines += ["", *(f"- {_escaped(point)}" for point in section.points)]
    for title, group in itertools.groupby(pictures, key=lambda picture: picture.section):
        lines += ["", f"## {_escaped(title)}"]
        for picture in group:
            lines += ["", f"![{_escaped(title)}]({PICTURES}/{picture.file})", "", _escaped(picture.caption)]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    lines = ["", f"**{_escaped(table.title)}**"] if table.title else []
    rows = (table.header, ["---"] * len(table.header), *(map(_escaped, row) for row in table.rows))
    lines += ["", *("| " + " | ".join(row) + " |" for row in rows)]
    for note in table.notes:
        lines += ["", _escaped(note)]
    return lines


def _escaped(text: str) -> str:
    """As text in Markdown, in a cell too: no emphasis, HTML or new cell comes of a name."""
    for character in "\\|*<`":
        text = text.replace(character, f"\\{character}")
    return " ".join(printable(text).split())


def page(report: Report, pictures: Sequence[Picture], folder: Path) -> str:
    """One HTML file that needs no other: pictures are inline."""
    parts = [_html_section(section) for section in report.sections]
    for title, group in itertools.groupby(pictures, key=lambda picture: picture.section):
        parts.append(f"<h2>{_html_text(title)}</h2>")
        for picture in group:
            data = base64.b64encode((folder / picture.file).read_bytes()).decode("ascii")
            caption = _html_text(picture.caption)
            source = f"data:image/png;base64,{data}"
            parts.append(f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{_html_text(TITLE)}</title>\n'
        f"<style>{STYLE}{REPORT_STYLE}</style>\n</head>\n<body>\n<h1>{_html_text(TITLE)}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _html_text(text: str) -> str:
    return html.escape(printable(text))


def _html_section(section: Section) -> str:
    parts = [f"<h2>{_html_text(section.title)}</h2>"]
    parts += [f"<p>{_html_text(paragraph)}</p>" for paragraph in section.paragraphs]
    for table in section.tables:
        parts.append(_html_table(table))
        parts += [f'<p class="note">{_html_text(note)}</p>' for note in table.notes]
    if section.points:
        parts.append("<ul>" + "".join(f"<li>{_html_text(point)}</li>" for point in section.points) + "</ul>")
    return "\n".join(parts)


def _html_table(table: Table) -> str:
    title = f"<h3>{_html_text(table.title)}</h3>\n" if table.title else ""
    header = "".join(_html_cell(cell, "th") for cell in table.header)
    rows = "".join("<tr>" + "".join(_html_cell(cell, "td") for cell in row) + "</tr>\n" for row in table.rows)
    return f'{title}<div class="wide"><table><tr>{header}</tr>\n{rows}</table></div>'


def _html_cell(text: str, tag: str) -> str:
    kind = "none" if text in ("-", NOT_RUN) else "text" if len(text) > LONG_CELL else ""
    opening = f'<{tag} class="{kind}">' if kind else f"<{tag}>"
    return f"{opening}{_html_text(text)}</{tag}>"
