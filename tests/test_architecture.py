"""Which part may import which, what `import attnorm` costs, and that nothing is ever unpickled."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "attnorm"

# config <- system <- ops <- layers <- models <- run_directory <- {training, inference} <- {evaluation, figures} <-
# {cli, studio}; `checkpoint` and `data` rest on system, `presets` on config alone. Parts in one pair of braces do not
# see each other; a page shows figures and scores, so it is above these. Only evaluation sees a sibling: benchmark.
_MODELS = {"config", "system", "ops", "layers", "models"}
_TRAINED = _MODELS | {"checkpoint", "run_directory", "data", "presets"}
_USED = _TRAINED | {"training", "inference", "metrics"}
_SHOWN = _USED | {"evaluation", "figures", "benchmark"}
_TOP = _SHOWN | {"experiments", "page", "report"}
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "system": {"config"},  # whose errors it raises
    "ops": {"config", "system"},
    "layers": {"config", "system", "ops"},
    "models": {"config", "system", "ops", "layers"},
    "data": {"config", "system"},
    "metrics": {"config", "system"},
    "presets": {"config"},
    "checkpoint": {"config", "system"},
    "run_directory": _MODELS | {"checkpoint"},  # the generator is rebuilt from what lies there
    "training": _TRAINED,
    "inference": _TRAINED,
    "evaluation": _USED | {"benchmark"},  # what a network costs is one of its scores
    "figures": _USED,
    "benchmark": _USED,
    "experiments": _SHOWN,
    "page": _SHOWN,
    "report": _SHOWN | {"page"},  # draws figures beside evaluation's tables, in the page's style
    "studio": _TOP,
    "cli": _TOP | {"studio"},  # one of its verbs starts the studio
    "__main__": {"cli"},
}
# The package's own file is the list of public names; it is above everything, so nothing below may use it but for these.
FACADE = "__init__"
OF_THE_FACADE = {"__version__"}


def part_of(path: Path, source: Path) -> str:
    """The top-level part that a file belongs to: "ops" for ops/dispatch.py, "config" for config.py."""
    return path.relative_to(source).parts[0].removesuffix(".py")


def imports_of(path: Path, source: Path) -> Iterator[tuple[int, str]]:
    """(line, part) for every import of the package by a file, at its top or inside a function."""
    package = ("attnorm", *path.relative_to(source).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = list(package[: len(package) - node.level + 1]) if node.level else []
            names = [above + (node.module.split(".") if node.module else []) + [alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "attnorm":
                yield node.lineno, name[1] if len(name) > 1 else FACADE


def violations(source: Path) -> list[str]:
    found = []
    known = set(MAY_IMPORT) | {FACADE}
    for path in sorted(source.rglob("*.py")):
        part = part_of(path, source)
        where = path.relative_to(source)
        if part not in known:
            found.append(f"{where}: {part!r} has no place in the layers; give it one in MAY_IMPORT, with the reason")
            continue
        if part == FACADE:
            continue
        for line, imported in imports_of(path, source):
            if imported in OF_THE_FACADE or imported in MAY_IMPORT[part] | {part}:
                continue
            if imported in MAY_IMPORT:
                found.append(f"{where}:{line}: {part} imports {imported}, which is not below it")
            else:
                found.append(f"{where}:{line}: {part} imports {imported!r} from the package's list of public names")
    return found


def test_imports_flow_one_way() -> None:
    assert len(list(SOURCE.rglob("*.py"))) > 10
    assert violations(SOURCE) == []


def test_the_rule_itself_has_no_cycles() -> None:
    left = dict(MAY_IMPORT)
    while left:
        free = [part for part, below in left.items() if not below & left.keys()]
        assert free, f"a cycle among {sorted(left)}"
        for part in free:
            del left[part]
    for first, second in (("training", "inference"), ("evaluation", "figures"), ("run_directory", "data")):
        assert second not in MAY_IMPORT[first] and first not in MAY_IMPORT[second]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.py", "from attnorm.system.files import a", "config imports system, which is not below it"),
        ("system/a.py", "from attnorm.ops import b", "system imports ops, which is not below it"),
        ("ops/a.py", "from attnorm.layers.b import c", "ops imports layers, which is not below it"),
        ("layers/a.py", "import attnorm.models.b as b", "layers imports models, which is not below it"),
        ("models/a.py", "from attnorm import checkpoint", "models imports checkpoint, which is not below it"),
        ("training/a.py", "def f():\n    from ..inference import g", "training imports inference"),
        ("inference.py", "from .training.trainer import train", "inference imports training"),
        ("checkpoint.py", "from attnorm import config, data", "checkpoint imports data"),
        ("data/a.py", "from attnorm.ops import b", "data imports ops"),
        ("presets.py", "if TYPE_CHECKING:\n    from attnorm.models.b import C", "presets imports models"),
        ("studio/app.py", "from attnorm.cli import main", "studio imports cli"),
        ("layers/a.py", "from attnorm import AttentiveNorm2d", "imports 'AttentiveNorm2d' from the package's list"),
        ("cli.py", "import attnorm", "imports '__init__' from the package's list"),
        ("extra/a.py", "", "'extra' has no place in the layers; give it one in MAY_IMPORT"),
        ("utils.py", "", "'utils' has no place in the layers; give it one in MAY_IMPORT"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, text: str, message: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    (violation,) = violations(tmp_path)
    assert violation.startswith(file) and message in violation


def test_a_right_import_is_not_found(tmp_path: Path) -> None:
    for file, text in {
        "ops/a.py": "import torch\nfrom attnorm.config import Config\nfrom . import b\nfrom .b import c",
        "training/a.py": "from attnorm import __version__, config as configuration\nfrom attnorm.data.images import d",
        "cli.py": "def f():\n    from attnorm.studio.app import serve\n    from attnorm import inference",
        "__init__.py": "from attnorm.cli import main",
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    assert violations(tmp_path) == []


# What an import costs


def modules_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter that has run `code`."""
    program = textwrap.dedent(code) + "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_the_package_its_configuration_and_presets_need_the_standard_library_only() -> None:
    modules = modules_after("import attnorm, attnorm.config, attnorm.presets; attnorm.__version__; dir(attnorm)")
    assert "attnorm" in modules and not modules & {"torch", "numpy", "PIL", "tyro", "rich"}


def test_using_the_layer_imports_torch_and_nothing_heavier() -> None:
    modules = modules_after(
        "from attnorm import AttentiveNorm2d\nimport torch\nAttentiveNorm2d(4)(torch.ones(1, 4, 2, 2))"
    )
    assert "torch" in modules
    heavy = {"torchvision", "matplotlib", "tensorboard", "skimage", "PIL", "rich", "tyro", "gradio", "timm", "scipy"}
    assert not modules & (heavy | {"torch_fidelity", "safetensors", "triton", "onnx", "fastapi"})


def test_every_public_name_can_be_imported_and_an_unknown_one_is_told_the_names() -> None:
    import attnorm

    for name in attnorm.__all__:
        assert getattr(attnorm, name) is not None
    assert set(dir(attnorm)) == set(attnorm.__all__)
    with pytest.raises(
        AttributeError, match=r"module 'attnorm' has no attribute 'AttentiveNorm'; it has .*AttentiveNorm2d"
    ):
        attnorm.AttentiveNorm  # noqa: B018


# No pickle

PICKLING_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "pickletools"}
PICKLING_CALLS = {("torch", "load"), ("torch", "save"), ("torch", "hub"), ("pd", "read_pickle")}
# Published weights come as such files: only here, and only with torch's restricted reader, which makes tensors.
MAY_READ_TENSORS = {"metrics/features.py"}


def is_restricted(call: ast.Call) -> bool:
    """Whether this is torch.load(..., weights_only=True)."""
    values = [keyword.value for keyword in call.keywords if keyword.arg == "weights_only"]
    return ast.unparse(call.func) == "torch.load" and [ast.unparse(value) for value in values] == ["True"]


def pickling(text: str, *, may_read_tensors: bool = False) -> list[str]:
    """What in a file could read or write a pickle."""
    found = []
    tree = ast.parse(text)
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    allowed = {id(call.func) for call in calls if is_restricted(call)} if may_read_tensors else set()
    for node in ast.walk(tree):
        if id(node) in allowed:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLING_MODULES]
            found += [alias.name for alias in node.names if alias.name == "torch.serialization"]
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.partition(".")[0] in PICKLING_MODULES or node.module == "torch.serialization":
                found.append(node.module)
            found += [
                f"{node.module}.{alias.name}" for alias in node.names if (node.module, alias.name) in PICKLING_CALLS
            ]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in PICKLING_CALLS:
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            is_off = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if is_off else ["allow_pickle"]
    return found


def is_allowed(path: Path) -> bool:
    return path.relative_to(SOURCE).as_posix() in MAY_READ_TENSORS


def test_nothing_is_pickled_or_unpickled() -> None:
    found = {
        str(path.relative_to(SOURCE)): what
        for path in sorted(SOURCE.rglob("*.py"))
        if (what := pickling(path.read_text(encoding="utf-8"), may_read_tensors=is_allowed(path)))
    }
    assert found == {}
    for path in SOURCE.rglob("*.py"):  # nor built from a name
        assert not re.search(r"__import__|import_module\(\s*[\"'](?!attnorm)", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('a')",
        "torch.save(a, b)",
        "from torch import load as read",
        "np.load('a', allow_pickle=True)",
        "np.load('a', allow_pickle=flag)",
        "from torch.serialization import load",
        "torch.load('a', weights_only=False)",
        "torch.load('a', weights_only=flag)",
        "torch.load('a', **{'weights_only': True})",
        "read = torch.load\nread('a', weights_only=True)",
        "f(torch.load, weights_only=True)",
        "torch.load('a', weights_only=True)\ntorch.load('b')",
    ],
)
def test_pickling_is_found(text: str) -> None:
    assert pickling(text)
    assert pickling(text, may_read_tensors=True)


def test_tensors_alone_may_be_read_where_published_weights_are_and_nowhere_else() -> None:
    text = "import torch\ntorch.load('a', map_location='cpu', weights_only=True)"
    assert pickling(text) == ["torch.load"]
    assert pickling(text, may_read_tensors=True) == []
    assert [path for path in SOURCE.rglob("*.py") if is_allowed(path)] == [SOURCE / "metrics" / "features.py"]


def test_safe_loading_is_not_found() -> None:
    assert not pickling("import safetensors.torch\nsafetensors.torch.load_file('a')\nnp.load('a', allow_pickle=False)")
