"""The report of `attnorm experiment regional-statistics`: tables with intervals over seeds, pictures, what they say."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from attnorm.experiments.regional_images import CELL, Setting, as_picture
from attnorm.experiments.regional_statistics import (
    ARMS,
    BASE,
    GATE_LR_SCALE,
    REACH,
    SWEEPS,
    TRAINED_AT,
    example_images,
    read_results,
)
from attnorm.metrics.intervals import Mean, mean_of
from attnorm.reports.figures import save_figure
from attnorm.reports.render import Document, Picture, Section, Strong, Table, write_document
from attnorm.system.files import write_json

REFERENCE = "an"  # the arm that the others are compared with
AXES = {
    "num_textures": "K, textures",
    "distance": "d, cells",
    "num_entities": "n, entities of AN",
}


class Results:
    """What was trained: values of each arm at each setting, by seed."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = {(row["arm"], Setting(**row["setting"]), row["seed"]): row for row in rows}
        self.arms = [name for name in ARMS if any(key[0] == name for key in self.rows)]
        self.seeds = sorted({key[2] for key in self.rows})

    def by_seed(self, arm: str, setting: Setting, value: Callable[[dict[str, Any]], float]) -> dict[int, float]:
        found = {seed: self.rows.get((arm, setting, seed)) for seed in self.seeds}
        return {seed: value(row) for seed, row in found.items() if row is not None}

    def counts(self) -> list[int]:
        """How many seeds each arm has at each setting."""
        return list(Counter((arm, setting) for arm, setting, _ in self.rows).values())

    def count(self, arm: str, setting: Setting) -> int:
        """How many seeds the arm has at the setting."""
        return sum(key[:2] == (arm, setting) for key in self.rows)

    def mean(self, arm: str, setting: Setting, value: Callable[[dict[str, Any]], float]) -> Mean | None:
        values = list(self.by_seed(arm, setting, value).values())
        return mean_of(values) if values else None

    def difference(self, arm: str, setting: Setting) -> Mean | None:
        """The arm's error minus AN's, over the seeds that both have."""
        first, second = (self.by_seed(name, setting, error_at(TRAINED_AT)) for name in (arm, REFERENCE))
        values = [first[seed] - second[seed] for seed in first if seed in second]
        return mean_of(values) if values else None


def error_at(size: int) -> Callable[[dict[str, Any]], float]:
    return lambda row: float(row["errors"][str(size)])


def write_report(out: Path) -> list[Path]:
    """report.md, report.json and its pictures in `out`, from what it holds; nothing where it holds nothing."""
    results = Results(read_results(out))
    if not results.rows:
        return []
    costs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "cost").glob("*.json"))}
    about = json.loads((out / "experiment.json").read_text(encoding="utf-8"))
    save_figure(sweep_figure(results), out / "error-against-textures.png")
    written = [out / "error-against-textures.png"]
    strips = {arm: out / "predictions" / f"{arm}.png" for arm in ARMS}
    strips = {arm: path for arm, path in strips.items() if path.exists()}
    if strips:
        save_figure(predictions_figure(strips), out / "predictions.png")
        written.append(out / "predictions.png")
    document = make_document(results, costs, about, read_results(out, tuning=True))
    write_json(out / "report.json", to_dict(results, costs, about))
    return [*write_document(document, out, "report"), out / "report.json", *written]


def to_dict(results: Results, costs: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Plain JSON types: every error with its interval and its difference to AN's, and the blocks' costs."""
    settings = dict.fromkeys(key[1] for key in results.rows)
    errors = [
        {
            "arm": arm,
            "setting": setting.name,
            "error": found._asdict(),
            "minus_an": None if (difference := results.difference(arm, setting)) is None else difference._asdict(),
        }
        for setting in settings
        for arm in results.arms
        if (found := results.mean(arm, setting, error_at(TRAINED_AT))) is not None
    ]
    plain = json.loads(json.dumps(errors), parse_constant=lambda name: None)  # JSON has no NaN
    return {**about, "errors": plain, "cost": costs}


def make_document(
    results: Results, costs: dict[str, Any], about: dict[str, Any], tuning: Sequence[dict[str, Any]] = ()
) -> Document:
    """The tables, what they support, and how they came about."""
    protocol = about["protocol"]
    counts = sorted(results.counts())
    done = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    task = (
        f"Cells of {CELL} pixels with one of K textures; in some of them colour and contrast are hidden and to be "
        "predicted. What tells them are cells of the same texture, at least d cells away; the convolutions reach "
        f"{REACH} pixels. Error: mean absolute difference over the hidden pixels, of colours in [-1, 1]; mean ± 95% "
        f"interval (Student's) over the seeds that are done, {done} of {protocol['seeds']}; one "
        "seed has no interval. Of differences, what stands out leaves out 0."
    )
    how = (
        f"attnorm experiment regional-statistics --out DIR --scale {protocol['scale']}: {len(results.rows)} "
        f"trainings of {protocol['steps']} steps of {protocol['batch_size']} images, Adam; "
        f"{sum(row['seconds'] for row in results.rows.values()) / 3600:.1f} hours on {about['threads']} thread(s) of "
        f"{about['processor']}, torch {about['torch']}, commit {about['commit'] or 'unknown'}. Arms of "
        "a seed start with the same weights around the block and see the same images; the test images are the same "
        "for all. Larger images are measured at the base setting alone."
    )
    sections = (
        Section("", (task,)),
        _base(results, [int(size) for size in protocol["test_images"]]),
        *(_sweep(field, results) for field in AXES),
        _layouts(results),
        _costs(costs),
        _tuning(tuning),
        Section("What the intervals say", points=(*conclusions(results), *cost_conclusions(costs))),
        Section("How", (how,)),
    )
    return Document("Regional statistics", tuple(section for section in sections if section is not None))


def _base(results: Results, sizes: Sequence[int]) -> Section:
    header = (
        *("block", "seeds", *(f"error at {size}" for size in sizes)),
        *("minus AN's, paired", "still falling by", "parameters", "learning rate"),
    )
    rows = tuple(
        (
            ARMS[arm].title,
            str(results.count(arm, BASE)),
            *(_show(results.mean(arm, BASE, error_at(size))) for size in sizes),
            "" if arm == REFERENCE else _signed(results.difference(arm, BASE)),
            _show(results.mean(arm, BASE, still_falling)),
            f"{next(row['parameters'] for key, row in results.rows.items() if key[0] == arm):,}",
            f"{next(row['lr'] for key, row in results.rows.items() if key[0] == arm):g}",
        )
        for arm in results.arms
    )
    note = (
        "Still falling by: the error on training images in the ninth tenth of the steps minus that in the last. A "
        "block that does no better than none after so many steps may need more of them."
    )
    title = (
        f"Base: K = {BASE.num_textures}, d = {BASE.distance}, n = {BASE.num_entities}, trained at {TRAINED_AT} pixels"
    )
    picture = Picture("predictions.png", "Hidden cells as the arms of the first seed predict them.")
    return Section(title, (), (Table("", header, rows, (note,)),), pictures=(picture,))


def _sweep(field: str, results: Results) -> Section | None:
    settings = [setting for setting in SWEEPS[field] if any(results.count(arm, setting) for arm in results.arms)]
    arms = [arm for arm in ([REFERENCE] if field == "num_entities" else results.arms) if arm in results.arms]
    if len(settings) < 2 or not arms:
        return None
    header = ("block", *(f"{getattr(setting, field)}" for setting in settings))
    rows = tuple(
        (ARMS[arm].title, *(_show(results.mean(arm, setting, error_at(TRAINED_AT))) for setting in settings))
        for arm in arms
    )
    tables = [Table("", header, rows)]
    if len(arms) > 1 and REFERENCE in arms:
        differences = tuple(
            (ARMS[arm].title, *(_signed(results.difference(arm, setting)) for setting in settings))
            for arm in arms
            if arm != REFERENCE
        )
        tables.append(Table("Minus AN's, paired by seed", header, differences))
    picture = Picture("error-against-textures.png", "Error against the number of textures.")
    pictures = (picture,) if field == "num_textures" else ()
    return Section(f"Error against {AXES[field]}", (), tuple(tables), pictures=pictures)


def _layouts(results: Results) -> Section | None:
    rows = []
    for arm in ("an_fixed", "an"):
        for setting in dict.fromkeys(setting for sweep in SWEEPS.values() for setting in sweep):
            if results.count(arm, setting):
                values = (
                    results.mean(arm, setting, lambda row, key=key: abs(float(row[key])))  # type: ignore[misc]
                    for key in ("entropy", "entities_in_use", "rho")
                )
                rows.append((ARMS[arm].title, setting.name, *(_show(value) for value in values)))
    header = ("block", "setting", "entropy (0 hard, 1 uniform)", "entities in use", "|rho|")
    return Section("What AN's layouts look like", (), (Table("", header, tuple(rows)),)) if rows else None


def _costs(costs: dict[str, Any]) -> Section | None:
    if not costs:
        return None
    sizes = list(next(iter(costs.values())))
    rows = tuple(
        (
            ARMS[arm].title,
            *(f"{cells[size]['milliseconds']:.1f} ms, {cells[size]['peak_bytes'] / 2**20:.1f} MiB" for size in sizes),
        )
        for arm, cells in ((arm, costs[arm]) for arm in ARMS if arm in costs)
    )
    text = (
        "Forward, one image of 32 channels, evaluation: median time, and the most that is held beyond weights and "
        "input. Other work on the machine disturbs the times, not the bytes."
    )
    table = Table("", ("block", *(f"{size} pixels" for size in sizes)), rows)
    return Section("What the block costs", (text,), (table,))


def _tuning(rows: Sequence[dict[str, Any]]) -> Section | None:
    if not rows:
        return None
    errors = {(row["arm"], row["lr"]): row["errors"][str(TRAINED_AT)] for row in rows}
    rates = sorted({lr for _, lr in errors})
    cells = tuple(
        (ARMS[arm].title, *(f"{errors[arm, lr]:.3f}" if (arm, lr) in errors else "-" for lr in rates))
        for arm in ARMS
        if any(arm == name for name, _ in errors)
    )
    text = (
        "Error at the base setting, on a seed and images that are used for nothing else. The scalar that opens a block "
        f"(rho, gate) learns {GATE_LR_SCALE} times as fast."
    )
    return Section("Learning rates", (text,), (Table("", ("block", *(f"{lr:g}" for lr in rates)), cells),))


def conclusions(results: Results) -> list[str]:
    """A line for each block beside AN: at which K it is better, worse or undecided."""
    lines = []
    for arm in results.arms:
        kinds: dict[str, list[str]] = {"AN is better": [], "AN is worse": [], "undecided": []}
        for setting in SWEEPS["num_textures"]:
            difference = results.difference(arm, setting) if arm != REFERENCE else None
            if difference is None or difference.num < 2:
                continue
            kind = "AN is better" if difference.is_supported else "undecided"
            kind = "AN is worse" if kind != "undecided" and difference.mean < 0 else kind
            kinds[kind].append(str(setting.num_textures))
        said = [f"{kind} at K = {', '.join(counts)}" for kind, counts in kinds.items() if counts]
        if said:
            lines.append(f"{ARMS[arm].title}: {'; '.join(said)}.")
    return lines or ["One seed says nothing of seeds."]


def cost_conclusions(costs: dict[str, Any]) -> list[str]:
    """How many times the time and memory of AN each attention takes, at each size."""
    lines = []
    for arm in ("linear_attention", "self_attention", "pre_norm_attention"):
        if arm in costs and REFERENCE in costs:
            said = []
            for size, cell in costs[arm].items():
                an = costs[REFERENCE][size]
                time, held = (cell[key] / an[key] for key in ("milliseconds", "peak_bytes"))
                said.append(f"{time:.1f} and {held:.1f} at {size} pixels")
            lines.append(f"{ARMS[arm].title}: times AN's time and memory, {'; '.join(said)}.")
    return lines


def still_falling(row: dict[str, Any]) -> float:
    curve = row["error_while_training"]
    return float(curve[-2] - curve[-1]) if len(curve) > 1 else math.nan


def sweep_figure(results: Results) -> Figure:
    """Error against K, with the intervals over seeds."""
    figure = Figure(figsize=(7, 4.5))
    axes = figure.add_subplot()
    for arm in results.arms:
        points = [
            (setting.num_textures, found)
            for setting in SWEEPS["num_textures"]
            if (found := results.mean(arm, setting, error_at(TRAINED_AT))) is not None
        ]
        x = [count for count, _ in points]
        axes.errorbar(
            x,
            [found.mean for _, found in points],
            yerr=[0 if math.isnan(found.half) else found.half for _, found in points],
            label=ARMS[arm].title,
            marker="o",
            markersize=3,
            capsize=2,
            linewidth=2.5 if arm == REFERENCE else 1.2,
            linestyle="-" if "attention" in arm or arm == REFERENCE else "--",
        )
    axes.set_xscale("log", base=2)
    counts = [setting.num_textures for setting in SWEEPS["num_textures"]]
    axes.set_xticks(counts, list(map(str, counts)))
    axes.set_ylim(bottom=0)
    axes.axvline(BASE.num_entities, color="0.8", linewidth=1, zorder=0)
    axes.set_xlabel("K, textures (grey: n of AN)")
    axes.set_ylabel("error in hidden cells")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def predictions_figure(strips: dict[str, Path]) -> Figure:
    """What is shown, the truth, and each arm's prediction, in columns; an image a row."""
    examples = example_images()
    shown = examples.shown[:, :3] + examples.shown[:, 3:4] * examples.hidden
    columns = {
        "shown": [as_picture(image) for image in shown],
        "truth": [as_picture(image) for image in examples.images],
    }
    for arm, path in strips.items():
        with Image.open(path) as file:
            columns[ARMS[arm].title] = np.split(np.asarray(file), len(examples.images), axis=1)
    figure = Figure(figsize=(1.7 * len(columns), 1.8 * len(examples.images)))
    grid = figure.subplots(len(examples.images), len(columns), squeeze=False)
    for j, (title, images) in enumerate(columns.items()):
        for i, image in enumerate(images):
            grid[i, j].imshow(image, interpolation="nearest")
            grid[i, j].set_axis_off()
        grid[0, j].set_title(title.replace(" (", "\n(").replace(", ", ",\n"), fontsize=8)
    figure.subplots_adjust(wspace=0.04, hspace=0.04)
    return figure


def _show(found: Mean | None) -> str:
    return "-" if found is None else found.text()


def _signed(found: Mean | None) -> str:
    if found is None:
        return "-"
    text = found.text(sign="+")
    return Strong(text) if found.is_supported else text
