"""Time and memory of a forward pass by size, and what is said where it does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from attnorm.checkpoint import Header, save_checkpoint
from attnorm.evaluation.latency import measure_latency
from attnorm.models.inpainting import InpaintingGenerator
from attnorm.presets import PRESETS
from attnorm.reports.inpainting import write_latency
from attnorm.run_directory import RunDirectory
from attnorm.settings import override


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    named = {}
    for context in ("an", "contextual"):
        path = tmp_path_factory.mktemp("runs") / context
        config = override(PRESETS["inpaint-smoke"][1], [f"model.context={context}"])
        weights = InpaintingGenerator(config.model).state_dict()
        run = RunDirectory(path)
        run.create(config, {})
        save_checkpoint(run.checkpoint_file(8), {f"ema.{n}": w for n, w in weights.items()}, Header(config, (), 8, 1.0))
        named[context] = path
    return named


def test_memory_grows_with_the_pixels_and_attention_holds_its_scores(runs: dict[str, Path]) -> None:
    cells = {(c.model, c.image_size): c for c in measure_latency(runs, [256, 32, 128], device="cpu", seconds=0)}
    assert list(cells) == [(name, size) for name in ("an", "contextual") for size in (32, 128, 256)]
    for cell in cells.values():
        assert cell.milliseconds is not None and cell.milliseconds > 0 and cell.passes == 1 and not cell.skipped
    peaks = {key: cell.peak_bytes or 0 for key, cell in cells.items()}
    # By hand, at 256 pixels: 32 by 32 patches, every one with every one, 4 bytes each.
    assert cells["contextual", 256].score_bytes == 4 * 1024**2 and cells["an", 256].score_bytes is None
    assert 3.9 < peaks["an", 256] / peaks["an", 128] < 4.1
    assert peaks["contextual", 256] > peaks["an", 256] + 4 * 1024**2
    # The decoder's last maps alone: 8 and 4 floats a pixel.
    assert peaks["an", 256] > 256 * 256 * 4 * 4


def test_what_would_not_fit_is_skipped_with_the_bytes_of_its_scores(runs: dict[str, Path], tmp_path: Path) -> None:
    cells = measure_latency(runs, [64, 128, 256, 512], device="cpu", seconds=0, allowed_bytes=16_000_000)
    found = {(cell.model, cell.image_size): cell for cell in cells}
    assert not found["an", 256].skipped and not found["contextual", 128].skipped
    # Neither its scores alone nor four times the memory at 128 are too much; sixteen times would be.
    skipped = found["contextual", 256]
    assert skipped.milliseconds is None and skipped.peak_bytes is None
    assert skipped.score_bytes == 4 * (32 * 32) ** 2
    assert re.fullmatch(r"would need up to [\d,]+ bytes; 16,000,000 are allowed", skipped.skipped)
    assert found["contextual", 512].score_bytes == 4 * (64 * 64) ** 2
    assert found["contextual", 512].skipped == "a smaller size did not fit"

    files = write_latency(cells, "cpu", tmp_path / "cost")
    values = json.loads(files[0].read_text(encoding="utf-8"))
    assert values["environment"]["device"] == "cpu" and values["environment"]["threads"] == torch.get_num_threads()
    assert values["cells"][6]["score_bytes"] == skipped.score_bytes
    text = files[1].read_text(encoding="utf-8")
    assert "|  | 64 x 64 | 128 x 128 | 256 x 256 | 512 x 512 |" in text
    assert "are allowed; a score matrix 4.0 MiB |" in text


def test_a_lack_of_memory_is_reported_and_any_other_failure_is_not_hidden(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(message: str) -> None:
        def forward(*_: object) -> None:
            raise RuntimeError(message)

        monkeypatch.setattr(InpaintingGenerator, "forward", forward)

    fail("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    (cell, after) = measure_latency({"an": runs["an"]}, [64, 128], device="cpu", seconds=0)
    assert cell.skipped == "out of memory" and after.skipped == "a smaller size did not fit"
    fail("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        measure_latency({"an": runs["an"]}, [64], device="cpu", seconds=0)
