"""A wheel brings the C operator compiled, one for all Pythons, and it computes the layer without a compiler."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from attnorm.ops import native

ROOT = Path(__file__).parents[2]
COMPILERS = ("cc", "gcc", "clang")

FIRST_EXAMPLE = """
import sys, torch
from attnorm import AttentiveNorm2d
from attnorm.ops import native
assert native.__file__.startswith(sys.argv[1]), native.__file__
assert not native._libraries  # importing it has not looked for one
torch.manual_seed(0)
x = torch.randn(2, 24, 9, 7)
layers = {impl: AttentiveNorm2d(24, 5, impl=impl) for impl in ("native", "fused")}
torch.nn.init.constant_(layers["native"].rho, 0.7)
layers["fused"].load_state_dict(layers["native"].state_dict())
y, expected = (layer(x, generator=torch.Generator().manual_seed(1)) for layer in layers.values())
torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
print(torch.backends.cpu.get_cpu_capability(), [path._name for path in native._libraries.values()])
"""


def test_setup_compiles_as_the_package_does() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text())
    found = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert found["FLAGS"] == native._FLAGS and found["LIBRARIES"] == native._LIBRARIES


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C compiler on this machine")
@pytest.mark.skipif(
    int(importlib.metadata.version("setuptools").split(".")[0]) < 77, reason="setuptools 77 is not installed"
)
def test_an_installed_wheel_runs_the_operator_where_there_is_no_compiler(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves folders behind
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    quick = tmp_path / "quick-cc"  # in a third of the time; native.c's branches are those of the processor's level
    quick.write_text(f'#!/bin/sh\nexec {next(filter(shutil.which, COMPILERS))} "$@" -O1\n')
    quick.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": ""}
    build = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('..')"]  # as pip calls it
    subprocess.run(build, check=True, capture_output=True, env=environment | {"CC": str(quick)}, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(installed)
    levels = sorted(path.stem for path in (installed / "attnorm" / "ops").glob("native-*.so"))
    environment |= {"PYTHONPATH": str(installed), "PATH": "", "ATTNORM_CACHE": str(tmp_path / "cache")}
    # A level that this machine has not, torch itself would take and end the process.
    own = torch.backends.cpu.get_cpu_capability().lower()
    for capability in {"default", own} if len(levels) > 1 and own in ("avx2", "avx512") else ("default",):
        limited = {**environment, "ATEN_CPU_CAPABILITY": capability}
        said = subprocess.run(
            [sys.executable, "-c", FIRST_EXAMPLE, str(installed)],
            check=True, capture_output=True, text=True, env=limited, cwd=tmp_path,
        ).stdout  # fmt: skip
        chosen = said.split()[0].lower()
        assert f"native-{chosen}.so" in said
    assert not (tmp_path / "cache").exists()
