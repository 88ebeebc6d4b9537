"""The report of `attnorm experiment diffusion`: one table with intervals over seeds, a picture of the curves."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from attnorm.experiments.diffusion import ARMS, SITES
from attnorm.experiments.protocol import TRAININGS
from attnorm.metrics.intervals import Mean, mean_of
from attnorm.reports.figures import save_figure
from attnorm.reports.render import Document, Picture, Section, Strong, Table, write_document
from attnorm.system.files import read_lines, write_json

REFERENCE = "an"  # the arm that the others are compared with


def write_report(out: Path) -> list[Path]:
    """report.md, report.json and curves.png in `out`, from its results; nothing where there are none."""
    results = read_lines(out / TRAININGS)
    if not results:
        return []
    about = json.loads((out / "experiment.json").read_text(encoding="utf-8"))
    arms = [summary for arm in ARMS if (summary := _summary(arm, results))]
    document = write_document(_document(arms, results, about), out, "report")
    plain = json.loads(json.dumps({**about, "arms": arms}), parse_constant=lambda name: None)  # JSON has no NaN
    write_json(out / "report.json", plain)
    return [*document, out / "report.json", save_figure(_curves(results), out / "curves.png")]


def _summary(arm: str, results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Means over the seeds of an arm, and its score minus AN's over the seeds that both have."""
    of_seed = {result["seed"]: result for result in results if result["arm"] == arm}
    if not of_seed:
        return None
    reference = {result["seed"]: result["score"] for result in results if result["arm"] == REFERENCE}
    differences = [result["score"] - reference[seed] for seed, result in of_seed.items() if seed in reference]
    rows = list(of_seed.values())
    return {
        "arm": arm,
        "score": mean_of([row["score"] for row in rows])._asdict(),
        "minus_an": mean_of(differences)._asdict() if differences and arm != REFERENCE else None,
        "milliseconds_a_step": statistics.median(row["milliseconds_a_step"] for row in rows),
        "parameters": rows[0]["parameters"],
        "entropy": _over_seeds(rows, "entropy"),
        "change": _over_seeds(rows, "change"),
    }


def _over_seeds(rows: list[dict[str, Any]], key: str) -> dict[str, Any] | None:
    """Of what is known of each site: the sites' mean first, so that the interval is of seeds alone."""
    of_seeds = [statistics.fmean(site[key] for site in row["sites"]) for row in rows if row.get("sites")]
    return mean_of(of_seeds)._asdict() if of_seeds else None


def _document(arms: list[dict[str, Any]], results: list[dict[str, Any]], about: dict[str, Any]) -> Document:
    protocol = about["protocol"]
    least = min(arm["milliseconds_a_step"] for arm in arms)
    rows = tuple(
        (
            ARMS[arm["arm"]][0],
            str(arm["score"]["num"]),
            _show(arm["score"]),
            _show_difference(arm["minus_an"]),
            f"{arm['milliseconds_a_step'] / least:.2f}",
            f"{arm['parameters']:,}",
            _show(arm["entropy"], 2),
            _show(arm["change"], 3),
        )
        for arm in arms
    )
    header = ("block", "seeds", "loss", "minus AN's, paired", "CPU time a step", "parameters", "entropy", "change")
    about_loss = (
        f"EDM's denoising loss on {protocol['test_images']} held-out images at {protocol['test_levels']} levels of "
        "noise, the same noises for all, averaged weights; mean ± 95% interval (Student's) over the seeds that are "
        f"done, none for one; bold leaves out 0. A block follows {' and '.join(SITES)}, at maps of 16 pixels, by "
        "attnorm.insert_after."
    )
    note = (
        "CPU time is of a training step, as a multiple of the quickest arm's (median over seeds). Entropy (1: uniform) "
        "and change (what AN adds, as a share of its input) are means over both sites, at the middle level."
    )
    how = (
        f"attnorm experiment diffusion --data {about['source']} --out DIR --scale {protocol['scale']}: "
        f"{protocol['steps']:,} steps of {protocol['batch_size']} images, width {protocol['width']}, Adam at "
        f"{protocol['lr']:g}, {protocol['precision']}, {about['threads']} thread(s) of {about['processor']}, torch "
        f"{about['torch']}, commit {', '.join(dict.fromkeys(result['commit'] or 'unknown' for result in results))}."
    )
    return Document(
        "A context block in a diffusion U-Net",
        (
            Section("", (about_loss,), (Table("", header, rows, (note,)),)),
            Section("How", (how,), pictures=(Picture("curves.png", "Loss against steps."),)),
        ),
    )


def _show(value: dict[str, Any] | None, digits: int = 5) -> str:
    return "" if value is None else Mean(**value).text(digits)


def _show_difference(value: dict[str, Any] | None) -> str:
    if value is None:
        return ""
    found = Mean(**value)
    text = found.text(5, sign="+")
    return Strong(text) if found.is_supported else text


def _curves(results: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    for i, arm in enumerate(ARMS):
        curves = [list(zip(*result["curve"], strict=True)) for result in results if result["arm"] == arm]
        for steps, losses in curves:
            axes.plot(steps, losses, color=f"C{i}", alpha=0.25, linewidth=0.8)
        if curves:
            mean = [sum(losses) / len(losses) for losses in zip(*(losses for _, losses in curves), strict=True)]
            axes.plot(curves[0][0], mean, color=f"C{i}", linewidth=1.8, label=f"{ARMS[arm][0]}, mean")
    axes.set_xlabel("steps")
    axes.set_ylabel("loss on held-out images")
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return figure
