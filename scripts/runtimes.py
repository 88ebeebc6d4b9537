"""Whether one checkpoint makes the same pictures in four runtimes: torch, torch.export, onnxruntime, onnxruntime-web.

    npm install onnxruntime-web
    python scripts/runtimes.py --out docs/results/runtimes.md

The last one runs in a headless Chromium, as one thread of WebAssembly. Both shipped systems are exported, and the layer
alone, each once, with its sizes left free; then each file is run at sizes that it was not made from. The page is
written anew after each; what it was stopped before is not measured, and the same command goes on with it. The largest
photographs take minutes.
"""

from __future__ import annotations

import argparse
import http.server
import json
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from playwright.sync_api import Browser, Page, sync_playwright
from torch import Tensor, nn

from attnorm import AttentiveNorm2d, load
from attnorm.export import TOLERANCE, as_program
from attnorm.fill_page import find_runtime
from attnorm.system.files import write_text
from attnorm.system.provenance import commit, processor

SIDES = (64, 64), (65, 97), (101, 67), (131, 128), (199, 333), (257, 251), (317, 509), (513, 512), (641, 427)
SIDES += (767, 1023), (1361, 1024), (2048, 2047)
BATCHES = (1, 2, 3, 5, 7, 8, 11, 16, 21, 32, 49, 64)
PAGE = """<!doctype html><title>runtimes</title><script type="module">
import * as ort from "/ort.wasm.bundle.min.mjs";
ort.env.wasm.numThreads = 1;
const floats = async (name) => new Float32Array(await (await fetch(name, { cache: "no-store" })).arrayBuffer());
window.open_model = async () => { window.session = await ort.InferenceSession.create("/model.onnx"); };
window.run_model = async (inputs) => {
  const feeds = {};
  for (const [name, shape] of Object.entries(inputs)) {
    feeds[name] = new ort.Tensor("float32", await floats(`/${name}.bin`), shape);
  }
  const start = performance.now();
  const results = await window.session.run(feeds);
  const seconds = (performance.now() - start) / 1000;
  const found = window.session.outputNames.map((name) => results[name]);
  let path = "/found.bin";
  for (const { data } of found) {
    for (let at = 0; at < data.length; at += 2 ** 22) { // Playwright keeps each request's body in memory
      await fetch(path, { method: "POST", body: data.subarray(at, at + 2 ** 22) });
      path = "/more.bin";
    }
  }
  return { seconds, shapes: found.map(({ dims }) => dims) };
};
document.body.dataset.ready = "";
</script>"""

Run = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]  # all that a program gives


class LayerProgram(nn.Module):
    """AN alone: features [N, 8, H, W] -> the same, with every gate open."""

    inputs, outputs = ("x",), ("y",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = AttentiveNorm2d(8, num_entities=4).eval()
        nn.init.constant_(self.layer.rho, 0.7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y

    def example(self) -> tuple[Tensor, ...]:
        return (torch.randn(2, 8, 20, 24),)

    def dynamic_shapes(self) -> dict[str, Any]:
        return {"x": {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}}


def photograph(height: int, width: int) -> dict[str, Tensor]:
    """Noise with a hole of a quarter of it, which is harder to agree on than a photograph."""
    mask = torch.zeros(1, 1, height, width)
    mask[:, :, height // 4 : height // 4 * 3, width // 4 : width // 4 * 3] = 1
    return {
        "image": torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height)) * 2 - 1,
        "mask": mask,
    }


def latents(program: Any, num: int) -> dict[str, Tensor]:
    return dict(zip(program.inputs, program.example(num), strict=True))


def features(height: int, width: int) -> dict[str, Tensor]:
    return {"x": torch.randn(1, 8, height, width, generator=torch.Generator().manual_seed(height))}


@contextmanager
def serving(folder: Path, runtime: Path) -> Iterator[str]:
    """The address of a server, for this machine alone, of the page, the runtime and what lies in `folder`."""
    for file in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
        (folder / file).symlink_to((runtime / "dist" / file).resolve())
    (folder / "index.html").write_text(PAGE, encoding="utf-8")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def guess_type(self, path: Any) -> str:  # a module must be said to be JavaScript
            return {"html": "text/html", "mjs": "text/javascript"}.get(
                str(path).rsplit(".")[-1], "application/octet-stream"
            )

        def do_POST(self) -> None:
            with (folder / "found.bin").open("ab" if self.path == "/more.bin" else "wb") as file:
                file.write(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def exported(program: Any, folder: Path) -> tuple[Run, Run]:
    """Writes both files and opens them again: torch.export's, onnxruntime's."""
    program_of_torch = torch.export.export(program, program.example(), dynamic_shapes=program.dynamic_shapes())
    torch.export.save(program_of_torch, folder / "model.pt2")
    made = torch.onnx.export(
        program_of_torch,
        (),
        input_names=list(program.inputs),
        output_names=list(program.outputs),
        dynamo=True,
        verbose=False,
    )
    assert made is not None
    made.save(str(folder / "model.onnx"))
    module = torch.export.load(folder / "model.pt2").module()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return (
        lambda inputs: as_tuple(module(*inputs.values())),
        lambda inputs: tuple(
            map(torch.from_numpy, session.run(None, {name: part.numpy() for name, part in inputs.items()}))
        ),
    )


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest, over all outputs; NaN where one has it."""
    far = [(ours - theirs).abs().max() for ours, theirs in zip(found, expected, strict=True)]
    return torch.stack(far).max().item()


def in_browser(page: Page, folder: Path, inputs: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], float]:
    for name, part in inputs.items():
        part.numpy().tofile(folder / f"{name}.bin")
    said = page.evaluate("inputs => run_model(inputs)", {name: list(part.shape) for name, part in inputs.items()})
    values = torch.from_numpy(np.fromfile(folder / "found.bin", np.float32))
    parts = values.split([math.prod(shape) for shape in said["shapes"]])
    return tuple(part.reshape(shape) for part, shape in zip(parts, said["shapes"], strict=True)), said["seconds"]


def compare(
    program: Any, cases: dict[str, Callable[[], dict[str, Tensor]]], browser: Browser, runtime: Path
) -> Iterator[tuple[str, str]]:
    """Each case, and its line of the table."""
    with tempfile.TemporaryDirectory() as name, serving(Path(name), runtime) as address:
        others = exported(program, folder := Path(name))
        page = browser.new_page()
        page.set_default_timeout(0)
        page.goto(address)
        page.locator("body[data-ready]").wait_for(state="attached")
        page.evaluate("open_model()")
        for case, make in cases.items():
            inputs = make()
            start = time.perf_counter()
            expected = as_tuple(program(*inputs.values()))
            seconds = time.perf_counter() - start
            far = [difference(run(inputs), expected) for run in others]
            found, in_page = in_browser(page, folder, inputs)
            far.append(difference(found, expected))
            if not all(value <= TOLERANCE for value in far):
                raise SystemExit(f"{case}: {far} from torch's; expected at most {TOLERANCE:g}")
            line = f"| {case} | {' | '.join(f'{value:.1e}' for value in far)} | {seconds:.2f} s | {in_page:.2f} s |"
            print(line, flush=True)
            yield case, line
        page.close()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--onnxruntime-web", type=Path, help="its folder; by custom node_modules/onnxruntime-web")
    asked = parser.parse_args()
    runtime = find_runtime(asked.onnxruntime_web)
    generator, inpainter = (as_program(load(name).model) for name in ("cifar10-an", "buildings-an"))
    systems = {
        "Class-conditional generator": (
            generator,
            {f"{num} of 32x32": partial(latents, generator, num) for num in BATCHES},
        ),
        "The layer alone": (LayerProgram(), {f"{w}x{h}": partial(features, h, w) for h, w in SIDES}),
        "Inpainter": (inpainter, {f"{w}x{h}": partial(photograph, h, w) for h, w in SIDES}),
    }
    web = json.loads((runtime / "package.json").read_text(encoding="utf-8"))["version"]
    releases = [f"{name} {version(name)}" for name in ("torch", "onnx", "onnxruntime")] + [f"onnxruntime-web {web}"]
    lines: dict[str, dict[str, str]] = {title: {} for title in systems}
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        about = ", ".join([*releases, f"Chromium {browser.version}"]), processor(), torch.get_num_threads(), commit()
        introduction = INTRODUCTION.format(*about)
        if asked.out.exists() and (text := asked.out.read_text(encoding="utf-8")).startswith(introduction):
            lines = {title: measured(text, title, cases) for title, (_, cases) in systems.items()}
        for title, (program, cases) in systems.items():
            missing = {case: make for case, make in cases.items() if case not in lines[title]}
            for case, line in compare(program, missing, browser, runtime) if missing else ():
                lines[title][case] = line
                tables = [table(title, systems[title][1], lines[title]) for title in systems]
                write_text(asked.out, "\n".join([introduction, *tables]))


def measured(text: str, title: str, cases: Iterable[str]) -> dict[str, str]:
    """The lines of an earlier page's table that were measured."""
    rows = text.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines()
    found = {case: row for case in cases for row in rows if row.startswith(f"| {case} |")}
    return {case: row for case, row in found.items() if "not measured" not in row}


def table(title: str, cases: Iterable[str], lines: dict[str, str]) -> str:
    head = "| pictures | torch.export | onnxruntime | onnxruntime-web | torch takes | onnxruntime-web takes |"
    body = "\n".join(lines.get(case, f"| {case} | not measured | | | | |") for case in cases)
    return f"## {title}\n\n{head}\n|---|---|---|---|---|---|\n{body}\n"


INTRODUCTION = """# One checkpoint, four runtimes

How far pictures are from torch's, at most, over all their values (which are from -1 to 1); more than 1e-4 would be an
error. The files are those of `attnorm export`: cifar10-an, a generator; the layer alone, 8 channels and 4 entities, its
gate open; and buildings-an, an inpainter, given noise with a hole of a quarter of it. Each was exported once, at one
size.

`python scripts/runtimes.py --out docs/results/runtimes.md`, after `npm install onnxruntime-web`: {}; {}, {} thread of
torch, one of WebAssembly; commit {}. Times are of one run each, beside other work.
"""

if __name__ == "__main__":
    main()
