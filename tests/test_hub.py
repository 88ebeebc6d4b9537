"""Models to folders as the Hugging Face Hub has them and back, by name, and without huggingface_hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import attnorm
from attnorm import AttentiveNorm2d, Generator, InpaintingGenerator, cli, create_model, list_models, load
from attnorm.checkpoint import CheckpointError, Header, find_damage, save_checkpoint
from attnorm.config import Config, ConfigError, UserError
from attnorm.hub import describe
from attnorm.inference import Inpainter, Sampler
from attnorm.presets import PRESETS
from attnorm.run_directory import RunDirectory
from attnorm.settings import override
from attnorm.studio.models import available_models
from attnorm.system.files import write_lines
from tests.conftest import awake


def config_of(task: str) -> Config:
    if task == "inpainting":
        return override(PRESETS["inpaint-smoke"][1], ["model.width=2", "model.an.num_entities=3"])
    settings = ["model.image_size=32", "model.num_classes=3", "model.width=2", "model.latent_dim=5"]
    settings += ["model.g_channels=2,2,1,1", "model.an_blocks=1,2"]
    if task == "grouped":
        settings += ["model.architecture=grouped", "model.width=16"]
    return override(Config(), [*settings, "data.source=/home/me/photographs", "run.seed=7"])


@pytest.fixture(params=["class_conditional", "grouped", "inpainting"])
def model(request: pytest.FixtureRequest) -> Any:
    config = config_of(request.param)
    network = awake(attnorm.registry.build_generator(config.model))
    network.header = Header(config, () if request.param == "inpainting" else ("tench", "b", "<c>"), 640, 1.5, "note")
    return network


def pictures(network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if isinstance(network, InpaintingGenerator):
            mask = torch.zeros(2, 1, 32, 40)
            mask[:, :, 8:20, 8:24] = 1
            return network(torch.rand(2, 3, 32, 40, generator=generator), mask).refined
        return network(torch.randn(4, 5, generator=generator), torch.tensor([0, 1, 2, 2]))


def test_a_saved_model_makes_the_same_pictures_and_keeps_its_configuration(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    for again in (type(model).from_pretrained(tmp_path / "model"), load(str(tmp_path / "model")).model):
        assert type(again) is type(model) and not again.training
        assert torch.equal(pictures(again), pictures(model))
        assert again.config == model.config
        assert again.header == model.header.public()
    names = set(safetensors.torch.load_file(tmp_path / "model/model.safetensors"))
    assert names == set(model.state_dict())  # by their own names, for whoever reads them without attnorm
    values = json.loads((tmp_path / "model/config.json").read_text())
    assert values["architectures"] == [type(model).__name__] and values["inference"] == describe(model.header)
    assert "/home/me" not in "".join(file.read_text(errors="replace") for file in (tmp_path / "model").iterdir())
    card = (tmp_path / "model/README.md").read_text()
    assert f"from attnorm import {type(model).__name__}\n" in card and hasattr(attnorm, type(model).__name__)
    assert load(tmp_path / "model").classes == model.header.classes


def test_a_network_that_nothing_is_known_of_numbers_its_classes(tmp_path: Path) -> None:
    network = Generator(config_of("class_conditional").model).half()
    network.save_pretrained(tmp_path)
    assert load(tmp_path).classes == ("0", "1", "2")
    again = Generator.from_pretrained(tmp_path)  # computes in float32 with the rounded weights
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(again.parameters(), network.parameters(), strict=True))


def test_shipped_models_in_half_precision_go_to_a_folder_with_their_cards(tmp_path: Path) -> None:
    for name in list_models(pretrained=True):
        network = create_model(name, pretrained=True)
        network.save_pretrained(tmp_path / name)
        again = create_model(str(tmp_path / name), pretrained=True)
        pairs = zip(network.state_dict().values(), again.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        card = (tmp_path / name / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: attnorm\n") and "licence of the data" in card and "## Scores" in card
        again.save_pretrained(tmp_path / "again" / name)  # what is known is handed on
        assert (tmp_path / "again" / name / "README.md").read_text() == card


def test_the_command_line_and_the_studio_take_a_saved_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for task in ("class_conditional", "inpainting"):
        network = awake(attnorm.registry.build_generator(config_of(task).model))
        network.save_pretrained(f"saved/{task}")
    cli.main(["sample", "saved/class_conditional", "--num", "2", "--out", "samples"])
    assert Path("samples/0/000000.png").is_file() and Path("samples/1/000001.png").is_file()
    assert Inpainter("saved/inpainting").has_layout
    found = {m.id: m for m in available_models([Path("saved")])}
    assert found["class_conditional"].classes == ("0", "1", "2") and not found["inpainting"].problem
    with pytest.raises(CheckpointError, match="holds the average of the weights alone"):
        Sampler("saved/class_conditional", ema=False)


def test_the_scores_of_a_run_are_on_its_card_and_the_run_itself_is_left_alone(tmp_path: Path) -> None:
    config, run = config_of("class_conditional"), RunDirectory(tmp_path / "run")
    run.create(config, {})
    state = {f"ema.{name}": tensor for name, tensor in Generator(config.model).state_dict().items()}
    save_checkpoint(run.checkpoint_file(640), state, Header(config, ("a", "b", "c"), 640, 1.5))
    run.scores_file.parent.mkdir()
    score = {"metric": "frechet", "name": "FID", "value": 12.3456, "protocol": "fid50k_train", "images_seen": 640}
    write_lines(run.scores_file, [score, score | {"images_seen": 320, "value": 99}, score | {"site": "blocks.1.an"}])
    network = load(run.path).model
    with pytest.raises(UserError, match="of something else, perhaps of a run; choose another folder"):
        network.save_pretrained(run.path)
    assert run.read()[0] == config
    network.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved/README.md").read_text()
    assert "- scores: FID 12.35 (fid50k_train)\n" in card and "of 3 classes: a, b, c" in card
    assert huggingface_hub.ModelCard(card).data.library_name == "attnorm"


def test_what_is_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Generator(config_of("class_conditional").model)
    changes = attnorm.insert_after(network, "blocks.0.conv1")
    with pytest.raises(UserError, match=r"describes: blocks\.0\.conv1\.inserted\.bias and 13 other tensors"):
        network.save_pretrained(tmp_path)
    changes.undo()
    network.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds another network than InpaintingGenerator"):
        InpaintingGenerator.from_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "is not what was written" in find_damage(weights)
    (tmp_path / "config.json").write_text('{"format_version": 1}')
    with pytest.raises(CheckpointError, match=r"config\.json has a damaged header"):
        Generator.from_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"me/none is not on this machine; .* or a model on the Hub"):
        Generator.from_pretrained("me/none", cache_dir=tmp_path)


class Hub:
    """A folder for the Hub: what HfApi and snapshot_download do there."""

    folder: Path

    def __init__(self, token: str | None = None) -> None:
        pass

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return type("Repository", (), {"repo_id": repo_id})()

    def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        shutil.copytree(folder_path, self.folder / repo_id)
        return f"https://hub/{repo_id}/commit/0"


def test_a_model_goes_to_the_hub_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub.folder = tmp_path
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / name))
    network = awake(Generator(config_of("class_conditional").model))
    assert network.push_to_hub("me/birds") == "https://hub/me/birds/commit/0"
    written = {file.name for file in (tmp_path / "me/birds").iterdir()}
    assert written == {"README.md", "config.json", "model.safetensors"}
    assert torch.equal(pictures(Generator.from_pretrained("me/birds")), pictures(network))
    assert torch.equal(pictures(create_model("me/birds", pretrained=True)), pictures(network))


def test_a_network_of_ones_own_with_the_layer_goes_through_huggingfaces_mixin(tmp_path: Path) -> None:
    class Network(nn.Module, huggingface_hub.PyTorchModelHubMixin):
        def __init__(self, channels: int = 4) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, channels, 3), AttentiveNorm2d(channels, num_entities=3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    network = Network(channels=6)
    network(torch.randn(2, 3, 8, 8))  # the layer's running moments are part of what is saved
    awake(network).save_pretrained(tmp_path)
    x = torch.randn(1, 3, 9, 7)
    assert torch.equal(Network.from_pretrained(tmp_path)(x), network(x))


def test_models_are_listed_and_made_by_name() -> None:
    shipped = set(list_models(pretrained=True))
    assert set(list_models()) == (set(PRESETS) - shipped) | shipped | {"preset:cifar10-an"}
    # Two networks of one name: the model, which was trained by another recipe, and the paper's at its widths.
    model, preset = create_model("cifar10-an"), create_model("preset:cifar10-an", num_classes=10)
    assert model.config == create_model("cifar10-an", pretrained=True).config
    assert preset.config == replace(PRESETS["cifar10-an"][1].model, num_classes=10) and preset.config != model.config
    assert create_model("preset:inpaint64-an").config == create_model("inpaint64-an").config
    assert list_models("inpaint64-*") == sorted(name for name in PRESETS if name.startswith("inpaint64-"))
    network = create_model("small32-relativistic-an", num_classes=5)
    assert network.num_classes == 5 and network.training and network.config.architecture == "grouped"
    assert create_model("buildings-an").config == create_model("buildings-an", pretrained=True).config
    for arguments, settings, message in (
        (("cifar10-am",), {}, r"no model 'cifar10-am'; did you mean cifar10-an\?"),
        (("inpaint64-an", True), {}, "the preset inpaint64-an has no weights; these have: buildings-an"),
        (("preset:cifar10-an", True), {}, "the preset cifar10-an has no weights; these have: buildings-an"),
        (("buildings-an", True), {"width": 3}, "width cannot be set"),
        (("inpaint64-an",), {"widht": 3}, r"no setting widht; did you mean width\?"),
        (("small32-an",), {}, "model.num_classes is 0"),
    ):
        with pytest.raises(ConfigError if "num_classes" not in message else ValueError, match=message):
            create_model(*arguments, **settings)


def test_all_but_saving_works_without_huggingface_hub(tmp_path: Path) -> None:
    Generator(config_of("class_conditional").model).save_pretrained(tmp_path)
    code = f"""
import sys
sys.modules["huggingface_hub"] = None
from attnorm import Generator, create_model, list_models
model = Generator.from_pretrained({str(tmp_path)!r})
for act in (lambda: model.save_pretrained("elsewhere"), lambda: Generator.from_pretrained("me/none")):
    try:
        act()
    except ValueError as error:
        print(error)
print(create_model("buildings-an", pretrained=True).header.images_seen)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = run.stdout.splitlines()
    assert len(lines) == 3, run.stderr
    assert lines[0] == "huggingface_hub is not installed; saving for the Hub needs: pip install 'attnorm[hub]'"
    assert lines[1].endswith("the Hub needs: pip install 'attnorm[hub]'") and lines[2].isdecimal()
