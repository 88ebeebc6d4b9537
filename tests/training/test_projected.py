"""The recipe "projected": its losses to the letter, what learns and what does not, and resuming to the last bit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from attnorm.checkpoint import read_checkpoint
from attnorm.config import Config, ConfigError, ProjectedConfig
from attnorm.data.stream import Batch
from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.presets import PRESETS
from attnorm.settings import from_dict, override, to_dict
from attnorm.system.randomness import BatchPart
from attnorm.training.augmentation import augment
from attnorm.training.projected import ProjectedTask
from attnorm.training.trainer import run_phase
from tests.training.conftest import check_resume

TINY = (
    "model.width=2",
    "model.num_classes=3",
    "model.latent_dim=4",
    "projected.feature_size=32",
    "projected.width=2",
    "run.device=cpu",
    "run.precision=float32",
    "run.batch_size=4",
    "run.duration_images=16",
    "run.checkpoint_every_images=8",
    "run.layout_every_images=8",
    "run.grid_every_images=8",
    "run.keep_checkpoints=9",
)


def tiny(context: str = "an", *settings: str) -> Config:
    return override(PRESETS[f"cifar10-projected-{context}"][1], [*TINY, *settings])


def task_of(config: Config) -> ProjectedTask:
    torch.manual_seed(0)
    task = ProjectedTask(config, torch.device("cpu"))
    for module in task.generator.modules():
        if isinstance(module, AttentiveNorm2d):
            torch.nn.init.constant_(module.rho, 0.5)
    return task


def batch() -> Batch:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(images, torch.tensor([0, 1, 2, 1]))


def test_losses_are_hinges_of_every_score_of_augmented_images() -> None:
    task = task_of(tiny())
    task.discriminator.eval()  # no power iterations between the passes
    generate, discriminate = task.phases(0)
    torch.manual_seed(7)
    loss, logged = generate.loss(batch())
    torch.manual_seed(8)
    d_loss, _ = discriminate.loss(batch())

    torch.manual_seed(7)
    labels = batch().labels
    fake = task.generator(torch.randn(4, 4), labels)
    fake = augment(fake, ("color", "translation", "cutout"))
    torch.manual_seed(8)
    real = augment(batch().images, ("color", "translation", "cutout"))
    scores = [
        torch.cat([head(h, labels) for head, h in zip(task.discriminator.heads, maps, strict=True)], 1)
        for maps in (task.discriminator.projector(real), task.discriminator.projector(fake))
    ]
    expected = torch.relu(1 - scores[0]).mean() + torch.relu(1 + scores[1]).mean()
    torch.testing.assert_close(d_loss, expected)
    torch.testing.assert_close(logged["generator/loss"], -scores[1].mean())
    torch.testing.assert_close(loss, -scores[1].mean() + 1e-3 * logged["generator/orthogonality"])


def test_the_generators_update_moves_all_of_it_and_nothing_else() -> None:
    task = task_of(tiny())
    before = {name: tensor.clone() for name, tensor in task.state.tensors().items()}
    features = [part.clone() for part in task.discriminator.projector.features.buffers()]
    made: list[torch.Tensor] = []
    task.generator.register_forward_hook(lambda *arguments: made.append(arguments[2]))
    looks: list[int] = []
    task.discriminator.projector.features.register_forward_hook(lambda *arguments: looks.append(len(arguments[2][0])))
    generate, discriminate = task.phases(0)
    run_phase(generate, task.state, batch())
    assert all(parameter.grad is not None for parameter in task.generator.parameters())
    # Biases that a batch norm takes off again have gradients of rounding alone.
    weights = [name for name, p in task.generator.named_parameters() if p.ndim == 4]
    assert all(task.generator.get_parameter(name).grad.abs().max() > 0 for name in weights)
    assert all(parameter.grad is None for parameter in task.discriminator.parameters())
    run_phase(discriminate, task.state, batch())
    # The images that the generator was updated with are judged: made once; looked at once, and so are the real ones.
    assert len(made) == 1 and looks == [4, 4]
    after = task.state.tensors()
    for name in ("discriminator.heads.0.score.parametrizations.weight.original", "generator.linear.weight"):
        assert not torch.equal(before[name], after[name])
    mixing = [name for name in before if ".projector." in name]
    assert len(mixing) == 4 + 3 and all(torch.equal(before[name], after[name]) for name in mixing)
    for part, old in zip(task.discriminator.projector.features.buffers(), features, strict=True):
        assert torch.equal(part, old)


def test_a_batch_in_two_parts_gives_the_gradients_of_the_whole() -> None:
    gradients = []
    for parts in ([None], [BatchPart(0, 2, 4), BatchPart(2, 4, 4)]):
        task = task_of(tiny("none"))
        task.generator.eval()  # batch norm's moments are a part's
        batches = [
            batch() if part is None else Batch(*(tensor[part.start : part.stop] for tensor in batch()[:2]), part=part)
            for part in parts
        ]
        for phase in task.phases(0):
            torch.manual_seed(2)
            run_phase(phase, task.state, *batches)
        gradients.append([p.grad for p in task.discriminator.parameters()])
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


def test_a_resumed_run_is_the_whole_one_to_the_last_bit(tmp_path: Path) -> None:
    settings = ("run.precision=bfloat16", "run.channels_last=true")
    out = check_resume(functools.partial(tiny, "an", *settings), tmp_path, 8, 16)
    tensors, _ = read_checkpoint(out / "checkpoints/000000016.safetensors")
    assert not any("features" in name for name in tensors)


def test_the_recipe_and_its_settings_go_together() -> None:
    config = tiny()
    assert from_dict(Config, to_dict(config)) == config
    assert Config().recipe == "paper" and Config().projected is None
    with pytest.raises(ConfigError, match="recipe is paper"):
        Config(projected=ProjectedConfig())
    old = to_dict(Config())
    for name in ("recipe", "projected"):
        del old[name]
    del old["model"]["g_channels"]
    assert from_dict(Config, old) == Config()  # as earlier versions wrote it


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_fixed_network_has_the_precision_of_the_step(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever "auto" means where a run goes on."""
    monkeypatch.setattr("attnorm.system.devices.cpu_info", lambda: ["flags: amx_bf16"] * (precision == "float32"))
    task = task_of(tiny("none", "run.precision=auto"))
    for phase in task.phases(0):
        loss, _ = run_phase(phase, task.state, batch(), precision=precision)
        assert loss.isfinite()
    features = task.discriminator.projector.features
    assert {tensor.dtype for tensor in features.buffers()} == {getattr(torch, precision)}
