"""Where the fast implementations can run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnorm.ops.dispatch import Parameters

DEVICE = {"native": torch.device("cpu"), "triton": torch.device("cuda" if torch.cuda.is_available() else "cpu")}


def implementation(name: str) -> Any:
    """The module of "native" or "triton"; skips where it cannot run."""
    module = pytest.importorskip(f"attnorm.ops.{name}", reason=f"{name} is not installed", exc_type=ImportError)
    if reason := module.unsupported_reason(DEVICE[name], torch.float32, 16, 16, False):
        pytest.skip(f"{name}: {reason}")
    if name == "triton" and DEVICE[name].type == "cpu":
        shapes = ((1, 16, 16), (1, 16), (16, 16), (16,), (16, 16), (16, 16), ())
        try:
            module.forward(torch.ones(1, 16, 4, 4), Parameters(*map(torch.ones, shapes)), 1e-5)
        except pytest.importorskip("triton").runtime.errors.InterpreterError as error:
            # Triton 3.6's cannot index with numpy 2.4 or newer.
            pytest.skip(f"Triton's interpreter does not work beside this numpy, which says nothing of them: {error}")
    return module
