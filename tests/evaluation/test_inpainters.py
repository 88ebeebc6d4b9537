"""Two tiny models and the baselines from the command line to the tables, and who may not be measured."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from attnorm import cli
from attnorm.checkpoint import Header, save_checkpoint
from attnorm.data.images import load_images
from attnorm.evaluation import inpainters
from attnorm.evaluation.baselines import mean_fill
from attnorm.evaluation.inpainters import evaluate_inpainters, name_runs, to_dict
from attnorm.evaluation.test_set import read_examples, read_manifest
from attnorm.inference import Inpainter
from attnorm.metrics.image_quality import DISTANCE_SCORES, SCORES, measure
from attnorm.models.inpainting import InpaintingGenerator
from attnorm.presets import PRESETS
from attnorm.reports.inpainting import make_document
from attnorm.reports.render import to_markdown
from attnorm.run_directory import RunDirectory
from attnorm.settings import override
from tests.conftest import draw_photographs


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_photographs(tmp_path_factory.mktemp("data") / "photographs", 12)


def make_run(path: Path, data: Path, context: str, *, seed: int, held_out_every: int = 3) -> Path:
    """A run with random weights."""
    settings = [f"model.context={context}", f"run.seed={seed}", f"data.held_out_every={held_out_every}"]
    config = override(PRESETS["inpaint-smoke"][1], [*settings, f"data.source={data}"])
    torch.manual_seed(seed)
    weights = InpaintingGenerator(config.model).state_dict()
    fingerprint = load_images(str(data), 40).fingerprint
    run = RunDirectory(path)
    run.create(config, {"source": str(data), "fingerprint": fingerprint})
    tensors = {f"ema.{name}": tensor for name, tensor in weights.items()}
    save_checkpoint(run.checkpoint_file(16), tensors, Header(config, ("all",), 16, 1.0))
    return path


@pytest.fixture(scope="module")
def runs(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / name, photographs, name, seed=seed) for seed, name in enumerate(("an", "contextual"))]


@pytest.fixture(scope="module")
def frozen(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest") / "rectangles"
    cli.main(["manifest", "--like", str(runs[0]), "--out", str(folder), "--masks", "rectangle"])
    return folder


def command(runs: list[Path], frozen: Path, out: Path, *more: str) -> list[str]:
    return ["evaluate", *map(str, runs), "--manifest", str(frozen), "--out", str(out), "--device", "cpu", *more]


def test_the_command_line_measures_every_model_and_baseline_image_by_image(
    runs: list[Path], frozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores"
    cli.main(command(runs, frozen, out, "--batch-size", "3"))
    names = ("scores.csv", "scores.json", "scores.md", "image-grid.png")
    assert capsys.readouterr().out.split() == [str(out / name) for name in names]
    assert {path.name for path in out.iterdir()} == set(names)

    manifest = read_manifest(frozen)
    images, masks = read_examples(manifest, load_images(manifest.data.source, 40))
    with open(out / "scores.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 4  # two models and two baselines; every third of twelve images
    for path in runs:
        model = Inpainter(path, device="cpu").model
        for i, entry in enumerate(manifest.entries):  # one at a time, from the definitions
            (row,) = [row for row in rows if row["method"] == path.name and row["image"] == entry.file]
            with torch.no_grad():
                refined = model(images[i : i + 1].float() / 127.5 - 1, masks[i : i + 1]).refined
            raw = ((refined + 1) * 127.5).round().to(torch.uint8)
            expected = measure(images[i : i + 1], raw, masks[i : i + 1])
            assert float(row["hole_share"]) == masks[i].double().mean().item() and row["mask"] == entry.mask
            for name in (*SCORES, *DISTANCE_SCORES):  # a batch rounds otherwise than an image alone: a level at times
                value = float(row[name] or "nan")  # nothing where no pixel is so far from the edge
                assert value == pytest.approx(expected[name].item(), rel=2e-3, nan_ok=True), name
    floor = measure(images, mean_fill(images, masks), masks)
    means = [row for row in rows if row["method"] == "mean fill"]
    assert [float(row["psnr_hole"]) for row in means] == floor["psnr_hole"].tolist()
    assert all(row["psnr_raw"] == "" for row in means)

    values: dict[str, Any] = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert values["manifest"]["images"] == 4 and values["manifest"]["sha256"] == manifest.sha256
    assert [values["models"][name]["seed"] for name in ("an", "contextual")] == [0, 1]
    for name, summary in {**values["models"], **values["baselines"]}.items():
        own = [row for row in rows if row["method"] == name]
        for score, mean in summary["means"].items():
            found = [float(row[score]) for row in own if row[score]]
            assert mean == pytest.approx(sum(found) / len(found)) and (len(found) == 4 or score in DISTANCE_SCORES)
    pairs = {(d["first"], d["second"]) for d in values["differences"]}
    assert pairs == {("an", "contextual")} | {(m, f) for m in ("an", "contextual") for f in ("mean fill", "Telea")}
    assert len(values["differences"]) == 5 * 3 + 9 + 4 * 6
    for difference in values["differences"]:
        both = {**values["models"], **values["baselines"]}
        first, second = (both[difference[key]]["means"][difference["score"]] for key in ("first", "second"))
        assert difference["mean"] == pytest.approx(first - second)
        assert difference["low"] <= difference["mean"] <= difference["high"]

    with Image.open(out / "image-grid.png") as grid:
        assert np.asarray(grid.convert("RGB")).std() > 10
    text = (out / "scores.md").read_text(encoding="utf-8")
    assert "| CA [38] | contextual | 23.78 |" in text and "| Ours | an | 25.09 |" in text
    assert f"| {2 * values['models']['an']['means']['mae_pasted']:.4f} |" in text


def test_nothing_is_overwritten_unless_asked_and_the_same_comes_out_again(
    runs: list[Path], frozen: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = tmp_path / "scores"
    cli.main(command(runs[:1], frozen, out, "--no-floors"))
    first = {path: path.read_bytes() for path in (out / "scores.csv", out / "scores.md")}
    assert "--overwrite" in refused(command(runs[:1], frozen, out))
    cli.main(command(runs[:1], frozen, out, "--no-floors", "--overwrite"))
    assert {path: path.read_bytes() for path in first} == first
    assert "overwrite" in refused(["manifest", "--like", str(runs[0]), "--out", str(frozen)])


def evaluated(runs: list[Path], frozen: Path, **options: Any) -> inpainters.Evaluation:
    manifest = read_manifest(frozen)
    examples = read_examples(manifest, load_images(manifest.data.source, 40))
    return evaluate_inpainters(runs, manifest, examples, device="cpu", **options)


def test_models_are_measured_as_the_tool_fills_where_that_is_asked_for(runs: list[Path], frozen: Path) -> None:
    manifest = read_manifest(frozen)
    images, masks = read_examples(manifest, load_images(manifest.data.source, 40))
    found = evaluated(runs[:1], frozen, seams=False)
    tool = Inpainter(runs[0], device="cpu")
    filled = torch.stack([tool.fill(*example).image for example in zip(images, masks, strict=True)])
    expected = measure(images, filled, masks)["psnr_pasted"].numpy()
    as_made = evaluated(runs[:1], frozen).by_image["an"]["psnr_pasted"]
    np.testing.assert_allclose(found.by_image["an"]["psnr_pasted"], expected, rtol=2e-3)
    assert np.abs(as_made - expected).min() > 0.05
    assert found.scores.models["an"].seams == "none"
    assert "ema, seams taken out" in to_markdown(make_document(found.scores))


def test_a_model_that_returns_the_truth_has_finite_scores_and_is_better_than_another(
    runs: list[Path], frozen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = inpainters._fill

    def perfect(inpainter: Inpainter, images: Tensor, masks: Tensor) -> Tensor:
        return images if inpainter.path.is_relative_to(runs[0]) else fill(inpainter, images, masks)

    monkeypatch.setattr(inpainters, "_fill", perfect)
    evaluation = evaluated(runs, frozen, with_baselines=False)
    values = json.loads(json.dumps(to_dict(evaluation.scores), allow_nan=False))
    assert values["models"]["an"]["images_without_error"] == 4
    assert values["models"]["contextual"]["images_without_error"] == 0
    best = 20 * math.log10(255) + 10 * math.log10(3 * 32 * 32)
    assert values["models"]["an"]["means"]["psnr_pasted"] == pytest.approx(best)
    assert values["models"]["an"]["means"]["mae_raw"] == 0
    supported = {d["score"]: d["mean"] for d in values["differences"] if d["is_supported"]}
    assert set(SCORES) | {"psnr_1-2"} <= set(supported) <= {*SCORES, *DISTANCE_SCORES}
    for name, mean in supported.items():
        assert (mean < 0) == name.startswith("mae")
    text = to_markdown(make_document(evaluation.scores))
    (reading,) = re.findall(r"^- an against contextual: (.*)$", text, re.MULTILINE)
    assert reading.startswith("an is better in PSNR pasted, SSIM pasted, MAE pasted, PSNR hole")
    assert "contextual is" not in reading and "undecided" not in reading
    section = text.split("## PSNR by distance from the hole's edge")[1].split("##")[0]
    rows = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in section.splitlines() if "|" in line)}
    model, rival = (evaluation.by_image[name] for name in ("an", "contextual"))
    for name, images, mean, difference in zip(
        DISTANCE_SCORES, rows["images"], rows["contextual"], rows["an - contextual"], strict=True
    ):
        found = rival[name][~np.isnan(rival[name])]
        assert images == str(len(found)) and mean == (f"{found.mean():.2f}" if len(found) else "-"), name
        gain = np.nanmean(model[name] - rival[name]) if len(found) > 1 else None
        assert difference.startswith("-" if gain is None else f"**{gain:+.2f} ["), name
    (truth,) = {tuple(part.shape) for part in (evaluation.grid.images, *evaluation.grid.results.values())}
    assert truth == (4, 3, 32, 32) and torch.equal(evaluation.grid.results["an"], evaluation.grid.images)
    grid = evaluation.grid
    changed = (grid.results["contextual"] != grid.images).any(1, keepdim=True)
    assert changed.any() and not (changed & ~grid.masks).any()


def test_equal_models_differ_in_nothing(runs: list[Path], frozen: Path, photographs: Path, tmp_path: Path) -> None:
    twin = make_run(tmp_path / "twin", photographs, "an", seed=0)
    evaluation = evaluated([runs[0], twin], frozen, with_baselines=False)
    assert all((d.mean, d.low, d.high) == (0, 0, 0) and not d.is_supported for d in evaluation.scores.differences)
    text = to_markdown(make_document(evaluation.scores))
    assert "- an against twin: undecided: PSNR pasted, SSIM pasted" in text and "**" not in text


def test_a_model_that_was_trained_on_the_test_images_is_refused(
    frozen: Path, photographs: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    other = make_run(tmp_path / "other", photographs, "none", seed=0, held_out_every=2)
    said = refused(command([other], frozen, tmp_path / "scores"))
    assert "was trained on images of" in said and "held out every 2th" in said and "has every 3th" in said
    assert not (tmp_path / "scores").exists()
    cli.main(["manifest", "--like", str(other), "--out", str(tmp_path / "sixth"), "--every", "6"])
    cli.main(command([other], tmp_path / "sixth", tmp_path / "scores", "--no-floors"))


def test_mistakes_are_told_in_one_line(
    runs: list[Path], frozen: Path, photographs: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = tmp_path / "scores"
    evaluate_an = ["evaluate", str(runs[0]), "--out", str(out)]
    assert "give --manifest DIR" in refused(["evaluate", "inpainters", *evaluate_an[1:]])
    assert "holds no manifest.json" in refused([*evaluate_an, "--manifest", str(tmp_path)])
    (tmp_path / "data").mkdir()
    shutil.copy(photographs / "00.png", tmp_path / "data")
    elsewhere = command(runs, frozen, out, "--data", str(tmp_path / "data"))
    assert "do not match the manifest: 02.png is not there; 05.png" in refused(elsewhere)
    said = refused(command([Path("cifar10-an")], frozen, out))
    assert "are for inpainters, but" in said and "was trained for class_conditional" in said
    assert "named twice" in refused(command([runs[0], runs[0]], frozen, out))
    assert "--seed is -1" in refused(command(runs, frozen, out, "--seed", "-1"))
    assert "expected sides in pixels" in refused([*evaluate_an, "--cost", "64,big"])
    assert "a size is 60; expected multiples of 8" in refused([*evaluate_an, "--cost", "60"])
    assert "give --data SRC and --size S" in refused(["manifest", "--out", str(out), "--size", "32"])
    data = ["manifest", "--out", str(out), "--data", str(photographs)]
    assert "multiple of 8" in refused([*data, "--size", "30"])
    assert "every 10th is 1; expected at least 2" in refused([*data, "--size", "32"])
    assert not out.exists()


def test_runs_are_named_by_their_folders(tmp_path: Path) -> None:
    file = tmp_path / "a/checkpoints/000000016.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    assert list(name_runs([tmp_path / "a", file, tmp_path / "b"])) == ["a", "a-16", "b"]
    same = [tmp_path / "b/a", tmp_path / "c/a"]
    assert list(name_runs(same)) == [str(path) for path in same]
