"""Folders and zips of images against each other and against saved statistics: values by definition, and refusals."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from attnorm import cli
from attnorm.config import Config, ConfigError, UserError
from attnorm.evaluation.image_folders import evaluate_images, make_statistics, read_statistics, write_statistics
from attnorm.metrics import features
from attnorm.metrics.generative import (
    Gaussian,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from attnorm.run_directory import RunDirectory
from attnorm.system.files import read_lines
from tests.evaluation.conftest import TinyExtractor


def make_folder(path: Path, count: int, *, seed: int, size: tuple[int, int] = (24, 20)) -> Tensor:
    """PNG files; their pixels, uint8 [N, 3, H, W]."""
    path.mkdir()
    values = np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    for number, pixels in enumerate(values):
        Image.fromarray(pixels).save(path / f"{number:03d}.png")
    return torch.from_numpy(values).permute(0, 3, 1, 2)


def test_scores_are_those_of_their_definitions_of_images_as_they_are(tmp_path: Path) -> None:
    fakes, reals = make_folder(tmp_path / "a", 14, seed=0), make_folder(tmp_path / "b", 17, seed=1)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for file in sorted((tmp_path / "b").iterdir()):
            archive.write(file, f"any/{file.name}")
    tiny = TinyExtractor()
    of_fakes, of_reals = tiny(fakes), tiny(reals).pooled
    names = ("frechet", "is", "kid", "precision-recall")
    for real in (tmp_path / "b", tmp_path / "b.zip"):
        found = {s.metric: s for s in evaluate_images(tmp_path / "a", real, tiny, metrics=names, batch_size=5)}
        laws = Gaussian.from_features(of_fakes.pooled), Gaussian.from_features(of_reals)
        assert found["frechet"].value == pytest.approx(frechet_distance(*laws), rel=1e-6)
        assert found["is10"].value == pytest.approx(inception_score(of_fakes.logits, 10)[0], rel=1e-6)
        few = of_reals[np.unique(np.linspace(0, 16, 14).astype(int))]
        assert found["kid"].value == pytest.approx(kernel_distance(of_fakes.pooled, few, seed=0)[0], rel=1e-6)
        expected = precision_recall(few, of_fakes.pooled)
        assert (found["precision"].value, found["recall"].value) == (expected.precision, expected.recall)
        assert found["frechet"].protocol == "frechet14_images_17reals_tiny" and found["kid"].num_reals == 14
        assert (found["frechet"].num_fakes, found["frechet"].num_reals, found["is1"].num_reals) == (14, 17, 0)
        used = found["frechet"].fakes
        assert used is not None and used.read_at == (24, 20) and used.source == str(tmp_path / "a")
    assert found["frechet"].identity != found["kid"].identity


def test_other_pixels_are_other_images_and_a_copy_is_none(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("copy", 0), ("b", 1)):
        make_folder(tmp_path / name, 12, seed=seed)
    a, copy, b = (evaluate_images(tmp_path / name, tmp_path / "b", TinyExtractor())[0] for name in ("a", "copy", "b"))
    assert a.identity == copy.identity != b.identity
    assert b.value == pytest.approx(0, abs=1e-9)  # against itself


def test_saved_statistics_give_the_same_scores_and_are_refused_of_another_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        make_folder(tmp_path / name, 15, seed=seed)
    names, kept = ("frechet", "kid"), tmp_path / "new" / "b.safetensors"
    first = evaluate_images(tmp_path / "a", tmp_path / "b", TinyExtractor(), metrics=names, save_statistics=kept)
    again = evaluate_images(tmp_path / "a", kept, TinyExtractor(), metrics=names)
    ours, theirs = ([(s.value, s.protocol, s.data, s.identity) for s in scores] for scores in (again, first))
    assert ours == theirs

    def refused(error: type[Exception], message: str, **settings: Any) -> None:
        with pytest.raises(error, match=message):
            evaluate_images(tmp_path / "a", kept, TinyExtractor(), **{"metrics": names} | settings)

    refused(ConfigError, "the size is 0, and here 16", size=16)
    monkeypatch.setattr(TinyExtractor, "weights_sha256", "1" * 64)
    refused(ConfigError, "is of another protocol: the extractor's weights is '0000")
    monkeypatch.undo()
    write_statistics(make_statistics(tmp_path / "b", TinyExtractor(), keep=False), kept)
    assert evaluate_images(tmp_path / "a", kept, TinyExtractor())[0].value == pytest.approx(first[0].value)
    refused(ConfigError, "no features of single images, which kid and precision-recall need")
    make_folder(tmp_path / "other", 15, seed=0, size=(20, 20))
    with pytest.raises(ConfigError, match="20x20 pixels, and the real ones 20x24"):
        evaluate_images(tmp_path / "other", kept, TinyExtractor())
    kept.write_bytes(b"no statistics")
    refused(UserError, "cannot be read as statistics")
    torch_file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, torch_file)
    with pytest.raises(UserError, match="holds no statistics"):
        read_statistics(torch_file, TinyExtractor())


def test_images_of_several_sizes_are_refused_or_cut_and_resized(tmp_path: Path) -> None:
    make_folder(tmp_path / "a", 12, seed=0)
    make_folder(tmp_path / "b", 12, seed=1, size=(30, 30))
    Image.new("RGB", (9, 8)).save(tmp_path / "b" / "zz.png")
    with pytest.raises(ConfigError, match=r"has images of 30x30 and 9x8|has images of 9x8 and 30x30"):
        evaluate_images(tmp_path / "b", tmp_path / "a", TinyExtractor())
    (score,) = evaluate_images(tmp_path / "b", tmp_path / "a", TinyExtractor(), size=16)
    assert (score.num_fakes, score.data.image_size) == (13, 16)
    (tmp_path / "few").mkdir()
    Image.new("RGB", (24, 20)).save(tmp_path / "few" / "a.png")
    with pytest.raises(UserError, match="has 1 images that can be read; expected at least 4"):
        evaluate_images(tmp_path / "few", tmp_path / "a", TinyExtractor())


def test_the_command_prints_and_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    monkeypatch.setattr(features, "load_extractor", lambda name, **_: TinyExtractor())
    for name, seed in (("a", 0), ("b", 1)):
        make_folder(tmp_path / name, 12, seed=seed)
    out, kept = tmp_path / "scores", tmp_path / "b.safetensors"
    command = ["evaluate", "images", str(tmp_path / "a"), str(tmp_path / "b"), "--metrics", "frechet,is"]
    cli.main([*command, "--out", str(out), "--save-statistics", str(kept), "--intervals"])
    said = capsys.readouterr().out
    lines = read_lines(out / "metrics.jsonl")
    assert [line["metric"] for line in lines] == ["frechet", "is1", "is10"] and kept.is_file()
    assert f"{lines[0]['value']:.5g}" in said and "frechet12_images_12reals_tiny" in said
    assert lines[0]["low"] < lines[0]["value"] < lines[0]["high"] and lines[0]["commit"] is not None
    assert json.dumps(lines[0]["fakes"]["read_at"]) == "[24, 20]"
    assert "does not exist" in refused(["evaluate", "images", tmp_path / "none", tmp_path / "b"])
    (tmp_path / "run").mkdir()
    RunDirectory(tmp_path / "run").create(Config(), {"fingerprint": ""})
    assert "is a run directory" in refused([*command, "--out", str(tmp_path / "run")])
    assert "is a file; expected a folder" in refused([*command, "--out", str(kept)])
    assert "end in .safetensors" in refused([*command, "--save-statistics", str(tmp_path / "b.npz")])
