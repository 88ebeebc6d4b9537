"""One web page that shows models at work which come with the package: what a newcomer sees first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from attnorm.checkpoint import read_header
from attnorm.data.builtin import builtin_photographs
from attnorm.inference import Inpainter, Sampler
from attnorm.pretrained import read_card, shipped
from attnorm.reports.figures import holes_figure, images_figure, save_figure
from attnorm.reports.page import layout_sections, samples_section, walk_section
from attnorm.reports.render import Document, Picture, Section, write_document

PHOTOGRAPHS = ("rocket", "coffee")  # of the built-in ones, none of which any model was trained on


def write_showcase(names: Sequence[str], out: Path) -> Path:
    """Writes OUT/index.html and the pictures it shows, in a folder a model; returns the page's path.

    Of a generator: samples of every class, a walk between two and back, what AN saw; of an inpainter: photographs with
    a hole, filled. Needs no data.
    """
    sections: list[Section] = []
    tasks = {name: read_header(shipped()[name]).config.task for name in names}
    for name in sorted(names, key=lambda name: (tasks[name] == "inpainting", name)):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        made = _inpainter(name, folder) if tasks[name] == "inpainting" else _generator(name, folder)
        card = read_card(name)
        said = " ".join(f"{text[0].upper()}{text[1:]}." for text in (card.what, f"trained on {card.data}", card.score))
        sections.append(Section(name, (said,), points=card.limits))
        sections += [
            replace(section, pictures=tuple(replace(p, file=f"{name}/{p.file}") for p in section.pictures))
            for section in made
        ]
    if not names:
        sections = [Section("", ("No model comes with this package.",))]
    document = Document("Attentive Normalization at work", tuple(sections))
    (page,) = write_document(document, out, "index", ("html",), embed=False)
    return page


def _generator(name: str, out: Path) -> list[Section]:
    sampler = Sampler(name)
    classes = list(range(min(len(sampler.classes), 10)))
    return [
        samples_section(sampler, classes, out),
        walk_section(sampler, classes, out),
        *layout_sections(sampler, classes, out),
    ]


def _inpainter(name: str, out: Path) -> list[Section]:
    inpainter = Inpainter(name)
    side = 2 * inpainter.image_size  # the largest that is seen whole
    views, rows = [], []
    for photograph in PHOTOGRAPHS:
        image = torch.from_numpy(_square(builtin_photographs()[photograph], side)).permute(2, 0, 1)
        mask = torch.zeros(1, side, side, dtype=torch.bool)
        mask[:, 3 * side // 8 : 5 * side // 8, 3 * side // 8 : 5 * side // 8] = True
        filled = inpainter.fill(image, mask, with_layouts=inpainter.has_layout)
        rows.append((image, filled.views[0].given, filled.image))
        views += filled.views
    save_figure(images_figure(rows, PHOTOGRAPHS), out / "filled.png")
    text = "Photographs that it has not seen: as they are, with a hole, filled."
    pictures = [Picture("filled.png", text)]
    if inpainter.has_layout:
        save_figure(holes_figure(views), out / "layout.png")
        pictures.append(Picture("layout.png", "What AN saw: the entity that wins each pixel, and the map of each."))
    return [Section("Filled", pictures=tuple(pictures))]


def _square(photograph: np.ndarray, side: int) -> np.ndarray:
    """The centre square of [H, W, 3], reduced to `side` pixels."""
    height, width = photograph.shape[:2]
    length = min(height, width)
    top, left = (height - length) // 2, (width - length) // 2
    square = Image.fromarray(photograph[top : top + length, left : left + length])
    return np.array(square.resize((side, side), Image.Resampling.LANCZOS))
