"""The whole benchmark: every implementation on every case, checked, then timed in turn."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnorm import __version__
from attnorm.benchmark.cases import (
    ATTENTION,
    CASES,
    IMPLEMENTATIONS,
    MODES,
    USUAL,
    Case,
    Implementation,
    Mode,
    attention_scores,
    find_named,
)
from attnorm.benchmark.checks import TOLERANCES, Correctness, Expected, build, check, make_tensors
from attnorm.benchmark.results import BenchReport, Cell, Status, with_ratios
from attnorm.benchmark.timing import (
    Runner,
    copy_bandwidth,
    least_seconds,
    measure_roofline,
    retain_memory,
    time_in_turn,
)
from attnorm.config import ConfigError
from attnorm.system.devices import find_device, temporary_tf32, usable_memory
from attnorm.system.provenance import commit, processor

Progress = Callable[[int, int, str], None]  # steps done, of how many, what comes next

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# Of self-attention's two products, forward: some 10 seconds on one CPU, one second on a GPU.
MOST_ATTENTION_OPERATIONS = {"cpu": 2e11, "cuda": 1e14}


def run(
    *,
    cases: str = "",
    implementations: str = "",
    device: str = "auto",
    dtype: str = "float32",
    tf32: bool = False,
    seconds: float = 1.0,
    threads: int = 0,
    retain: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> BenchReport:
    """Checks and times every implementation on every case, forward and training.

    Args:
        cases: Names, or groups of names ("table5"), comma between; "" for those that this device can bear.
        implementations: The same of IMPLEMENTATIONS; "an" means all of AN's.
        device: auto, cpu or cuda.
        dtype: float32, bfloat16 or float16: of the input; the weights stay in float32, under autocast.
        tf32: Let CUDA round the factors of float32 products to 10 bits.
        seconds: To spend on each cell, after its warm-up.
        threads: For torch on the CPU; 0 leaves them as they are.
        retain: `retain_memory` first.

    Raises:
        ConfigError: a name, device or number that cannot be meant.
    """
    found = find_device(device)
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"the device is {found}; the benchmark knows cpu and cuda: take --device cpu")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if not 0 < seconds < math.inf or threads < 0:
        raise ConfigError(f"--seconds is {seconds:g}, --threads {threads}; expected more than 0, and 0 or more")
    if retain and found.type != "cpu":
        raise ConfigError(f"--retain-memory is for the CPU; the device is {found}")
    if tf32 and (found.type != "cuda" or dtype != "float32"):
        raise ConfigError(f"--tf32 is for float32 on CUDA; got {dtype} on {found}")
    chosen_cases = find_named("case", cases or USUAL[found.type], CASES)
    every = ",".join(implementation.name for implementation in IMPLEMENTATIONS)
    chosen = find_named("implementation", implementations or every, IMPLEMENTATIONS)
    if retain:
        retain_memory()
    threads_before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    environment = _environment(found, dtype, tf32, seconds, retain)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(temporary_tf32(tf32))
            if found.type == "cuda":  # events are recorded on the current device
                stack.enter_context(torch.cuda.device(found))
            if any(implementation.is_compiled for implementation in chosen):
                from torch._dynamo import config as compiler

                # Every shape is compiled for itself, in either mode; the usual limit of 8 would end that with an error.
                stack.enter_context(compiler.patch(recompile_limit=16 * len(CASES)))
            environment["roofline"] = measure_roofline(found, DTYPES[dtype])
            bench = _Bench(chosen, found, DTYPES[dtype], environment, seconds, _Steps(progress, chosen_cases, chosen))
            cells = [cell for case in chosen_cases for cell in bench.measure(case)]
    finally:
        torch.set_num_threads(threads_before)
    environment["load_averages"].append(_load())
    return BenchReport(environment=environment, cases=chosen_cases, cells=with_ratios(cells))


class _Steps:
    """Counts what is done: a check, and a time in either mode, of every implementation on every case."""

    def __init__(self, progress: Progress, cases: Sequence[Case], implementations: Sequence[Implementation]) -> None:
        self.progress, self.done = progress, 0
        self.total = (1 + len(MODES)) * len(cases) * len(implementations)

    def say(self, what: str) -> None:
        self.progress(self.done, self.total, what)

    def advance(self) -> None:
        self.done += 1


@dataclass(frozen=True)
class _Bench:
    """What is the same for all cases."""

    implementations: Sequence[Implementation]
    device: torch.device
    dtype: torch.dtype
    environment: dict[str, Any]
    seconds: float
    steps: _Steps

    def measure(self, case: Case) -> list[Cell]:
        cells: list[Cell] = []
        ready: list[tuple[Implementation, Correctness]] = []
        known: dict[Any, Expected] = {}
        for implementation in self.implementations:
            self.steps.say(f"{case.name} {implementation.name}: checking")
            status, reason, correctness = _gate(
                case, implementation, self.device, self.dtype, self.environment["precision"], known
            )
            self.steps.advance()
            if status == "measured" and correctness is not None:
                ready.append((implementation, correctness))
                continue
            errors = {} if correctness is None else _errors(correctness)
            for mode in MODES:
                cells.append(Cell(case.name, implementation.name, mode, status, reason=reason, **errors))
                self.steps.advance()
        known.clear()
        x, gradient = make_tensors(case.shape, self.device, self.dtype)
        inputs = [x, *(x.detach().clone().requires_grad_() for _ in range(_copies(x) - 1))]
        if self.device.type == "cpu":  # a map that fits a cache is read from there: its own copy is the measure
            roofline = self.environment["roofline"]
            own = copy_bandwidth(torch.ones(case.shape, dtype=self.dtype))
            roofline.setdefault("bytes_per_second_by_case", {})[case.name] = max(own, roofline["bytes_per_second"])
        for mode in MODES:
            cells += self._time(case, mode, ready, inputs, gradient)
        order = [implementation.name for implementation in self.implementations]
        return sorted(cells, key=lambda cell: (MODES.index(cell.mode), order.index(cell.implementation)))

    def _time(
        self,
        case: Case,
        mode: Mode,
        ready: Sequence[tuple[Implementation, Correctness]],
        inputs: Sequence[Tensor],
        gradient: Tensor,
    ) -> Iterator[Cell]:
        """Warms up all that are right, then times them in turn."""
        runners: list[tuple[Implementation, Correctness, int, Runner]] = []
        for implementation, correctness in ready:
            name = implementation.name
            self.steps.say(f"{case.name} {name} {mode}")
            runner = Runner(build(implementation.build, case.shape[1], self.device), inputs, gradient, mode, self.dtype)
            try:
                reason = _lack_of_memory(case, implementation, mode, self.device, self.dtype)
                if not reason:
                    runners.append((implementation, correctness, runner.prepare(), runner))
            except torch.OutOfMemoryError as error:
                reason = f"out of memory: {str(error).splitlines()[0]}"
            runner.clear()
            if reason:
                yield Cell(case.name, name, mode, "missing", reason=reason, **_errors(correctness))
                self.steps.advance()
        self.steps.say(f"{case.name} {mode}: {len(runners)} in turn")
        time_in_turn([runner for *_, runner in runners], self.seconds, self.steps.advance)
        least = least_seconds(case, mode, inputs[0].element_size(), self.environment["roofline"])
        kept = inputs[0].nbytes * (1 if mode == "forward" else 2)  # output, and the input's gradient
        for implementation, correctness, peak, runner in runners:
            p20, median, p80 = (1e3 * np.quantile(runner.times, (0.2, 0.5, 0.8))).tolist()
            firsts = [runner.first_seconds]
            if correctness.shape == case.shape:  # then its check has compiled it
                firsts.append(correctness.first_seconds[mode])
            yield Cell(
                case.name,
                implementation.name,
                mode,
                "measured",
                **_errors(correctness),
                median_ms=median,
                p20_ms=p20,
                p80_ms=p80,
                fastest_ms=1e3 * min(runner.times),
                repeats=len(runner.times),
                peak_bytes=peak,
                beyond_bytes=max(peak - kept, 0),
                of_roofline=1e3 * least / median if implementation.name.startswith("an-") else None,
                compile_seconds=max(0.0, max(firsts) - median / 1e3) if implementation.is_compiled else None,
            )


def _errors(correctness: Correctness) -> dict[str, Any]:
    return {
        "checked_shape": correctness.shape,
        "output_error": correctness.output if math.isfinite(correctness.output) else None,  # JSON has no NaN
        "gradient_error": correctness.gradient if math.isfinite(correctness.gradient) else None,
    }


def _gate(
    case: Case,
    implementation: Implementation,
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    known: dict[Any, Expected],
) -> tuple[Status, str, Correctness | None]:
    """Whether a cell may be timed, or the reason why not."""
    if implementation.name == ATTENTION:
        scores = attention_scores(case.shape)
        cost = 4 * scores * (case.shape[1] // 2)
        if cost > MOST_ATTENTION_OPERATIONS[device.type]:
            reason = (
                f"{cost:.1e} operations forward, more than the {MOST_ATTENTION_OPERATIONS[device.type]:.0e} that are "
                f"borne here; its score matrix would have {_size(scores * torch.finfo(dtype).bits // 8)}"
            )
            return "missing", reason, None
    try:
        correctness = check(implementation, case.shape, device=device, dtype=dtype, known=known)
    except torch.OutOfMemoryError as error:
        return "missing", f"out of memory in its check: {str(error).splitlines()[0]}", None
    except ValueError as error:  # an implementation that cannot run here, with its reason
        return "missing", str(error), None
    except RuntimeError as error:
        return "failed", f"{type(error).__name__}: {str(error).splitlines()[0]}", None
    complaint = correctness.complaint(precision)
    if complaint:
        return "failed", complaint, correctness
    return "measured", "", correctness


def _lack_of_memory(
    case: Case, implementation: Implementation, mode: Mode, device: torch.device, dtype: torch.dtype
) -> str:
    """Why a cell cannot run, or "": its peak from that of a crop, as every implementation's memory is linear in pixels
    (attention's too, in the kernels that never build the score matrix).
    """
    n, c, h, w = case.shape
    crop = (n, c, min(h, 64), min(w, 64))
    x, gradient = make_tensors(crop, device, dtype)
    peak = Runner(build(implementation.sizing or implementation.build, c, device), [x], gradient, mode, dtype).prepare()
    needed, there = peak * h * w // (crop[2] * crop[3]), usable_memory(device)
    return f"needs about {_size(needed)}, more than the {_size(there)} allowed here" if needed > there else ""


def _copies(x: Tensor) -> int:
    """As many inputs as it takes for each to have left the GPU's cache before its next turn."""
    if x.device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    return max(1, min(256, math.ceil(2 * cache / x.nbytes)))


def _environment(device: torch.device, dtype: str, tf32: bool, seconds: float, retain: bool) -> dict[str, Any]:
    kept = ("MALLOC_", "PYTORCH_", "OMP_", "MKL_", "KMP_", "GOMP_")
    values: dict[str, Any] = {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "precision": "tf32" if tf32 else dtype,
        "tolerances": TOLERANCES["tf32" if tf32 else dtype],
        "seconds_a_cell": seconds,
        "attnorm": __version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_averages": [_load()],  # before and after
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "retain_memory": retain,
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(kept)},
        "preloaded": [Path(library).name for library in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()],
        "cache": "one input: what the processor's caches hold of it is read from there",
    }
    if device.type == "cuda":
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        values["cache"] = (
            f"inputs rotate over as many copies as fill the L2 cache of {_size(l2)} twice (256 at most), so the input "
            "comes from memory; outputs and temporaries may find their old places in the cache"
        )
    return values


def _load() -> float | None:
    """Processes that ran or waited for a core over the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB" if count < 1024 else f"{count / 1024:.3g} TiB"
