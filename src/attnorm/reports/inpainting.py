"""Scores of inpainters as documents: Table 3 of the paper, differences with intervals, what a picture costs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from attnorm import __version__
from attnorm.evaluation.inpainters import PROTOCOL, InpaintingScores, Method
from attnorm.evaluation.latency import Cell
from attnorm.evaluation.scores import METRICS
from attnorm.metrics.image_quality import DISTANCE_SCORES, REGIONS
from attnorm.metrics.intervals import Difference
from attnorm.reports.paper import TABLE_3, PrintedInpainter
from attnorm.reports.render import NOT_RUN, Document, Section, Strong, Table, write_document
from attnorm.reports.runs import short
from attnorm.reports.seed_comparison import SeedComparison, compare, rows_by_seed
from attnorm.system.devices import device_name, find_device
from attnorm.system.files import write_json
from attnorm.system.provenance import commit

COMPARED = ("psnr", "ssim", "mae")
PRINTED = (
    "The printed numbers are of Paris StreetView at 256 pixels, with masks and definitions that the paper does not "
    "name: they are there to be seen, not to be compared with. MAE x2 is of values in [-1, 1], as which the "
    "printed one stands here: it is too large for [0, 1] at its PSNR (docs/paper.md, row 19)."
)


def table_3(scores: InpaintingScores | None, title: str = "", *, regions: Sequence[str] = ("hole",)) -> Table:
    """The paper's rows, each with the models of its kind, what the paper lacks, and the baselines.

    Args:
        regions: Of REGIONS, what is shown beside the whole image.
    """
    header = ["Method", "model"]
    for key in COMPARED:
        doubled = " x2" if key == "mae" else ""
        header += [f"{METRICS[key].title}, paper", f"{METRICS[key].title}{doubled}, whole image"]
    with_lpips = scores is not None and any("lpips_pasted" in model.means for model in scores.models.values())
    own = ["lpips"] if with_lpips else []
    header += ["MAE, whole image", *(f"{METRICS[key].title}, whole image" for key in own)]
    header += [f"{METRICS[key].title}, {region}" for region in regions for key in COMPARED]
    header += ["seed", "parameters", "s a step", "images seen", "device"]
    models = scores.models if scores else {}
    rows = []
    for printed in TABLE_3:
        found = {name: model for name, model in models.items() if model.context == printed.context}
        rows += [
            _row(printed.label, printed if i == 0 else None, *item, regions, own)
            for i, item in enumerate(found.items())
        ]
        if not found:
            rows.append(_row(printed.label, printed, NOT_RUN, None, regions, own))
    known = [printed.context for printed in TABLE_3]
    for name, model in models.items():
        if model.context not in known:
            rows.append(_row(f"context {model.context}: not in the paper", None, name, model, regions, own))
    for name, baseline in (scores.baselines if scores else {}).items():
        rows.append(_row(f"{name}: a baseline", None, "-", baseline, regions, own))
    notes = (scores.manifest.note,) if scores and scores.manifest.note else ()
    return Table(title, tuple(header), tuple(rows), notes)


def _row(
    label: str,
    printed: PrintedInpainter | None,
    name: str,
    method: Method | None,
    regions: Sequence[str],
    own: Sequence[str],
) -> tuple[str, ...]:
    def show(key: str, region: str, times: int = 1) -> str:
        value = method.means.get(f"{key}_{region}") if method else None
        return "" if value is None else f"{times * value:.{METRICS[key].digits}f}"

    cells = [label, name]
    for key in COMPARED:
        cells.append("" if printed is None else f"{printed.values[key]:.{METRICS[key].digits}f}")
        cells.append(show(key, "pasted", 2 if key == "mae" else 1))
    cells += [show(key, "pasted") for key in ("mae", *own)]
    cells += [show(key, region) for region in regions for key in COMPARED]
    if method is None:
        return (*cells, "", "", "", "", "")
    seconds = ""
    if method.images_seen and method.batch_size and method.training_seconds is not None:  # older results do not say
        seconds = f"{method.training_seconds * method.batch_size / method.images_seen:.3g}"
    counts = ["" if count is None else f"{count:,}" for count in (method.parameters, method.images_seen)]
    return (*cells, "" if method.seed is None else str(method.seed), counts[0], seconds, counts[1], method.device)


def section_3(inpainting: Mapping[str, InpaintingScores], failed: Mapping[str, str] = MappingProxyType({})) -> Section:
    """Table 3 of the report, with the differences between models over the images, and why others came to nothing."""
    tables = []
    for name, scores in inpainting.items():
        used = scores.manifest
        title = (
            f"{name}: {used.images:,} images of {short(used.source)} at {used.image_size} pixels, {used.masks} masks, "
            f"manifest {used.sha256[:12]}{_seams(scores)}"
        )
        tables.append(table_3(scores, title))
        rows = [(" - ".join(pair), *_difference_cells(scores, pair)) for pair in _pairs(scores)]
        if rows:
            bootstrap = scores.bootstrap
            title = (
                f"Differences, whole image: first minus second, with the {bootstrap.confidence:.0%} interval of the "
                f"paired bootstrap over images ({bootstrap.resamples:,} resamples, seed {bootstrap.seed})"
            )
            header = ("", *(METRICS[key].title for key in _compared(scores)), "reading, over images")
            note = (
                "These are of two models as they are; another seed of either is another model. What seeds decide, and "
                'how many would, stands below in "Which rows differ" for every two presets of which several seeds are '
                "here."
            )
            tables.append(Table(title, header, tuple(rows), (note,)))
    points = tuple(f"{name}: failed, {why}" for name, why in failed.items())
    return Section("Table 3. Inpainting", (PRINTED,), tuple(tables or [table_3(None)]), points)


def _pairs(scores: InpaintingScores) -> list[tuple[str, str]]:
    return list(dict.fromkeys((found.first, found.second) for found in scores.differences))


def _compared(scores: InpaintingScores) -> tuple[str, ...]:
    """The metrics of which there are differences."""
    return (*COMPARED, "lpips") if any(found.score == "lpips_pasted" for found in scores.differences) else COMPARED


def _difference_cells(scores: InpaintingScores, pair: tuple[str, str]) -> list[str]:
    """A cell a metric of the whole image, and what they say in words."""
    found, cells, words = _of_pair(scores, pair), [], []
    for key in _compared(scores):
        difference = found.get(f"{key}_pasted")
        cells.append(_show(difference, METRICS[key].digits))
        if difference is not None:
            better = _better(difference)
            words.append(f"{key.upper()}: {f'{better} is better' if better else 'undecided'}")
    return [*cells, "; ".join(words)]


def _of_pair(scores: InpaintingScores, pair: tuple[str, str]) -> dict[str, Difference]:
    return {found.score: found for found in scores.differences if (found.first, found.second) == pair}


def _better(difference: Difference) -> str:
    """Which of the two is, "" where that is undecided."""
    if not difference.is_supported:
        return ""
    is_less_better = METRICS[difference.score.partition("_")[0]].is_less_better
    return difference.first if (difference.mean < 0) == is_less_better else difference.second


def _show(difference: Difference | None, digits: int) -> str:
    if difference is None:
        return "-"
    return f"{difference.mean:+.{digits}f} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"


def _strong(difference: Difference | None, digits: int) -> str:
    text = _show(difference, digits)
    return Strong(text) if difference is not None and difference.is_supported else text


def compare_inpainters(scores: InpaintingScores) -> list[SeedComparison]:
    """Presets with several seeds, two by two, in what is measured of the whole image; a row is a preset, or one of the
    settings with which it is there.
    """
    of_preset: dict[str, set[str]] = {}
    for model in scores.models.values():
        of_preset.setdefault(_preset(model), set()).add(model.settings)
    found = []
    for key in _compared(scores):
        scored = [
            (
                f"{_preset(model)}, settings {model.settings[:6]}"
                if len(of_preset[_preset(model)]) > 1
                else _preset(model),
                model.seed,
                model.means[f"{key}_pasted"],
                model.images_seen or 0,
            )
            for model in scores.models.values()
            if f"{key}_pasted" in model.means and model.seed is not None
        ]
        score = f"{METRICS[key].title}, whole image{_seams(scores)}"
        found += compare(METRICS[key], score, rows_by_seed(scored), paired=True)
    return found


def _preset(model: Method) -> str:
    return model.preset or f"context {model.context}"


def _seams(scores: InpaintingScores) -> str:
    """Said of scores that are not of the paper's pasting."""
    return ", seams taken out" if any(model.seams == "none" for model in scores.models.values()) else ""


# The document of `attnorm evaluate inpainters`


def make_document(scores: InpaintingScores) -> Document:
    """Table 3, the differences, what they support, PSNR by distance, the models, and the protocol."""
    used, bootstrap = scores.manifest, scores.bootstrap
    about = (
        f"Data: {used.source}, every {used.every}th image by name. {used.note}".rstrip(),
        f"Masks: {used.masks}, seed {used.seed}; {used.mean_hole_share:.1%} of an image are missing on average. "
        f"Manifest: SHA-256 {used.sha256}.",
        PRINTED,
    )
    by_region = tuple(
        (" - ".join(pair), region, *cells)
        for pair, region in itertools.product(_pairs(scores), REGIONS)
        if set(cells := _region_cells(scores, pair, region)) != {"-"}
    )
    how = (
        f"First minus second, mean over images, with the {bootstrap.confidence:.0%} interval of the paired bootstrap "
        f"({bootstrap.resamples:,} resamples, seed {bootstrap.seed}). What stands out does not contain 0."
    )
    by_distance = (
        "In dB, of the missing pixels that are so many pixels from the nearest known one; mean over images that have "
        "such pixels. Below, differences as above."
    )
    chance = (
        "The intervals are over test images, for these very weights: they do not say what training again with another "
        f"seed would change. There are {len(scores.differences)} of them, and of such intervals one in "
        f"{round(1 / (1 - bootstrap.confidence))} leaves out 0 by chance where there is no difference."
    )
    regions = Table("", ("", "region", *(METRICS[key].title for key in _compared(scores))), by_region)
    points = tuple(_words(scores, pair) for pair in _pairs(scores))
    sections = (
        Section("", about, (table_3(scores, regions=("hole", "raw")),)),
        Section("Differences", (how,), (regions,) if by_region else (), points),
        Section("PSNR by distance from the hole's edge", (by_distance,), _distance_tables(scores)),
        Section("", (chance,)),
        Section("Models", (), (_models_table(scores),)),
        Section("Protocol", points=_protocol(scores)),
    )
    return Document(f"Inpainting: {used.images} images at {used.image_size} pixels", sections)


def write_scores_document(scores: InpaintingScores, out: Path) -> list[Path]:
    """scores.md in `out`."""
    return write_document(make_document(scores), out, "scores")


def _region_cells(scores: InpaintingScores, pair: tuple[str, str], region: str) -> list[str]:
    found = _of_pair(scores, pair)
    return [_strong(found.get(f"{key}_{region}"), METRICS[key].digits) for key in _compared(scores)]


def _words(scores: InpaintingScores, pair: tuple[str, str]) -> str:
    """Which of the two the intervals favour, in what."""
    favoured: dict[str, list[str]] = {pair[0]: [], pair[1]: [], "undecided": []}
    for score, difference in _of_pair(scores, pair).items():
        key, _, region = score.partition("_")
        if region in REGIONS:
            favoured[_better(difference) or "undecided"].append(f"{key.upper()} {region}")
    texts = [f"{name} is better in {', '.join(favoured[name])}" for name in pair if favoured[name]]
    if favoured["undecided"]:
        texts.append(f"undecided: {', '.join(favoured['undecided'])}")
    return f"{pair[0]} against {pair[1]}: {'; '.join(texts)}."


def _distance_tables(scores: InpaintingScores) -> tuple[Table, ...]:
    """Means of the methods by distance, then differences with their intervals."""
    header = ("", *(name.removeprefix("psnr_") for name in DISTANCE_SCORES))
    rows = [("images", *(str(scores.images_with.get(name, "-")) for name in DISTANCE_SCORES))]
    for name, method in (*scores.models.items(), *scores.baselines.items()):
        means = (method.means.get(score) for score in DISTANCE_SCORES)
        rows.append((name, *("-" if mean is None else f"{mean:.2f}" for mean in means)))
    differences = tuple(
        (" - ".join(pair), *(_strong(_of_pair(scores, pair).get(name), 2) for name in DISTANCE_SCORES))
        for pair in _pairs(scores)
    )
    tables = (Table("", header, tuple(rows)), Table("", header, differences))
    return tables if differences else tables[:1]


def _models_table(scores: InpaintingScores) -> Table:
    header = (
        "model",
        "preset",
        "settings",
        "context",
        "width",
        "parameters",
        "seed",
        "images seen",
        "weights",
        "device",
        "SHA-256",
    )
    rows = tuple(
        (
            name,
            m.preset or "-",
            m.settings[:6] or "-",
            m.context,
            str(m.width),
            f"{m.parameters:,}",
            str(m.seed),
            f"{m.images_seen:,}",
            m.weights + (", seams taken out" if m.seams == "none" else ""),
            m.device,
            m.sha256[:16],
        )
        for name, m in scores.models.items()
    )
    return Table("", header, rows)


def _protocol(scores: InpaintingScores) -> tuple[str, ...]:
    points = [f"{name}: {text}." for name, text in PROTOCOL.items()]
    for name, model in scores.models.items():
        if model.note not in ("", scores.manifest.note):
            points.append(f"training data of {name}: {model.note}")
        if model.switch_images == 0:
            points.append(f"{name} ended its first phase by the L1 on its held-out images, which may be among these.")
    return tuple(points)


# What a picture costs


def write_latency(cells: Sequence[Cell], device: str, out: Path) -> list[Path]:
    """cost.json and cost.md in `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    environment: dict[str, Any] = {
        "device": device_name(find_device(device)),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "attnorm": __version__,
        "torch": torch.__version__,
        "commit": commit(),
    }
    write_json(out / "cost.json", {"environment": environment, "cells": [asdict(cell) for cell in cells]})
    text = (
        f"One forward pass, batch 1, float32, on {environment['device']} with {environment['threads']} threads, "
        f"torch {environment['torch']}: median, and the most that torch's allocator held beyond weights and input."
    )
    document = Document("Cost of filling one picture", (Section("", (text,), (_latency_table(cells),)),))
    return [out / "cost.json", *write_document(document, out, "cost")]


def _latency_table(cells: Sequence[Cell]) -> Table:
    sizes = sorted({cell.image_size for cell in cells})
    found = {(cell.model, cell.image_size): cell for cell in cells}
    rows = tuple(
        (name, *(_show_cell(found[name, size]) for size in sizes))
        for name in dict.fromkeys(cell.model for cell in cells)
    )
    return Table("", ("", *(f"{size} x {size}" for size in sizes)), rows)


def _show_cell(cell: Cell) -> str:
    scores = f"; a score matrix {_mebibytes(cell.score_bytes)}" if cell.score_bytes is not None else ""
    if cell.milliseconds is None or cell.peak_bytes is None:
        return f"not run: {cell.skipped}{scores}"
    return f"{cell.milliseconds:,.1f} ms, {_mebibytes(cell.peak_bytes)}{scores}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
