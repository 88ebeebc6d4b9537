"""Pictures of the studio's tabs, and how long each action takes, measured in the page.

    python scripts/studio_pages.py RUN... --out docs/studio

It starts the studio on the run directories, does in a headless Chromium what a person does, writes a PNG file a tab,
and prints a Markdown table. The first class-conditional model and the last inpainting model are used.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

from attnorm.system.provenance import commit, processor

REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "attnorm", "studio", *map(str, asked.runs), "--port", "0", "--no-open"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        try:
            assert server.stderr is not None
            found = re.search(r"http://\S+/", server.stderr.readline())
            assert found, "the studio did not start"
            chromium = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
            rows = {"open the page": visit(page, found[0])}
            for tab in (generate_and_morph, see, fill_holes):
                rows |= tab(page, asked.out)
            watch(page, asked.out)
            narrow = browser.new_page(
                viewport={"width": 390, "height": 780}, color_scheme="dark", device_scale_factor=2
            )
            visit(narrow, found[0])
            telephone(narrow, asked.out)
        finally:
            server.terminate()
    print(f"{processor()}, {torch.get_num_threads()} threads, commit {commit()}\n")
    print("| action | median | 95th percentile | times |\n|---|---|---|---|")
    for name, values in rows.items():
        ordered = sorted(values)
        late = ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)]
        digits = 1 if late < 20 else 0
        print(f"| {name} | {statistics.median(ordered):.{digits}f} ms | {late:.{digits}f} ms | {len(ordered)} |")


def visit(page: Page, address: str) -> list[float]:
    begun = time.perf_counter()
    page.goto(address)
    page.locator("body[data-ready]").wait_for()
    return [1000 * (time.perf_counter() - begun)]


def idle(panel: str) -> str:
    """A condition in JavaScript: nothing is asked for in a panel."""
    return f"!document.querySelector('#{panel} [data-work]').hasAttribute('aria-busy')"


def count(selector: str) -> str:
    return f"document.querySelectorAll('{selector}').length"


def timed(page: Page, button: Locator, arrival: str, times: int = REPEATS) -> list[float]:
    """Milliseconds from a press, as the page's own clock has it, to the frame after the one in which `arrival`, a
    JavaScript condition, first holds; the first time, which loads the model, is left out. What earlier presses brought
    is taken away before.
    """
    script = """(button) => new Promise((done) => {
        for (const old of document.querySelectorAll("[data-results]")) old.replaceChildren();
        const begun = performance.now();
        const isThere = () => ARRIVAL;
        const drawn = () => requestAnimationFrame(() => done(performance.now() - begun));
        const look = () => requestAnimationFrame(() => (isThere() ? drawn() : look()));
        button.click();
        look();
    })""".replace("ARRIVAL", arrival)
    values = []
    for _ in range(times + 1):
        expect(page.locator("[data-work][aria-busy]")).to_have_count(0, timeout=60_000)
        expect(button).to_be_enabled()
        values.append(button.evaluate(script))
    expect(page.locator("[data-work][aria-busy]")).to_have_count(0, timeout=60_000)
    return values[1:]


def shoot(page: Page, out: Path, name: str) -> None:
    """A PNG file; of photographs with 256 colours, to be small."""
    page.wait_for_timeout(400)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    if len(stream.getvalue()) > 150_000:
        stream = io.BytesIO()
        picture.quantize(256, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    (out / f"{name}.png").write_bytes(stream.getvalue())


def drag(page: Page, box: dict[str, float], points: list[tuple[float, float]], steps: int = 12) -> None:
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=steps)
    page.mouse.up()


def generate_and_morph(page: Page, out: Path) -> dict[str, list[float]]:
    rows: dict[str, list[float]] = {}
    panel = page.locator("#generate")
    generate = panel.get_by_role("button", name="Generate")
    rows["generate: first picture"] = timed(page, generate, "document.querySelector('#generate .grid img')")
    all_there = f"{count('#generate .grid img')} === 32 && {idle('generate')}"
    rows["generate: 32 pictures"] = timed(page, generate, all_there)
    shoot(page, out, "generate")

    page.get_by_role("tab", name="Morph").click()
    panel = page.locator("#morph")
    for name in ("coffee", "rocket"):  # where the demo's classes are at hand: walks that are good to see
        if panel.locator("[name=add] option", has_text=name).count():
            panel.get_by_label("Add").select_option(label=name)
            panel.get_by_role("button", name="Add").click()
    for _ in range(3):
        if panel.locator("[data-strip] li").count() > 3:
            panel.locator("[data-strip] li").nth(1).get_by_label("Remove").click()
    walk = panel.get_by_role("button", name="Walk")
    done = f"{idle('morph')} && {count('#morph [data-film] img')}"
    rows["morph: a walk of 31 pictures"] = timed(page, walk, done)
    slider = panel.locator("[data-slide]")
    rows["morph: a step of the slider"] = slider.evaluate(FRAMES, "slide")
    slider.evaluate("(slide) => { slide.value = 9; slide.dispatchEvent(new Event('input')); }")
    shoot(page, out, "morph")

    return rows


def see(page: Page, out: Path) -> dict[str, list[float]]:
    rows: dict[str, list[float]] = {}
    page.get_by_role("tab", name="See the layer").click()
    panel = page.locator("#layer")
    looked = idle("layer")
    rows["layer: look"] = timed(page, panel.get_by_role("button", name="Look"), looked)
    shoot(page, out, "layer")
    rows["layer: hover"] = panel.locator("[data-winners]").evaluate(FRAMES, "hover")
    shares = [float(text.rstrip("%")) for text in panel.locator(".entities .name span").all_inner_texts()]
    largest = panel.locator(".entities li").nth(shares.index(max(shares)))
    rows["layer: switch an entity off or on"] = timed(page, largest.get_by_text("Off"), looked)
    largest.get_by_text("Off").click()
    panel.locator("[data-difference]", has_text="differs").wait_for()
    panel.locator("[data-winners]").hover()
    shoot(page, out, "layer-edited")

    return rows


def fill_holes(page: Page, out: Path) -> dict[str, list[float]]:
    rows: dict[str, list[float]] = {}
    page.get_by_role("tab", name="Fill holes").click()
    panel = page.locator("#holes")
    panel.locator("[name=example]").select_option("astronaut")
    panel.locator("[data-empty]").wait_for(state="hidden")
    view = panel.locator("[data-view]")
    page.wait_for_timeout(500)
    box = view.bounding_box()
    assert box is not None
    drag(page, box, [(0.45, 0.42), (0.55, 0.44), (0.56, 0.55)])
    shoot(page, out, "holes-mask")
    for way in (0.30, 0.36, 0.42, 0.48):  # brush strokes, timed by the page: what a move takes, and what a frame
        drag(page, box, [(0.62, way), (0.74, way + 0.05), (0.62, way + 0.1)], steps=25)
    rows["holes: a move of the brush"] = page.evaluate("document.getElementById('holes').studio.pens.times")
    rows["holes: a frame drawn"] = page.evaluate("document.getElementById('holes').studio.view.times")
    for _ in range(4):
        page.keyboard.press("Control+z")
    for method in panel.locator("[name=method]").all():
        method.uncheck()
    panel.locator("[data-methods] label", has_text="inpaint").last.locator("input").check()
    panel.locator("[name=method][value=telea]").check()
    fill = panel.get_by_role("button", name="Fill", exact=True)
    fill.click()
    panel.locator("[data-results] li").nth(1).wait_for()
    panel.locator("[data-results] button").first.click()
    page.evaluate("scrollTo(0, 0)")
    shoot(page, out, "holes")
    panel.locator("[data-layout]").check()
    view.hover(position={"x": box["width"] * 0.585, "y": box["height"] * 0.36})
    shoot(page, out, "holes-layout")
    rows["holes: what the brush is matched with"] = view.evaluate(FRAMES, "hover")
    panel.locator("[name=method][value=telea]").uncheck()
    one = f"{idle('holes')} && {count('#holes [data-results] li')} === 1"
    rows["holes: fill with a model"] = timed(page, fill, one)

    return rows


def watch(page: Page, out: Path) -> None:
    page.get_by_role("tab", name="Runs").click()
    boxes = page.locator("#runs [data-runs] input")
    boxes.last.wait_for()
    page.wait_for_timeout(2500)
    shoot(page, out, "runs")


# Moves over an element, or along a slider, one by one: milliseconds that the page is at work for each, from the event
# to the end of the frame that shows it.
FRAMES = """(element, kind) => new Promise((done) => {
    const times = [];
    const box = element.getBoundingClientRect();
    const move = (number) => {
        if (kind === "slide") {
            element.value = number % (Number(element.max) + 1);
            return element.dispatchEvent(new Event("input"));
        }
        const x = box.left + box.width * (0.3 + (0.4 * ((number * 7) % 120)) / 120);
        const y = box.top + box.height * (0.3 + (0.4 * ((number * 11) % 120)) / 120);
        element.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: y, pointerId: 1, bubbles: true }));
    };
    const step = (number) => {
        if (number === 120) return done(times);
        let frame = 0;
        requestAnimationFrame(() => (frame = performance.now())); // before what the page asks for
        const begun = performance.now();
        move(number);
        const handled = performance.now() - begun;
        requestAnimationFrame(() => {
            const channel = new MessageChannel(); // comes after styles, layout and painting
            channel.port1.onmessage = () => {
                times.push(handled + performance.now() - frame);
                setTimeout(() => step(number + 1), 5);
            };
            channel.port2.postMessage(0);
        });
    };
    step(0);
})"""


def telephone(page: Page, out: Path) -> None:
    page.get_by_role("button", name="Generate").click()
    page.locator("#generate [data-bar]").wait_for()
    page.get_by_role("tab", name="See the layer").click()
    page.get_by_role("button", name="Look").click()
    page.locator("#layer [data-seen]").wait_for()
    page.locator("#layer [data-canvases]").scroll_into_view_if_needed()
    page.locator("#layer [data-winners]").hover()
    page.evaluate(
        "scrollTo(0, document.querySelector('#layer [data-canvases]').getBoundingClientRect().top + scrollY - 110)"
    )
    shoot(page, out, "telephone-layer")
    page.get_by_role("tab", name="Fill holes").click()
    page.locator("#holes [name=example]").select_option("cat")
    page.locator("#holes [data-empty]").wait_for(state="hidden")
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(500)
    box = page.locator("#holes [data-view]").bounding_box()
    assert box is not None
    drag(page, box, [(0.4, 0.45), (0.6, 0.5)])
    shoot(page, out, "telephone-holes")


if __name__ == "__main__":
    main()
