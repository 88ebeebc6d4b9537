"""What makes a step faster changes nothing of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from attnorm.benchmark.training_step import measured_step, random_images
from attnorm.config import Config
from attnorm.data.images import ImageSet
from attnorm.data.stream import Batch, BatchesAhead, Stream
from attnorm.layers.resampling import DownConv2d, UpConv2d
from attnorm.registry import load
from attnorm.settings import override
from attnorm.system.randomness import seed_step
from attnorm.training.task import adam
from attnorm.training.trainer import make_task, resolve, run_phase, train

CPU = torch.device("cpu")
TINY = ["model.image_size=32", "model.num_classes=3", "model.width=4", "model.latent_dim=4", "run.batch_size=6"]


def random_batch(dtype: torch.dtype = torch.float32) -> Batch:
    random = torch.Generator().manual_seed(1)
    return Batch(torch.rand(6, 3, 32, 32, generator=random, dtype=dtype) * 2 - 1, torch.arange(6) % 3)


def after_steps(*changes: str, count: int = 2) -> dict[str, torch.Tensor]:
    """All tensors of a task after some steps."""
    config = override(Config(), [*TINY, *changes])
    images = random_images(config)
    config = resolve(config, images)
    torch.manual_seed(0)
    task = make_task(config, images, CPU)
    step = measured_step(task, config, images, 6, 0, CPU)
    for _ in range(count):
        step()
    return {name: tensor.clone() for name, tensor in task.state.tensors().items()}


def after_first_phase(*settings: str) -> dict[str, torch.Tensor]:
    """The loss, the gradients and the buffers of D after its first update, in float64."""
    config = override(Config(), [*TINY, *settings])
    torch.manual_seed(0)
    task = make_task(config, random_images(config), CPU)
    for network in task.state.networks.values():
        network.double()
    torch.set_default_dtype(torch.float64)
    try:
        seed_step(0, 0)
        loss, _ = run_phase(task.phases(0)[0], task.state, random_batch(torch.float64))
    finally:
        torch.set_default_dtype(torch.float32)
    discriminator = task.state.networks["discriminator"]
    gradients = {name: p.grad for name, p in discriminator.named_parameters() if p.grad is not None}
    return {"loss": loss, **gradients, **dict(discriminator.named_buffers())}


@pytest.mark.parametrize("switch", ["run.joint_pass", "run.fused_resampling"])
@pytest.mark.parametrize("block", [["model.context=none", "model.head=auxiliary"], ["model.an.temperature=0.1"]])
def test_a_step_made_another_way_has_the_same_gradient(block: list[str], switch: str) -> None:
    """In two passes of D, but for the running moments of AN's features, which see real and generated images apart."""
    one, other = (after_first_phase(*block, f"{switch}={value}") for value in ("true", "false"))
    assert len(one) > 20 and one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("is_fused", [True, False])
def test_resampling_is_fused_where_it_is_asked_for(is_fused: bool) -> None:
    config = override(Config(), [*TINY, f"run.fused_resampling={is_fused}"])
    networks = make_task(config, random_images(config), CPU).state.networks
    for name, kind in (("generator", UpConv2d), ("discriminator", DownConv2d)):
        found = [module for module in networks[name].modules() if isinstance(module, kind)]
        assert len(found) >= 2 and all(module.is_fused is is_fused for module in found)


def test_an_average_of_all_weights_at_once_is_that_of_one_after_another_to_the_bit() -> None:
    together, apart = after_steps(), after_steps("run.foreach_ema=false")
    assert all(torch.equal(together[name], apart[name]) for name in together)


def test_adam_is_fused_where_it_is_asked_for() -> None:
    for is_fused in (True, False):
        config = override(Config(), [f"run.fused_adam={is_fused}"])
        assert adam(torch.nn.Linear(1, 1), 0.1, config).defaults["fused"] is is_fused


def test_batches_made_ahead_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another one is asked for than was said, and where making one fails."""
    config = override(Config(), [*TINY, "data.flip=true"])
    pixels = np.random.default_rng(0).integers(0, 256, (24, 3, 32, 32), np.uint8)
    stream = Stream(config, ImageSet(pixels, np.arange(24) % 3, ("a", "b", "c"), "", ""), CPU)
    expected = {position: stream.batch(position).images for position in (0, 6, 12, 600)}
    made: list[int] = []
    make = stream.batch
    monkeypatch.setattr(stream, "batch", lambda position, part=None: (made.append(position), make(position, part))[1])
    with BatchesAhead(stream) as ahead:
        for position, then in ((0, 6), (6, 12), (600, 12), (12, 0)):
            (batch,) = ahead.batches(position, [None], then=then)
            assert torch.equal(batch.images, expected[position])
    assert sorted(made) in ([0, 6, 12, 12, 600], [0, 0, 6, 12, 12, 600])  # the last one may be given up
    monkeypatch.setattr(stream, "batch", lambda *_: 1 / 0)
    with BatchesAhead(stream) as ahead:
        ahead.stream = Stream(config, stream.images, CPU)
        ahead.batches(0, [None], then=6)
        ahead.stream = stream
        ahead.batches(6, [None], then=12)
        with pytest.raises(ZeroDivisionError):
            ahead.batches(12, [None], then=18)


def test_a_training_with_batches_made_ahead_is_the_same_to_the_bit(tmp_path: Path) -> None:
    runs = []
    for prefetch in ("true", "false"):
        config = override(Config(), [*TINY, "run.duration_images=12", "run.accumulate=2", f"run.prefetch={prefetch}"])
        out = tmp_path / prefetch
        train(config, random_images(config), out)
        runs.append((out, load(out).model.state_dict()))
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
