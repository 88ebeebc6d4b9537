"""The report: its files and its subcommand, pictures inside the page, text never taken for markup, the same bytes."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attnorm import cli
from attnorm.checkpoint import Header, save_checkpoint
from attnorm.config import Config
from attnorm.models.class_conditional import Generator
from attnorm.presets import ROWS
from attnorm.reports.render import Document, Section, Strong, Table, to_html, to_markdown
from attnorm.reports.report import build_report, write_report
from attnorm.run_directory import RunDirectory
from attnorm.settings import override
from tests.conftest import contents

pytestmark = pytest.mark.usefixtures("few_pictures")
CLASSES = ("<b>cat</b>", "dog | co", "owl")
BENCH = Path(__file__).parents[2] / "docs/results/bench/cpu-float32.json"


def make_run(path: Path, row: str, *, value: float = 12.3) -> Path:
    """A run with random weights, one score and a line of training's log."""
    tiny = ("model.image_size=32", "model.width=2", "model.latent_dim=4", "model.num_classes=3", "model.an.eps=1e-5")
    config = override(ROWS[row][1](Config()), [*tiny, "data.source=/data/animals"])
    torch.manual_seed(0)
    weights = {f"ema.{name}": tensor for name, tensor in Generator(config.model).state_dict().items()}
    run = RunDirectory(path)
    run.create(config, {"source": "/data/animals", "fingerprint": "ab" * 32, "classes": list(CLASSES)})
    save_checkpoint(run.checkpoint_file(640), weights, Header(config, CLASSES, 640, 90.0, "only <i>memorised</i>"))
    run.metrics_file.write_text('{"images_seen": 8, "generator/loss": 1.0}\n', encoding="utf-8")
    score = {"metric": "frechet", "name": "FID", "protocol": "fid5k_train_inception", "value": value}
    (path / "evaluation").mkdir()
    line = json.dumps({**score, "images_seen": 640, "training_seconds": 90.0}) + "\n"
    (path / "evaluation/metrics.jsonl").write_text(line, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "a|n*", "an"), make_run(folder / "none", "sngan-star", value=20.0)]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `attnorm evaluate` of inpainters leaves, with its image grid."""
    folder = tmp_path_factory.mktemp("inpainting") / "scores"
    folder.mkdir()
    manifest = {"images": 4, "source": "street", "image_size": 32, "masks": "centre", "sha256": "9" * 64}
    values: dict[str, Any] = {"manifest": manifest, "models": {}, "floors": {}, "differences": [], "bootstrap": {}}
    (folder / "scores.json").write_text(json.dumps(values), encoding="utf-8")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
        folder / "image-grid.png"
    )
    return folder


class Reader(HTMLParser):
    """Checks that tags are closed in order, and keeps text, images and cells."""

    VOID = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        assert "href" not in values
        if tag == "img":
            self.images.append(values["src"] or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_page(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def written(runs: list[Path], scores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "out"
    said: list[tuple[int, int, str]] = []
    report = build_report(runs, [scores], [BENCH])
    paths = write_report(report, out, device="cpu", progress=lambda *step: said.append(step))
    assert paths == [out / name for name in ("report.md", "report.html", "report.json")]
    assert [step[0] for step in said] == [0, 1, 2, 3, 4, 5, 6] and {step[1] for step in said} == {6}
    return out


def test_every_figure_is_drawn_and_inside_the_page(written: Path, scores: Path) -> None:
    names = ["statistics.png", "layouts.png", "figure-7-1.png", "figure-7-2.png", "figure-8.png", "figure-9-1.png"]
    names += ["table-5-1.png", "curves.png"]
    assert {path.name for path in (written / "pictures").iterdir()} == {*names, "layouts.json"}
    reader = read_page(written / "report.html")
    assert len(reader.images) == len(names)
    for name, source in zip(names, reader.images, strict=True):
        start, _, data = source.partition(",")
        assert start == "data:image/png;base64"
        assert base64.b64decode(data) == (written / "pictures" / name).read_bytes(), name
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 1
    assert (written / "pictures/figure-9-1.png").read_bytes() == (scores / "image-grid.png").read_bytes()
    text = (written / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((.*?)\)", text) == [f"pictures/{name}" for name in names]
    pictures = json.loads((written / "report.json").read_text(encoding="utf-8"))["pictures"]
    files = [picture["file"] for section in pictures for picture in section["pictures"]]
    assert files == [f"pictures/{name}" for name in names]


def test_names_are_text_in_the_page_and_in_markdown(written: Path) -> None:
    reader = read_page(written / "report.html")
    assert not reader.tags & {"b", "i", "script"}
    said = "".join(reader.text)
    assert "a|n*" in said and "only <i>memorised</i>" in said and "12.30" in said
    text = (written / "report.md").read_text(encoding="utf-8")
    assert "| a\\|n\\* |" in text and "only \\<i>memorised\\</i>" in text and "<i>m" not in text.replace("\\<", "")


def test_every_row_of_a_table_in_markdown_has_as_many_cells_as_its_header(written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) > 6
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_without_an_there_are_samples_and_curves_only(runs: list[Path], tmp_path: Path) -> None:
    write_report(build_report(runs[1:], tables=(1,)), tmp_path / "out", device="cpu")
    names = {path.name for path in (tmp_path / "out/pictures").iterdir()}
    assert names == {"figure-7-1.png", "curves.png"}


def test_points_and_titles_are_shown_in_both_and_steer_neither() -> None:
    table = Table("a title", ("x", "y"), ((Strong("1"), "not run"),), ("a note \x1b[31m caf\udce9 <b>",))
    document = Document("Title", (Section("Heading", ("A paragraph.",), (table,), ("a point",)),))
    text = to_markdown(document)
    assert text.endswith(
        "## Heading\n\nA paragraph.\n\n**a title**\n\n| x | y |\n| --- | --- |\n| **1** | not run |\n\n"
        "a note \\x1b[31m caf\\xe9 \\<b>\n\n- a point\n"
    )
    shown = to_html(document, Path(), embed=True)
    assert "<h3>a title</h3>" in shown and '<td><strong>1</strong></td><td class="none">not run</td>' in shown
    assert r'<p class="note">a note \x1b[31m caf\xe9 &lt;b&gt;</p>' in shown
    assert "<ul>\n<li>a point</li>\n</ul>" in shown


# The subcommand


def test_the_subcommand_says_what_it_wrote_and_overwrites_only_when_told_with_the_same_bytes(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    command = ["report", str(runs[0]), "--out", str(out), "--device", "cpu"]
    cli.main(command)
    assert capsys.readouterr().out.split() == [str(out / name) for name in ("report.md", "report.html", "report.json")]
    before = contents(out)
    (out / "report.md").write_text("mine", encoding="utf-8")
    for mistake, message in (
        (command, "--overwrite"),
        (["report", "--out", str(out)], "nothing to report on was named"),
        (["report", str(tmp_path / "none"), "--out", str(out)], "is not a run directory"),
        ([*command, "--device", "abacus"], "the device is 'abacus'"),
    ):
        assert message in refused(mistake)
    assert (out / "report.md").read_text(encoding="utf-8") == "mine"
    cli.main([*command, "--overwrite"])
    assert contents(out) == before


def test_the_subcommand_takes_inpainters_and_benchmarks_without_any_run(
    scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    cli.main(["report", "--out", str(out), "--inpainting", str(scores), "--bench", str(BENCH)])
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "scores: 4 images of street" in text and "| AN | an-native | 2.52 |" in text
    assert {path.name for path in (out / "pictures").iterdir()} == {"figure-9-1.png", "table-5-1.png"}
