"""What one step of the class-conditional task does: which gradients flow, in which presets, and to whom."""

# N batch, S image size.

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnorm import AttentiveNorm2d, SelfAttention2d
from attnorm.config import Config
from attnorm.data.stream import Batch
from attnorm.models.class_conditional import Generator
from attnorm.presets import PRESETS
from attnorm.settings import override
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.losses import orthogonality_loss
from attnorm.training.task import Phase
from attnorm.training.trainer import run_phase
from tests.training.conftest import changed, check_precision, copies

CPU = torch.device("cpu")
# Every row of one family; of the others, which have other sizes of images, what has most parts; and other switches.
ALIKE = ("-an-n8", "-an-n32", "-an-fixed")  # as -an, in other numbers
GRADIENTS = [
    (name, "data.flip=true")
    for name, (_, config) in PRESETS.items()
    if name.startswith("small32-") and config.recipe == "paper" and not name.endswith(ALIKE)
]
GRADIENTS += [(name, "data.flip=true") for name in ("smoke", "imagenette64-an", "imagenette128-sagan")]
GRADIENTS += [
    ("small32-an", setting)
    for setting in (
        "model.site=insert",
        "model.an.statistics=masked",
        "model.an.shared_sampling=true",
        "model.an.orthogonality=raw",
        "model.an_blocks=1,2",
        "model.head=auxiliary",
    )
]
TINY = ("model.width=2", "model.latent_dim=4", "model.an.num_entities=3", "model.num_classes=3", "run.batch_size=3")


def wake(network: nn.Module) -> None:
    """Away from the start, where rho and gate are 0, all t are equal, and the entities' affine rows are equal: then the
    layout matters only where the moments of the regions differ, and gradients of t, key and query are tiny.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, AttentiveNorm2d):
                module.rho.fill_(0.5)
                module.weight.add_(torch.randn(module.weight.shape, generator=generator))
                module.bias.add_(torch.randn(module.bias.shape, generator=generator))
                if module.self_sampling:
                    module.t.copy_(torch.linspace(0.5, 2.0, module.num_entities))
            elif isinstance(module, SelfAttention2d):
                module.gate.fill_(0.5)


def zero_by_mathematics(network: nn.Module) -> set[str]:
    """Parameters that shift a whole channel of something that is normalized afterwards.

    Generator: the first bias of a block before its second norm; and the last biases of a block, that of the shortcut
    included: the next block's first norm takes such a shift out, its shortcut hands it on as another, and so on to the
    last norm. Self-attention on the way makes something else of it. Attentive norm moves along with its input (Eq. 6),
    so that the bias before it counts; but the shift of value(X) is taken out with each region's mean.
    """
    names = {
        f"{name}.value.bias"
        for name, module in network.named_modules()
        if isinstance(module, AttentiveNorm2d) and module.statistics == "weighted"
    }
    if isinstance(network, Generator):
        last_attention = max((i for i, block in enumerate(network.blocks) if block.after is not None), default=-1)
        for index, block in enumerate(network.blocks):
            if block.norm2 is not None and block.an is None:
                names.add(f"blocks.{index}.conv1.bias")
            if index > last_attention:
                names |= {f"blocks.{index}.conv2.bias", f"blocks.{index}.shortcut.bias"}
    return names


def random_batch(size: int, image_size: int, seed: int = 0) -> Batch:
    """Images of 64 coloured patches, so that regions differ, as those of photographs do and those of noise do not."""
    small = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Batch(F.interpolate(torch.tanh(2 * small), size=image_size), torch.arange(size) % 3)


def check_gradients(network: nn.Module) -> None:
    largest = {name: p.grad.abs().max().item() for name, p in network.named_parameters() if p.grad is not None}
    assert largest.keys() == {name for name, _ in network.named_parameters()}
    scale = max(largest.values())
    assert 0 < scale < float("inf")
    zero = zero_by_mathematics(network)
    assert zero <= largest.keys()
    if not isinstance(network, Generator):  # none while as many real images as fake ones are within the hinge's margin
        del largest["linear.bias"]
    dead = {name: value / scale for name, value in largest.items() if name not in zero and value <= 1e-5 * scale}
    alive = {name: value / scale for name, value in largest.items() if name in zero and value > 1e-9 * scale}
    assert not dead, "no gradient where there must be one"
    assert not alive, "a gradient where mathematics has none"


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("preset", "setting"), GRADIENTS)
def test_every_parameter_gets_a_gradient_but_those_that_cannot(preset: str, setting: str) -> None:
    config = override(PRESETS[preset][1], ["model.num_classes=3", setting])
    if preset != "smoke":
        config = override(config, ["model.width=4", "model.latent_dim=8"])
    torch.manual_seed(0)
    task = ClassConditionalTask(config, CPU)
    wake(task.generator)
    wake(task.discriminator)
    for phase in task.phases(0):
        torch.manual_seed(1)
        run_phase(phase, task.state, random_batch(3, config.model.image_size))
        check_gradients(task.state.networks[phase.network])


def test_presets_of_the_paper_have_its_recipe() -> None:
    """In what all rows share (tests/test_presets.py)."""
    config = PRESETS["paper-imagenet128-an"][1]
    assert config.model.image_size == 128 and config.model.width == 64
    assert config.run.batch_size == 256 and config.run.duration_images == 880_000 * 256
    assert (config.optim.beta1, config.optim.beta2) == (0.0, 0.999)
    assert config.optim.ema_decay == 0.9999 and config.optim.d_steps == 1


def tiny_task(*settings: str) -> ClassConditionalTask:
    torch.manual_seed(0)
    return ClassConditionalTask(override(Config(), ["model.image_size=32", *TINY, *settings]), CPU)


def test_a_phase_changes_its_own_network_alone() -> None:
    task = tiny_task("optim.d_steps=3")
    networks = task.state.networks
    for phase in task.phases(0)[-2:]:
        other = next(name for name in networks if name != phase.network)
        for network in networks.values():
            network.zero_grad(set_to_none=True)
        before = {name: copies(network) for name, network in networks.items()}
        run_phase(phase, task.state, random_batch(3, 32))
        assert changed(networks[phase.network], before[phase.network])
        assert not changed(networks[other], before[other])
        assert all(parameter.grad is None for parameter in networks[other].parameters())
        assert all(parameter.grad is not None for parameter in networks[phase.network].parameters())
    assert [phase.network for phase in task.phases(0)] == ["discriminator"] * 3 + ["generator"]
    assert (task.position(0), task.position(3)) == (0, 12)


def test_the_discriminator_loss_is_the_hinge_of_separate_passes() -> None:
    """One concatenated pass gives each half the scores that it has alone, with its own labels."""
    task = tiny_task("model.context=none", "model.g_spectral_norm=false")
    task.discriminator.eval()  # its singular vectors rest
    batch = random_batch(3, 32)
    torch.manual_seed(5)
    with torch.no_grad():
        loss, logged = task.phases(0)[0].loss(batch)
    torch.manual_seed(5)
    with torch.no_grad():
        fake = task.generator(torch.randn(3, 4), batch.labels)
        real_score = task.discriminator(batch.images, batch.labels).score
        fake_score = task.discriminator(fake, batch.labels).score
    expected = F.relu(1 - real_score).mean() + F.relu(1 + fake_score).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logged["discriminator/real_score"], real_score.mean())
    torch.testing.assert_close(logged["discriminator/fake_score"], fake_score.mean())


def test_the_auxiliary_classifier_learns_from_real_images_and_teaches_the_generator() -> None:
    task = tiny_task("model.head=auxiliary", "model.context=none", "optim.classifier_weight=2")
    task.discriminator.eval()
    batch = random_batch(3, 32)
    with torch.no_grad():
        logits = task.discriminator(batch.images, batch.labels).class_logits
        loss, logged = task.phases(0)[0].loss(batch)
        expected = F.cross_entropy(logits, batch.labels)
        torch.testing.assert_close(logged["discriminator/classifier"], expected)
        torch.testing.assert_close(loss, logged["discriminator/loss"] + 2 * expected)
        g_loss, g_logged = task.phases(0)[1].loss(batch)
        torch.testing.assert_close(g_loss, g_logged["generator/loss"] + 2 * g_logged["generator/classifier"])


@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_orthogonality_enters_each_loss_with_its_weight(network: str) -> None:
    def loss(weight: float) -> tuple[float, float]:
        task = tiny_task(f"optim.orthogonality_weight={weight}")
        torch.manual_seed(7)
        phase: Phase = next(phase for phase in task.phases(0) if phase.network == network)
        return phase.loss(random_batch(3, 32))[0].item(), orthogonality_loss(task.state.networks[network]).item()

    without, penalty = loss(0.0)
    assert penalty > 0.1
    assert loss(0.5)[0] == pytest.approx(without + 0.5 * penalty, rel=1e-5)


def test_gradients_are_float32_under_bfloat16() -> None:
    task = tiny_task("run.channels_last=true")
    for phase in task.phases(0):
        check_precision(task, phase, random_batch(3, 32))
    weight = task.generator.blocks[0].conv1.parametrizations.weight.original
    assert weight.is_contiguous(memory_format=torch.channels_last)
    losses = {}
    for precision in ("float32", "bfloat16"):
        task = tiny_task()
        torch.manual_seed(1)
        losses[precision] = run_phase(task.phases(0)[0], task.state, random_batch(3, 32), precision=precision)[0].item()
    assert losses["float32"] != losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


def test_the_grid_shows_a_class_a_row_and_a_latent_a_column() -> None:
    task = tiny_task()
    with torch.no_grad():  # tables that differ between classes, as training makes them
        for name, parameter in task.average.network.named_parameters():
            if "gamma" in name or "beta" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    grid = task.sample_grid(columns=4)  # there are three classes only
    assert grid.shape == (12, 3, 32, 32)
    assert torch.equal(grid, task.sample_grid(columns=4))
    latents = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = task.average.network(latents[2:3], torch.tensor([1]))[0]
    torch.testing.assert_close(grid[1 * 4 + 2], expected, atol=1e-5, rtol=1e-5)
    assert (grid[6] - grid[2]).abs().max() > 1e-3 and (grid[6] - grid[5]).abs().max() > 1e-3


def test_layout_statistics_describe_every_site_and_leave_the_state_alone() -> None:
    task = tiny_task()
    wake(task.discriminator)
    before = {name: tensor.clone() for name, tensor in task.state.tensors().items()}
    statistics = task.layout_statistics(random_batch(3, 32))
    assert task.discriminator.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state.tensors().items())
    for site in ("layout/generator.blocks.2.an", "layout/discriminator.blocks.0.an"):
        assert 0 < statistics[f"{site}/entropy"] <= 1
        assert sum(statistics[f"{site}/usage"]) == pytest.approx(1)
        assert len(statistics[f"{site}/usage"]) == len(statistics[f"{site}/t"]) == 3
    assert statistics["layout/discriminator.blocks.0.an/rho"] == 0.5
    assert statistics["layout/discriminator.blocks.0.an/t"] == pytest.approx([0.5, 1.25, 2.0])
    torch.manual_seed(99)  # nothing is drawn
    assert task.layout_statistics(random_batch(3, 32)) == statistics
