"""One web page about a run: what was trained, samples by class, what AN saw, an interpolation, the curves."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from attnorm.checkpoint import CheckpointError
from attnorm.config import printable
from attnorm.data.images import ImageSet, load_images
from attnorm.figures import (
    curves_figure,
    images_figure,
    interpolation_figure,
    most_telling_entity,
    samples_figure,
    save_figure,
    write_layouts,
)
from attnorm.inference import Sampler
from attnorm.ops.soft_layout import effective_entities
from attnorm.run_directory import RunDirectory
from attnorm.system.files import write_text

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img { max-width: 100%; image-rendering: auto; } figure { margin: 1rem 0; }
figcaption { color: #555; font-size: 0.9rem; } code { background: #f3f3f3; padding: 0 0.2em; }
.note { background: #fff6dd; border-left: 4px solid #e0b000; padding: 0.6rem 1rem; }
table { border-collapse: collapse; } td { padding: 0.1rem 1rem 0.1rem 0; vertical-align: top; }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd; } figcaption { color: #aaa; } code { background: #2a2a2a; }
  img { background: #fff; } .note { background: #3a3210; }
}
"""


def write_page(run: Path, sampler: Sampler, out: Path) -> Path:
    """Writes OUT/index.html and the pictures it shows; returns the page's path. Needs no data set but the built-in."""
    if not RunDirectory(run).exists():
        raise CheckpointError(f"{run} is not a run directory; a page needs its curves too")
    out.mkdir(parents=True, exist_ok=True)
    config, header = sampler.header.config, sampler.header
    classes = list(range(min(len(sampler.classes), 10)))
    parts = [_facts(sampler)]
    if header.note:
        parts.append(f'<p class="note">{_text(header.note)}</p>')

    save_figure(samples_figure(sampler, classes), out / "samples.png")
    text = "A class a row, a latent a column. "
    originals = _originals(sampler, classes)
    if originals is not None:
        save_figure(originals, out / "originals.png")
    parts.append(_section("Samples by class", _picture("samples.png", text + "Made by the averaged generator.")))
    if originals is not None:
        parts.append(_section("What it was trained on", _picture("originals.png", "Training images, a class a row.")))

    images, layouts = sampler.interpolate(0, [classes[i % len(classes)] for i in (0, 1, 2)], 5)
    if layouts:
        site = next(iter(layouts))
        files = write_layouts(sampler, classes, 0, out)
        numbers = json.loads((out / "layouts.json").read_text(encoding="utf-8"))[site]
        used = effective_entities(numbers["usage"])
        text = (
            f"Image, the entity that wins each pixel, and the map of every entity, at {site}. The layout's normalised "
            f"entropy is {numbers['entropy']:.3f} (1: uniform, AN is instance normalization; 0: hard regions); "
            f"{used:.1f} of {len(numbers['usage'])} entities are in use, as the exponential of the usage's entropy."
        )
        lower = _share_of_lower_std(numbers["images"])
        statistics = (
            "Mean and standard deviation of the feature map, on the whole and on the pixels that an entity wins. "
            f"The standard deviation of a region is below that of the whole map in {lower:.0%} of the regions."
        )
        parts.append(_section("What Attentive Normalization sees", _picture(files[0].name, text)))
        parts.append(_section("Statistics of the regions", _picture(files[1].name, statistics)))

    layout = next(iter(layouts.values())).layout if layouts else None
    entity = most_telling_entity(layout) if layout is not None else 0
    titles = ["" for _ in images]
    for index in range(3):
        titles[4 * index] = sampler.classes[classes[index % len(classes)]]
    save_figure(interpolation_figure(images, layout, entity, titles), out / "interpolation.png")
    text = "One latent; the statistics of conditional normalization are mixed linearly from class to class."
    if layout is not None:
        text += f" Below, the map of entity {entity}."
    parts.append(_section("From class to class", _picture("interpolation.png", text)))

    save_figure(curves_figure({config.preset or "run": run}), out / "curves.png")
    parts.append(_section("Training", _picture("curves.png", "Logged in the run directory's metrics.jsonl.")))

    title = f"{config.preset or 'A run'}: Attentive Normalization for image generation"
    page = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{_text(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{_text(title)}</h1>\n" + "\n".join(parts) + "\n</html>\n"
    )
    write_text(out / "index.html", page)
    return out / "index.html"


def _facts(sampler: Sampler) -> str:
    header, config = sampler.header, sampler.header.config
    steps = header.images_seen // config.run.batch_size
    rows = {
        "Task": f"class-conditional, {len(sampler.classes)} classes, {config.model.image_size} pixels",
        "Context block": f"{config.model.context}, width {config.model.width}",
        "Trained on": config.data.source,
        "Training": f"{steps:,} generator steps, {header.images_seen:,} images, {header.seconds / 60:.1f} minutes",
    }
    cells = "".join(f"<tr><td>{name}</td><td>{_text(text)}</td></tr>" for name, text in rows.items())
    return f"<table>{cells}</table>"


def _originals(sampler: Sampler, classes: list[int]) -> Figure | None:
    """The first views of each class of the built-in data, which alone is at hand everywhere."""
    if sampler.header.config.data.source != "builtin":
        return None
    data: ImageSet = load_images("builtin", sampler.header.config.model.image_size)
    rows = [data.batch((data.labels == label).nonzero()[0][:8])[0] for label in classes]
    return images_figure(rows, [sampler.classes[label] for label in classes])


def _share_of_lower_std(images: list[dict[str, Any]]) -> float:
    comparisons = [region["std"] < image["whole"]["std"] for image in images for region in image["regions"].values()]
    return sum(comparisons) / max(len(comparisons), 1)


def _text(text: str) -> str:
    return html.escape(printable(text))


def _section(title: str, body: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{body}"


def _picture(name: str, caption: str) -> str:
    text = _text(caption)
    return f'<figure><img src="{name}" alt="{text}"><figcaption>{text}</figcaption></figure>'
