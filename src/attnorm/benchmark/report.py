"""What was measured, and as what it is written: JSON, Markdown, a figure."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from attnorm.benchmark.cases import ATTENTION, CONV_INSTANCE_NORM, COPY, MODES, PAPER_TABLE_5, Case, Mode, Shape
from attnorm.checkpoint import CheckpointError
from attnorm.system.files import write_atomically, write_json, write_text

FORMAT_VERSION = 2
WHAT: dict[Mode, str] = {"forward": "evaluation, no gradients", "training": "forward and backward"}


Status = Literal["measured", "failed", "missing"]


@dataclass(frozen=True)
class Cell:
    """One implementation on one case in one mode."""

    case: str
    implementation: str
    mode: Mode
    status: Status
    reason: str = ""  # why there is no time
    checked_shape: Shape | None = None  # the case's own, or a crop of it
    output_error: float | None = None  # relative, in evaluation
    gradient_error: float | None = None  # relative, the worst of the input's and the parameters', in training
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    repeats: int = 0
    ratio_to_copy: float | None = None  # of the medians
    ratio_to_conv_instance_norm: float | None = None
    peak_bytes: int | None = None  # what one step adds at its highest to input, parameters and the output's gradient
    beyond_bytes: int | None = None  # of these, what is neither output nor the input's gradient
    of_roofline: float | None = None  # AN: the least time that the machine allows / the median
    compile_seconds: float | None = None  # of the first step with this shape, not in the times
    fastest_ms: float | None = None  # where other work shares the machine, the time that it disturbed least


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """All that was measured, where, and how."""

    format_version: int = FORMAT_VERSION
    environment: dict[str, Any]
    cases: tuple[Case, ...]
    cells: tuple[Cell, ...]

    def find(self, case: str, implementation: str, mode: Mode) -> Cell | None:
        wanted = (case, implementation, mode)
        return next((cell for cell in self.cells if (cell.case, cell.implementation, cell.mode) == wanted), None)

    def implementations(self) -> list[str]:
        return list(dict.fromkeys(cell.implementation for cell in self.cells))


def with_ratios(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """The cells with the ratios of their medians to those of the copy and of conv + instance norm, where measured."""
    medians = {(cell.case, cell.mode, cell.implementation): cell.median_ms for cell in cells}

    def ratio(cell: Cell, other: str) -> float | None:
        unit = medians.get((cell.case, cell.mode, other))
        return cell.median_ms / unit if cell.median_ms is not None and unit else None

    return tuple(
        dataclasses.replace(
            cell, ratio_to_copy=ratio(cell, COPY), ratio_to_conv_instance_norm=ratio(cell, CONV_INSTANCE_NORM)
        )
        for cell in cells
    )


def write_report(report: BenchReport, out: Path) -> list[Path]:
    """Writes bench.json, bench.md and time-against-pixels.png into `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "bench.json", dataclasses.asdict(report))
    text = markdown(report)
    write_text(out / "bench.md", text)
    figure = pixels_figure(report)
    FigureCanvasAgg(figure)
    write_atomically(
        out / "time-against-pixels.png",
        lambda temporary: figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight"),
    )
    return [out / name for name in ("bench.json", "bench.md", "time-against-pixels.png")]


def read_report(path: Path) -> BenchReport:
    """A bench.json, as it was written."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise CheckpointError(f"{path} has format {values['format_version']}; this version reads {FORMAT_VERSION}")
        return BenchReport(
            environment=values["environment"],
            cases=tuple(Case(**case | {"shape": tuple(case["shape"])}) for case in values["cases"]),
            cells=tuple(
                Cell(**cell | {"checked_shape": tuple(cell["checked_shape"]) if cell["checked_shape"] else None})
                for cell in values["cells"]
            ),
        )
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as a bench.json ({error}); run the benchmark again") from error


def disturbances(report: BenchReport) -> list[str]:
    """Where the same copy took more than twice as long in one mode as in the other: something else ran there.
    Below 50 microseconds chance alone does that.
    """
    out = []
    for case in report.cases:
        copies = [report.find(case.name, COPY, mode) for mode in MODES]
        times = [copy.median_ms for copy in copies if copy is not None and copy.median_ms is not None]
        if len(times) == 2 and max(times) > 2 * min(times) > 2 * 0.05:
            took = " and ".join(f"{time:.3g} ms ({mode})" for time, mode in zip(times, MODES, strict=True))
            out.append(f"{case.name}: the same copy took {took}; something else was running: measure again")
    return out


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]


def tables(report: BenchReport) -> list[Table]:
    """Times, memory and shares of the roofline by mode, implementations in rows and cases in columns; what compiling
    took; and Table 5 beside what was measured.
    """
    kinds = (
        ("median ms (fastest; 20%-80%), times the copy, times conv + instance norm", _show_time),
        ("peak memory in inputs, and beyond output and gradient", _show_memory(report)),
        ("share of the roofline: the least time for AN's bytes and operations / the median", _show("of_roofline", 3)),
        ("seconds to compile, not in the times above", _show("compile_seconds", 1)),
    )
    header = ["", *(f"{case.name} {_by(case.shape)}" for case in report.cases)]
    out = []
    for (title, show), mode in itertools.product(kinds, MODES):
        rows = [
            [name, *(show(report.find(case.name, name, mode)) for case in report.cases)]
            for name in report.implementations()
        ]
        # An implementation without an answer has no row in a table of a thing that only some have.
        rows = [row for row in rows if set(row[1:]) != {"-"}]
        if rows:
            out.append(Table(f"{mode} ({WHAT[mode]}): {title}", header, rows))
    return [*out, _table_5(report)] if _has_table_5(report) else out


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _show(key: str, digits: int) -> Callable[[Cell | None], str]:
    def show(cell: Cell | None) -> str:
        value = None if cell is None else getattr(cell, key)
        return "-" if value is None else f"{value:.{digits}f}"

    return show


def _show_time(cell: Cell | None) -> str:
    if cell is None or cell.median_ms is None:
        return "-" if cell is None else cell.status
    ratios = [ratio for ratio in (cell.ratio_to_copy, cell.ratio_to_conv_instance_norm) if ratio is not None]
    shown = "".join(f" {ratio:.0f}x" if ratio >= 10 else f" {ratio:.2g}x" for ratio in ratios)
    fastest = "" if cell.fastest_ms is None else f"{cell.fastest_ms:.3g}; "
    return f"{cell.median_ms:.3g} ({fastest}{cell.p20_ms:.3g}-{cell.p80_ms:.3g}){shown}"


def _show_memory(report: BenchReport) -> Callable[[Cell | None], str]:
    element = 4 if report.environment["dtype"] == "float32" else 2
    inputs = {case.name: element * math.prod(case.shape) for case in report.cases}

    def show(cell: Cell | None) -> str:
        if cell is None or cell.peak_bytes is None or cell.beyond_bytes is None:
            return "-" if cell is None else cell.status
        return f"{cell.peak_bytes / inputs[cell.case]:.2f}, {cell.beyond_bytes / inputs[cell.case]:.2f}"

    return show


def _has_table_5(report: BenchReport) -> bool:
    return any(case.name.startswith("table5-") for case in report.cases)


def _table_5(report: BenchReport) -> Table:
    """The paper's rows, then ours on the same sizes."""
    sizes = list(PAPER_TABLE_5["AN"])
    rows = [
        [f"{name} (the paper)", *("-" if times[size] is None else f"{times[size]:.2f}" for size in sizes)]
        for name, times in PAPER_TABLE_5.items()
    ]
    for name in report.implementations():
        if name == ATTENTION or name.startswith("an-"):
            found = [report.find(f"table5-{size}", name, "forward") for size in sizes]
            shown = ["-" if cell is None or cell.median_ms is None else f"{cell.median_ms:.2f}" for cell in found]
            rows.append([f"{name} (here)", *shown])
    return Table(
        "Table 5: ms at 1 x 32 channels; the paper's were on a 2080",
        ["", *(f"{size} x {size}" for size in sizes)],
        rows,
    )


def markdown(report: BenchReport) -> str:
    """The whole report as a document."""
    environment = report.environment
    lines = ["# attnorm bench layer", ""]
    lines += [
        f"{environment['device_name']}, {environment['threads']} threads, {environment['precision']}; "
        f"attnorm {environment['attnorm']}, torch {environment['torch']}, triton {environment['triton'] or 'absent'}, "
        f"Python {environment['python']}, {environment['platform']}; commit {environment['commit'][:7] or 'unknown'}"
        f", {environment['date'] or 'no date'}.",
        "",
        f"Cache: {environment['cache']}.",
        f"Memory is {'kept in the process (mallopt)' if environment['retain_memory'] else 'left to the allocator'}; "
        f"variables: {json.dumps(environment['variables'])}, "
        f"preloaded: {', '.join(environment['preloaded']) or 'nothing'}.",
        f"A copy moves {environment['roofline']['bytes_per_second'] / 1e9:.4g} GB/s here, a matrix product makes "
        f"{environment['roofline']['operations_per_second'] / 1e12:.3g} TFLOP/s"
        f"{_own_copies(report)}.",
        f"Load average before and after: {environment['load_averages']}.",
    ]
    lines += [f"\n**{disturbance}.**" for disturbance in disturbances(report)]
    for table in tables(report):
        lines += ["", f"## {table.title[0].upper()}{table.title[1:]}", "", *_markdown_table(table)]
    checked = {(c.case, c.implementation): c for c in report.cells if None not in (c.output_error, c.gradient_error)}
    rows = []
    for c in checked.values():
        rows.append(
            [c.case, c.implementation, _by(c.checked_shape or ()), f"{c.output_error:.1e}", f"{c.gradient_error:.1e}"]
        )
    allowed = " and ".join(f"{tolerance:g}" for tolerance in environment["tolerances"])
    lines += ["", f"## Relative error against the reference in float64 (allowed: {allowed})", ""]
    lines += _markdown_table(Table("", ["case", "implementation", "compared on", "output", "gradients"], rows))
    without = [
        f"- {c.case}, {c.implementation}, {c.mode}: {c.status}: {c.reason}" for c in report.cells if c.median_ms is None
    ]
    if without:
        lines += ["", "## Without a time", "", *without]
    return "\n".join(lines) + "\n"


def _own_copies(report: BenchReport) -> str:
    """Where maps fit a cache, what a copy of the case's own size moves is what its share of the roofline is of."""
    own = report.environment["roofline"].get("bytes_per_second_by_case", {})
    texts = [f"{name} {value / 1e9:.4g}" for name, value in own.items()]
    return f"; copies of the cases' own sizes, where faster, {', '.join(texts)} GB/s" if texts else ""


def _markdown_table(table: Table) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (table.header, ["---"] * len(table.header), *table.rows)]


def series(report: BenchReport, mode: Mode) -> dict[str, list[tuple[int, float]]]:
    """(pixels, median ms) by implementation, over the cases of one batch size and channels that has most sizes."""
    kinds = [case.shape[:2] for case in report.cases]
    kind = max(kinds, key=kinds.count)
    pixels = {case.name: case.shape[2] * case.shape[3] for case in report.cases if case.shape[:2] == kind}
    out: dict[str, list[tuple[int, float]]] = {}
    for cell in report.cells:
        if cell.mode == mode and cell.median_ms is not None and cell.case in pixels:
            out.setdefault(cell.implementation, []).append((pixels[cell.case], cell.median_ms))
    return {name: sorted(points) for name, points in out.items()}


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of log time against log pixels between the two largest sizes, where overheads count least: 1 is linear, 2 is
    quadratic. None for fewer than two sizes.
    """
    if len(points) < 2:
        return None
    (first, before), (last, after) = sorted(points)[-2:]
    return math.log(after / before) / math.log(last / first)


def pixels_figure(report: BenchReport) -> Figure:
    """Time against pixels, both logarithmic, with each line's slope; the paper's Table 5 in grey where it applies."""
    figure = Figure(figsize=(12, 6))
    for mode, axis in zip(MODES, figure.subplots(1, 2), strict=True):
        for name, points in series(report, mode).items():
            steepness = slope(points)
            label = name if steepness is None else f"{name}, slope {steepness:.2f}"
            axis.loglog(*zip(*points, strict=True), "o-", markersize=4, label=label)
        if mode == "forward" and _has_table_5(report):
            for (name, times), marker in zip(PAPER_TABLE_5.items(), ("s:", "^:"), strict=True):
                points = [(size * size, ms) for size, ms in times.items() if ms is not None]
                label = f"{name}, the paper on a 2080, slope {slope(points):.2f}"
                axis.loglog(*zip(*points, strict=True), marker, color="grey", markersize=4, label=label)
        axis.set_title(mode, fontsize=10)
        axis.set_xlabel("pixels of a feature map")
        axis.set_ylabel("median ms")
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    environment = report.environment
    figure.suptitle(f"{environment['device_name']}, {environment['precision']}", fontsize=10)
    figure.tight_layout()
    return figure
