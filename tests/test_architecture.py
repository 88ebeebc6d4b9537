"""Which part may import which, what an import costs, and that nothing is ever unpickled."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import importlinter.cli
import pytest

import attnorm

ROOT = Path(__file__).parents[1]
SOURCES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "src" / "attnorm").rglob("*.py")}


def test_imports_flow_one_way_and_in_no_circle(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contracts are in pyproject.toml; a part that has no place in them fails, too."""
    monkeypatch.setattr("logging.config.dictConfig", lambda _: None)  # it would silence every logger there is
    failed = importlinter.cli.lint_imports(str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert not failed, capsys.readouterr().out
    for path, text in SOURCES.items():  # and the list of public names is above everything
        for names in re.findall(r"^ *from attnorm import (.+)", text, re.MULTILINE):
            assert not set(re.findall(r"\w+", names)) & set(attnorm.__all__[1:]), path
        assert not re.search(r"^ *import attnorm$", text, re.MULTILINE), path


def test_the_tree_in_contributing_has_every_file_and_no_other() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text[text.index("```\nsrc/attnorm/") :].split("```")[1]
    folders: list[str] = []
    listed = set()
    for indent, name in re.findall(r"^((?:  )+)(\S+)", tree, re.MULTILINE):
        del folders[len(indent) // 2 - 1 :]
        if name.endswith("/"):
            folders.append(name)
        elif name.endswith(".py"):
            listed.add("".join([*folders, name]))
    files = {path.relative_to(ROOT / "src" / "attnorm").as_posix() for path in SOURCES}
    assert listed == {file for file in files if not file.endswith("__init__.py")}


def modules_after(program: str) -> set[str]:
    """Top-level modules in a fresh interpreter that has run `program`."""
    program += "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_the_package_its_configuration_and_presets_need_the_standard_library_only() -> None:
    modules = modules_after("import attnorm, attnorm.settings, attnorm.presets; attnorm.__version__; dir(attnorm)")
    assert "attnorm" in modules and not modules & {"torch", "numpy", "PIL", "tyro", "rich"}


def test_using_the_layer_imports_torch_and_nothing_heavier() -> None:
    code = "from attnorm import AttentiveNorm2d\nimport torch\nAttentiveNorm2d(4)(torch.ones(1, 4, 2, 2))"
    modules = modules_after(code)
    heavy = {"torchvision", "matplotlib", "tensorboard", "skimage", "PIL", "rich", "tyro", "uvicorn", "timm", "scipy"}
    heavy |= {"torch_fidelity", "safetensors", "triton", "onnx", "fastapi"}
    assert "torch" in modules and not modules & heavy


def test_every_public_name_can_be_imported_and_an_unknown_one_is_told_the_names() -> None:
    for name in attnorm.__all__:
        assert getattr(attnorm, name) is not None
    assert set(dir(attnorm)) == set(attnorm.__all__)
    message = r"module 'attnorm' has no attribute 'AttentiveNorm'; it has .*AttentiveNorm2d"
    with pytest.raises(AttributeError, match=message):
        attnorm.AttentiveNorm  # type: ignore[attr-defined] # noqa: B018


def test_nothing_is_unpickled() -> None:
    """Ruff bans the modules and functions that pickle (TID251). Published weights alone are read by torch.load, whose
    restricted reader makes tensors; NumPy reads no objects; and nothing is imported by a name of somebody else's."""
    allowed = [
        f"{path.name}: {line.strip()}"
        for path, text in SOURCES.items()
        for line in text.splitlines()
        if "TID251" in line
    ]
    assert len(allowed) == 1 and re.match(r"published_weights\.py: .*torch\.load\(.*weights_only=True\)", allowed[0])
    for path, text in SOURCES.items():
        assert not re.search(r"__import__|import_module\(\s*[\"'](?!attnorm)|allow_pickle=(?!False)", text), path
