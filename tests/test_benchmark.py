"""The benchmark: nothing wrong gets a time, what is counted is counted exactly, and what is said follows from it."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import attnorm.ops.attentive_norm as operation
from attnorm import cli
from attnorm.benchmark import cases, checks, timing
from attnorm.benchmark import run as bench_run
from attnorm.benchmark.cases import (
    CASES,
    CONV_INSTANCE_NORM,
    IMPLEMENTATIONS,
    MODES,
    NUM_ENTITIES,
    USUAL,
    Case,
    Implementation,
    Mode,
    find_named,
)
from attnorm.benchmark.results import BenchReport, Cell, read_results, with_ratios
from attnorm.checkpoint import CheckpointError
from attnorm.config import ConfigError
from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.reports import benchmark as reports
from attnorm.reports.paper import TABLE_5
from attnorm.reports.render import to_markdown

BY_NAME = {implementation.name: implementation for implementation in IMPLEMENTATIONS}
FUSED = BY_NAME["an-fused"]
ENVIRONMENT: dict[str, Any] = {
    **{"device_name": "an abacus", "threads": 1, "dtype": "float32", "precision": "float32", "platform": "wood"},
    **{"attnorm": "0", "commit": "0123456789", "torch": "2", "triton": None, "python": "3", "cache": "none"},
    **{"date": "2026-01-01T00:00:00+00:00", "load_averages": [0.5, 0.25], "tolerances": (1e-5, 1e-4)},
    **{"retain_memory": False, "variables": {}, "preloaded": []},
    "roofline": {"bytes_per_second": 2e9, "operations_per_second": 3e12},
}


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the benchmark has no Triton kernels: interpreted they take minutes, and tests/ops holds them."""
    unsupported_reason = operation.unsupported_reason

    def without(impl: str, device: torch.device, *kind: Any) -> str | None:
        if impl == "triton" and device.type != "cuda":
            return f"x is on {device}; it runs on CUDA devices"
        return unsupported_reason(impl, device, *kind)

    monkeypatch.setattr(operation, "unsupported_reason", without)


@pytest.fixture(autouse=True)
def _known_roofline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring it takes seconds: once is enough."""
    if request.function is not test_the_command_writes_all_of_it:
        monkeypatch.setattr(bench_run, "measure_roofline", lambda *_: dict(ENVIRONMENT["roofline"]))


def measured(case: str, implementation: str, mode: Mode, median: float, **values: Any) -> Cell:
    between = {"p20_ms": 0.5 * median, "p80_ms": 3 * median, "repeats": 5, "peak_bytes": 4096, "beyond_bytes": 2048}
    return Cell(case, implementation, mode, "measured", median_ms=median, **between | values)


def report_of(times: dict[str, Callable[[int], float]]) -> BenchReport:
    """Table 5's sizes with invented times, of P pixels."""
    cases = tuple(case for case in CASES if case.name.startswith("table5-") or case.name == "gan-16")
    cells = [
        measured(case.name, name, mode, time(case.shape[2] * case.shape[3]))
        for case, mode, (name, time) in itertools.product(cases, MODES, times.items())
    ]
    return BenchReport(environment=ENVIRONMENT, cases=cases, cells=with_ratios(cells))


# The gate


NOT_COMPILED = [implementation for implementation in IMPLEMENTATIONS if not implementation.is_compiled]


def checked(shape: tuple[int, ...], **options: Any) -> Iterator[tuple[Implementation, checks.Correctness]]:
    """Every implementation that runs here; one for another device says so."""
    for implementation in NOT_COMPILED:
        try:
            yield implementation, checks.check(implementation, shape, **options)
        except ValueError as error:
            assert "cannot run" in str(error)


@pytest.mark.parametrize("case", ["smoke", "table5-128", "small", "gan-16", "wide"])  # each number of channels
def test_every_implementation_is_right_on_every_case(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small crop of the case's own batch and channels."""
    (shape,) = (known.shape for known in CASES if known.name == case)
    monkeypatch.setitem(checks.LARGEST_CHECKED_BYTES, "cpu", 8 * 2**20)
    for implementation, found in checked(shape):
        assert found.complaint("float32") == "" and found.shape[:2] == shape[:2]
        assert (found.output > 0) == (implementation.name != "copy")


def test_the_plain_form_is_one_graph_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for inductor but not compiled, which takes half a minute and is checked at every run of the benchmark.
    A break in the graph would be an error.
    """
    monkeypatch.setattr(cases, "why_not_compiled", lambda: "")
    original = nn.Module.compile

    def traced(self: nn.Module, **settings: Any) -> None:
        assert settings.pop("options")["fallback_random"] and settings == {"fullgraph": True, "dynamic": False}
        original(self, **settings, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", traced)
    report = bench_run.run(cases="smoke", implementations="copy,an-inductor", device="cpu", seconds=1e-3)
    for mode in MODES:
        cell = report.find("smoke", "an-inductor", mode)
        assert cell is not None and cell.status == "measured" and (cell.output_error or 1) < 1e-5
        assert cell.compile_seconds
        copied = report.find("smoke", "copy", mode)
        assert copied is not None and copied.compile_seconds is None


def test_without_a_compiler_inductor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config as compiler  # takes seconds

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with compiler.patch({"cpp.cxx": ("/nowhere/g++",)}):  # monkeypatch would leave it without any
        report = bench_run.run(cases="smoke", implementations="an-inductor", device="cpu", seconds=1e-3)
    assert [cell.status for cell in report.cells] == ["missing", "missing"]
    assert re.search(r"an-inductor cannot run: No working C\+\+ compiler.*/nowhere/g\+\+.*CXX", report.cells[0].reason)


def test_low_precision_is_within_its_own_tolerance_and_not_within_float32s() -> None:
    for implementation, found in checked((2, 16, 12, 12), dtype=torch.bfloat16):
        assert found.complaint("bfloat16") == ""
        assert bool(found.complaint("float32")) == (implementation.name != "copy")


def test_larger_cases_are_checked_on_a_crop_that_says_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks.LARGEST_CHECKED_BYTES, "cpu", 8 * NUM_ENTITIES * 4 * 12 * 10)
    assert checks.check(FUSED, (1, 4, 12, 10)).shape == (1, 4, 12, 10)
    assert checks.check(FUSED, (1, 4, 24, 20)).shape == (1, 4, 12, 10)
    assert checks.check(FUSED, (1, 4, 24, 22)).shape == (1, 4, 6, 6)


def without_gradient_of_t(layer: AttentiveNorm2d, x: Tensor, original: Callable[..., Tensor]) -> Tensor:
    """t comes out right and gets no gradient."""
    if not layer.training:
        return original(layer, x)
    with torch.no_grad():
        kept = layer.t.clone()
    del layer._parameters["t"]
    layer.t = kept
    out = original(layer, x)
    del layer.t
    layer.t = nn.Parameter(kept)
    return out


def raising(error: Exception) -> Callable[..., Tensor]:
    def fail(*_: object) -> Tensor:
        raise error

    return fail


@pytest.mark.parametrize(
    ("defect", "status", "reason"),
    [
        (
            lambda layer, x, original: original(layer, x) * 1.01,
            "failed",
            r"the output is off by 1\.0e-02, more than 1e-05",
        ),
        (without_gradient_of_t, "failed", r"the gradient of t is off by 1\.0e\+00, more than 0\.0001"),
        (lambda layer, x, original: original(layer, x) * math.nan, "failed", "the output is off by nan"),
        (raising(RuntimeError("no such kernel image\nand more")), "failed", "RuntimeError: no such kernel image$"),
        (raising(ValueError("it cannot run: it is Tuesday")), "missing", "it cannot run: it is Tuesday"),
    ],
    ids=["output", "gradient", "nan", "broken", "unable"],
)
def test_what_is_wrong_gets_no_time(
    monkeypatch: pytest.MonkeyPatch, defect: Callable[..., Tensor], status: str, reason: str
) -> None:
    original = AttentiveNorm2d.forward

    def forward(self: AttentiveNorm2d, x: Tensor) -> Any:
        return defect(self, x, original) if self.impl == "fused" else original(self, x)

    monkeypatch.setattr(AttentiveNorm2d, "forward", forward)
    report = bench_run.run(cases="smoke", implementations="copy,an-reference,an-fused", device="cpu", seconds=1e-3)
    for mode in MODES:
        cell = report.find("smoke", "an-fused", mode)
        assert cell is not None and cell.status == status and re.search(reason, cell.reason)
        assert cell.median_ms is None and cell.ratio_to_copy is None and cell.peak_bytes is None and cell.repeats == 0
        for other in ("copy", "an-reference"):
            cell = report.find("smoke", other, mode)
            assert cell is not None and cell.status == "measured" and cell.median_ms
    text = to_markdown(reports.make_document(report))
    assert f"- smoke, an-fused, training: {status}: " in text and f"| {status} |" in text


# Memory and operations


def test_peak_bytes_are_exact() -> None:
    def known() -> None:
        first = torch.empty(1000)  # 4000
        second = torch.empty(500, dtype=torch.float64)  # 8000, the peak but for what comes
        del first  # 4000
        third = torch.empty(2001)  # 12004
        del second, third

    assert [timing.peak_bytes(known) for _ in range(3)] == [12004] * 3
    assert timing.peak_bytes(lambda: None) == 0


@pytest.mark.parametrize(("impl", "least", "most"), [("reference", 60, 200), ("fused", 4, 9)])
def test_the_reference_needs_the_n_fold_tensor_and_the_fused_one_does_not(impl: str, least: float, most: float) -> None:
    implementation = BY_NAME[f"an-{impl}"]
    x, gradient = checks.make_tensors((1, 32, 32, 32), torch.device("cpu"), torch.float32)
    runner = timing.Runner(implementation.build(32), [x], gradient, "training", torch.float32)
    peak = runner.prepare()
    assert runner.prepare() == peak
    assert least < peak / x.nbytes < most
    assert x.grad is None  # and nothing is left behind


def test_operations_are_those_of_the_matrix_products() -> None:
    a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7)
    assert timing.operations(lambda: a @ b) == 2 * 3 * 5 * 7
    assert timing.operations(lambda: (a @ b).sum().backward()) == 2 * (2 * 3 * 5 * 7)
    assert timing.operations(lambda: a + a) == 0
    convolution = nn.Conv2d(4, 6, 1, bias=False)
    assert timing.operations(lambda: convolution(torch.ones(2, 4, 8, 8))) == 2 * 4 * 6 * 2 * 8 * 8


def test_least_bytes_and_operations_are_those_of_the_formula() -> None:
    shape = (2, 32, 8, 8)
    assert timing.least_bytes(shape, "forward", 4) == 3 * 4 * 2 * 32 * 64
    assert timing.least_bytes(shape, "training", 2) == 8 * 2 * 2 * 32 * 64
    forward = 2 * (2 * 32 * 32 + 6 * 16 * 32)
    backward = 2 * 32 * 32 + 6 * 16 * 32 + 6 * 32 * 32 + 20 * 16 * 32
    assert timing.least_operations(shape, "forward") == 2 * 64 * forward
    assert timing.least_operations(shape, "training") == 2 * 64 * (forward + backward)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="mallinfo2 is of the GNU C library 2.33")
def test_retained_memory_is_kept_and_used_again() -> None:
    """By what the allocator says that it holds, which no other process changes. In a process of its own: the setting
    cannot be taken back."""
    program = """
import ctypes, torch
from attnorm.benchmark.timing import retain_memory
fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in fields]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
def held():  # bytes, after a block of 64 MiB was made and freed
    torch.ones(16 * 2**20)
    info = mallinfo()
    return info.arena + info.hblkhd
print(held(), held())
retain_memory()
print(*(held() for _ in range(40)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    left, *retained = (list(map(int, line.split())) for line in done.stdout.splitlines())
    assert left[0] == left[1] <= retained[0][0] - 64 * 2**20
    assert len(set(retained[0][20:])) == 1  # what was freed has holes of the right size by then: no more is taken


# What follows from the measurements


def test_ratios_are_those_of_the_medians() -> None:
    cells = [
        measured("a", "copy", "forward", 2.0, p20_ms=1.9, p80_ms=80.0),
        measured("a", "an-fused", "forward", 10.0, p20_ms=9.0, p80_ms=11.0),
        measured("a", CONV_INSTANCE_NORM, "forward", 4.0),
        measured("a", "an-fused", "training", 10.0),
        measured("b", "copy", "forward", 1.0),
        Cell(case="a", implementation="self_attention", mode="forward", status="missing", reason="too large"),
    ]
    found = with_ratios(cells)
    assert [cell.ratio_to_copy for cell in found] == [1.0, 5.0, 2.0, None, 1.0, None]
    assert [cell.ratio_to_conv_instance_norm for cell in found] == [0.5, 2.5, 1.0, None, None, None]
    assert [dataclasses.replace(cell, ratio_to_copy=None, ratio_to_conv_instance_norm=None) for cell in found] == cells


def test_a_machine_that_was_busy_is_noticed() -> None:
    times = {("a", "forward"): 2.0, ("a", "training"): 1.1, ("b", "forward"): 1.0, ("b", "training"): 2.1}
    cells = tuple(measured(case, "copy", mode, time) for (case, mode), time in times.items())  # type: ignore[arg-type]
    cases = (Case("a", (1, 1, 1, 1), ""), Case("b", (1, 1, 1, 2), ""))
    report = BenchReport(environment=ENVIRONMENT, cases=cases, cells=cells)
    (found,) = reports.disturbances(report)
    assert found.startswith("b: the same copy took 1 ms (forward) and 2.1 ms (training)")
    assert found in to_markdown(reports.make_document(report))
    brief = tuple(dataclasses.replace(cell, median_ms=(cell.median_ms or 0) / 100) for cell in cells)
    assert reports.disturbances(dataclasses.replace(report, cells=brief)) == []


def test_slopes_of_the_plot_are_those_of_the_powers() -> None:
    report = report_of({"an-fused": lambda p: 1e-5 * p, "self_attention": lambda p: 1e-10 * p**2})
    for mode in MODES:
        lines = reports.series(report, mode)
        assert [pixels for pixels, _ in lines["an-fused"]] == [n * n for n in (128, 256, 512, 1024)]  # and not gan-16
        assert reports.slope(lines["an-fused"]) == pytest.approx(1)
        assert reports.slope(lines["self_attention"]) == pytest.approx(2)
    # At the large end: what a start costs must not make the growth look slower.
    assert reports.slope([(1, 100.0), (100, 101.0), (400, 404.0)]) == pytest.approx(1)
    assert reports.slope([(400, 404.0), (100, 101.0), (1, 100.0)]) == pytest.approx(1)
    assert reports.slope([(64, 1.0)]) is None
    paper = TABLE_5["AN"]
    assert reports.slope([(size * size, ms) for size, ms in paper.items() if ms]) == pytest.approx(1.0, abs=0.01)
    labels = [line.get_label() for line in reports.pixels_figure(report).axes[1].lines]
    assert labels == ["an-fused, slope 1.00", "self_attention, slope 2.00"]


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = report_of({"copy": lambda p: 0.1, "an-fused": lambda p: 1e-5 * p})
    gone = Cell("gan-16", "x", "training", "failed", reason="off", checked_shape=(1, 2, 3, 4))
    report = dataclasses.replace(report, cells=(*report.cells, gone))
    files = reports.write_report(report, tmp_path / "new")
    assert [file.name for file in files] == ["bench.json", "bench.md", "time-against-pixels.png"]
    again = read_results(files[0])
    assert again == dataclasses.replace(report, environment=json.loads(json.dumps(ENVIRONMENT)))
    text = files[1].read_text(encoding="utf-8")
    assert to_markdown(reports.make_document(again)) == text == to_markdown(reports.make_document(report))


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    for text in ("", "{}", '{"format_version": 1}', '{"format_version": 99}'):
        (tmp_path / "bench.json").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"bench\.json"):
            read_results(tmp_path / "bench.json")


def test_tables_show_medians_ratios_memory_shares_and_the_paper() -> None:
    report = report_of({"copy": lambda p: 2.0, "an-fused": lambda p: p / 2**14 * 5, "self_attention": lambda p: 400.0})
    cells = list(report.cells)
    for i, cell in enumerate(cells):
        if cell.implementation == "an-fused":
            compiling = 1.26 if cell.mode == "training" else None
            cells[i] = dataclasses.replace(cell, fastest_ms=0.5, of_roofline=0.25, compile_seconds=compiling)
    time, _, memory, _, share, _, compiled, paper = reports.tables(dataclasses.replace(report, cells=tuple(cells)))
    assert time.header[:2] == ("", "table5-128 1x32x128x128")
    assert [row[:2] for row in time.rows] == [
        ("copy", "2 (1-6) 1x"),
        ("an-fused", "5 (0.5; 2.5-15) 2.5x"),
        ("self_attention", "400 (200-1.2e+03) 200x"),
    ]
    assert [row[1] for row in memory.rows[:2]] == ["0.00, 0.00", f"{4096 / 2**21:.2f}, {2048 / 2**21:.2f}"]
    assert [row[:2] for row in share.rows] == [("an-fused", "0.250")]  # the others have none
    assert compiled.title.startswith("Training") and compiled.rows[0][:2] == ("an-fused", "1.3")
    assert paper.rows[0] == ("AN", "paper", "0.73", "2.24", "9.46", "37.68")
    assert paper.rows[1] == ("AN", "an-fused", "5", "20", "80", "320")
    assert paper.rows[2] == ("Self-attention", "paper", "5.21", "79.42", "-", "-")


def test_the_share_of_the_roofline_is_of_the_bytes_or_of_the_operations_whichever_take_longer() -> None:
    case = Case("any", (2, 32, 8, 8), "")
    slow_memory = {"bytes_per_second": 1e3, "operations_per_second": 1e30}
    assert timing.least_seconds(case, "forward", 4, slow_memory) == 3 * 4 * 2 * 32 * 64 / 1e3
    in_cache = slow_memory | {"bytes_per_second_by_case": {"any": 2e3, "other": 1e9}}
    assert timing.least_seconds(case, "training", 4, in_cache) == 8 * 4 * 2 * 32 * 64 / 2e3
    slow_products = {"bytes_per_second": 1e30, "operations_per_second": 1e3}
    operations = timing.least_operations(case.shape, "training")
    assert timing.least_seconds(case, "training", 4, slow_products) == operations / 1e3


def test_self_attention_is_left_out_where_it_cannot_be_borne() -> None:
    case = next(case for case in CASES if case.name == "table5-1024")
    device = torch.device("cpu")
    status, reason, checked = bench_run._gate(case, BY_NAME["self_attention"], device, torch.float32, "float32", {})
    assert (status, checked) == ("missing", None)
    assert "1.8e+13 operations" in reason and "1 TiB" in reason  # 2^20 x 2^18 scores of 4 bytes


def test_what_needs_more_memory_than_there_is_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run, "usable_memory", lambda device: 30 * 4 * 2 * 8 * 16 * 16)
    report = bench_run.run(cases="smoke", implementations="an-reference,an-fused", device="cpu", seconds=1e-3)
    cells = [report.find("smoke", name, "training") for name in ("an-reference", "an-fused")]
    assert [cell.status for cell in cells if cell] == ["missing", "measured"]
    assert cells[0] and re.fullmatch(r"needs about [\d.]+ MiB, more than the 480 KiB allowed here", cells[0].reason)


def test_every_implementation_has_its_turn_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []

    class Pretended:
        def __init__(self, number: int, cost: float) -> None:
            self.number, self.cost, self.spent, self.times, self.graphs = number, cost, 0.0, [], []

        def repeat(self) -> None:
            turns.append(self.number)
            self.spent += self.cost
            self.times.append(self.cost)

        def clear(self) -> None:
            pass

    done: list[int] = []
    runners: Any = [Pretended(0, 1.0), Pretended(1, 10.0)]
    timing.time_in_turn(runners, 5.0, lambda: done.append(turns[-1]))
    assert turns == [0, 1, 0, 1, 0, 1, 0, 0]  # the slow one is repeated three times all the same
    assert done == [1, 0]


# The command


def test_the_command_writes_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    names = [implementation.name for implementation in NOT_COMPILED]
    arguments = ["--cases", "smoke", "--seconds", "0.01", "--device", "cpu", "--implementations", ",".join(names)]
    cli.main(["bench", "layer", *arguments, "--out", str(out)])
    said = capsys.readouterr()
    assert said.out.splitlines()[-3:] == [str(out / n) for n in ("bench.json", "bench.md", "time-against-pixels.png")]
    assert "smoke" in said.out and "2x8x16x16" in said.out and "an-fused" in said.out
    report = read_results(out / "bench.json")
    assert [(cell.mode, cell.implementation) for cell in report.cells] == list(itertools.product(MODES, names))
    for cell in report.cells:
        assert cell.status == "measured" or (cell.status == "missing" and "cannot run" in cell.reason), cell
        if cell.status == "measured":
            assert 0 < (cell.fastest_ms or 0) <= (cell.p20_ms or 0) <= (cell.median_ms or 0) <= (cell.p80_ms or 0)
            assert cell.repeats >= timing.FEWEST_REPEATS and cell.checked_shape == (2, 8, 16, 16)
            copied = report.find(cell.case, "copy", cell.mode)
            assert copied is not None and copied.median_ms is not None
            assert cell.ratio_to_copy == pytest.approx((cell.median_ms or 0) / copied.median_ms)
            assert (cell.of_roofline is not None) == cell.implementation.startswith("an-")
    environment = report.environment
    assert environment["torch"] == torch.__version__ and environment["device"] == "cpu" and environment["threads"] == 1
    roofline = environment["roofline"]
    assert roofline["bytes_per_second_by_case"]["smoke"] >= roofline["bytes_per_second"] > 1e8
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert environment["commit"].removesuffix("-dirty") == head.stdout.strip()  # nothing where it is no checkout
    assert len(environment["load_averages"]) == 2
    with Image.open(out / "time-against-pixels.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 1


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ("--cases smoke,wid", "did you mean wide?"),
        ("--cases ,", "no case was named"),
        ("--cases smoke --implementations an-fast", "there is no implementation 'an-fast'; did you mean an-fused?"),
        ("--seconds nan", "expected more than 0"),
        ("--threads -1", "0 or more"),
        ("--tf32 --device cpu", "--tf32 is for float32 on CUDA"),
        ("--preset small32-an --set run.batch_size=4", "bench layer has no --preset, --set"),
    ],
)
def test_a_mistake_ends_with_status_2_and_leaves_nothing(
    tmp_path: Path, refused: Callable[..., str], arguments: str, remedy: str
) -> None:
    assert remedy in refused(["bench", "layer", "--out", tmp_path / "out", *arguments.split()])
    assert not any(tmp_path.iterdir())


def test_a_step_is_refused_what_only_the_layer_has(tmp_path: Path, refused: Callable[..., str]) -> None:
    train = ["bench", "train", "--out", tmp_path / "out"]
    assert "bench train has no --dtype, --tf32" in refused([*train, "--dtype", "bfloat16", "--tf32"])
    assert "expected more than 0" in refused([*train, "--seconds", "nan"])
    assert not any(tmp_path.iterdir())


def test_an_occupied_folder_is_refused_at_once(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(bench_run, "run", lambda **_: pytest.fail("it was run"))
    message = "already there; choose another --out, or say --overwrite"
    assert message in refused(["bench", "layer", "--out", tmp_path])
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_groups_of_names_stand_for_their_members() -> None:
    assert [case.name for case in find_named("case", "gan, smoke", CASES)] == ["smoke", "gan-16", "gan-64"]
    with pytest.raises(ConfigError, match="no case 'table'"):
        find_named("case", "table", CASES)
    assert set(USUAL["cpu"].split(",")) < {case.name for case in CASES}
    sizes = [case.shape for case in CASES if case.name.startswith("table5-")]
    assert sizes == [(1, 32, size, size) for size in TABLE_5["AN"]]
