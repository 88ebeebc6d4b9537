"""A page that fills holes in the browser: one HTML file with the exported inpainter and onnxruntime-web inside.

It needs no server and asks nobody for anything: its content security policy allows no connection at all.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import tempfile
from importlib import resources
from pathlib import Path

from attnorm.export import ExportError, export
from attnorm.models.inpainting import InpaintingGenerator
from attnorm.registry import Loaded
from attnorm.system.files import write_text

RUNTIME = Path("node_modules", "onnxruntime-web")  # where npm puts it
RUNTIME_FILES = {"runtime": "ort.wasm.bundle.min.mjs", "wasm": "ort-wasm-simd-threaded.wasm"}


def find_runtime(folder: Path | None = None) -> Path:
    """The folder of the npm package onnxruntime-web: `folder`, or that of this directory or of one above it.

    Raises:
        ExportError: it is not there, or has not the files that are needed.
    """
    here = Path.cwd()
    places = [folder] if folder else [place / RUNTIME for place in (here, *here.parents)]
    for place in places:
        if all((place / "dist" / file).is_file() for file in RUNTIME_FILES.values()):
            return place
    raise ExportError(
        f"there is no onnxruntime-web with dist/{RUNTIME_FILES['runtime']} in {folder or RUNTIME}: "
        "npm install onnxruntime-web, in this folder, or name its folder by --onnxruntime-web"
    )


def write_page(loaded: Loaded, out: Path, runtime: Path | None = None) -> float:
    """Writes the page as `out`, and returns how far the exported file's pictures are from the network's, at most.

    Args:
        loaded: An inpainter, from `attnorm.load`.
        out: The file, by custom .html.
        runtime: The folder of the npm package onnxruntime-web; `find_runtime` looks for it.

    Raises:
        ExportError: it is no inpainter, there is no onnxruntime-web, or what `export` raises.
    """
    if not isinstance(loaded.model, InpaintingGenerator):
        raise ExportError(f"{loaded.path} was trained for {loaded.header.config.task}; the page needs an inpainter")
    runtime = find_runtime(runtime)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model.onnx")
        difference = export(loaded, model)
        write_text(out, make_page(model, runtime, title=loaded.path.stem))
    return difference


def make_page(model: Path, runtime: Path, title: str) -> str:
    """The page of an exported inpainter; what it does with pixels and masks is as the metadata of `model` says."""
    import onnx

    known = onnx.load(model, load_external_data=False).metadata_props
    package = json.loads((runtime / "package.json").read_text(encoding="utf-8"))
    parts = {
        "title": html.escape(title),
        "version": html.escape(package["version"]),
        "metadata": json.dumps({entry.key: entry.value for entry in known}).replace("<", "\\u003c"),
        "model": _packed(model),
        **{name: _packed(runtime / "dist" / file) for name, file in RUNTIME_FILES.items()},
        **{name.replace(".", "_"): _own(name) for name in ("page.css", "page.js", "worker.js")},
    }
    page = _own("page.html")
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    return page


def _own(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _packed(path: Path) -> str:
    return base64.b64encode(gzip.compress(path.read_bytes(), 6, mtime=0)).decode()
