"""Tables 1, 2 and 4 of the paper with what was measured beside what is printed, and where the numbers come from.

Nothing is measured here. Rows that have not been run are shown as such.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from attnorm.evaluation.scores import Score, UsedExtractor
from attnorm.ops.soft_layout import effective_entities
from attnorm.reports.paper import (
    NUM_IMAGENET_CLASSES,
    TABLE_1,
    TABLE_1_COLUMNS,
    TABLE_2,
    TABLE_2_COLUMNS,
    TABLE_4,
    TABLE_4_COLUMNS,
)
from attnorm.reports.render import NOT_RUN, Section, Table
from attnorm.reports.runs import LABELS, Column, Run, column_of, columns, short, show, titles
from attnorm.reports.seed_comparison import HEADER as SEED_HEADER
from attnorm.reports.seed_comparison import SeedComparison, explanation

# Which of our metrics stand beside a printed column.
BESIDE = {"iterations": (), "fid": ("frechet",), "intra_fid": ("intra-frechet",), "is": ("is1", "is10")}
GENERATIVE = ("frechet", "intra-frechet", "is1", "is10", "kid", "precision", "recall")  # in the order of METRICS
PRINTED_ENTITIES = {"an-n8": 8, "an-n32": 32}  # all other rows of AN have 16
MOST_CLASSES_SHOWN = 20  # of those that Table 2 does not print

COST = ("G / D parameters", "s a step", "device", "batch", "steps", "images seen")


class Line(NamedTuple):
    """A printed row, and the runs that belong to it."""

    label: str
    printed: Mapping[str, str]
    runs: list[Run]


def _cost(run: Run) -> list[str]:
    batch = run.config.run.batch_size
    seconds = f"{run.seconds * batch / run.images_seen:.3g}" if run.images_seen else "-"
    device = "not recorded" if run.config.run.device == "auto" else run.config.run.device
    g_parameters, d_parameters = run.parameters
    return [
        f"{g_parameters:,} / {d_parameters:,}",
        seconds,
        device,
        str(batch),
        f"{run.shown_at // batch:,}",
        f"{run.shown_at:,}",
    ]


def _score_table(title: str, first: str, printed_columns: Mapping[str, str], lines: Sequence[Line]) -> Table:
    """Printed columns, each with what was measured of the kind to its right; a line for every seed."""
    runs = [run for line in lines for run in line.runs]
    measured = {key: columns(runs, BESIDE[key]) for key in printed_columns}
    header = [first, "run", "seed"]
    for key, name in printed_columns.items():
        header += [f"{name}, paper", *titles(measured[key])]
    rows = []
    for line in lines:
        for number, run in enumerate(line.runs or [None]):
            cells = [line.label, NOT_RUN if run is None else _run_cell(run), "" if run is None else _seed(run)]
            for key in printed_columns:
                cells.append("" if number else line.printed.get(key, "-"))
                cells += ["" if run is None else show(run.find(column)) for column in measured[key]]
            rows.append((*cells, *(_cost(run) if run is not None else [""] * len(COST))))
    return Table(title, (*header, *COST), tuple(rows), tuple(_notes(lines)))


def _run_cell(run: Run) -> str:
    return f"{run.name}: {run.failure}" if run.failure else run.name


def _seed(run: Run) -> str:
    return str(run.config.run.seed)


def _notes(lines: Sequence[Line]) -> list[str]:
    """What a reader of a table must know before comparing its rows."""
    runs = [run for line in lines for run in line.runs]
    notes = list(dict.fromkeys(run.note for run in runs if run.note))
    if len({run.shown_at for run in runs if not run.failure}) > 1:
        notes.append("The rows have seen unlike numbers of images: their scores do not compare at equal training.")
    for name in ("precision", "tf32"):
        kinds: dict[str, list[str]] = {}
        for run in runs:
            kinds.setdefault(str(getattr(run.config.run, name)), []).append(run.name)
        if len(kinds) > 1:
            said = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
            notes.append(f"The runs differ in run.{name} too: {said}.")
    for run in runs:
        num_entities = run.model.an.num_entities
        if run.row.startswith("an") and num_entities != PRINTED_ENTITIES.get(run.row, 16):
            notes.append(f"{run.name}: {run.label} in this family of presets has n = {num_entities}.")
        if run.scored_at is not None and run.scored_at < run.images_seen:
            notes.append(
                f"{run.name} was scored after {run.scored_at:,} images; it has seen {run.images_seen:,} since."
            )
        for column in columns([run], ("frechet",)):
            same = [s for s in run.scores if column_of(s) == column]
            best = min(same, key=lambda score: score.value)
            if best.images_seen != run.scored_at:
                notes.append(
                    f"{run.name}: its best {column.name} ({column.protocol}) was {show(best)} after "
                    f"{best.images_seen:,} images; the table shows the last."
                )
    return notes


def _beside_the_paper(configurations: Mapping[str, list[Run]], metrics: Sequence[str]) -> str:
    """Whether what is printed may be compared with what was measured."""
    agreeing = sorted(
        {
            column.protocol
            for runs in configurations.values()
            for run in runs
            for column in columns([run], metrics)
            if _agrees(run, column)
        }
    )
    text = (
        'The columns marked "paper" are of ImageNet at 128 pixels by the standard Inception network, on 50,000 '
        "samples: they are there to be seen, not to be compared with, unless protocol and data agree"
    )
    if not agreeing:
        return f"{text}, which they do for nothing here."
    return f"{text}, as far as the paper states them: so for {', '.join(agreeing)}."


def _agrees(run: Run, column: Column) -> bool:
    """Whether a score is of the paper's data and, as far as they are stated, by its protocol."""
    return (
        column.name in ("FID", "IS", "intra-FID")  # the standard extractor's names
        and not column.subset
        and column.image_size == run.model.image_size == 128
        and len(run.classes) == NUM_IMAGENET_CLASSES
        and (_is_intra_protocol(column) if column.metric == "intra-frechet" else column.num_fakes == 50_000)
        and (column.metric in ("is1", "is10", "intra-frechet") or column.num_reals > 1_200_000)
    )


def _is_intra_protocol(column: Column) -> bool:
    """5,000 generated images a class against all that were trained on, of all classes or of Table 2's (row 20)."""
    least = {"intra5k_train_inception[all]": 1_200_000, "intra5k_train_inception[table2]": 8_000}
    return column.num_reals > least.get(column.protocol, math.inf)


def section_1(configurations: Mapping[str, list[Run]]) -> Section:
    def lines(runs: Sequence[Run]) -> list[Line]:
        return [Line(row.label, row.values, [run for run in runs if run.row == row.row]) for row in TABLE_1]

    tables = [
        _score_table(configuration, "Model", TABLE_1_COLUMNS, lines(runs))
        for configuration, runs in _holding(configurations, {row.row for row in TABLE_1}).items()
    ]
    paragraphs = (_beside_the_paper(configurations, ("frechet", "intra-frechet", "is1", "is10")),)
    return Section("Table 1. Class-conditional generation", paragraphs, tuple(tables))


def section_4(configurations: Mapping[str, list[Run]]) -> Section:
    """The ablation; below its rows those of Table 1, and what the paper does not have."""
    own = {row.row for row in TABLE_4}

    def lines(runs: Sequence[Run]) -> list[Line]:
        out = [Line(row.label, row.values, [run for run in runs if run.row == row.row]) for row in TABLE_4]
        for row in TABLE_1:
            if row.row not in own and (found := [run for run in runs if run.row == row.row]):
                out.append(Line(f"{row.label} (Table 1)", row.values, found))
        for label in dict.fromkeys(run.label for run in runs if not run.row):
            out.append(Line(label, {}, [run for run in runs if run.label == label]))
        return out

    tables, points = [], []
    for configuration, runs in _holding(configurations, {*own, ""}).items():
        tables.append(_score_table(configuration, "Module", TABLE_4_COLUMNS, lines(runs)))
        layouts = _layout_table(configuration, runs)
        if layouts.rows:
            tables.append(layouts)
            points.append(
                "Entropy is the layout's, normalised: 1 is uniform, and AN is then instance normalization; 0 is hard "
                "regions. Entities in use are the exponential of the entropy of the shares of pixels that they win."
            )
        further = _further_table(configuration, runs)
        if further.rows:
            tables.append(further)
    paragraphs = (_beside_the_paper(configurations, ("frechet", "is1", "is10")), *dict.fromkeys(points))
    return Section("Table 4. What the parts of AN do", paragraphs, tuple(tables))


def _holding(configurations: Mapping[str, list[Run]], rows: set[str]) -> dict[str, list[Run]]:
    """The configurations in which one of `rows` was run; an empty one where none was, so that the table is shown."""
    return {name: runs for name, runs in configurations.items() if any(run.row in rows for run in runs)} or {"": []}


def _layout_table(configuration: str, runs: Sequence[Run]) -> Table:
    header = ("Module", "run", "seed", "site", "entropy", "entities in use", "largest share", "seen after", "source")
    rows = [
        (
            run.label,
            run.name,
            _seed(run),
            layout.site,
            f"{layout.entropy:.3f}",
            f"{effective_entities(layout.usage):.1f} of {len(layout.usage)}",
            f"{max(layout.usage):.2f}",
            f"{layout.images_seen:,} images",
            layout.source,
        )
        for row in (*LABELS, "")
        for run in runs
        if run.row == row
        for layout in run.layouts
    ]
    return Table(f"Layouts: {configuration}", header, tuple(rows))


def _further_table(configuration: str, runs: Sequence[Run]) -> Table:
    """Scores that no table of the paper has."""
    shown = columns(runs, ("kid", "precision", "recall"))
    rows = [
        (run.label, run.name, _seed(run), *(show(run.find(column)) for column in shown))
        for run in runs
        if any(run.find(column) for column in shown)
    ]
    return Table(f"Further scores: {configuration}", ("Module", "run", "seed", *titles(shown)), tuple(rows))


def section_2(configurations: Mapping[str, list[Run]]) -> Section:
    """Classes in rows, models in columns."""
    tables = []
    with_classes = {
        name: [run for run in runs if columns([run], ("intra-frechet",))] for name, runs in configurations.items()
    }
    for configuration, runs in ({name: runs for name, runs in with_classes.items() if runs} or {"": []}).items():
        shown = columns(runs, ("intra-frechet",))
        texts = dict(zip(shown, titles(shown), strict=True))
        measured = [
            (f"{run.label}, {run.name}: {texts[column]}", run, score)
            for run in runs
            for column in shown
            if (score := run.find(column)) is not None
        ]
        tables.append(_classes_table(configuration, measured))
    paragraphs = (
        _beside_the_paper(configurations, ("intra-frechet",)),
        'The paper prints "Indigo hunting" for class 14, which is the indigo bunting.',
    )
    return Section("Table 2. Class by class", paragraphs, tuple(tables))


def _classes_table(configuration: str, measured: Sequence[tuple[str, Run, Score]]) -> Table:
    printed_header = [f"{name}, paper" for name in TABLE_2_COLUMNS.values()]
    header = ["Class (label)", *printed_header, *([text for text, _, _ in measured] or ["here"])]
    used: set[tuple[int, str]] = set()
    rows: list[list[str]] = []
    for printed in TABLE_2:
        cells = [f"{printed.name} ({printed.label})", *(printed.values[row] for row in TABLE_2_COLUMNS)]
        for number, (_, run, score) in enumerate(measured):
            values = score.values
            names = {printed.name.lower()}
            if len(run.classes) == NUM_IMAGENET_CLASSES:
                names.add(str(printed.label))
            key = next((key for key in values if _plain(key) in names or key.startswith(printed.wordnet)), None)
            if key is not None:
                used.add((number, key))
            cells.append(NOT_RUN if key is None else f"{values[key]:.2f}")
        rows.append(cells if measured else [*cells, NOT_RUN])
    others = {
        key: None for number, (_, _, score) in enumerate(measured) for key in score.values if (number, key) not in used
    }
    notes = []
    if len(others) > MOST_CLASSES_SHOWN:
        notes.append(f"{len(others):,} other classes were measured; their values are in report.json.")
    for key in others if not notes else ():
        of_runs = [score.values.get(key) for _, _, score in measured]
        rows.append([key, *("-" for _ in TABLE_2_COLUMNS), *("-" if v is None else f"{v:.2f}" for v in of_runs)])
    if measured:
        means = [f"{show(score)} ({len(score.values)} classes)" for _, _, score in measured]
        rows.append(["mean over the classes measured", *("-" for _ in TABLE_2_COLUMNS), *means])
    return Table(configuration, tuple(header), tuple(map(tuple, rows)), tuple(notes))


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").lower().strip()


def seeds_section(compared: Mapping[str, Sequence[SeedComparison]]) -> Section:
    tables = [
        Table(title, SEED_HEADER, tuple(comparison.row() for comparison in comparisons))
        for title, comparisons in compared.items()
        if comparisons
    ]
    different = {comparison for comparisons in compared.values() for comparison in comparisons}
    return Section("Which rows differ", (explanation(len(different)),), tuple(tables))


def particulars(configurations: Mapping[str, list[Run]]) -> list[Section]:
    # Once each: one without tau stands beside either kind of AN.
    runs = list({run.path: run for members in configurations.values() for run in members}.values())
    shown = columns(runs, GENERATIVE)
    first = {column_of(score): score for run in runs for score in reversed(run.scores)}
    protocols = []
    for column, title in zip(shown, titles(shown), strict=True):
        extractor, data = first[column].extractor or UsedExtractor(), first[column].data
        weights = extractor.weights_sha256[:12] or "-"
        protocols.append(
            (
                title,
                f"{extractor.title or extractor.name or '-'}, weights {weights}",
                extractor.preprocessing or "-",
                f"{column.num_fakes:,}" if column.num_fakes else "-",
                f"{column.num_reals:,}" if column.num_reals else "-",
                f"{short(data.source)}, {column.split or '-'}, {column.image_size or '-'} pixels, "
                f"{column.fingerprint[:12] or '-'}",
                first[column].interval or "-",
            )
        )
    kept = ("score", "extractor", "preprocessing", "generated", "real", "data", "interval")
    table = Table("", kept, tuple(protocols))
    sections = [Section("Protocols", ("Images are rounded to uint8 before anything is measured.",), (table,))]
    header = (
        "run",
        "row",
        "preset",
        "data",
        "precision",
        "checkpoint",
        "its SHA-256",
        "commit",
        "measured on",
        *COST[:2],
    )
    rows = []
    for run in runs:
        shown_scores = [s for s in run.scores if s.images_seen == run.scored_at]
        score = next(reversed(shown_scores), None)
        rows.append(
            (
                _run_cell(run),
                run.label,
                run.config.preset or "-",
                f"{short(run.data.get('source', ''))}, {run.data.get('fingerprint', '')[:12] or '-'}",
                run.config.run.precision,
                Path(score.checkpoint).name if score and score.checkpoint else "-",
                score.checkpoint_sha256[:12] if score and score.checkpoint_sha256 else "-",
                _all_of(s.commit[:12] for s in shown_scores),
                _all_of(s.device for s in shown_scores),
                *_cost(run)[:2],
            )
        )
    return [*sections, Section("Runs", (), (Table("", header, tuple(rows)),))]


def _all_of(values: Iterable[str]) -> str:
    """What scores of a run say of one thing, each answer once."""
    return ", ".join(dict.fromkeys(filter(None, values))) or "-"
