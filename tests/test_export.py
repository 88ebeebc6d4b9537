"""Exported files compute what the networks do, at sizes that they were not made from, and say what they are."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from attnorm import AttentiveNorm2d, cli
from attnorm import export as exporting
from attnorm.checkpoint import Header, save_checkpoint
from attnorm.config import Config
from attnorm.fill_page import find_runtime, make_page
from attnorm.inference import Inpainter
from attnorm.models.class_conditional import Generator
from attnorm.models.inpainting import InpaintingGenerator, paste
from attnorm.presets import PRESETS
from attnorm.registry import Loaded, load
from attnorm.settings import override
from tests.conftest import awake

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'attnorm[export]'")


def saved(network: nn.Module, config: Config, classes: tuple[str, ...], path: Path) -> Path:
    tensors = {f"ema.{name}": tensor for name, tensor in network.state_dict().items()}
    save_checkpoint(path, tensors, Header(config, classes, 640, 1.0))
    return path


@pytest.fixture(scope="module")
def inpainter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = override(PRESETS["inpaint-smoke"][1], ["model.width=2", "model.an.num_entities=3"])
    network = awake(InpaintingGenerator(config.model))  # type: ignore[arg-type]
    return saved(network, config, (), tmp_path_factory.mktemp("run") / "inpainter.safetensors")


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ["image_size=32", "num_classes=3", "width=2", "latent_dim=5", "an.num_entities=3"]
    config = override(Config(), [f"model.{setting}" for setting in settings])
    network = awake(Generator(config.model))  # type: ignore[arg-type]
    return saved(network, config, ("a", "b", "<c>"), tmp_path_factory.mktemp("run") / "generator.safetensors")


@pytest.fixture(scope="module")
def exported(inpainter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inpainter, as the command writes it."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    cli.main(["export", str(inpainter), "--out", str(path)])
    return path


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_an_inpainter_in_onnxruntime_fills_photographs_of_odd_sizes_as_the_tool_does(
    inpainter: Path, exported: Path
) -> None:
    found = session(exported)
    tool = Inpainter(inpainter)
    for num, height, width in ((1, 64, 64), (2, 67, 101), (1, 8, 131)):
        image = 2 * torch.rand(num, 3, height, width) - 1
        mask = torch.zeros(num, 1, height, width)
        mask[:, :, 2:7, 20:50] = 1
        filled, refined = found.run(["filled", "refined"], {"image": image.numpy(), "mask": mask.numpy()})
        expected = tool.outputs(image, mask != 0).refined
        np.testing.assert_allclose(refined, expected.numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(filled, paste(image, expected, mask).numpy(), rtol=0, atol=1e-4)
        assert (filled != image.numpy()).any()
        np.testing.assert_array_equal(filled[:, :, 7:], image.numpy()[:, :, 7:])
    meta = found.get_modelmeta().custom_metadata_map
    assert meta["task"] == "inpainting" and meta["mask"] == "0: known, anything else: missing"
    numbers = {"mask_known": 0, "mask_missing": 1, "pixel_scale": 127.5, "pixel_offset": -1}
    assert {name: float(meta[name]) for name in numbers} == numbers


def test_a_generator_in_onnxruntime_makes_the_images_of_classes_and_mixtures(
    generator: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exporting.export(load(generator), tmp_path / "model.onnx")
    assert "TopK" not in caplog.text  # what a user can do nothing about
    assert not logging.getLogger("onnxscript.optimizer._constant_folding").filters
    found = session(tmp_path / "model.onnx")
    network = load(generator).model
    z, mixture = torch.randn(4, 5), torch.tensor([[1.0, 0, 0], [0, 0, 1], [0.5, 0.5, 0], [0, 0.2, 0.8]])
    (images,) = found.run(None, {"z": z.numpy(), "classes": mixture.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(images, network(z, mixture).numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(images[:2], network(z[:2], torch.tensor([0, 2])).numpy(), rtol=0, atol=1e-4)
    assert np.abs(images[0] - images[1]).max() > 0.01
    assert json.loads(found.get_modelmeta().custom_metadata_map["classes"]) == ["a", "b", "<c>"]


def test_torch_exports_program_computes_the_same_and_carries_what_it_is(generator: Path, tmp_path: Path) -> None:
    exporting.export(load(generator), tmp_path / "model.pt2", "torch-export")
    files = {"attnorm.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=files).module()
    inputs = torch.randn(5, 5), torch.eye(3)[[0, 1, 2, 0, 1]]
    with torch.no_grad():
        torch.testing.assert_close(program(*inputs), load(generator).model(*inputs), rtol=0, atol=1e-5)
    assert json.loads(files["attnorm.json"])["latent_dim"] == "5"


def test_contextual_attention_exports_too_from_nine_pixels_on(tmp_path: Path) -> None:
    settings = ["model.width=2", "model.context=contextual", "model.contextual_release=tensorflow"]
    config = override(PRESETS["inpaint-smoke"][1], settings)
    network = awake(InpaintingGenerator(config.model))  # type: ignore[arg-type]
    loaded = load(saved(network, config, (), tmp_path / "model.safetensors"))
    assert exporting.export(loaded, tmp_path / "model.pt2", "torch-export") < 1e-5
    files = {"attnorm.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=files).module()
    image, mask = 2 * torch.rand(1, 3, 9, 70) - 1, torch.zeros(1, 1, 9, 70)
    mask[:, :, 3:6, 40:50] = 1
    with torch.no_grad():
        expected = exporting.as_program(loaded.model)(image, mask)
        torch.testing.assert_close(program(image, mask), expected, rtol=0, atol=1e-5)
    assert json.loads(files["attnorm.json"])["least_side"] == "9"


def test_the_layer_alone_exports_with_any_size() -> None:
    layer = awake(nn.Sequential(AttentiveNorm2d(6, num_entities=3)))
    sides = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(layer, (torch.randn(2, 6, 8, 9),), dynamic_shapes=({**sides},))
    assert not any("attnorm" in str(node.target) for node in program.graph.nodes)
    for shape in ((1, 6, 17, 5), (3, 6, 2, 40)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)
    x = torch.randn(1, 6, 1023, 1361, generator=torch.Generator().manual_seed(0))  # sums of a million pixels
    torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=5e-5)


@pytest.mark.parametrize("error", [0.001, math.nan])
def test_a_file_that_computes_something_else_is_not_left_behind(
    generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    loaded: Loaded = load(generator)

    class Wrong(exporting.ClassConditionalProgram):
        def forward(self, z: Tensor, classes: Tensor) -> Tensor:
            images = super().forward(z, classes)
            return images + error if torch.compiler.is_exporting() else images

    monkeypatch.setattr(exporting, "ClassConditionalProgram", Wrong)
    with pytest.raises(exporting.ExportError, match=r"from the network's; expected at most 0\.0001"):
        exporting.export(loaded, tmp_path / "model.pt2", "torch-export")
    assert not list(tmp_path.iterdir())


def test_the_page_fills_holes_in_the_browser_as_the_tool_does_and_asks_nobody(
    inpainter: Path, exported: Path, tmp_path: Path
) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    try:
        page_text = make_page(exported, find_runtime(), "tests")
    except exporting.ExportError as error:
        pytest.skip(str(error))
    (tmp_path / "page.html").write_text(page_text, encoding="utf-8")
    tool = Inpainter(inpainter)
    side = tool.image_size
    random = np.random.default_rng(0)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 780})
        page.set_default_timeout(120_000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: asked.append(str(error)))
        page.goto((tmp_path / "page.html").as_uri())
        page.locator("body[data-state=ready]").wait_for()
        for height, width in ((side + 3, side + 37), (3 * side, 4 * side + 1)):  # seen whole, and in a window
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            mask = np.zeros((height, width), bool)
            mask[side // 2 + 1 : side // 2 + 20, -side // 2 :] = True
            Image.fromarray(pixels).save(tmp_path / "photo.png"), Image.fromarray(mask).save(tmp_path / "mask.png")
            page.set_input_files("[data-photo]", tmp_path / "photo.png")
            page.locator(f"text={width}x{height} pixels").wait_for()
            page.set_input_files("[data-mask]", tmp_path / "mask.png")
            page.locator("[data-undo]:enabled").wait_for()
            page.locator("[data-fill]").click()
            page.locator("text=outside the hole every pixel is the photograph's").wait_for()
            with page.expect_download() as waiting:
                page.locator("[data-download]").click()
            found = np.asarray(Image.open(waiting.value.path()).convert("RGB"))
            np.testing.assert_array_equal(found[~mask], pixels[~mask])
            expected = tool.fill(torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(mask)[None])
            difference = np.abs(expected.image.permute(1, 2, 0).numpy().astype(int) - found)
            assert difference.max() <= 1 and difference.mean() < 0.01 and (found[mask] != pixels[mask]).any()
            assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
        assert all(url.startswith(("file:", "blob:")) for url in asked), asked
        page.set_input_files("[data-photo]", tmp_path / "page.html")
        page.locator("text=page.html is no picture that this browser reads").wait_for()
        browser.close()


def test_the_page_needs_an_inpainter_and_a_runtime_and_a_file_is_called_what_it_is(
    generator: Path, inpainter: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    web = ["--format", "web", "--onnxruntime-web", tmp_path, "--out", tmp_path / "x.html"]
    assert "needs an inpainter" in refused(["export", generator, *web], is_silent=False)
    assert "npm install onnxruntime-web, in this folder" in refused(["export", inpainter, *web], is_silent=False)
    names = {"onnx": "x.html", "torch-export": "x.onnx", "web": "x"}
    for form, name in names.items():
        command = ["export", generator, "--format", form, "--out", tmp_path / name]
        assert f"{name} is written as {form}, as --format says; let its name end in ." in refused(command)
    assert not list(tmp_path.iterdir())
