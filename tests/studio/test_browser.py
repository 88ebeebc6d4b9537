"""The studio in a real browser: what a person does with it, at a desk and on a telephone, light and dark."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install -e '.[dev]'")
from playwright.sync_api import Browser, Locator, Page, expect  # noqa: E402

from attnorm.presets import PRESETS  # noqa: E402
from attnorm.run_directory import RunDirectory  # noqa: E402
from attnorm.studio.service import Service  # noqa: E402
from tests.studio.conftest import CLASSES, make_run, serving  # noqa: E402
from tests.studio.test_api import SlowService, decoded, encoded, fill, photograph, post  # noqa: E402

expect.set_options(timeout=20_000)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESK, TELEPHONE = (1280, 800), (390, 780)
BOTH = [(DESK, "light"), (TELEPHONE, "dark")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page that a person has opened, and what it asked for."""

    def __init__(self, browser: Browser, address: str, size: tuple[int, int] = DESK, scheme: Any = "light") -> None:
        self.address = address
        viewport: Any = {"width": size[0], "height": size[1]}
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme, has_touch=size == TELEPHONE)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda said: self.faults.append(said.text) if said.type == "error" else None)

    def __enter__(self) -> Page:
        self.page.goto(self.address)
        self.page.locator("body[data-ready]").wait_for()
        return self.page

    def __exit__(self, kind: object, *_: object) -> None:
        width = self.page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
        self.context.close()
        if kind is None:
            foreign = [url for url in self.requests if not url.startswith((self.address, "data:", "blob:"))]
            assert foreign == [] and self.faults == []
            assert width[0] <= width[1]  # nothing sticks out to the side


def picture(canvas: Locator) -> np.ndarray:
    """What a canvas shows, once the frame is drawn that is under way: the page draws once a frame."""
    script = """canvas => new Promise((done) => {
        requestAnimationFrame(() => requestAnimationFrame(() => done(canvas.toDataURL())));
    })"""
    return decoded(canvas.evaluate(script).partition(",")[2])


def pictures(panel: Locator) -> list[np.ndarray]:
    return [decoded(image.get_attribute("src").partition(",")[2]) for image in panel.locator(".grid img").all()]


def downloaded(page: Page, button: Locator) -> bytes:
    with page.expect_download() as waiting:
        button.click()
    return Path(waiting.value.path()).read_bytes()


@pytest.mark.parametrize(("size", "scheme"), BOTH)
def test_someone_picks_classes_generates_enlarges_and_gets_the_same_again(
    browser: Browser, address: str, size: tuple[int, int], scheme: str
) -> None:
    with Visit(browser, address, size, scheme) as page:
        panel = page.locator("#generate")
        assert panel.locator("[data-classes]").inner_text().split("\n")[0] == CLASSES[0]  # as text, not in bold
        expect(panel.locator("[data-classes] b")).to_have_count(0)
        panel.get_by_role("button", name="None", exact=True).click()
        panel.get_by_label(CLASSES[0]).check()
        panel.get_by_label("tench").check()
        panel.get_by_label("Each").fill("2")
        panel.get_by_label("Seed", exact=True).fill("7")
        panel.get_by_role("button", name="Generate").click()
        expect(panel.get_by_role("button", name="Download zip")).to_be_visible()
        shown = pictures(panel)
        asked = {"model": "gan", "classes": ["0", "2"], "seed": 7, "count": 2}
        made = post(f"{address}/api/generate", json=asked).json()["images"]
        for image, expected in zip(shown, made, strict=True):
            np.testing.assert_array_equal(image, decoded(expected["png"]))

        panel.locator(".grid button").nth(1).click()
        dialog = page.get_by_role("dialog")
        expect(dialog.locator("[data-caption]")).to_have_text(f"{CLASSES[0]}, seed 8")
        page.keyboard.press("ArrowRight")
        expect(dialog.locator("[data-caption]")).to_have_text("tench, seed 7")
        dialog.get_by_role("button", name="Layout").click()
        expect(dialog.locator("[data-verdict]")).to_contain_text("Entropy")
        assert len(np.unique(picture(dialog.locator("[data-winners]")).reshape(-1, 4), axis=0)) > 1
        assert (decoded(downloaded(page, dialog.get_by_role("button", name="PNG"))) == shown[2]).all()
        page.keyboard.press("Escape")

        with zipfile.ZipFile(io.BytesIO(downloaded(page, panel.get_by_role("button", name="Download zip")))) as archive:
            np.testing.assert_array_equal(decoded(archive.read("003.png")), shown[3])
        recipe = downloaded(page, panel.get_by_role("button", name="Recipe", exact=True))
        panel.get_by_label("Seed", exact=True).fill("0")
        panel.get_by_label("Use a recipe").set_input_files({"name": "r.json", "mimeType": "a/b", "buffer": recipe})
        expect(panel.get_by_label("Seed", exact=True)).to_have_value("7")  # from here on the pictures are new ones
        expect(panel.locator(".grid img")).to_have_count(4)
        assert all((one == other).all() for one, other in zip(shown, pictures(panel), strict=True))


def test_someone_walks_from_class_to_class(browser: Browser, address: str) -> None:
    with Visit(browser, address, TELEPHONE) as page:
        page.get_by_role("tab", name="Morph").click()
        panel = page.locator("#morph")
        panel.get_by_label(f"Remove {CLASSES[1]}").click()
        panel.get_by_label("Steps").fill("5")
        panel.get_by_role("button", name="Walk").click()
        slider = panel.get_by_label("Along the walk")
        expect(slider).to_be_visible()
        asked = {"model": "gan", "classes": ["0", "2"], "steps": 5}
        walk = post(f"{address}/api/interpolate", json=asked).json()
        expect(panel.locator("[data-where]")).to_have_text(f"100% {CLASSES[0]}, 0% tench")
        maps = [picture(panel.locator("[data-map]"))]
        slider.focus()
        for step in range(1, 3):
            page.keyboard.press("ArrowRight")
            expect(slider).to_have_value(str(step))
        expect(panel.locator("[data-where]")).to_have_text(f"50% {CLASSES[0]}, 50% tench")
        np.testing.assert_array_equal(picture(panel.locator("[data-image]"))[..., :3], decoded(walk["images"][2]))
        maps.append(picture(panel.locator("[data-map]")))
        assert (maps[0] != maps[1]).any()
        stroke(page, slider, (0.5, 0.5), (0.99, 0.5))
        expect(slider).to_have_value("4")
        np.testing.assert_array_equal(picture(panel.locator("[data-image]"))[..., :3], decoded(walk["images"][4]))
        animation = downloaded(page, panel.get_by_role("button", name="GIF"))
        assert animation == post(f"{address}/api/interpolate", json=asked | {"format": "gif"}).content
        assert decoded(downloaded(page, panel.get_by_role("button", name="PNG strip"))).shape == (66, 5 * 34 - 2, 3)


def test_someone_lights_up_a_region_and_edits_entities(browser: Browser, address: str) -> None:
    with Visit(browser, address) as page:
        page.keyboard.press("3")
        panel = page.locator("#layer")
        panel.get_by_role("button", name="Look").click()
        winners, readout = panel.locator("[data-winners]"), panel.locator("[data-readout]")
        expect(winners).to_be_visible()
        expect(readout).to_contain_text("Point at the image")
        seen = post(f"{address}/api/layout", json={"model": "gan", "class": "0"}).json()
        maps, facts = seen["sites"][0]["maps"], seen["sites"][0]["facts"]
        shares = np.frombuffer(base64.b64decode(maps["shares"]), np.uint8).reshape(4, maps["height"], maps["width"])
        row, column = 20, 9
        entity = int(shares[:, row, column].argmax())
        before = picture(panel.locator("[data-image]"))
        box = winners.bounding_box()
        assert box is not None
        place = box["width"] * (column + 0.5) / maps["width"], box["height"] * (row + 0.5) / maps["height"]
        winners.hover(position={"x": place[0], "y": place[1]})
        region = facts["regions"][str(entity)]
        expect(readout).to_contain_text(f"Entity {entity}:")
        expect(readout).to_contain_text(f"mean {region['mean']:.3f} and deviation {region['std']:.3f}")
        lit = picture(panel.locator("[data-image]"))
        is_won = shares.argmax(0) == entity
        np.testing.assert_array_equal(lit[is_won], before[is_won])  # everywhere
        assert (lit[~is_won][:, :3].mean(0) < before[~is_won][:, :3].mean(0)).all()
        expect(panel.locator(".entities .lit b")).to_have_text(str(entity))

        panel.get_by_role("button", name="Switch entity 1 off").click()
        expect(panel.locator("[data-difference]")).to_contain_text("differs by")
        edited = post(f"{address}/api/layout", json={"model": "gan", "class": "0", "off": [1]}).json()
        page.mouse.move(0, 0)
        expect(readout).to_contain_text("Point at the image")
        np.testing.assert_array_equal(picture(panel.locator("[data-edited]"))[..., :3], decoded(edited["edited_png"]))
        panel.get_by_role("button", name="Undo edits").click()
        expect(panel.locator("[data-edited]")).to_be_hidden()
        panel.get_by_role("button", name="Exchange entity 0").click()
        panel.get_by_role("button", name="Exchange entity 2").click()
        expect(panel.locator("[data-edited]")).to_be_visible()
        exchanged = post(f"{address}/api/layout", json={"model": "gan", "class": "0", "exchange": [0, 2]}).json()
        page.mouse.move(0, 0)
        expect(readout).to_contain_text("Point at the image")
        np.testing.assert_array_equal(
            picture(panel.locator("[data-edited]"))[..., :3], decoded(exchanged["edited_png"])
        )


def test_a_tap_lights_up_a_region_until_the_next_one(browser: Browser, address: str) -> None:
    with Visit(browser, address, TELEPHONE) as page:
        page.get_by_role("tab", name="See the layer").click()
        panel = page.locator("#layer")
        panel.get_by_role("button", name="Look").click()
        expect(panel.locator("[data-readout]")).to_contain_text("Point at the image")
        panel.locator("[data-image]").tap()
        expect(panel.locator("[data-readout]")).to_contain_text("Entity")
        page.wait_for_timeout(200)  # the finger is gone
        expect(panel.locator("[data-readout]")).to_contain_text("Entity")


def transfer(page: Page, name: str, data: bytes) -> Any:
    script = """([name, data]) => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], name, { type: "image/png" }));
        return transfer;
    }"""
    return page.evaluate_handle(script, [name, base64.b64encode(data).decode()])


def drag(page: Page, *places: tuple[float, float]) -> None:
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up()


def stroke(page: Page, view: Locator, *points: tuple[float, float]) -> None:
    """Drags the mouse through points given in shares of what is seen."""
    view.scroll_into_view_if_needed()
    box = view.bounding_box()
    assert box is not None
    drag(page, *((box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points))


def mask_of(page: Page) -> np.ndarray:
    return decoded(downloaded(page, page.get_by_role("button", name="Save mask")))[..., 0] > 0


@pytest.mark.parametrize(("size", "scheme"), BOTH)
def test_someone_drops_a_photograph_paints_fills_and_downloads(
    browser: Browser, address: str, size: tuple[int, int], scheme: str
) -> None:
    pixels = photograph(64, 64)
    with Visit(browser, address, size, scheme) as page:
        page.get_by_role("tab", name="Fill holes").click()
        panel = page.locator("#holes")
        page.dispatch_event(
            "#holes [data-editor]", "drop", {"dataTransfer": transfer(page, "holiday.png", encoded(pixels))}
        )
        status = panel.locator("[data-status]")
        expect(status).to_have_text("holiday.png, 64 \u00d7 64, PNG: nothing is marked yet")
        view = panel.locator("[data-view]")
        panel.get_by_role("button", name="Fill", exact=True).click()
        expect(page.get_by_text("Mark first what is missing.")).to_be_visible()

        stroke(page, view, (0.4, 0.4), (0.6, 0.4), (0.6, 0.6))
        painted = mask_of(page)
        assert 20 < painted.sum() < 1000 and (painted[:8] == 0).all()
        expect(status).to_contain_text(f"{100 * painted.mean():.1f}"[:3])
        view.focus()
        page.keyboard.press("e")
        stroke(page, view, (0.6, 0.6), (0.6, 0.5))
        erased = mask_of(page)
        assert erased.sum() < painted.sum() and not (erased & ~painted).any()
        page.keyboard.press("Control+z")
        np.testing.assert_array_equal(mask_of(page), painted)
        page.keyboard.press("Control+Shift+Z")
        np.testing.assert_array_equal(mask_of(page), erased)
        panel.get_by_role("button", name="Clear").click()
        page.keyboard.press("r")
        stroke(page, view, (0.42, 0.4), (0.58, 0.6))
        page.keyboard.press("l")
        stroke(page, view, (0.45, 0.62), (0.55, 0.62), (0.5, 0.75))
        mask = mask_of(page)
        rows, columns = np.nonzero(mask)
        assert mask[rows.min() : rows.min() + 8, columns.min() : columns.max() + 1].all()  # the rectangle
        assert 20 < mask.sum() < 2000

        panel.get_by_label("Mean colour").check()
        panel.get_by_label("Telea").uncheck()
        panel.get_by_label("What the mask hides").check()
        panel.get_by_role("button", name="Fill", exact=True).click()
        expect(panel.locator("[data-results] button")).to_have_count(2)
        expect(panel.locator("[data-results]")).to_contain_text("dB")
        panel.locator("[data-results] button").first.click()
        expect(status).to_contain_text("Filled with inpainter")
        data = downloaded(page, panel.get_by_role("button", name="Download"))
        with httpx.Client(base_url=address, timeout=60) as client:
            assert data == fill(client, "inpainter", encoded(pixels), encoded(mask)).content
        filled = decoded(data)
        np.testing.assert_array_equal(filled[~mask], pixels[~mask])
        assert (filled[mask] != pixels[mask]).any()

        divider = panel.get_by_role("slider", name="Before and after")
        middle = picture(view)
        divider.scroll_into_view_if_needed()
        handle, editor = divider.bounding_box(), panel.locator("[data-editor]").bounding_box()
        assert handle is not None and editor is not None
        height = handle["y"] + handle["height"] / 2
        drag(page, (handle["x"] + handle["width"] / 2, height), (editor["x"] + editor["width"] * 0.02, height))
        assert int(divider.get_attribute("aria-valuenow")) <= 3
        after = picture(view)
        assert (after != middle).any()
        divider.focus()
        page.keyboard.press("End")
        before = picture(view)
        assert (before != after).any() and divider.get_attribute("aria-valuenow") == "100"

        panel.get_by_label("Show what it is matched with").check()
        expect(panel.locator("[data-matched]")).to_contain_text("The hole: ")
        view.hover(position={"x": editor["width"] / 2, "y": editor["height"] / 2})
        expect(panel.locator("[data-matched]")).to_contain_text("Under the brush: ")
        panel.get_by_role("button", name="Go on with it").click()
        expect(status).to_contain_text("holiday-filled.png, 64 \u00d7 64, PNG: nothing is marked yet")
        expect(panel.locator("[data-history] button")).to_have_count(1)
        panel.locator("[data-history] button").click()
        expect(status).to_contain_text("holiday.png, 64 \u00d7 64")


def test_masks_are_opened_inverted_grown_and_refused_and_the_keyboard_paints(browser: Browser, address: str) -> None:
    with Visit(browser, address) as page:
        page.keyboard.press("4")
        panel = page.locator("#holes")
        script = "(transfer) => dispatchEvent(new ClipboardEvent('paste', { clipboardData: transfer }))"
        page.evaluate(script, transfer(page, "", encoded(photograph(40, 32))))
        status = panel.locator("[data-status]")
        expect(status).to_contain_text("pasted.png, 32 \u00d7 40")
        mask = np.zeros((40, 32), bool)
        mask[10:20, 5:15] = True
        opened = {"name": "m.png", "mimeType": "image/png", "buffer": encoded(mask)}
        panel.get_by_label("Open a mask").set_input_files(opened)
        np.testing.assert_array_equal(mask_of(page), mask)
        panel.get_by_role("button", name="Invert").click()
        np.testing.assert_array_equal(mask_of(page), ~mask)
        panel.get_by_role("button", name="Undo").click()
        panel.get_by_role("button", name="Grow").click()
        grown = np.zeros_like(mask)
        grown[9:21, 4:16] = True
        np.testing.assert_array_equal(mask_of(page), grown)
        panel.get_by_role("button", name="Shrink").click()
        np.testing.assert_array_equal(mask_of(page), mask)
        panel.get_by_label("Open a mask").set_input_files(opened | {"buffer": encoded(mask[:5])})
        expect(page.get_by_text("The mask has 32\u00d75 pixels, the photograph 32\u00d740.")).to_be_visible()
        panel.get_by_role("button", name="Clear").click()
        panel.locator("[data-view]").focus()
        page.keyboard.press("]")
        for key in ("Enter", "ArrowRight", "ArrowDown", "Enter", "ArrowLeft"):
            page.keyboard.press(key)
        by_keys = mask_of(page)
        assert by_keys[20, 16] and 4 < by_keys.sum() < 200
        for _ in range(120):  # more than the 100 steps that are kept
            page.keyboard.press("i")
        for _ in range(130):
            page.keyboard.press("Control+z")
        np.testing.assert_array_equal(mask_of(page), by_keys)
        expect(panel.get_by_role("button", name="Undo")).to_be_disabled()


class Fingers:
    """On a canvas, at places given in shares of it; they are kept apart by their order."""

    def __init__(self, page: Page, box: Any) -> None:
        self.session, self.box = page.context.new_cdp_session(page), box

    def __call__(self, kind: str, *places: tuple[float, float]) -> None:
        points = [
            {"x": self.box["x"] + x * self.box["width"], "y": self.box["y"] + y * self.box["height"], "id": number}
            for number, (x, y) in enumerate(places)
        ]
        self.session.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})


def test_one_finger_paints_two_zoom_about_what_is_between_them_and_three_do_nothing(
    browser: Browser, address: str
) -> None:
    with Visit(browser, address, TELEPHONE) as page:
        page.get_by_role("tab", name="Fill holes").click()
        photo = {"name": "p.png", "mimeType": "image/png", "buffer": encoded(photograph(64, 64))}
        page.get_by_label("Open a photograph").set_input_files(photo)
        view = page.locator("#holes [data-view]")
        expect(page.locator("#holes [data-status]")).to_contain_text("nothing is marked yet")

        def fingers() -> Fingers:
            view.scroll_into_view_if_needed()
            return Fingers(page, view.bounding_box())

        put = fingers()
        put("Start", (0.4, 0.2)), put("Move", (0.6, 0.2)), put("End")
        painted = mask_of(page)
        assert painted.sum() > 20

        put = fingers()
        put("Start", (0.4, 0.4)), put("Start", (0.4, 0.4), (0.6, 0.6))
        put("Move", (0.4, 0.4), (0.8, 0.8))
        put("End", (0.4, 0.4)), put("Move", (0.2, 0.3)), put("End")  # the finger that stays longer paints nothing
        np.testing.assert_array_equal(mask_of(page), painted)
        put = fingers()
        put("Start", (0.3, 0.3)), put("Start", (0.3, 0.3), (0.7, 0.7))
        put("Start", (0.3, 0.3), (0.7, 0.7), (0.3, 0.7)), put("Move", (0.3, 0.3), (0.7, 0.7), (0.3, 0.5)), put("End")
        np.testing.assert_array_equal(mask_of(page), painted)

        put = fingers()
        put("Start", (0.6, 0.6)), put("End")  # in the middle of where they were, now twice as far apart
        rows, columns = np.nonzero(mask_of(page) & ~painted)
        assert rows.mean() + 0.5 == pytest.approx(32, abs=1) and columns.mean() + 0.5 == pytest.approx(32, abs=1)

        page.route("**/api/inpaint?*", lambda route: (time.sleep(0.5), route.continue_()))  # progress is shown, below
        page.get_by_role("button", name="Fill", exact=True).tap()  # the photograph, which comes into view again
        expect(page.locator("#holes [data-results] button")).to_have_count(2)
        expect(view).to_be_in_viewport(ratio=1)


def test_a_large_photograph_is_sharp_for_who_zooms_in_and_so_is_what_fills_it(browser: Browser, address: str) -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 2048))[..., None].repeat(3, 2)  # grey in what is reduced
    with Visit(browser, address) as page:
        page.keyboard.press("4")
        photo = {"name": "p.png", "mimeType": "image/png", "buffer": encoded(stripes)}
        page.get_by_label("Open a photograph").set_input_files(photo)
        view = page.locator("#holes [data-view]")
        expect(page.locator("#holes [data-status]")).to_contain_text("4096")
        for _ in range(200):
            if page.evaluate("!!document.getElementById('holes').studio.view.fine"):
                break
            page.wait_for_timeout(50)
        for _ in range(12):
            page.keyboard.press("+")

        def middle() -> np.ndarray:
            shown = picture(view)[..., :3].astype(int)
            row, column = shown.shape[0] // 2, shown.shape[1] // 2
            return shown[row, column - 100 : column + 100]

        assert middle().min() < 10 and middle().max() > 245
        view.focus()
        for key in ("[",) * 26 + ("Enter", "Enter"):  # a dot in the middle
            page.keyboard.press(key)
        page.get_by_label("Mean colour").check()
        page.get_by_label("Telea").uncheck()
        page.locator("[name=method][value=inpainter]").uncheck()
        page.keyboard.press("Shift+Enter")
        expect(page.locator("#holes [data-results] button")).to_have_count(1)
        page.get_by_role("slider", name="Before and after").press("Home")
        page.mouse.move(0, 0)
        assert abs(middle()[90] - 127).max() < 5 and middle().min() < 10 and middle().max() > 245


def test_contextual_attention_shows_what_it_took_and_a_model_without_a_block_says_so(
    browser: Browser, tmp_path: Path
) -> None:
    for context in ("contextual", "none"):
        make_run(tmp_path / context, PRESETS[f"inpaint-smoke-{context}"][1])
    with serving(Service([tmp_path])) as address, Visit(browser, address) as page:
        page.keyboard.press("4")
        photo = {"name": "p.png", "mimeType": "image/png", "buffer": encoded(photograph(64, 64))}
        page.get_by_label("Open a photograph").set_input_files(photo)
        expect(page.locator("#holes [data-status]")).to_contain_text("nothing is marked yet")
        view = page.locator("#holes [data-view]")
        stroke(page, view, (0.2, 0.2), (0.3, 0.2))
        for method in ("contextual", "none"):
            page.locator(f"#holes [name=method][value={method}]").check()
        page.get_by_role("button", name="Fill", exact=True).click()
        said, shows = page.locator("#holes [data-matched]"), page.locator("#holes [data-layout]")
        results = page.locator("#holes [data-results] button")
        expect(results).to_have_count(3)  # Telea's is one, of itself
        results.filter(has_text="none").click()
        expect(said).to_have_text("none has no layout to show: the layer is not in it (none).")
        expect(shows).to_be_hidden()
        results.filter(has_text="contextual").click()
        before = picture(view)
        shows.check()
        expect(said).to_have_text("The hole: rebuilt from what is lit up")
        whole = picture(view)
        assert (whole != before).any()
        box = view.bounding_box()
        assert box is not None
        view.hover(position={"x": 0.25 * box["width"], "y": 0.2 * box["height"]})
        expect(said).to_have_text("Under the brush: rebuilt from what is lit up")
        assert (picture(view) != whole).any()
        view.hover(position={"x": 0.9 * box["width"], "y": 0.9 * box["height"]})
        expect(said).to_have_text("The hole: rebuilt from what is lit up")


def test_a_file_beside_the_editor_opens_and_history_outlives_a_studio_that_does_not_answer(
    browser: Browser, address: str
) -> None:
    drop = """(dataTransfer) => document.querySelector("header").dispatchEvent(
        new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }))"""
    with (visit := Visit(browser, address)) as page:
        files = transfer(page, "holiday.jpg", encoded(photograph(32, 32), "JPEG"))
        assert page.evaluate(drop, files) is False  # prevented: the browser would leave the page
        page.keyboard.press("4")
        panel = page.locator("#holes")
        assert panel.locator("[data-empty]").is_visible()
        page.evaluate(drop, files)
        expect(panel.locator("[data-status]")).to_contain_text("holiday.jpg")
        stroke(page, panel.locator("[data-view]"), (0.45, 0.5), (0.55, 0.5))
        panel.get_by_role("button", name="Fill", exact=True).click()
        expect(panel.locator("[data-results] button")).to_have_count(2)
        panel.get_by_role("button", name="Go on with it").click()
        history = panel.locator("[data-history] button")
        expect(history).to_have_text("1: holiday.jpg")
        expect(panel.locator("[data-status]")).to_contain_text("PNG")  # JPEG again would change the other pixels
        page.route("**/api/photograph", lambda route: route.abort())
        history.click()
        expect(panel.get_by_role("alert")).to_contain_text("The studio does not answer")
        expect(history).to_have_text("1: holiday.jpg")
        page.unroute("**/api/photograph")
        history.click()
        expect(history).to_have_text("1: holiday-filled.png")
        expect(panel.locator("[data-status]")).to_contain_text("holiday.jpg")
        visit.faults.clear()


def test_someone_watches_a_run_train(browser: Browser, tmp_path: Path) -> None:
    make_run(tmp_path / "run", PRESETS["smoke"][1])
    run = RunDirectory(tmp_path / "run")
    with serving(Service([tmp_path])) as address, Visit(browser, address) as page:
        page.get_by_role("tab", name="Runs").click()
        panel = page.locator("#runs")
        expect(panel.locator("[data-live]")).to_have_text("Live: run has seen 80 images.")
        expect(panel.locator("article")).to_contain_text("Samples at 80 images seen")
        expect(panel.locator("article")).to_contain_text("awake")
        expect(panel.locator(".curves figure")).to_have_count(1)
        rows = [{"images_seen": n, "generator/loss": 1 / n, "layout/generator.x/entropy": 0.5} for n in (160, 240)]
        with run.metrics_file.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        Image.new("RGB", (8, 8), "gold").save(run.sample_file(240))
        expect(panel.locator("[data-live]")).to_have_text("Live: run has seen 240 images.")
        expect(panel.locator(".curves figure")).to_have_count(2)
        expect(panel.locator("article")).to_contain_text("Samples at 240 images seen")


def test_a_first_checkpoint_is_there_at_the_next_tab_and_what_was_chosen_stays(
    browser: Browser, tmp_path: Path
) -> None:
    for name in ("early", "late"):
        make_run(tmp_path / name, PRESETS["smoke"][1])
    checkpoints = tmp_path / "late" / "checkpoints"
    checkpoints.rename(tmp_path / "kept")
    with serving(Service([tmp_path])) as address, Visit(browser, address) as page:
        panel = page.locator("#generate")
        late = panel.locator("[name=model] option[value=late]")
        expect(late).to_be_disabled()
        panel.get_by_label("tench").uncheck()
        (tmp_path / "kept").rename(checkpoints)
        page.keyboard.press("4")
        page.get_by_label("Mean colour").check()
        page.keyboard.press("1")
        expect(late).to_be_enabled()
        expect(panel.get_by_label("tench")).not_to_be_checked()
        page.keyboard.press("4")
        expect(page.get_by_label("Mean colour")).to_be_checked()
        expect(page.locator("#holes [name=example] option", has_text="cat")).to_have_count(1)


def test_runs_are_watched_again_after_a_studio_has_refused_them(browser: Browser, address: str) -> None:
    with (visit := Visit(browser, address)) as page:
        page.route("**/api/runs/events*", lambda route: route.fulfill(status=404, json={"error": "no such run"}))
        page.keyboard.press("5")
        expect(page.locator("#runs [data-live]")).to_contain_text("trying again")
        page.unroute("**/api/runs/events*")
        expect(page.locator("#runs [data-live]")).to_contain_text("Live: gan has seen 80 images.")
        visit.faults.clear()


def test_what_takes_long_can_be_cancelled_and_errors_are_told(browser: Browser, runs: Path) -> None:
    service = SlowService(runs)
    with serving(service) as address, (visit := Visit(browser, address)) as page:
        panel = page.locator("#generate")
        panel.get_by_role("button", name="Generate").click()
        assert service.begun.acquire(timeout=10)
        panel.get_by_role("button", name="Cancel").click()
        expect(panel.locator("[data-work]")).to_have_text("Cancelled.")
        assert service.ended.acquire(timeout=10)
        expect(panel.locator("[data-results]")).to_be_empty()
        expect(panel.locator("[data-empty]")).to_be_visible()
        expect(panel.get_by_role("button", name="Generate")).to_be_enabled()
        page.keyboard.press("4")
        broken = {"name": "<i>x</i>.png", "mimeType": "image/png", "buffer": b"nonsense"}
        page.get_by_label("Open a photograph").set_input_files(broken)
        expect(page.get_by_role("alert")).to_contain_text("cannot read the image <i>x</i>.png")
        assert [fault.partition("status of ")[2] for fault in visit.faults] == ["422 (Unprocessable Entity)"]
        visit.faults.clear()


def test_it_is_used_by_keyboard_and_everything_has_a_name(browser: Browser, address: str) -> None:
    unnamed = """() => [...document.querySelectorAll("button, a, input, select, canvas, [role=slider], dialog")]
        .filter((one) => !(one.getAttribute("aria-label") || one.getAttribute("aria-labelledby") || one.labels?.length
            || (one.localName !== "select" && one.textContent.trim())))
        .map((one) => one.outerHTML)"""
    with Visit(browser, address) as page:
        assert page.evaluate(unnamed) == []
        page.keyboard.press("Tab")
        expect(page.get_by_text("Skip to the content")).to_be_focused()
        page.keyboard.press("Tab")
        expect(page.get_by_role("tab", name="Generate")).to_be_focused()
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("tab", name="Morph")).to_be_focused()
        expect(page.locator("#morph")).to_be_visible()
        assert page.url.endswith("#/morph")
        page.keyboard.press("?")
        expect(page.get_by_role("dialog", name="The studio in short")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
        page.get_by_label("Switch between light and dark").click()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        page.reload()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"  # remembered


def test_the_api_has_its_own_page_and_nothing_from_elsewhere_is_let_in(browser: Browser, address: str) -> None:
    with (visit := Visit(browser, address)) as page:
        refused = page.evaluate(
            """() => new Promise((done) => {
                addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
                fetch("http://192.0.2.1/").catch(() => {});
            })"""
        )
        assert refused == "connect-src"
        assert all("Content Security Policy" in fault for fault in visit.faults)
        visit.faults.clear()
        page.goto(f"{address}/api/docs")
        expect(page.get_by_text("/api/inpaint", exact=True)).to_be_visible()


def test_text_is_readable_on_its_ground_in_both_themes() -> None:
    css = (Path(__file__).parents[2] / "src/attnorm/studio/static/studio.css").read_text()
    themes = re.findall(r":root(?:\[data-theme=\"dark\"\])? \{(.*?)\}", css, re.DOTALL)[:2]
    for theme in themes:
        colours = {name: luminance(text) for name, text in re.findall(r"--([\w-]+): #([0-9a-f]{6});", theme)}
        grounds = ("page", "card", "sunk")
        pairs = [(text, ground) for text in ("text", "soft") for ground in grounds]
        pairs += [("bad", "card"), ("good", "sunk"), ("warm", "sunk")]
        pairs += [("accent-text", "accent"), ("text", "accent-soft")]
        for text, ground in pairs:
            light, dark = sorted((colours[text], colours[ground]), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)  # WCAG 2, AA


def luminance(text: str) -> float:
    parts = np.array([int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
