"""One web page about a run: what was trained, samples by class, what AN saw, an interpolation, the curves."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from attnorm.checkpoint import CheckpointError
from attnorm.data.images import ImageSet, load_images
from attnorm.inference import Sampler
from attnorm.ops.soft_layout import effective_entities
from attnorm.pretrained import shipped
from attnorm.reports.figures import (
    curves_figure,
    images_figure,
    samples_figure,
    save_figure,
    write_layouts,
    write_walk,
)
from attnorm.reports.render import Document, Picture, Section, Table, write_document
from attnorm.run_directory import RunDirectory, is_saved_model

STEPS = 5  # of the interpolation, from one class to the next


def write_page(run: Path, sampler: Sampler, out: Path) -> Path:
    """Writes OUT/index.html and the pictures it shows; returns the page's path. Needs no data set but the built-in.

    `run` is a run directory, or a model without a run (saved by `save_pretrained`, or of the package's), which has no
    curves.
    """
    is_run = RunDirectory(run).exists()
    if not is_run and not is_saved_model(run) and str(run) not in shipped():
        raise CheckpointError(f"{run} is not a run directory; a page needs its curves too")
    out.mkdir(parents=True, exist_ok=True)
    preset = sampler.header.config.preset
    classes = list(range(min(len(sampler.classes), 10)))
    sections = [Section("", (), (_facts(sampler),)), samples_section(sampler, classes, out)]
    if originals := _originals(sampler, classes):
        save_figure(originals, out / "originals.png")
        sections.append(_pictured("What it was trained on", "originals.png", "Training images, a class a row."))
    sections += [*layout_sections(sampler, classes, out), walk_section(sampler, classes, out)]
    if is_run:
        save_figure(curves_figure({preset or "run": run}), out / "curves.png")
        sections.append(_pictured("Training", "curves.png", "Logged in the run directory's metrics.jsonl."))
    title = f"{preset or 'A run'}: Attentive Normalization for image generation"
    (page,) = write_document(Document(title, tuple(sections)), out, "index", ("html",), embed=False)
    return page


def _pictured(title: str, file: str, caption: str) -> Section:
    return Section(title, pictures=(Picture(file, caption),))


def _facts(sampler: Sampler) -> Table:
    header, config = sampler.header, sampler.header.config
    steps = header.images_seen // config.run.batch_size
    rows = (
        ("Task", f"class-conditional, {len(sampler.classes)} classes, {config.model.image_size} pixels"),
        ("Context block", f"{config.model.context}, width {config.model.width}"),
        ("Trained on", config.data.source or "see its card: attnorm models NAME"),
        ("Training", f"{steps:,} generator steps, {header.images_seen:,} images, {header.seconds / 60:.1f} minutes"),
    )
    return Table("", (), rows, (header.note,) if header.note else ())


def samples_section(sampler: Sampler, classes: list[int], out: Path) -> Section:
    save_figure(samples_figure(sampler, classes), out / "samples.png")
    text = "A class a row, a latent a column. Made by the averaged generator."
    return _pictured("Samples by class", "samples.png", text)


def _originals(sampler: Sampler, classes: list[int]) -> Figure | None:
    """The first views of each class of the built-in data, which alone is at hand everywhere."""
    if sampler.header.config.data.source != "builtin":
        return None
    data: ImageSet = load_images("builtin", sampler.header.config.model.image_size)
    rows = [data.batch((data.labels == label).nonzero()[0][:8])[0] for label in classes]
    return images_figure(rows, [sampler.classes[label] for label in classes])


def layout_sections(sampler: Sampler, classes: list[int], out: Path) -> list[Section]:
    """Figures 5 and 4 of the first site; nothing where there is no AN."""
    if sampler.header.config.model.context != "an":
        return []
    files = write_layouts(sampler, classes, 0, out)
    site, numbers = next(iter(json.loads((out / "layouts.json").read_text(encoding="utf-8")).items()))
    layouts = (
        f"Image, the entity that wins each pixel, and the map of every entity, at {site}. The layout's normalised "
        f"entropy is {numbers['entropy']:.3f} (1: uniform, AN is instance normalization; 0: hard regions); "
        f"{effective_entities(numbers['usage']):.1f} of {len(numbers['usage'])} entities are in use, as the "
        "exponential of the usage's entropy."
    )
    images = numbers["images"]
    lower = [region["std"] < image["whole"]["std"] for image in images for region in image["regions"].values()]
    statistics = (
        "Mean and standard deviation of the feature map, on the whole and on the pixels that an entity wins. "
        "The standard deviation of a region is below that of the whole map in "
        f"{sum(lower) / max(len(lower), 1):.0%} of the regions."
    )
    return [
        _pictured("What Attentive Normalization sees", files[0].name, layouts),
        _pictured("Statistics of the regions", files[1].name, statistics),
    ]


def walk_section(sampler: Sampler, classes: list[int], out: Path) -> Section:
    walk = [classes[i % len(classes)] for i in range(3)]
    entity = write_walk(sampler, 0, walk, STEPS, out / "interpolation.png")
    text = "One latent; the statistics of conditional normalization are mixed linearly from class to class."
    if entity is not None:
        text += f" Below, the map of entity {entity}."
    return _pictured("From class to class", "interpolation.png", text)
