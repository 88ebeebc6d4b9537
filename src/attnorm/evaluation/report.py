"""Tables 1 to 5 of the paper with what was measured beside what is printed: plain data, made from what runs left.

Nothing is measured here. Rows that have not been run are shown as such.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from attnorm import __version__
from attnorm.benchmark.cases import ATTENTION, PAPER_TABLE_5
from attnorm.benchmark.report import BenchReport, Cell, read_report
from attnorm.checkpoint import CheckpointError
from attnorm.config import ConfigError
from attnorm.evaluation.inpainting import DIGITS as INPAINTING_DIGITS
from attnorm.evaluation.inpainting import TABLE_3, TITLES, name_runs
from attnorm.evaluation.paper_tables import (
    NUM_IMAGENET_CLASSES,
    TABLE_1,
    TABLE_1_COLUMNS,
    TABLE_2,
    TABLE_2_COLUMNS,
    TABLE_4,
    TABLE_4_COLUMNS,
)
from attnorm.evaluation.runs import (
    LABELS,
    SCORE_DIGITS,
    Column,
    Run,
    Score,
    column_of,
    columns,
    read_run,
    recipes_of,
    short,
    show,
    titles,
    without_paths,
)
from attnorm.evaluation.seed_comparison import HEADER as SEED_HEADER
from attnorm.evaluation.seed_comparison import SeedComparison, compare, compare_runs, explanation
from attnorm.ops.soft_layout import effective_entities

ALL_TABLES = (1, 2, 3, 4, 5)
NOT_RUN = "not run"
# Which of our metrics stand beside a printed column.
BESIDE = {"iterations": (), "fid": ("frechet",), "intra_fid": ("intra-frechet",), "is": ("is1", "is10")}
PRINTED_ENTITIES = {"an-n8": 8, "an-n32": 32}  # all other rows of AN have 16
MOST_CLASSES_SHOWN = 20  # of those that Table 2 does not print
INPAINTING_CONTEXTS = {"paper: CA [38]": "contextual", "paper: Ours": "an"}  # of Table 3's rows


@dataclass(frozen=True)
class Table:
    """Text as it is shown; every row has as many cells as the header."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    points: tuple[str, ...] = ()  # a list


@dataclass(frozen=True)
class Report:
    """Everything that is written, but for the pictures."""

    sections: tuple[Section, ...]
    runs: tuple[Run, ...] = ()
    seed_comparisons: tuple[SeedComparison, ...] = ()
    inpainting: Mapping[str, tuple[Path, dict[str, Any]]] = field(default_factory=dict)  # folder, scores.json; by name
    benches: Mapping[str, BenchReport] = field(default_factory=dict)  # by name

    @property
    def tables(self) -> list[Table]:
        return [table for section in self.sections for table in section.tables]


def build_report(
    runs: Sequence[Path],
    inpainting: Sequence[Path] = (),
    benches: Sequence[Path] = (),
    *,
    tables: Sequence[int] = ALL_TABLES,
    failed: Mapping[Path, str] | None = None,
) -> Report:
    """The tables that are asked for, with "not run" where there is nothing.

    Args:
        runs: Class-conditional run directories; their scores are those in RUN/evaluation/metrics.jsonl.
        inpainting: Folders that `attnorm evaluate` of inpainters has written.
        benches: Folders that `attnorm bench layer` has written, or its JSON files.
        failed: Why a run came to nothing, by its path among `runs`; its row says so.

    Raises:
        CheckpointError: a run or a file of scores cannot be read.
        ConfigError: a run is of another task, or named twice; a folder does not hold what it should.
    """
    if unknown := set(tables) - set(ALL_TABLES):
        raise ConfigError(f"there is no table {min(unknown)}; the paper has tables 1 to 5")
    failed = failed or {}
    found = [read_run(name, path, failed.get(path, "")) for name, path in _named(runs).items()]
    scores = {name: (path, _read_scores_json(path)) for name, path in _named(inpainting).items()}
    measured = {
        name: read_report(path if path.is_file() else path / "bench.json") for name, path in _named(benches).items()
    }
    recipes = recipes_of(found)
    builders = {
        1: lambda: _section_1(recipes),
        2: lambda: _section_2(recipes),
        3: lambda: _section_3(scores),
        4: lambda: _section_4(recipes),
        5: lambda: _section_5(measured),
    }
    sections = [builders[number]() for number in ALL_TABLES if number in tables]
    compared = {name: compare_runs(runs_of) for name, runs_of in recipes.items()}
    if 3 in tables:
        compared |= {name: _compare_inpainters(values) for name, (_, values) in scores.items()}
    if any(compared.values()):
        sections.append(_seeds_section(compared))
    if found:
        sections += _particulars(recipes)
    return Report(tuple(sections), tuple(found), tuple(itertools.chain(*compared.values())), scores, measured)


def to_dict(report: Report) -> dict[str, Any]:
    """Plain JSON types: the tables as they are shown, and below what they were made from."""
    return {
        "attnorm": __version__,
        "sections": [asdict(section) for section in report.sections],
        "seed_comparisons": [comparison.to_dict() for comparison in report.seed_comparisons],
        "runs": [
            {
                "name": run.name,
                "row": run.row,
                "label": run.label,
                "preset": run.config.preset,
                "seed": run.config.run.seed,
                "parameters": run.parameters,
                "images_seen": run.images_seen,
                "batch_size": run.config.run.batch_size,
                "seconds": run.seconds,
                "recipe": run.recipe,
                "failure": run.failure,
                "scores": [without_paths(score) for score in run.scores],
                "layouts": [layout._asdict() for layout in run.layouts],
            }
            for run in report.runs
        ],
        "inpainting": {
            name: {key: model["means"] for key, model in {**scores["models"], **scores["floors"]}.items()}
            for name, (_, scores) in report.inpainting.items()
        },
        "printed": {
            "table_1": [row._asdict() for row in TABLE_1],
            "table_2": [row._asdict() for row in TABLE_2],
            "table_3": TABLE_3,
            "table_4": [row._asdict() for row in TABLE_4],
            "table_5": PAPER_TABLE_5,
        },
    }


# What runs left


def _named(paths: Sequence[Path]) -> dict[str, Path]:
    return name_runs(paths) if paths else {}


def _read_scores_json(folder: Path) -> dict[str, Any]:
    file = folder / "scores.json"
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        missing = {"manifest", "models", "floors", "differences", "bootstrap"} - values.keys()
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} holds no scores.json that can be read ({error}); expected what `attnorm evaluate` of inpainters "
            "writes"
        ) from error
    if missing:
        raise CheckpointError(f"{file} has no {', '.join(sorted(missing))}; measure again with `attnorm evaluate`")
    return values


# Tables 1, 2 and 4


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
            best = min(same, key=lambda score: score["value"])
            if best["images_seen"] != run.scored_at:
                notes.append(
                    f"{run.name}: its best {column.name} ({column.protocol}) was {show(best)} after "
                    f"{best['images_seen']:,} images; the table shows the last."
                )
    return notes


def _beside_the_paper(recipes: Mapping[str, list[Run]], metrics: Sequence[str]) -> str:
    """Whether what is printed may be compared with what was measured."""
    agreeing = sorted(
        {
            column.protocol
            for runs in recipes.values()
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


def _section_1(recipes: Mapping[str, list[Run]]) -> Section:
    def lines(runs: Sequence[Run]) -> list[Line]:
        return [Line(row.label, row.values, [run for run in runs if run.row == row.row]) for row in TABLE_1]

    tables = [
        _score_table(recipe, "Model", TABLE_1_COLUMNS, lines(runs))
        for recipe, runs in _holding(recipes, {row.row for row in TABLE_1}).items()
    ]
    paragraphs = (_beside_the_paper(recipes, ("frechet", "intra-frechet", "is1", "is10")),)
    return Section("Table 1. Class-conditional generation", paragraphs, tuple(tables))


def _section_4(recipes: Mapping[str, list[Run]]) -> Section:
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
    for recipe, runs in _holding(recipes, {*own, ""}).items():
        tables.append(_score_table(recipe, "Module", TABLE_4_COLUMNS, lines(runs)))
        layouts = _layout_table(recipe, runs)
        if layouts.rows:
            tables.append(layouts)
            points.append(
                "Entropy is the layout's, normalised: 1 is uniform, and AN is then instance normalization; 0 is hard "
                "regions. Entities in use are the exponential of the entropy of the shares of pixels that they win."
            )
        further = _further_table(recipe, runs)
        if further.rows:
            tables.append(further)
    paragraphs = (_beside_the_paper(recipes, ("frechet", "is1", "is10")), *dict.fromkeys(points))
    return Section("Table 4. What the parts of AN do", paragraphs, tuple(tables))


def _holding(recipes: Mapping[str, list[Run]], rows: set[str]) -> dict[str, list[Run]]:
    """The recipes in which one of `rows` was run; an empty one where there is none, so that the table is shown."""
    return {name: runs for name, runs in recipes.items() if any(run.row in rows for run in runs)} or {"": []}


def _layout_table(recipe: str, runs: Sequence[Run]) -> Table:
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
    return Table(f"Layouts: {recipe}", header, tuple(rows))


def _further_table(recipe: str, runs: Sequence[Run]) -> Table:
    """Scores that no table of the paper has."""
    shown = columns(runs, ("kid", "precision", "recall"))
    rows = [
        (run.label, run.name, _seed(run), *(show(run.find(column)) for column in shown))
        for run in runs
        if any(run.find(column) for column in shown)
    ]
    return Table(f"Further scores: {recipe}", ("Module", "run", "seed", *titles(shown)), tuple(rows))


def _section_2(recipes: Mapping[str, list[Run]]) -> Section:
    """Classes in rows, models in columns."""
    tables = []
    with_classes = {name: [run for run in runs if columns([run], ("intra-frechet",))] for name, runs in recipes.items()}
    for recipe, runs in ({name: runs for name, runs in with_classes.items() if runs} or {"": []}).items():
        shown = columns(runs, ("intra-frechet",))
        texts = dict(zip(shown, titles(shown), strict=True))
        measured = [
            (f"{run.label}, {run.name}: {texts[column]}", run, score)
            for run in runs
            for column in shown
            if (score := run.find(column)) is not None
        ]
        tables.append(_classes_table(recipe, measured))
    paragraphs = (
        _beside_the_paper(recipes, ("intra-frechet",)),
        'The paper prints "Indigo hunting" for class 14, which is the indigo bunting.',
    )
    return Section("Table 2. Class by class", paragraphs, tuple(tables))


def _classes_table(recipe: str, measured: Sequence[tuple[str, Run, Score]]) -> Table:
    printed_header = [f"{name}, paper" for name in TABLE_2_COLUMNS.values()]
    header = ["Class (label)", *printed_header, *([text for text, _, _ in measured] or ["here"])]
    used: set[tuple[int, str]] = set()
    rows: list[list[str]] = []
    for printed in TABLE_2:
        cells = [f"{printed.name} ({printed.label})", *(printed.values[row] for row in TABLE_2_COLUMNS)]
        for number, (_, run, score) in enumerate(measured):
            values = score.get("values") or {}
            names = {printed.name.lower()}
            if len(run.classes) == NUM_IMAGENET_CLASSES:
                names.add(str(printed.label))
            key = next((key for key in values if _plain(key) in names or key.startswith(printed.wordnet)), None)
            if key is not None:
                used.add((number, key))
            cells.append(NOT_RUN if key is None else f"{values[key]:.2f}")
        rows.append(cells if measured else [*cells, NOT_RUN])
    others = {
        key: None
        for number, (_, _, score) in enumerate(measured)
        for key in score.get("values") or {}
        if (number, key) not in used
    }
    notes = []
    if len(others) > MOST_CLASSES_SHOWN:
        notes.append(f"{len(others):,} other classes were measured; their values are in report.json.")
    for key in others if not notes else ():
        values = [(score.get("values") or {}).get(key) for _, _, score in measured]
        rows.append([key, *("-" for _ in TABLE_2_COLUMNS), *("-" if v is None else f"{v:.2f}" for v in values)])
    if measured:
        means = [f"{show(score)} ({len(score.get('values') or {})} classes)" for _, _, score in measured]
        rows.append(["mean over the classes measured", *("-" for _ in TABLE_2_COLUMNS), *means])
    return Table(recipe, tuple(header), tuple(map(tuple, rows)), tuple(notes))


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").lower().strip()


def _seeds_section(compared: Mapping[str, Sequence[SeedComparison]]) -> Section:
    tables = [
        Table(title, SEED_HEADER, tuple(comparison.row() for comparison in comparisons))
        for title, comparisons in compared.items()
        if comparisons
    ]
    return Section("Which rows differ", (explanation(sum(len(table.rows) for table in tables)),), tuple(tables))


# Where the numbers come from


def _particulars(recipes: Mapping[str, list[Run]]) -> list[Section]:
    runs = [run for members in recipes.values() for run in members]
    shown = columns(runs, tuple(SCORE_DIGITS))
    first = {column_of(score): score for run in runs for score in reversed(run.scores)}
    protocols = []
    for column, title in zip(shown, titles(shown), strict=True):
        extractor = first[column].get("extractor") or {}
        data = first[column].get("data") or {}
        weights = extractor.get("weights_sha256", "")[:12] or "-"
        protocols.append(
            (
                title,
                f"{extractor.get('title') or extractor.get('name') or '-'}, weights {weights}",
                extractor.get("preprocessing", "-"),
                f"{column.num_fakes:,}" if column.num_fakes else "-",
                f"{column.num_reals:,}" if column.num_reals else "-",
                f"{short(data.get('source', ''))}, {column.split or '-'}, {column.image_size or '-'} pixels, "
                f"{column.fingerprint[:12] or '-'}",
                first[column].get("interval", "-"),
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
        shown_scores = [s for s in run.scores if s["images_seen"] == run.scored_at]
        score = next(reversed(shown_scores), {})
        rows.append(
            (
                _run_cell(run),
                run.label,
                run.config.preset or "-",
                f"{short(run.data.get('source', ''))}, {run.data.get('fingerprint', '')[:12] or '-'}",
                run.config.run.precision,
                Path(score["checkpoint"]).name if score.get("checkpoint") else "-",
                score.get("checkpoint_sha256", "")[:12] or "-",
                _all_of(s.get("commit", "")[:12] for s in shown_scores),
                _all_of(s.get("device", "") for s in shown_scores),
                *_cost(run)[:2],
            )
        )
    return [*sections, Section("Runs", (), (Table("", header, tuple(rows)),))]


def _all_of(values: Iterable[str]) -> str:
    """What scores of a run say of one thing, each answer once."""
    return ", ".join(dict.fromkeys(filter(None, values))) or "-"


# Table 3


def _section_3(inpainting: Mapping[str, tuple[Path, dict[str, Any]]]) -> Section:
    text = (
        "The printed numbers are of Paris StreetView at 256 pixels, with masks and definitions that the paper does not "
        "name: they are there to be seen, not to be compared with. MAE x2 is of values in [-1, 1], as which the "
        "printed one stands here: it is too large for [0, 1] at its PSNR (docs/paper.md, row 19)."
    )
    tables = [table for name, (_, scores) in inpainting.items() for table in _tables_3(name, scores)]
    return Section("Table 3. Inpainting", (text,), tuple(tables or _tables_3("", None)))


def _tables_3(name: str, scores: dict[str, Any] | None) -> list[Table]:
    """Scores, and differences with their intervals."""
    measured = ("psnr_pasted", "ssim_pasted", "mae_pasted", "psnr_hole", "ssim_hole", "mae_hole")
    header = ["Method", "model"]
    for key in ("psnr", "ssim", "mae"):
        header += [f"{TITLES[key]}, paper", "MAE x2, whole image" if key == "mae" else f"{TITLES[key]}, whole image"]
    header += ["MAE, whole image", *(f"{TITLES[key]}, hole" for key in ("psnr", "ssim", "mae"))]
    header += ["seed", "parameters", "s a step", "images seen", "device"]

    def row(label: str, printed: Mapping[str, float] | None, model: str, values: dict[str, Any] | None) -> list[str]:
        means = (values or {}).get("means", {})
        shown = {
            key: f"{means[key]:.{INPAINTING_DIGITS[key.partition('_')[0]]}f}" if key in means else ""
            for key in measured
        }
        cells = [label, model]
        for key in ("psnr", "ssim", "mae"):
            cells.append("" if printed is None else f"{printed[key]:.{INPAINTING_DIGITS[key]}f}")
            doubled = f"{2 * means['mae_pasted']:.4f}" if means else ""
            cells.append(doubled if key == "mae" else shown[f"{key}_pasted"])
        cells += [shown["mae_pasted"], shown["psnr_hole"], shown["ssim_hole"], shown["mae_hole"]]
        about = values or {}
        parameters, images_seen = (f"{about[key]:,}" if key in about else "" for key in ("parameters", "images_seen"))
        seconds = ""
        if about.get("images_seen") and "batch_size" in about:  # older results do not say
            seconds = f"{about['training_seconds'] * about['batch_size'] / about['images_seen']:.3g}"
        return [*cells, str(about.get("seed", "")), parameters, seconds, images_seen, str(about.get("device", ""))]

    models = scores["models"] if scores else {}
    rows = []
    for label, context in INPAINTING_CONTEXTS.items():
        found = {key: model for key, model in models.items() if model["context"] == context}
        text = label.removeprefix("paper: ")
        rows += [row(text, TABLE_3[label] if i == 0 else None, k, v) for i, (k, v) in enumerate(found.items())]
        if not found:
            rows.append(row(text, TABLE_3[label], NOT_RUN, None))
    others = {key: model for key, model in models.items() if model["context"] not in INPAINTING_CONTEXTS.values()}
    rows += [row(f"context {model['context']}: not in the paper", None, key, model) for key, model in others.items()]
    rows += [row(f"{key}: a floor", None, "-", floor) for key, floor in (scores["floors"] if scores else {}).items()]
    if scores is None:
        return [Table("", tuple(header), tuple(map(tuple, rows)))]
    manifest, bootstrap = scores["manifest"], scores["bootstrap"]
    title = (
        f"{name}: {manifest['images']:,} images of {short(manifest['source'])} at {manifest['image_size']} pixels, "
        f"{manifest['masks']} masks, manifest {manifest['sha256'][:12]}"
    )
    notes = [manifest["note"]] if manifest.get("note") else []
    tables = [Table(title, tuple(header), tuple(map(tuple, rows)), tuple(notes))]
    differences = _differences_3(scores["differences"])
    if differences:
        text = (
            f"Differences, whole image: first minus second, with the {bootstrap['confidence']:.0%} interval of the "
            f"paired bootstrap over images ({bootstrap['resamples']:,} resamples, seed {bootstrap['seed']})"
        )
        header = ["", *(TITLES[key] for key in ("psnr", "ssim", "mae")), "reading, over images"]
        note = (
            "These are of two models as they are; another seed of either is another model. What seeds decide, and how "
            'many would, stands below in "Which rows differ" for every two presets of which several seeds are here.'
        )
        tables.append(Table(text, tuple(header), tuple(differences), (note,)))
    return tables


def _compare_inpainters(scores: Mapping[str, Any]) -> list[SeedComparison]:
    """Presets with several seeds, two by two, in what is measured of the whole image; a row is a preset."""
    found = []
    for key, digits in INPAINTING_DIGITS.items():
        rows: dict[str, dict[int, tuple[float, int]]] = {}
        for model in scores["models"].values():
            if f"{key}_pasted" in model["means"] and "seed" in model:
                label = model.get("preset") or f"context {model['context']}"
                value = model["means"][f"{key}_pasted"]
                rows.setdefault(label, {})[model["seed"]] = value, model.get("images_seen", 0)
        found += compare(f"{TITLES[key]}, whole image", rows, is_less_better=key == "mae", digits=digits)
    return found


def _differences_3(differences: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows = []
    for first, second in dict.fromkeys((d["first"], d["second"]) for d in differences):
        cells, words = [], []
        for key, digits in INPAINTING_DIGITS.items():
            found = next(
                (d for d in differences if (d["first"], d["second"], d["score"]) == (first, second, f"{key}_pasted")),
                None,
            )
            if found is None:
                cells.append("-")
                continue
            cells.append(f"{found['mean']:+.{digits}f} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]")
            winner = first if (found["mean"] < 0) == (key == "mae") else second
            words.append(f"{key.upper()}: {f'{winner} is better' if found['is_supported'] else 'undecided'}")
        rows.append((f"{first} - {second}", *cells, "; ".join(words)))
    return rows


# Table 5


def _section_5(benches: Mapping[str, BenchReport]) -> Section:
    text = (
        "Milliseconds of one forward pass at batch 1 and 32 channels. The paper's are of PyTorch 1.1.0 on a 2080, with "
        "a stroke where its memory ran out."
    )
    tables = [_table_5(name, report) for name, report in benches.items()]
    return Section("Table 5. What the layer costs", (text,), tuple(tables or [_table_5("", None)]))


def _table_5(name: str, report: BenchReport | None) -> Table:
    sizes = list(PAPER_TABLE_5["AN"])
    names = report.implementations() if report else []
    of_row = {
        "AN": [name for name in names if name.startswith("an-")],
        "Self-attention": [name for name in names if name == ATTENTION],
    }
    rows, reasons = [], []
    for label, printed in PAPER_TABLE_5.items():
        rows.append((label, "paper", *("-" if printed[size] is None else f"{printed[size]:.2f}" for size in sizes)))
        for implementation in of_row[label]:
            assert report is not None
            cells = []
            for size in sizes:
                cell = _cell_5(report, implementation, size)
                if cell is None:
                    cells.append(NOT_RUN)
                elif cell.median_ms is None:
                    cells.append(cell.status)
                    reasons.append(f"{implementation} at {size} x {size}: {cell.status}: {cell.reason}")
                else:
                    cells.append(f"{cell.median_ms:,.0f}" if cell.median_ms >= 100 else f"{cell.median_ms:.3g}")
            rows.append((label, implementation, *cells))
        if not of_row[label]:
            rows.append((label, "here", *(NOT_RUN for _ in sizes)))
    header = ("Module", "implementation", *(f"{size} x {size}" for size in sizes))
    if report is None:
        return Table("", header, tuple(rows))
    environment = report.environment
    title = (
        f"{name}: {environment['device_name']}, {environment['precision']}, {environment['threads']} threads, torch "
        f"{environment['torch']}"
    )
    return Table(title, header, tuple(rows), tuple(reasons))


def _cell_5(report: BenchReport, implementation: str, size: int) -> Cell | None:
    """Of the case that has Table 5's shape, whatever it is called."""
    names = [case.name for case in report.cases if case.shape == (1, 32, size, size)]
    return next((cell for name in names if (cell := report.find(name, implementation, "forward")) is not None), None)
