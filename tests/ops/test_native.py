"""How the CPU implementation is built by the machine's C compiler, and what is said where it cannot be."""

from __future__ import annotations

import shutil
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from attnorm.ops import native
from attnorm.ops.dispatch import Parameters

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")), reason="no C compiler on this machine"
)


def why(device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The reason why it cannot run, or nothing."""
    return native.unsupported_reason(torch.device(device), dtype, 1, 1, False) or ""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNORM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_it_cannot_run_on_is_said(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "float64" in why(dtype=torch.float64) and "meta" in why("meta")
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert "'no-such-compiler' is not found" in why()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(cache))
    assert "name one with CC" in why()
    (tmp_path / "file").touch()
    monkeypatch.setenv("CC", sys.executable)  # any program: the folder fails first
    monkeypatch.setenv("ATTNORM_CACHE", str(tmp_path / "file" / "cache"))
    assert "name another cache folder with ATTNORM_CACHE" in why()
    monkeypatch.setenv("ATTNORM_NATIVE", "0")
    assert "ATTNORM_NATIVE=0" in why()


def test_a_failed_build_gives_the_first_line_of_the_compilers_message(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text('#!/bin/sh\necho "native.c:1: error: no vectors here" >&2\necho "more" >&2\nexit 1\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(compiler))
    assert why().endswith("error: no vectors here")
    assert not list(cache.iterdir())
    zeros: Any = [torch.zeros(shape) for shape in ((1, 3, 2, 2), (1, 2, 3), (1, 2), (3, 3), (3,), (2, 3), (2, 3), ())]
    with pytest.raises(RuntimeError, match="no vectors here"):
        native.forward(zeros[0], Parameters(*zeros[1:]), 1e-5)


@needs_compiler
def test_it_is_built_once_and_again_where_it_is_damaged(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By any number of threads or processes, each of which writes a whole file. The compiler is one that is done at
    once: it hands out what the machine's has built.
    """
    monkeypatch.delenv("ATTNORM_CACHE")
    built = native._build_and_load("", str(native.default_cache_dir()))
    assert not isinstance(built, str)
    compiler, log = tmp_path / "quick-cc", tmp_path / "log"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit\necho >> {log}\n'
        f'while [ "$1" != -o ]; do shift; done\ncp {built._name} "$2"\n'
    )
    compiler.chmod(0o755)
    build = native._build_and_load.__wrapped__
    with ThreadPoolExecutor(2) as pool:
        assert not any(isinstance(made, str) for made in pool.map(build, [str(compiler)] * 2, [str(cache)] * 2))
    (file,) = cache.iterdir()  # no temporary file is left
    made, calls = file.stat().st_mtime_ns, log.read_text()
    assert not isinstance(build(str(compiler), str(cache)), str)
    assert (file.stat().st_mtime_ns, log.read_text()) == (made, calls)
    (tmp_path / "other").mkdir()  # of a file that this process has mapped it would not see the damage
    (tmp_path / "other" / file.name).write_bytes(b"damaged")
    assert not isinstance(build(str(compiler), str(tmp_path / "other")), str) and log.read_text() == calls + "\n"
