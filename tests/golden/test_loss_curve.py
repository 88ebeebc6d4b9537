"""The losses of the first ten steps of a fixed tiny configuration, as they were when loss_curve.json was written.

A refactor leaves them as they are. A change of numerics shows here; where it is meant, write the file anew with

    python tests/golden/test_loss_curve.py

and say so in the commit. In double precision: Adam's first steps turn the rounding of gradients that are nearly zero
into whole steps, so that in float32 the order of sums in another build of torch, or another number of threads, moves
the losses by per cents within ten steps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from attnorm import AttentiveNorm2d
from attnorm.config import Config
from attnorm.data.stream import Batch
from attnorm.settings import override
from attnorm.system.randomness import seed_step
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.trainer import run_phase

FILE = Path(__file__).with_name("loss_curve.json")
NAMES = ("discriminator/loss", "generator/loss", "discriminator/orthogonality", "generator/orthogonality")
RELATIVE, ABSOLUTE = 1e-3, 1e-4
SETTINGS = (
    "model.image_size=32",
    "model.num_classes=3",
    "model.width=2",
    "model.latent_dim=4",
    "model.an.num_entities=4",
    "optim.g_lr=1e-3",
    "optim.d_lr=1e-3",
    "optim.orthogonality_weight=0.1",
)
FIXED = "model.an.temperature=none"  # the first curve's, which is older than the layer's own temperature


@contextmanager
def double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@double_precision()
def tiny_task(*settings: str) -> ClassConditionalTask:
    torch.manual_seed(0)
    task = ClassConditionalTask(override(Config(), [*SETTINGS, *settings]), torch.device("cpu"))
    for network in (task.generator, task.discriminator):
        for module in network.modules():
            if isinstance(module, AttentiveNorm2d):  # so that the layers count from the first step on
                torch.nn.init.constant_(module.rho, 1.0)
                if module.self_sampling:
                    torch.nn.init.constant_(module.t, 1.0)
    return task


@double_precision()
def loss_curve(task: ClassConditionalTask) -> dict[str, list[float]]:
    curve: dict[str, list[float]] = {name: [] for name in NAMES}
    for step in range(10):
        seed_step(0, 4 * step)
        values: dict[str, torch.Tensor] = {}
        for index, phase in enumerate(task.phases(4 * step)):
            generator = torch.Generator().manual_seed(2 * step + index)
            patches = torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1
            labels = torch.randint(3, (4,), generator=generator)
            _, logged = run_phase(phase, task.state, Batch(F.interpolate(patches, scale_factor=4), labels))
            values |= logged
        for name in NAMES:
            curve[name].append(values[name].item())
    return curve


def test_losses_are_those_of_the_golden_curves() -> None:
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    for settings, name in (((), "curve_with_its_own_temperature"), ((FIXED,), "curve")):
        for loss, values in loss_curve(tiny_task(*settings)).items():
            assert values == pytest.approx(golden[name][loss], rel=RELATIVE, abs=ABSOLUTE), (name, loss)


if __name__ == "__main__":
    record = {
        "made_by": "python tests/golden/test_loss_curve.py",
        "what": "ten steps on CPU in float64; the configuration, weights and batches are built in test_loss_curve.py",
        "torch": torch.__version__.split("+")[0],
        "tolerance": {"relative": RELATIVE, "absolute": ABSOLUTE},
        **{
            key: {name: [round(value, 5) for value in values] for name, values in loss_curve(task).items()}
            for key, task in (("curve", tiny_task(FIXED)), ("curve_with_its_own_temperature", tiny_task()))
        },
    }
    text = re.sub(r"\[[^\]]*\]", lambda found: " ".join(found[0].split()), json.dumps(record, indent=2))
    FILE.write_text(text + "\n", encoding="utf-8")
