"""The document of `attnorm bench layer`: its tables, where other work disturbed it, time against pixels."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from attnorm.benchmark.cases import ATTENTION, COPY, MODES, Mode
from attnorm.benchmark.results import BenchReport, Cell
from attnorm.reports.figures import save_figure
from attnorm.reports.paper import TABLE_5
from attnorm.reports.render import NOT_RUN, Document, Section, Table, write_document
from attnorm.system.files import write_json

WHAT: dict[Mode, str] = {"forward": "evaluation, no gradients", "training": "forward and backward"}


def write_report(report: BenchReport, out: Path) -> list[Path]:
    """Writes bench.json, bench.md and time-against-pixels.png into `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "bench.json", dataclasses.asdict(report))
    written = write_document(make_document(report), out, "bench")
    return [out / "bench.json", *written, save_figure(pixels_figure(report), out / "time-against-pixels.png")]


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
    header = ("", *(f"{case.name} {_by(case.shape)}" for case in report.cases))
    out = []
    for (title, show), mode in itertools.product(kinds, MODES):
        rows = [
            (name, *(show(report.find(case.name, name, mode)) for case in report.cases))
            for name in report.implementations()
        ]
        # An implementation without an answer has no row in a table of a thing that only some have.
        rows = [row for row in rows if set(row[1:]) != {"-"}]
        if rows:
            out.append(Table(f"{mode[0].upper()}{mode[1:]} ({WHAT[mode]}): {title}", header, tuple(rows)))
    if any(case.name.startswith("table5-") for case in report.cases):
        out.append(table_5(report, "Table 5: ms at 1 x 32 channels; the paper's were on a 2080"))
    return out


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


def table_5(report: BenchReport | None, title: str) -> Table:
    """The paper's rows, each with ours below it on the same sizes, by the shape of a case and not by its name."""
    sizes = list(TABLE_5["AN"])
    names = report.implementations() if report else []
    ours = {"AN": [n for n in names if n.startswith("an-")], "Self-attention": [n for n in names if n == ATTENTION]}
    rows: list[tuple[str, ...]] = []
    reasons: list[str] = []
    for label, printed in TABLE_5.items():
        rows.append((label, "paper", *("-" if printed[size] is None else f"{printed[size]:.2f}" for size in sizes)))
        for implementation in ours[label]:
            assert report is not None
            found = {size: _cell_5(report, implementation, size) for size in sizes}
            rows.append((label, implementation, *map(_show_5, found.values())))
            reasons += [
                f"{implementation} at {size} x {size}: {cell.status}: {cell.reason}"
                for size, cell in found.items()
                if cell is not None and cell.median_ms is None
            ]
        if not ours[label]:
            rows.append((label, "here", *(NOT_RUN for _ in sizes)))
    header = ("Module", "implementation", *(f"{size} x {size}" for size in sizes))
    return Table(title, header, tuple(rows), tuple(reasons))


def _cell_5(report: BenchReport, implementation: str, size: int) -> Cell | None:
    names = [case.name for case in report.cases if case.shape == (1, 32, size, size)]
    return next((cell for name in names if (cell := report.find(name, implementation, "forward")) is not None), None)


def _show_5(cell: Cell | None) -> str:
    if cell is None:
        return NOT_RUN
    if cell.median_ms is None:
        return cell.status
    return f"{cell.median_ms:,.0f}" if cell.median_ms >= 100 else f"{cell.median_ms:.3g}"


def make_document(report: BenchReport) -> Document:
    """The whole report."""
    environment = report.environment
    variables = json.dumps(environment["variables"])
    about = Section(
        "",
        (
            f"{environment['device_name']}, {environment['threads']} threads, {environment['precision']}; attnorm "
            f"{environment['attnorm']}, torch {environment['torch']}, triton {environment['triton'] or 'absent'}, "
            f"Python {environment['python']}, {environment['platform']}; commit "
            f"{environment['commit'][:7] or 'unknown'}, {environment['date'] or 'no date'}.",
            f"Cache: {environment['cache']}.",
            f"Memory is {'kept in the process (mallopt)' if environment['retain_memory'] else 'left to the allocator'};"
            f" variables: {variables}, preloaded: {', '.join(environment['preloaded']) or 'nothing'}.",
            f"A copy moves {environment['roofline']['bytes_per_second'] / 1e9:.4g} GB/s here, a matrix product makes "
            f"{environment['roofline']['operations_per_second'] / 1e12:.3g} TFLOP/s{_own_copies(report)}.",
            f"Load average before and after: {environment['load_averages']}.",
        ),
        points=tuple(disturbances(report)),
    )
    checked = {(c.case, c.implementation): c for c in report.cells if None not in (c.output_error, c.gradient_error)}
    errors = tuple(
        (c.case, c.implementation, _by(c.checked_shape or ()), f"{c.output_error:.1e}", f"{c.gradient_error:.1e}")
        for c in checked.values()
    )
    allowed = " and ".join(f"{tolerance:g}" for tolerance in environment["tolerances"])
    title = f"Relative error against the reference in float64 (allowed: {allowed})"
    header = ("case", "implementation", "compared on", "output", "gradients")
    without = tuple(
        f"{c.case}, {c.implementation}, {c.mode}: {c.status}: {c.reason}" for c in report.cells if c.median_ms is None
    )
    sections = [
        about,
        *(Section(table.title, tables=(dataclasses.replace(table, title=""),)) for table in tables(report)),
    ]
    sections.append(Section(title, tables=(Table("", header, errors),)))
    if without:
        sections.append(Section("Without a time", points=without))
    return Document("attnorm bench layer", tuple(sections))


def _own_copies(report: BenchReport) -> str:
    """Where maps fit a cache, what a copy of the case's own size moves is what its share of the roofline is of."""
    own = report.environment["roofline"].get("bytes_per_second_by_case", {})
    texts = [f"{name} {value / 1e9:.4g}" for name, value in own.items()]
    return f"; copies of the cases' own sizes, where faster, {', '.join(texts)} GB/s" if texts else ""


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
        if mode == "forward" and any(case.name.startswith("table5-") for case in report.cases):
            for (name, times), marker in zip(TABLE_5.items(), ("s:", "^:"), strict=True):
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
