"""The paper's figures and the page: the numbers against loops, the pictures opened and looked at."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from attnorm.checkpoint import CheckpointError, Header, save_checkpoint
from attnorm.config import Config
from attnorm.data.images import ImageSet, fingerprint
from attnorm.inference import Sampler
from attnorm.layers.observe import Observation
from attnorm.reports import figures
from attnorm.reports.page import write_page
from attnorm.run_directory import RunDirectory
from attnorm.settings import override
from attnorm.training.class_conditional import ClassConditionalTask
from tests.conftest import look_at

CLASSES = ("<b>cat</b>", "dog & co", "owl")
NOTE = "Each class is one photograph: a generator can only memorise them <sic>."
METRICS: tuple[dict[str, Any], ...] = (
    {"images_seen": 0, "layout/generator.an/entropy": 0.5, "layout/generator.an/usage": [0.5, 0.5, 0.0]},
    {"images_seen": 8, "generator/loss": 1.0, "discriminator/loss": 2.0, "discriminator/real_score": 0.25},
    {"images_seen": 16, "generator/loss": 3.0, "discriminator/loss": 1.5, "discriminator/fake_score": -0.5},
    {"images_seen": 16, "layout/generator.an/entropy": 0.75, "layout/generator.an/usage": [1.0, 0.0, 0.0]},
)


def make_run(path: Path, *settings: str) -> Path:
    """A run directory as training leaves it, with a model that nobody trained."""
    tiny = ("model.image_size=32", "model.width=2", "model.latent_dim=4", "model.an.num_entities=3")
    config = override(Config(), [*tiny, "model.num_classes=3", "model.an.temperature=2", "data.source=builtin"])
    config = override(config, settings)
    torch.manual_seed(0)
    task = ClassConditionalTask(config, torch.device("cpu"))
    run = RunDirectory(path)
    run.create(config, {"fingerprint": ""})
    header = Header(config, CLASSES, 640, 90.0, NOTE)
    save_checkpoint(run.checkpoint_file(640), task.state.tensors(), header)
    lines = [json.dumps(row) for row in METRICS] + ['{"images_seen": 24, "gen']  # a line that is being written
    run.metrics_file.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("figures") / "run")


@pytest.fixture(scope="module")
def sampler(run: Path) -> Sampler:
    return Sampler(run, device="cpu")


@pytest.fixture(scope="module")
def originals() -> ImageSet:
    """In place of the built-in photographs."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(30, dtype=np.int64) % 3
    return ImageSet(pixels, labels, CLASSES, "builtin", fingerprint(pixels, labels, CLASSES))


def observation(num: int = 2, entities: int = 4, channels: int = 3) -> Observation:
    generator = torch.Generator().manual_seed(0)
    layout = torch.rand(num, entities, 5, 7, generator=generator) ** 3
    return Observation(torch.randn(num, channels, 5, 7, generator=generator) + 2, layout / layout.sum(1, keepdim=True))


def drawn(figure: Figure) -> list[np.ndarray]:
    """The pictures in a figure, in reading order."""
    return [np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images]


def titles(figure: Figure) -> list[str]:
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


# Numbers


def test_region_statistics_equal_a_loop_over_pixels() -> None:
    seen = observation()
    rows = figures.region_statistics(seen)
    assert len(rows) == 2
    for features, layout, row in zip(seen.features, seen.layout, rows, strict=True):
        pixels: dict[int, list[list[float]]] = {}
        for i in range(5):
            for j in range(7):
                winner = max(range(4), key=lambda k, i=i, j=j, layout=layout: layout[k, i, j].item())
                pixels.setdefault(winner, []).append([features[c, i, j].item() for c in range(3)])
        everything = [pixel for region in pixels.values() for pixel in region]
        for name, region in [("whole", everything), *pixels.items()]:
            means = [sum(pixel[c] for pixel in region) / len(region) for c in range(3)]
            variances = [sum((pixel[c] - means[c]) ** 2 for pixel in region) / len(region) for c in range(3)]
            ours = row["whole"] if name == "whole" else row["regions"][name]
            assert ours["mean"] == pytest.approx(sum(means) / 3, rel=1e-5)
            assert ours["std"] == pytest.approx(sum(map(math.sqrt, variances)) / 3, rel=1e-5, abs=1e-9)
            if name != "whole":
                assert ours["share"] == pytest.approx(len(region) / 35)
        assert row["regions"].keys() == pixels.keys()


def test_the_most_telling_entity_varies_most_over_the_pixels() -> None:
    layout = torch.full((2, 3, 4, 4), 0.1)
    layout[:, 1, :2] = 0.5  # varies within each image
    layout[0, 2] = 0.9  # differs between images, but is flat in each
    assert figures.most_telling_entity(layout) == 1


def test_metrics_are_read_up_to_a_line_that_is_being_written(run: Path, tmp_path: Path) -> None:
    assert figures.read_metrics(run) == list(METRICS)
    with pytest.raises(CheckpointError, match=r"has no metrics\.jsonl"):
        figures.read_metrics(tmp_path)


# Pictures


def test_the_samples_figure_shows_each_class_and_seed(sampler: Sampler) -> None:
    figure = figures.samples_figure(sampler, [2, 0], columns=3, seed=5)
    pictures = drawn(figure)
    expected = [sampler.sample([5, 6, 7], [label] * 3).images for label in (2, 0)]
    assert len(pictures) == 6
    for picture, image in zip(pictures, torch.cat(expected), strict=True):
        np.testing.assert_array_equal(picture, image.permute(1, 2, 0).numpy())
    assert [text.get_text() for axis in figure.axes for text in axis.texts] == ["owl", "<b>cat</b>"]


def test_the_layout_figure_shows_image_winners_and_every_entity(tmp_path: Path) -> None:
    seen = observation()
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    figure = figures.layout_figure(images, seen, ["first", "second"])
    look_at(figures.save_figure(figure, tmp_path / "x.png"))
    pictures = drawn(figure)
    assert len(pictures) == 2 * (1 + 1 + 4)
    np.testing.assert_array_equal(pictures[6], images[1].permute(1, 2, 0).numpy())
    # One colour for each entity that wins somewhere, at the pixels where it wins.
    winners = seen.layout[0].argmax(0).numpy()
    colours = {(entity, *colour) for entity, colour in zip(winners.flat, pictures[1].reshape(-1, 3), strict=True)}
    assert len(colours) == len({colour[1:] for colour in colours}) == len(np.unique(winners))
    for entity in range(4):  # brightest where the entity's share is largest, darkest where it is least
        shown, share = pictures[2 + entity][..., 0], seen.layout[0, entity].numpy()
        assert shown[np.unravel_index(share.argmax(), share.shape)] == 1.0
        assert shown[np.unravel_index(share.argmin(), share.shape)] == 0.0
    assert titles(figure) == ["image", "argmax", "0", "1", "2", "3"]


def test_the_statistics_figure_shows_the_largest_regions_with_their_numbers(tmp_path: Path) -> None:
    seen = observation()
    images = torch.zeros(2, 3, 5, 7, dtype=torch.uint8)
    figure = figures.statistics_figure(images, seen, regions=2)
    look_at(figures.save_figure(figure, tmp_path / "x.png"))
    row = figures.region_statistics(seen)[0]
    largest = sorted(row["regions"], key=lambda entity: -row["regions"][entity]["share"])[:2]
    expected = [f"({row['whole']['mean']:.2f}, {row['whole']['std']:.2f})"]
    expected += [f"{k}: ({row['regions'][k]['mean']:.2f}, {row['regions'][k]['std']:.2f})" for k in largest]
    assert titles(figure)[:3] == expected


def test_the_interpolation_figure_shows_one_entity_on_one_scale(tmp_path: Path) -> None:
    layout = torch.zeros(2, 2, 4, 4)
    layout[0, 1, 0, 0], layout[1, 1, 0, 0] = 1.0, 0.5
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    figure = figures.interpolation_figure(images, layout, 1, ["from", "to"])
    pictures = drawn(figure)
    assert len(pictures) == 4 and titles(figure) == ["from", "to"]
    assert pictures[2][0, 0, 0] == 1.0 and 0.45 < pictures[3][0, 0, 0] < 0.55
    look_at(figures.save_figure(figure, tmp_path / "x.png"))
    assert len(drawn(figures.interpolation_figure(images, None, 0, ["from", "to"]))) == 2


def test_curves_show_what_the_metrics_say(run: Path, tmp_path: Path) -> None:
    figure = figures.curves_figure({"demo": run})
    look_at(figures.save_figure(figure, tmp_path / "x.png"))
    losses, scores, entropy, usage = figure.axes
    assert [line.get_xydata().tolist() for line in losses.lines] == [[[8, 1.0], [16, 3.0]], [[8, 2.0], [16, 1.5]]]
    assert [line.get_xydata().tolist() for line in scores.lines] == [[[8, 0.25]], [[16, -0.5]]]
    assert entropy.lines[0].get_xydata().tolist() == [[0, 0.5], [16, 0.75]]
    assert usage.lines[0].get_xydata() == pytest.approx(np.array([[0, 2.0], [16, 1.0]]))
    assert [line.get_label() for line in losses.lines] == ["generator/loss", "discriminator/loss"]


def test_a_dozen_runs_have_a_dozen_colours() -> None:
    names = [f"run-{number}" for number in range(12)]
    assert len({figures._colour_of(name, names) for name in names}) == 12


def write_scores(run: Path, *scores: dict[str, Any]) -> None:
    common = {"metric": "frechet", "name": "FID", "protocol": "fid5k_train_inception", "weights": "ema"}
    (run / "evaluation").mkdir(parents=True)
    lines = [json.dumps({**common, "data": {"fingerprint": "ab" * 32}, **score}) for score in scores]
    (run / "evaluation/metrics.jsonl").write_text("\n".join([*lines, '{"metric": "fre']), encoding="utf-8")
    (run / "metrics.jsonl").touch()


def test_curves_show_distances_against_images_and_hours_a_panel_a_protocol(tmp_path: Path) -> None:
    def score(images_seen: int, value: float, **changes: Any) -> dict[str, Any]:
        return {"images_seen": images_seen, "training_seconds": 36.0 * images_seen, "value": value, **changes}

    lite = {"name": "Fréchet distance (lite)", "protocol": "frechet5k_train_lite"}
    scores = [score(200, 9.0), score(100, 20.0), score(200, 8.0)]  # measured again
    others = [score(200, 5.0, seed=3), score(200, 1.0, subset=True), score(200, 7.0, metric="kid")]
    write_scores(tmp_path / "one", *scores, *others, score(100, 30.0, **lite), score(100, 25.0, weights="raw"))
    write_scores(tmp_path / "two", score(150, 12.0), score(100, 14.0, data={"fingerprint": "cd" * 32}))
    figure = figures.curves_figure({"one": tmp_path / "one", "two": tmp_path / "two"})
    look_at(figures.save_figure(figure, tmp_path / "x.png"))
    panels = {
        (axis.get_title(), axis.get_xlabel(), axis.get_ylabel()): {
            line.get_label(): line.get_xydata().tolist() for line in axis.lines
        }
        for axis in figure.axes
    }
    expected = {
        ("fid5k_train_inception, data abababab", "FID"): {
            "one averaged weights": [[100, 20.0], [200, 8.0]],
            "one raw weights": [[100, 25.0]],
            "two averaged weights": [[150, 12.0]],
        },
        ("fid5k_train_inception, data cdcdcdcd", "FID"): {"two averaged weights": [[100, 14.0]]},
        ("frechet5k_train_lite, data abababab", lite["name"]): {"one averaged weights": [[100, 30.0]]},
    }
    hours = "hours of training"
    for (title, label), lines in expected.items():
        assert panels.pop((title, "images seen", label)) == lines
        in_hours = {name: [[seen / 100, value] for seen, value in points] for name, points in lines.items()}
        assert panels.pop((title, hours, label)) == in_hours
    assert not panels
    assert [axis.get_xlabel() for axis in figure.axes[:2]] == ["images seen", hours]


def test_of_several_runs_a_colour_is_a_run_and_a_style_is_what_it_shows(run: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"images_seen": 8, "discriminator/loss": 1.0}\n', encoding="utf-8")
    figure = figures.curves_figure({"one": run, "two": tmp_path})
    drawn = {line.get_label(): line for line in figure.axes[0].lines}
    assert drawn["two discriminator/loss"].get_linestyle() == drawn["one discriminator/loss"].get_linestyle() == "--"
    (legend,) = figure.legends
    colours = {text.get_text(): line.get_color() for text, line in zip(legend.texts, legend.get_lines(), strict=True)}
    assert colours == {name: drawn[f"{name} discriminator/loss"].get_color() for name in ("one", "two")}
    panel = figure.axes[0].get_legend()
    assert [text.get_text() for text in panel.texts] == ["generator/loss", "discriminator/loss"]


def test_layouts_are_written_with_their_numbers(sampler: Sampler, tmp_path: Path) -> None:
    files = figures.write_layouts(sampler, [1, 2], 7, tmp_path)
    assert sorted(path.name for path in files) == ["layouts.json", "layouts.png", "statistics.png"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    for path in files:
        if path.suffix == ".png":
            look_at(path)
    numbers = json.loads((tmp_path / "layouts.json").read_text(encoding="utf-8"))
    layout = sampler.sample([7, 8], [1, 2], with_layouts=True).layouts["blocks.2.an"]
    assert list(numbers) == ["blocks.2.an"]
    site = numbers["blocks.2.an"]
    probabilities = layout.layout.double()
    entropy = -(probabilities * probabilities.log()).sum(1).mean().item() / math.log(3)
    assert site["entropy"] == pytest.approx(entropy, rel=1e-4)
    wins = layout.layout.argmax(1)
    assert site["usage"] == pytest.approx([(wins == k).double().mean().item() for k in range(3)])
    assert [(image["class"], image["seed"]) for image in site["images"]] == [("dog & co", 7), ("owl", 8)]
    whole = layout.features[1].double().flatten(1)
    assert site["images"][1]["whole"]["mean"] == pytest.approx(whole.mean().item(), rel=1e-4, abs=1e-6)
    assert site["images"][1]["whole"]["std"] == pytest.approx(whole.std(1, correction=0).mean().item(), rel=1e-4)


# The page


@pytest.fixture(scope="module")
def page(run: Path, sampler: Sampler, originals: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnorm.reports.page.load_images", lambda source, size: originals)
        return write_page(run, sampler, tmp_path_factory.mktemp("page") / "out")


def test_the_page_names_only_files_that_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r'(?:src|href)="([^"]+)"', text)
    pictures = {"samples.png", "originals.png", "layouts.png", "statistics.png", "interpolation.png", "curves.png"}
    assert set(named) == pictures
    for name in named:
        look_at(page.parent / name)
    assert {entry.name for entry in page.parent.iterdir()} == pictures | {"index.html", "layouts.json"}


def test_the_page_says_what_the_data_are_and_how_long_it_took(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "a generator can only memorise them &lt;sic&gt;." in text
    assert "builtin" in text and "1.5 minutes" in text and "10 generator steps, 640 images" in text
    entropy = json.loads((page.parent / "layouts.json").read_text(encoding="utf-8"))["blocks.2.an"]["entropy"]
    assert f"entropy is {entropy:.3f}" in text.replace("\n", " ")


def test_the_page_never_takes_text_for_html(page: Path, run: Path, sampler: Sampler, tmp_path: Path) -> None:
    assert "<b>" not in page.read_text(encoding="utf-8")
    config = sampler.header.config
    hostile = replace(config, preset='"><script>', data=replace(config.data, source="<i>"))
    other = Sampler(sampler.path, device="cpu")
    other.header = replace(other.header, config=hostile, note="<script>alert(1)</script>")
    text = write_page(run, other, tmp_path / "out").read_text(encoding="utf-8")
    assert "<script>" not in text and "<i>" not in text and "&lt;script&gt;alert" in text


def test_the_page_of_a_run_without_layers_or_originals_leaves_these_out(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", "model.context=none", "data.source=/photographs")
    plain = Sampler(path, device="cpu")
    with pytest.raises(CheckpointError, match="no AttentiveNorm2d in its generator"):
        figures.write_layouts(plain, [0], 0, tmp_path / "layouts")
    text = write_page(path, plain, tmp_path / "out").read_text(encoding="utf-8")
    assert set(re.findall(r'src="([^"]+)"', text)) == {"samples.png", "interpolation.png", "curves.png"}
    assert not (tmp_path / "out/layouts.png").exists() and not (tmp_path / "layouts").exists()


def test_names_of_any_kind_are_drawn_as_they_are(tmp_path: Path, run: Path) -> None:
    """Neither formulas, nor bytes that are not UTF-8, nor accents in pieces."""
    names = ["$5_$10", "caf\udce9", "cafe\u0301", "\x1b[31m"]
    figure = figures.images_figure([[torch.zeros(3, 2, 2, dtype=torch.uint8)] for _ in names], names)
    figures.save_figure(figure, tmp_path / "x.png")
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert [text.get_text() for text in texts] == ["$5_$10", r"caf\xe9", "caf\u00e9", r"\x1b[31m"]
    figure = figures.curves_figure({name: run for name in names})
    figures.save_figure(figure, tmp_path / "x.png")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["$5_$10", r"caf\xe9", "caf\u00e9", r"\x1b[31m"]


def test_what_the_usual_font_lacks_is_of_an_installed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matplotlib brings STIXGeneral, which has U+231A; without it a box is drawn, and a warning given."""
    figure = Figure()
    figure.text(0.1, 0.5, "\u231a cat")
    with pytest.warns(UserWarning, match="Glyph 8986"):
        figures.save_figure(figure, tmp_path / "box.png")
    monkeypatch.setattr(figures, "FALLBACK_FONTS", ("A font that is nowhere", "STIXGeneral"))
    figures.save_figure(figure, tmp_path / "watch.png")  # a warning would be an error
    assert (look_at(tmp_path / "watch.png") < 128).any()
