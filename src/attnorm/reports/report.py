"""The report: the paper's tables with what was measured, and its figures drawn from the runs, as files.

The same runs give the same bytes, on the same machine with the same number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from attnorm import __version__
from attnorm.benchmark.results import BenchReport, read_results
from attnorm.config import ConfigError
from attnorm.evaluation.inpainters import InpaintingScores, name_runs, read_scores
from attnorm.reports import paper
from attnorm.reports.benchmark import table_5
from attnorm.reports.inpainting import compare_inpainters, section_3
from attnorm.reports.pictures import PICTURES, draw_pictures
from attnorm.reports.render import Document, Section, Table, write_document
from attnorm.reports.runs import Run, read_run, short, training_configurations
from attnorm.reports.seed_comparison import SeedComparison, compare_runs
from attnorm.reports.tables import particulars, section_1, section_2, section_4, seeds_section
from attnorm.system.files import write_json

ALL_TABLES = (1, 2, 3, 4, 5)
TITLE = "Attentive Normalization: the paper's tables and figures, measured"

Progress = Callable[[int, int, str], None]  # pictures done, in all, what is being drawn


@dataclass(frozen=True)
class Report:
    """Everything that is written, but for the pictures."""

    sections: tuple[Section, ...]
    runs: tuple[Run, ...] = ()
    seed_comparisons: tuple[SeedComparison, ...] = ()
    inpainting: Mapping[str, InpaintingScores] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)  # of these, by the same names
    benches: Mapping[str, BenchReport] = field(default_factory=dict)

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
        inpainting: Folders that `attnorm evaluate inpainters` has written.
        benches: Folders that `attnorm bench layer` has written, or its JSON files.
        failed: Why a run came to nothing, by its path; a row says so where it is among `runs`, else Table 3 does.

    Raises:
        CheckpointError: a run or a file of scores cannot be read.
        ConfigError: a run is of another task, or named twice; a folder does not hold what it should.
    """
    if unknown := set(tables) - set(ALL_TABLES):
        raise ConfigError(f"there is no table {min(unknown)}; the paper has tables 1 to 5")
    failed = failed or {}
    found = [read_run(name, path, failed.get(path, "")) for name, path in name_runs(runs).items()]
    folders = name_runs(inpainting)
    scores = {name: read_scores(path) for name, path in folders.items()}
    measured = {
        name: read_results(path if path.is_file() else path / "bench.json") for name, path in name_runs(benches).items()
    }
    configurations = training_configurations(found)
    builders: dict[int, Callable[[], Section]] = {
        1: lambda: section_1(configurations),
        2: lambda: section_2(configurations),
        3: lambda: section_3(scores, {path.name: why for path, why in failed.items() if path not in runs}),
        4: lambda: section_4(configurations),
        5: lambda: _section_5(measured),
    }
    sections = [builders[number]() for number in ALL_TABLES if number in tables]
    compared = {name: compare_runs(members) for name, members in configurations.items()}
    if 3 in tables:
        compared |= {name: compare_inpainters(found_scores) for name, found_scores in scores.items()}
    if any(compared.values()):
        sections.append(seeds_section(compared))
    if found:
        sections += particulars(configurations)
    comparisons = tuple(itertools.chain(*compared.values()))
    return Report(tuple(sections), tuple(found), comparisons, scores, folders, measured)


def _section_5(benches: Mapping[str, BenchReport]) -> Section:
    text = (
        "Milliseconds of one forward pass at batch 1 and 32 channels. The paper's are of PyTorch 1.1.0 on a 2080, with "
        "a stroke where its memory ran out."
    )
    tables = []
    for name, bench in benches.items():
        environment = bench.environment
        about = f"{environment['device_name']}, {environment['precision']}, {environment['threads']} threads"
        tables.append(table_5(bench, f"{name}: {about}, torch {environment['torch']}"))
    return Section("Table 5. What the layer costs", (text,), tuple(tables or [table_5(None, "")]))


def to_dict(report: Report) -> dict[str, Any]:
    """Plain JSON types: the tables as they are shown, and below what they were made from."""
    return {
        "attnorm": __version__,
        "sections": [asdict(section) for section in report.sections],
        "seed_comparisons": [comparison.to_dict() for comparison in report.seed_comparisons],
        "runs": [_run_to_dict(run) for run in report.runs],
        "inpainting": {
            name: {key: dict(method.means) for key, method in {**scores.models, **scores.baselines}.items()}
            for name, scores in report.inpainting.items()
        },
        "printed": {
            "table_1": [row._asdict() for row in paper.TABLE_1],
            "table_2": [row._asdict() for row in paper.TABLE_2],
            "table_3": [row._asdict() for row in paper.TABLE_3],
            "table_4": [row._asdict() for row in paper.TABLE_4],
            "table_5": paper.TABLE_5,
        },
    }


def _run_to_dict(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "row": run.row,
        "label": run.label,
        "preset": run.config.preset,
        "seed": run.config.run.seed,
        "parameters": run.parameters,
        "images_seen": run.images_seen,
        "batch_size": run.config.run.batch_size,
        "seconds": run.seconds,
        "training_configuration": run.training_configuration,
        "failure": run.failure,
        # A whole path says where someone keeps the data.
        "scores": [
            replace(score, data=replace(score.data, source=short(score.data.source))).to_dict() for score in run.scores
        ],
        "layouts": [layout._asdict() for layout in run.layouts],
    }


def write_report(
    report: Report,
    out: Path,
    *,
    device: str = "auto",
    progress: Progress = lambda done, total, what: None,
) -> list[Path]:
    """Writes report.md, report.html (its pictures inside), report.json and pictures/ into `out`; returns the paths of
    the first three.

    Args:
        device: Where the images of Figures 4, 5, 7 and 8 are made: auto, cpu, cuda or mps.
    """
    (out / PICTURES).mkdir(parents=True, exist_ok=True)
    drawn = draw_pictures(report.runs, report.folders, report.benches, out, device=device, progress=progress)
    write_json(out / "report.json", {**to_dict(report), "pictures": [asdict(section) for section in drawn]})
    document = Document(TITLE, (*report.sections, *drawn))
    return [*write_document(document, out, "report", ("md", "html")), out / "report.json"]
