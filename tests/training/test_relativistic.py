"""The recipe "relativistic": losses and penalties to the letter, schedules, and resuming to the last bit."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch

from attnorm import load
from attnorm.checkpoint import Header, save_checkpoint
from attnorm.config import Config
from attnorm.data.stream import Batch
from attnorm.models.relativistic import RelativisticGenerator
from attnorm.presets import PRESETS
from attnorm.settings import override
from attnorm.training.relativistic import RelativisticTask
from attnorm.training.resume import start_from
from tests.training.conftest import check_resume

TINY = (
    "model.width=2",
    "model.num_classes=3",
    "model.latent_dim=4",
    "run.device=cpu",
    "run.precision=float32",
    "run.batch_size=4",
    "run.duration_images=16",
    "run.checkpoint_every_images=8",
    "relativistic.schedule_images=16",
    "run.keep_checkpoints=9",
)


def tiny(context: str = "an", *settings: str) -> Config:
    return override(PRESETS[f"small32-relativistic-{context}"][1], [*TINY, *settings])


def task_of(config: Config) -> RelativisticTask:
    torch.manual_seed(0)
    task = RelativisticTask(config, torch.device("cpu"))
    for network in task.state.networks.values():
        network.double()
        for name, parameter in network.named_parameters():
            if name.endswith("conv3.weight"):
                torch.nn.init.normal_(parameter, std=0.1)
            if name.endswith("rho"):
                torch.nn.init.constant_(parameter, 0.5)
    return task


def batch() -> Batch:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    return Batch(images, torch.tensor([0, 1, 2, 1]))


def test_losses_are_softplus_of_differences_and_both_penalties(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("none", "relativistic.last_augmented=0")
    task = task_of(config)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # of the task: all in float64
    discriminate, generate = task.phases(8)
    labels = batch().labels

    def latents() -> torch.Tensor:
        return task._latents(labels).double()

    torch.manual_seed(3)
    z = latents()
    monkeypatch.setattr(task, "_latents", lambda labels: z)
    loss, logged = discriminate.loss(batch())

    real, fake = batch().images.requires_grad_(), task.generator(z, labels).detach().requires_grad_()
    scores = [task.discriminator(images, labels) for images in (real, fake)]
    penalties = []
    for images, score in zip((real, fake), scores, strict=True):
        each = [torch.autograd.grad(s, images, create_graph=True)[0].square().sum() for s in score]
        penalties.append(torch.stack(each).mean())
    gamma = 0.005 + (0.05 - 0.005) * (1 + math.cos(math.pi / 2)) / 2  # halfway of the schedule
    expected = torch.log1p(torch.exp(scores[1] - scores[0])).mean()
    torch.testing.assert_close(logged["discriminator/loss"], expected)
    expected = expected + gamma / 2 * (penalties[0] + penalties[1])
    torch.testing.assert_close(loss, expected)
    weights = [p for p in task.discriminator.parameters() if p.ndim == 4]
    for got, wanted in zip(*(torch.autograd.grad(each, weights) for each in (loss, expected)), strict=True):
        torch.testing.assert_close(got, wanted)

    g_loss, _ = generate.loss(batch())
    torch.testing.assert_close(g_loss, torch.log1p(torch.exp(scores[0] - scores[1])).mean())


@pytest.mark.parametrize(("images_seen", "share"), [(0, 1.0), (8, 0.5), (16, 0.0), (999, 0.0)])
def test_what_is_scheduled_goes_along_half_a_cosine(images_seen: int, share: float) -> None:
    task = RelativisticTask(tiny("an", "optim.gate_lr_scale=10"), torch.device("cpu"))
    task.phases(images_seen)
    for optimiser in task.state.optimisers.values():
        assert optimiser.param_groups[0]["lr"] == pytest.approx(2e-4 * (0.25 + 0.75 * share))
        assert optimiser.param_groups[0]["betas"] == (0.0, pytest.approx(0.99 - 0.09 * share))
    assert task.state.optimisers["generator"].param_groups[1]["lr"] == pytest.approx(2e-3 * (0.25 + 0.75 * share))
    assert task.gamma == pytest.approx(0.005 + 0.045 * share)
    assert task.augmented == pytest.approx(0.55 * (1 - share))
    half_life = 20_000 * (1 - share)
    assert task.average.decay == pytest.approx(0.5 ** (4 / half_life) if half_life else 0)


def test_a_resumed_run_is_the_whole_one_to_the_last_bit(tmp_path: Path) -> None:
    settings = ("model.context=self_attention", "relativistic.context_in_discriminator=true")
    out = check_resume(functools.partial(tiny, "an", *settings), tmp_path, 8, 16)
    assert isinstance(load(out).model, RelativisticGenerator)


def test_of_a_model_with_other_classes_all_but_these_is_taken(tmp_path: Path) -> None:
    """Classes are the second axis of the embeddings, in G and in D."""
    theirs, config = task_of(tiny()).state, tiny()
    save_checkpoint(tmp_path / "a.safetensors", theirs.tensors(), Header(config, ("a", "b", "c"), 8, 0.0))
    ours = task_of(override(config, ["model.num_classes=2"])).state
    before = {name: tensor.clone() for name, tensor in ours.tensors().items()}
    (said,) = start_from(str(tmp_path / "a.safetensors"), ours, ("x", "y"))
    assert "what the discriminator has of each class" in said and "size of image" not in said
    after, kept = ours.tensors(), []
    for name, tensor in theirs.tensors().items():
        if name.startswith(("generator.", "discriminator.")):
            is_kept = tensor.shape != after[name].shape
            kept += [name] if is_kept else []
            torch.testing.assert_close(after[name], before[name] if is_kept else tensor, rtol=0, atol=0)
    assert {name.partition(".")[0] for name in kept} == {"generator", "discriminator"}
