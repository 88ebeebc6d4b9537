"""The average of the weights, and the training state's way into a checkpoint and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from attnorm.config import Config
from attnorm.data.stream import Batch
from attnorm.settings import override
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.state import ExponentialAverage
from attnorm.training.trainer import run_phase

TINY = (
    "model.image_size=32",
    "model.num_classes=3",
    "model.width=2",
    "model.latent_dim=4",
    "model.an.num_entities=3",
    "model.an.moments=batch",
    "run.batch_size=2",
)


def tiny_task(*settings: str, seed: int = 0) -> ClassConditionalTask:
    torch.manual_seed(seed)
    return ClassConditionalTask(override(Config(), [*TINY, *settings]), torch.device("cpu"))


def step(task: ClassConditionalTask, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    batch = Batch(torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1, torch.tensor([0, 2]))
    for phase in task.phases(0):
        run_phase(phase, task.state, batch)
    task.state.images_seen = 2 * (number - 1)
    task.state.finish_step(2)


def test_average_follows_the_recursion_with_its_ramp() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 2.0)
    average = ExponentialAverage(network, decay=0.5)
    assert not average.network.training and not average.network.weight.requires_grad
    expected = 2.0
    for number in range(1, 21):
        nn.init.constant_(network.weight, float(number))
        decay = min(0.5, number / (number + 9))  # 0.1, 2/11, ..., 0.5 from step 9 on
        assert average.network.weight.item() == pytest.approx(expected, rel=1e-6), number  # apart from the network
        expected = decay * expected + (1 - decay) * number
        average.update(number)
    assert average.network.weight.item() == pytest.approx(expected, rel=1e-6)


def test_running_moments_are_averaged_and_counters_and_singular_vectors_copied() -> None:
    network = nn.BatchNorm2d(2)
    average = ExponentialAverage(network, decay=0.9)
    with torch.no_grad():
        network.running_mean.fill_(10.0)
        network.running_var.fill_(3.0)
        network.num_batches_tracked.fill_(7)
    average.update(1)  # decay 0.1
    assert average.network.running_mean.tolist() == pytest.approx([9.0, 9.0])
    assert average.network.running_var.tolist() == pytest.approx([2.8, 2.8])
    assert average.network.num_batches_tracked.item() == 7

    network = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2, bias=False))
    average = ExponentialAverage(network, decay=0.9)
    with torch.no_grad():
        network.parametrizations.weight.original.fill_(1.0)
    network(torch.ones(1, 3))  # one power iteration
    before = average.network.parametrizations.weight[0]._u.clone()
    average.update(5)
    ours, theirs = average.network.parametrizations.weight[0], network.parametrizations.weight[0]
    assert torch.equal(ours._u, theirs._u) and torch.equal(ours._v, theirs._v)
    assert not torch.equal(before, ours._u)


@pytest.mark.parametrize("settings", [("optim.gate_lr_scale=50",), ("run.channels_last=true",)])
def test_state_comes_back_bit_for_bit_and_goes_on_alike(settings: tuple[str, ...]) -> None:
    original, restored = tiny_task(*settings), tiny_task(*settings, seed=99)
    for number in (1, 2):
        torch.manual_seed(number)
        step(original, number)
    # As a checkpoint keeps them: contiguous copies.
    stored = {name: tensor.detach().clone().contiguous() for name, tensor in original.state.tensors().items()}
    assert differing(stored, restored.state.tensors())
    restored.state.load_tensors(stored)
    assert not differing(stored, restored.state.tensors())
    for task in (original, restored):
        torch.manual_seed(3)
        step(task, 3)
    assert not differing(original.state.tensors(), restored.state.tensors())


def test_state_holds_networks_averages_moments_and_steps_and_refuses_less() -> None:
    task = tiny_task()
    step(task, 1)
    step(task, 2)
    tensors = task.state.tensors()
    for name, network in (("generator", task.generator), ("discriminator", task.discriminator)):
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensors[f"{name}.{key}"], tensor)
        for key, parameter in network.named_parameters():
            moments = task.state.optimisers[name].state[parameter]
            for part in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(tensors[f"optimiser.{name}.{key}.{part}"], moments[part])
            assert tensors[f"optimiser.{name}.{key}.step"].item() == 2
    ema = {name.removeprefix("ema."): tensor for name, tensor in tensors.items() if name.startswith("ema.")}
    assert not differing(ema, task.average.network.state_dict())
    assert differing(ema, task.generator.state_dict())
    optimiser = "optimiser.generator.to_rgb.bias.exp_avg_sq"
    for name in ("generator.to_rgb.bias", "ema.to_rgb.bias", "discriminator.linear.bias", optimiser):
        with pytest.raises(RuntimeError, match="linear.bias" if "linear" in name else "to_rgb.bias"):
            tiny_task().state.load_tensors({key: tensor for key, tensor in tensors.items() if key != name})


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names under which the two do not hold the same values of the same type."""
    return sorted(
        name
        for name in first.keys() | second.keys()
        if name not in first
        or name not in second
        or first[name].dtype != second[name].dtype
        or not torch.equal(first[name], second[name])
    )


def test_gates_learn_at_their_own_rate() -> None:
    """One step of Adam from rest is the learning rate, whatever the gradient."""
    task = tiny_task("optim.gate_lr_scale=50", "optim.g_lr=1e-3")
    gate, other = task.generator.blocks[2].an.rho, task.generator.to_rgb.bias
    before = other.detach().clone()
    step(task, 1)
    assert gate.abs().item() == pytest.approx(0.05, rel=1e-3)
    torch.testing.assert_close((other.detach() - before).abs(), torch.full_like(before, 1e-3), rtol=1e-3, atol=0)
