"""What the benchmark measured, as it is kept in bench.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from attnorm.benchmark.cases import CONV_INSTANCE_NORM, COPY, Case, Mode, Shape
from attnorm.checkpoint import CheckpointError

FORMAT_VERSION = 2
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


def read_results(path: Path) -> BenchReport:
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
