"""The paper's figures from a run: samples (7), layouts (5), region statistics (4), interpolation (8); and curves."""

# N images, K entities, S image size.

from __future__ import annotations

import itertools
import math
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from torch import Tensor

from attnorm.checkpoint import CheckpointError
from attnorm.config import ConfigError, printable
from attnorm.evaluation.scores import Score, scores_of_run
from attnorm.inference import Sampler, View
from attnorm.layers.observe import Observation
from attnorm.ops.soft_layout import effective_entities, entity_usage, layout_entropy
from attnorm.run_directory import RunDirectory
from attnorm.system.files import write_atomically, write_json

ENTITY_COLOURS = colormaps["tab20"]
# For what matplotlib's own font has no glyph of: names of classes in Chinese, Japanese and Korean. One such font, where
# it is installed, has most of them.
FALLBACK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR", "Source Han Sans SC"),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "IPAexGothic", "NanumGothic"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
)


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG atomically; its folder is made where missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    installed = set(font_manager.get_font_names()).intersection(FALLBACK_FONTS)
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_fontfamily(["sans-serif", *sorted(installed, key=FALLBACK_FONTS.index)])
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight"))
    return path


def images_figure(rows: Sequence[Iterable[Tensor]], row_titles: Sequence[str]) -> Figure:
    """uint8 images [3, S, S] in rows, each with its title."""
    return _table([[(_to_array(image), "") for image in row] for row in rows], row_titles=row_titles)


def samples_figure(sampler: Sampler, classes: Sequence[int], *, columns: int = 8, seed: int = 0) -> Figure:
    """Figure 7: a class a row, a seed a column."""
    seeds = list(range(seed, seed + columns))
    rows = [sampler.sample(seeds, [label] * columns).images for label in classes]
    return images_figure(rows, [sampler.classes[label] for label in classes])


def layout_figure(images: Tensor, observation: Observation, row_titles: Sequence[str]) -> Figure:
    """Figure 5: image, the entity that wins each pixel, and the map of every entity (black 0, white its maximum).

    `images` are uint8 [N, 3, S, S]; the observation is of the same N images.
    """
    pairs = zip(images, observation.layout, strict=True)
    cells = [[(_to_array(image), "image"), *_maps(layout)] for image, layout in pairs]
    return _table(cells, row_titles=row_titles, titles_on_first_row_only=True)


def holes_figure(views: Sequence[View]) -> Figure:
    """The refinement stage's layout of each view of an inpainted photograph: what was given, what was filled, the
    entity that wins each pixel, and the map of every entity (black 0, white its maximum).
    """
    cells = []
    for view in views:
        if view.layout is None:
            raise ValueError("a view has no layout; fill with with_layouts=True")
        cells.append([(_to_array(view.given), "given"), (_to_array(view.filled), "filled"), *_maps(view.layout)])
    return _table(cells, titles_on_first_row_only=True)


def _maps(layout: Tensor) -> list[tuple[np.ndarray, str]]:
    """Of one image, [K, H, W]: the entity that wins each pixel, and the map of every entity."""
    winners = ENTITY_COLOURS(layout.argmax(0).numpy() % 20)[..., :3]
    return [(winners, "argmax"), *((_heat(entity), f"{k}") for k, entity in enumerate(layout))]


def region_statistics(observation: Observation) -> list[dict[str, Any]]:
    """Figure 4's numbers, for each image: mean and standard deviation of the feature map that entered the layer, on the
    whole map and on the pixels that each entity wins (entities that win none are left out).

    Both are taken per channel over positions, then averaged over channels.
    """
    rows = []
    for features, layout in zip(observation.features.double(), observation.layout, strict=True):
        flat, winners = features.flatten(1), layout.argmax(0).flatten()
        regions = {}
        for entity in winners.unique().tolist():
            region = flat[:, winners == entity]
            regions[entity] = {
                "mean": region.mean().item(),
                "std": region.std(1, correction=0).mean().item(),
                "share": region.shape[1] / flat.shape[1],
            }
        whole = {"mean": flat.mean().item(), "std": flat.std(1, correction=0).mean().item()}
        rows.append({"whole": whole, "regions": regions})
    return rows


def statistics_figure(images: Tensor, observation: Observation, *, regions: int = 3) -> Figure:
    """Figure 4: image with (mean, std) of the whole map, then the largest regions with theirs."""
    cells = []
    for image, layout, statistics in zip(images, observation.layout, region_statistics(observation), strict=True):
        whole = statistics["whole"]
        row = [(_to_array(image), f"({whole['mean']:.2f}, {whole['std']:.2f})")]
        largest = sorted(statistics["regions"].items(), key=lambda item: -item[1]["share"])[:regions]
        for entity, region in largest:
            row.append((_heat(layout[entity]), f"{entity}: ({region['mean']:.2f}, {region['std']:.2f})"))
        row += [(np.ones((1, 1, 3)), "")] * (1 + regions - len(row))
        cells.append(row)
    return _table(cells, size=1.4)


def write_layouts(sampler: Sampler, classes: Sequence[int], seed: int, out: Path) -> list[Path]:
    """Figures 5 and 4 of one image a class, and their numbers; returns the files written into `out`."""
    images, layouts = sampler.sample([seed + i for i in range(len(classes))], classes, with_layouts=True)
    if not layouts:
        raise CheckpointError(f"{sampler.path} has no AttentiveNorm2d in its generator, so there is no layout to draw")
    names = [sampler.classes[label] for label in classes]
    written, numbers = [], {}
    for index, (site, observation) in enumerate(layouts.items()):
        suffix = f"-{site}" if index else ""
        written.append(save_figure(layout_figure(images, observation, names), out / f"layouts{suffix}.png"))
        written.append(save_figure(statistics_figure(images, observation), out / f"statistics{suffix}.png"))
        numbers[site] = {
            "entropy": layout_entropy(observation.layout).item(),
            "usage": entity_usage(observation.layout).tolist(),
            "images": [
                {"class": name, "seed": seed + i, **statistics}
                for i, (name, statistics) in enumerate(zip(names, region_statistics(observation), strict=True))
            ],
        }
    write_json(out / "layouts.json", numbers)
    return [*written, out / "layouts.json"]


def interpolation_figure(images: Tensor, layout: Tensor | None, entity: int, titles: Sequence[str]) -> Figure:
    """Figure 8: the images of a walk, and under each the map of one entity, on one scale along the walk."""
    rows = [[(_to_array(image), title) for image, title in zip(images, titles, strict=True)]]
    if layout is not None:
        maps = layout[:, entity]
        low, high = maps.min().item(), maps.max().item()
        rows.append([(_heat(map, low, high), "") for map in maps])
    return _table(rows)


def write_walk(
    sampler: Sampler, seed: int, classes: Sequence[int], steps: int, path: Path, *, entity: int | None = None
) -> int | None:
    """Figure 8 from class to class, `steps` images each; returns the entity whose map is shown: the most telling one
    unless it is given, None without AN.
    """
    images, layouts = sampler.interpolate(seed, classes, steps)
    layout = next(iter(layouts.values())).layout if layouts else None
    if layout is None:
        entity = None
    elif entity is None:
        entity = most_telling_entity(layout)
    elif not 0 <= entity < layout.shape[1]:
        raise ConfigError(f"--entity is {entity}; this layer has entities 0 to {layout.shape[1] - 1}")
    titles = ["" for _ in images]
    for index, label in enumerate(classes):
        titles[index * (steps - 1)] = sampler.classes[label]
    save_figure(interpolation_figure(images, layout, entity or 0, titles), path)
    return entity


def most_telling_entity(layout: Tensor) -> int:
    """The entity whose map varies most over the pixels of [N, K, H, W]: the one worth showing."""
    return int(layout.flatten(2).std(2, correction=0).mean(0).argmax())


def inpainting_figure(images: Tensor, masks: Tensor, results: Mapping[str, Tensor]) -> Figure:
    """Figure 9: an image a row, with its hole in white, as each of `results` (by title) fills it, and as it was.

    Images and results are uint8 [N, 3, S, S], masks bool [N, 1, S, S], True = missing.
    """
    columns = {"input": images.masked_fill(masks, 255), **results, "truth": images}
    return _table(
        # Long names of models would run into one another.
        [
            [(_to_array(column[i]), textwrap.fill(title, 14)) for title, column in columns.items()]
            for i in range(len(images))
        ],
        titles_on_first_row_only=True,
    )


# The panels of `curves_figure` in their order: a panel's title, and the names in metrics.jsonl of what it shows.
CURVES = {
    "losses": ("generator/loss", "discriminator/loss"),
    "scores": ("discriminator/real_score", "discriminator/fake_score"),
    "validation L1 in [-1, 1]": ("validation/l1", "validation/coarse_l1", "validation/hole_l1"),
    "critics: distance": ("critic/distance",),
    "critics: gradient penalty": ("critic/gradient_penalty",),
}
LAYOUT_CURVES = {
    "normalised entropy of the layout": "entropy",
    "entities in use (exp of the usage's entropy)": "usage",
}
IMAGES_SEEN = "images seen"
STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")


class Curve(NamedTuple):
    """One line of a panel of `curves_figure`."""

    panel: str
    x: str  # what it is drawn against
    y: str  # what it is, where the panel's title does not say so
    label: str
    points: list[tuple[float, float]]


def curves_figure(runs: dict[str, Path]) -> Figure:
    """What training logged against images seen: losses, scores or validation, and the layouts' entropy and effective
    number of entities; then Fréchet distances, as they were measured at checkpoints, against images seen and against
    hours of training, a panel for each protocol. Panels for which no run has anything are left out.
    """
    curves = {
        name: [*_curves(read_metrics(path)), *_score_curves(scores_of_run(RunDirectory(path))[0])]
        for name, path in runs.items()
    }
    found = {curve[:3] for of_run in curves.values() for curve in of_run}
    logged = [*CURVES, *LAYOUT_CURVES]
    order = {title: number for number, title in enumerate(logged)}
    panels = sorted(found, key=lambda panel: (order.get(panel[0], len(order)), panel[0], panel[1] != IMAGES_SEEN))
    num_rows = max(math.ceil(len(panels) / 2), 1)
    figure = Figure(figsize=(11, 3.2 * num_rows))
    axes = figure.subplots(num_rows, 2, squeeze=False).flat
    for panel, axis in itertools.zip_longest(panels, axes):
        if panel is None:
            axis.axis("off")
            continue
        shown = [(name, curve) for name, of_run in curves.items() for curve in of_run if curve[:3] == panel]
        styles = dict(zip(dict.fromkeys(curve.label for _, curve in shown), itertools.cycle(STYLES), strict=False))
        for name, curve in shown:
            color = _colour_of(name, runs) if len(runs) > 1 else None
            label = f"{name} {curve.label}" if len(runs) > 1 else curve.label
            if curve.y:  # a few measurements, each by itself
                axis.plot(
                    *zip(*curve.points, strict=True),
                    f"o{styles[curve.label]}",
                    color=color,
                    label=label,
                    linewidth=1,
                    markersize=3,
                )
            else:
                axis.plot(*_smooth(curve.points), styles[curve.label], color=color, label=label, linewidth=1)
        title, x_label, y_label = panel
        axis.set_title(_name(title), fontsize=10, parse_math=False)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(alpha=0.3)
        if len(runs) == 1:
            _without_math(axis.legend(fontsize=7))
        else:  # here what a line's style means, once below all panels what its colour does
            axis.legend(
                [Line2D([], [], color="black", linestyle=style) for style in styles.values()], styles, fontsize=7
            )
    figure.tight_layout()
    if len(runs) > 1:
        handles = [Line2D([], [], color=_colour_of(name, runs)) for name in runs]
        names = [_name(name) for name in runs]
        columns = min(len(runs), 4)
        _without_math(
            figure.legend(handles, names, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns)
        )
    return figure


def _colour_of(name: str, runs: Iterable[str]) -> tuple[float, float, float, float]:
    names = list(runs)
    colours = colormaps["tab10" if len(names) <= 10 else "tab20"]
    return colours(names.index(name) % colours.N)


def _curves(rows: list[dict[str, Any]]) -> Iterator[Curve]:
    """Each curve that the rows of a run's metrics.jsonl hold."""
    for panel, keys in CURVES.items():
        for key in keys:
            if points := [(row["images_seen"], row[key]) for row in rows if key in row]:
                yield Curve(panel, IMAGES_SEEN, "", key, points)
    for panel, part in LAYOUT_CURVES.items():
        for key in sorted({key for row in rows for key in row if key.endswith(f"/{part}")}):
            points = [(row["images_seen"], row[key]) for row in rows if key in row]
            if part == "usage":
                points = [(images_seen, effective_entities(usage)) for images_seen, usage in points]
            yield Curve(panel, IMAGES_SEEN, "", key.removeprefix("layout/").removesuffix(f"/{part}"), points)


def _score_curves(scores: list[Score]) -> Iterator[Curve]:
    """Fréchet distances by protocol, real images and weights; of several draws the first seed's, of a repetition the
    last, as in tables. Subset estimates are left out.
    """
    kinds: dict[tuple[str, str, str], dict[int, tuple[float, float]]] = {}
    for score in sorted(scores, key=lambda score: -score.seed):
        if score.metric == "frechet" and not score.subset:
            data = score.data.fingerprint[:8]
            panel = f"{score.protocol}, data {data}" if data else score.protocol
            label = "averaged weights" if score.weights == "ema" else "raw weights"
            points = kinds.setdefault((panel, score.name, label), {})
            points[score.images_seen] = (score.training_seconds or 0.0) / 3600, score.value
    for (panel, name, label), points in kinds.items():
        ordered = sorted(points.items())
        yield Curve(panel, IMAGES_SEEN, name, label, [(seen, value) for seen, (_, value) in ordered])
        yield Curve(panel, "hours of training", name, label, [point for _, point in ordered])


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that is still being written is left out."""
    file = RunDirectory(run).metrics_file
    if not file.is_file():
        raise CheckpointError(f"{run} has no metrics.jsonl; expected a run directory")
    return RunDirectory(run).read_metrics()


def _table(
    cells: Sequence[Sequence[tuple[np.ndarray, str]]],
    *,
    row_titles: Sequence[str] | None = None,
    titles_on_first_row_only: bool = False,
    size: float = 1.0,
) -> Figure:
    """Pictures in rows, each with a title above it."""
    has_titles = any(title for row in cells for _, title in row)
    height = size * (1.22 if has_titles and not titles_on_first_row_only else 1.04)
    figure = Figure(figsize=(size * 1.05 * max(map(len, cells)), height * len(cells)))
    axes = figure.subplots(len(cells), max(map(len, cells)), squeeze=False, gridspec_kw={"wspace": 0.04})
    for number, (row, row_axes) in enumerate(zip(cells, axes, strict=True)):
        for axis in row_axes:
            axis.axis("off")
        for (picture, title), axis in zip(row, row_axes, strict=False):
            axis.imshow(picture, interpolation="nearest")
            if title and not (titles_on_first_row_only and number):
                axis.set_title(_name(title), fontsize=7, pad=2, parse_math=False)
        if row_titles:
            row_axes[0].text(
                -0.08,
                0.5,
                _name(row_titles[number]),
                transform=row_axes[0].transAxes,
                ha="right",
                va="center",
                fontsize=8,
                parse_math=False,
            )
    return figure


def _name(text: str) -> str:
    """As a figure can show it: whole letters where they came in pieces, and nothing that is no text."""
    return unicodedata.normalize("NFC", printable(text))


def _without_math(legend: Legend) -> None:
    for text in legend.get_texts():
        text.set_parse_math(False)


def _to_array(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def _heat(map: Tensor, low: float | None = None, high: float | None = None) -> np.ndarray:
    low = map.min().item() if low is None else low
    high = map.max().item() if high is None else high
    return colormaps["gray"](((map - low) / max(high - low, 1e-12)).clamp(0, 1).numpy())[..., :3]


def _smooth(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """A running mean over a fiftieth of the points."""
    x, y = np.array(points, dtype=float).T
    window = max(len(y) // 50, 1)
    return x[window - 1 :], np.convolve(y, np.ones(window) / window, "valid")
