"""Models that come with the package: made from a run, taken by name wherever a run is, shown on one page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from attnorm import cli, load, pretrained
from attnorm.checkpoint import CheckpointError, Header, read_checkpoint, save_checkpoint
from attnorm.config import Config, ConfigError
from attnorm.inference import Inpainter, Sampler
from attnorm.presets import PRESETS
from attnorm.pretrained import Card, card_text, read_card, ship, shipped
from attnorm.settings import from_dict, override
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.inpainting import InpaintingTask

CARD = Card(
    **{"what": "noise of three classes", "data": "nothing, 32 pixels", "licence": "CC0", "recipe": "none"},
    **{"images_seen": 640, "hours": 0.5, "machine": "one core", "commit": "abc1234", "score": "accuracy 33%"},
    **{"scores": ("accuracy 33% of 300 images by a coin",), "limits": ("It shows nothing.",)},
    nearest="It has seen nothing to remember.",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    generator = override(
        Config(),
        [
            "model.image_size=32",
            "model.num_classes=3",
            "model.width=2",
            "data.source=/home/me/photographs",
            "run.start_from=/home/me/runs/first",
        ],
    )
    inpainting = override(PRESETS["inpaint-smoke"][1], ["model.width=2"])
    tasks = {
        "tiny-an": (ClassConditionalTask(generator, torch.device("cpu")), generator, ("a", "b", "c")),
        "holes-an": (InpaintingTask(inpainting, torch.device("cpu")), inpainting, ()),
    }
    files = {name: folder / f"{name}-run.safetensors" for name in tasks}
    for name, (task, config, classes) in tasks.items():
        save_checkpoint(files[name], task.state.tensors(), Header(config, classes, 640, 1800.0))
    return files


@pytest.fixture
def models(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setattr(pretrained, "FOLDER", folder)
    for name, file in sources.items():
        ship(file, name, CARD, folder)
    return folder


def run(arguments: Sequence[object]) -> None:
    cli.main([*map(str, arguments)])


def test_a_shipped_model_is_the_average_rounded_to_half_precision(models: Path, sources: dict[str, Path]) -> None:
    tensors, header = read_checkpoint(models / "tiny-an.safetensors")
    whole, _ = read_checkpoint(sources["tiny-an"])
    assert tensors.keys() == {name for name in whole if name.startswith("ema.")}
    for name, tensor in tensors.items():
        is_small = whole[name].is_floating_point() and whole[name].ndim >= 2
        assert tensor.dtype == (torch.float16 if is_small else whole[name].dtype)
        assert torch.equal(tensor, whole[name].to(tensor.dtype))
    assert header.images_seen == 640 and header.config.data.source == ""
    assert b"/home/me" not in (models / "tiny-an.safetensors").read_bytes()
    assert (models / "tiny-an.safetensors").stat().st_size < 0.4 * sources["tiny-an"].stat().st_size


def test_a_name_is_taken_where_a_run_is(
    models: Path, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    from_run = Sampler(sources["tiny-an"], device="cpu").sample([0, 1], [0, 2]).images
    by_name = Sampler("tiny-an", device="cpu").sample([0, 1], [0, 2]).images
    assert (from_run.int() - by_name.int()).abs().max() <= 2  # rounding of the weights
    assert load("holes-an").path == models / "holes-an.safetensors"
    run(["sample", "tiny-an", "--num", 1, "--out", "samples"])
    picture = Image.open(tmp_path / "samples/a/000000.png")
    shown = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
    assert (shown.int() - by_name[0].int()).abs().max() <= 1
    with pytest.raises(SystemExit):
        run(["evaluate", "tiny-an", "--data", "builtin", "--num", 3])  # there is no run for scores to go to


def test_an_unknown_name_is_told_the_nearest_and_what_is_there_goes_before_one(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"tiny-a does not exist; did you mean tiny-an\? expected a run"):
        Sampler("tiny-a")
    with pytest.raises(CheckpointError, match="was trained for class_conditional"):
        Inpainter("tiny-an")
    with pytest.raises(CheckpointError, match="holds the average of the weights alone"):
        Sampler("tiny-an", ema=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-an").mkdir()
    with pytest.raises(CheckpointError, match="tiny-an is not a run directory"):
        Sampler("tiny-an")


def test_models_are_listed_and_cards_shown(
    models: Path, sources: dict[str, Path], capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    run(["models"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].startswith("tiny-an") and lines[1].startswith("holes-an")
    for part in ("class_conditional", "nothing, 32 pixels", "MiB", "accuracy 33%"):
        assert part in lines[2]
    run(["models", "tiny-an"])
    assert capsys.readouterr().out.rstrip() == card_text("tiny-an", CARD).rstrip()
    assert read_card("tiny-an") == CARD
    assert "did you mean tiny-an? there are: holes-an, tiny-an" in refused(["models", "tiny"])
    ship(sources["tiny-an"], "smoke", CARD, models)
    run(["models"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("smoke is a preset too, another network: attnorm train --preset smoke, create_model('")


def test_the_page_shows_every_model_at_work(models: Path, tmp_path: Path) -> None:
    run(["models", "--out", tmp_path / "show"])
    text = (tmp_path / "show/index.html").read_text(encoding="utf-8")
    of_generators = ("samples.png", "interpolation.png", "layouts.png")
    for picture in (*(f"tiny-an/{name}" for name in of_generators), "holes-an/filled.png", "holes-an/layout.png"):
        assert f'src="{picture}"' in text
        with Image.open(tmp_path / "show" / picture) as image:
            assert min(image.size) > 50
    assert CARD.limits[0] in text and CARD.score[1:] in text
    # Generators first, whatever their names.
    assert text.index("tiny-an/samples.png") < text.index("holes-an/filled.png")


def test_a_model_that_is_too_large_is_refused(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "LARGEST", 1000)
    with pytest.raises(ConfigError, match=r"tiny-an would have .* MiB; expected at most"):
        ship(sources["tiny-an"], "tiny-an", CARD, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_card_leaves_nothing_out() -> None:
    values = json.loads(json.dumps(CARD.__dict__))
    with pytest.raises(ConfigError, match="a card says nothing of licence"):
        from_dict(Card, values | {"licence": ""})


def test_what_ships_keeps_its_promises() -> None:
    files = shipped()
    assert sum(file.stat().st_size for file in files.values()) <= 40 * 2**20
    for name, file in files.items():
        assert file.stat().st_size <= pretrained.LARGEST
        card, text = read_card(name), Path(__file__).parents[1] / f"docs/models/{name}.md"
        assert card_text(name, card) == text.read_text(encoding="utf-8")
        assert load(name).header.images_seen == card.images_seen
