"""The inpainting task: Eq. 9 and 10 against loops over images, the two phases, masks, validation, and whole runs."""

# N batch, S image size.

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from torch import Tensor, nn

from attnorm.checkpoint import CheckpointError, read_checkpoint
from attnorm.config import Config, ConfigError, InpaintingTaskConfig
from attnorm.data.images import ImageSet, cut_centres, held_out_indices, to_float
from attnorm.data.masks import free_form_mask, rectangle_mask
from attnorm.data.stream import Batch, Stream
from attnorm.presets import PRESETS
from attnorm.run_directory import RunDirectory
from attnorm.settings import override
from attnorm.system.process_group import ProcessGroup
from attnorm.training.inpainting import InpaintingTask, PhaseSwitch
from attnorm.training.resume import start_from
from attnorm.training.trainer import run_phase
from tests.training.conftest import (
    assert_equal_runs,
    changed,
    check_precision,
    check_resume,
    images_from,
    noise,
    rows_of,
    run,
)

CPU = torch.device("cpu")
TINY = (
    "model.width=2",
    "inpainting.masks=rectangle",
    "inpainting.switch_images=8",
    "data.source=",
    "data.stored_size=0",
    "data.held_out_every=4",
    "run.device=cpu",
    "run.precision=float32",
    "run.batch_size=2",
    "run.duration_images=16",
    "run.log_every_images=2",
    "run.layout_every_images=4",
    "run.validate_every_images=2",
    "run.grid_every_images=8",
    "run.checkpoint_every_images=4",
    "run.keep_checkpoints=9",
)


def tiny(*settings: str) -> Config:
    return override(PRESETS["inpaint-smoke"][1], [*TINY, *settings])


def tiny_task(*settings: str, held_out: Tensor | None = None) -> InpaintingTask:
    torch.manual_seed(0)
    return InpaintingTask(tiny(*settings), CPU, held_out)


def random_batch(size: int = 2, position: int = 0) -> Batch:
    images = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(position)) * 2 - 1
    return Batch(images, torch.zeros(size, dtype=torch.int64), position)


def random_images(num: int = 16, height: int = 32, width: int = 32) -> ImageSet:
    return noise(num, height, width, classes=("all",))


def masks_and_corners(count: int, *, seed: int = 0, position: int = 0) -> list[tuple[Tensor, tuple[int, int]]]:
    return [tuple(rectangle_mask(32, seed=seed, index=position + i)) for i in range(count)]


# The losses


def test_the_first_phase_minimizes_the_reconstruction_of_both_stages() -> None:
    task, batch = tiny_task("model.context=none", "inpainting.reconstruction_weight=3"), random_batch()
    (phase,) = task.phases(0)
    loss, logged = phase.loss(batch)
    with torch.no_grad():
        masks = torch.stack([mask.float() for mask, _ in masks_and_corners(2)])
        coarse, refined = task.generator(batch.images, masks)
    expected = ((coarse - batch.images).abs().mean() + (refined - batch.images).abs().mean()) / 2
    torch.testing.assert_close(logged["generator/reconstruction"], expected)
    torch.testing.assert_close(loss, 3 * expected)
    assert "generator/adversarial" not in logged


@pytest.mark.parametrize("images_seen", [0, 10_000_000], ids=["first phase", "second phase"])
def test_the_hole_weighs_in_the_reconstruction_of_either_phase(images_seen: int) -> None:
    task, batch = tiny_task("model.context=none", "inpainting.hole_weight=6"), random_batch()
    _, logged = task.phases(images_seen)[-1].loss(batch)
    with torch.no_grad():
        masks = torch.stack([mask.float() for mask, _ in masks_and_corners(2)])
        errors = [(stage - batch.images).abs() for stage in task.generator(batch.images, masks)]
    expected = sum((error + 5 * error * masks).mean() for error in errors) / 2
    torch.testing.assert_close(logged["generator/reconstruction"], expected)


def pasted_and_crops(task: InpaintingTask, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """(truth, its crop, pasted, its crop, mask) of every image, one at a time."""
    out = []
    for image, (mask, (top, left)) in zip(
        batch.images, masks_and_corners(len(batch.images), position=batch.position), strict=True
    ):
        with torch.no_grad():
            refined = task.generator(image[None], mask[None].float()).refined[0]
        pasted = torch.where(mask, refined, image)
        part = (slice(None), slice(top, top + 16), slice(left, left + 16))
        out.append((image, image[part], pasted, pasted[part], mask))
    return out


def test_the_generator_loss_is_equation_9() -> None:
    settings = ("model.context=none", "inpainting.adversarial_weight=0.5")
    task, batch = tiny_task(*settings), random_batch(3, position=6)
    with torch.no_grad():
        loss, logged = task.phases(8)[-1].loss(batch)
        scores = [task.critic(pasted[None], crop[None]) for _, _, pasted, crop, _ in pasted_and_crops(task, batch)]
        masks = torch.stack([mask.float() for mask, _ in masks_and_corners(3, position=6)])
        filled = task.generator(batch.images, masks)
    reconstruction = torch.stack([(stage - batch.images).abs().mean() for stage in filled]).mean()
    adversarial = -torch.stack([whole + local for whole, local in scores]).mean()
    assert adversarial.abs() > 1e-4
    torch.testing.assert_close(logged["generator/adversarial"], adversarial, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(loss, 1.2 * reconstruction + 0.5 * adversarial)


@pytest.mark.parametrize("gp_mask", [False, True], ids=["whole-gradient", "masked-gradient"])
def test_the_critic_loss_is_equation_10_for_the_image_and_for_the_crop(gp_mask: bool) -> None:
    task, batch = tiny_task("model.context=none", f"inpainting.gp_mask={gp_mask}"), random_batch(3, position=6)
    torch.manual_seed(5)
    loss, logged = task.phases(8)[0].loss(batch)
    torch.manual_seed(5)
    shares = torch.rand(3, 1, 1, 1)
    distances, penalties = [], []
    corners = [corner for _, corner in masks_and_corners(3, position=6)]
    for share, (top, left), (real, real_crop, fake, fake_crop, mask) in zip(
        shares, corners, pasted_and_crops(task, batch), strict=True
    ):
        real_scores, fake_scores = task.critic(real[None], real_crop[None]), task.critic(fake[None], fake_crop[None])
        distances.append(sum(real_scores) - sum(fake_scores))
        penalty: Any = 0.0
        for index, (a, b) in enumerate(((fake, real), (fake_crop, real_crop))):  # one share for both
            inputs = [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 16, 16)]
            inputs[index] = (share * a + (1 - share) * b)[None].requires_grad_()
            (gradient,) = torch.autograd.grad(task.critic(*inputs)[index], inputs[index])
            if gp_mask:
                gradient = gradient * (mask if index == 0 else mask[:, top : top + 16, left : left + 16])
            penalty += (gradient.square().sum().sqrt() - 1) ** 2
        penalties.append(penalty)
    torch.testing.assert_close(logged["critic/distance"], torch.stack(distances).mean(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(logged["critic/gradient_penalty"], torch.stack(penalties).mean())
    torch.testing.assert_close(loss, -logged["critic/distance"] + 10 * logged["critic/gradient_penalty"])


@pytest.mark.parametrize("images_seen", [0, 8])
def test_orthogonality_enters_with_its_weight(images_seen: int) -> None:
    losses = []
    for weight in (0.0, 0.5):
        task = tiny_task(f"optim.orthogonality_weight={weight}")
        torch.manual_seed(1)
        loss, logged = task.phases(images_seen)[-1].loss(random_batch())
        losses.append(loss.item())
    assert logged["generator/orthogonality"].item() > 0.1
    assert losses[1] == pytest.approx(losses[0] + 0.5 * logged["generator/orthogonality"].item(), rel=1e-5)


@pytest.mark.parametrize("context", ["an", "self_attention", "region"])
def test_every_parameter_gets_a_gradient(context: str) -> None:
    task = tiny_task(f"model.context={context}", "model.width=4")
    with torch.no_grad():  # away from the start, where the inner gradients of the blocks are 0
        for name, parameter in task.generator.named_parameters():
            if name in ("context.rho", "context.gate"):
                parameter.fill_(0.5)
            elif name == "context.t":
                parameter.copy_(torch.linspace(0.5, 2.0, 4))
    for phase in task.phases(8)[-2:]:
        run_phase(phase, task.state, random_batch(3))
        network = task.state.networks[phase.network]
        # A shift of value(X) is taken out with each region's mean; one of all scores is no distance.
        zero = {"context.value.bias", *(name for name, _ in task.critic.named_parameters() if is_last_bias(task, name))}
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert name in zero or parameter.grad.abs().max() > 0, name


def test_gradients_and_the_penalty_are_float32_under_bfloat16() -> None:
    """The penalty's interpolates are the same: the generator is left out of it by a hole filled with the truth."""
    task = tiny_task("run.channels_last=true")
    for phase in (*task.phases(0), *task.phases(8)):
        check_precision(task, phase, random_batch())
    penalties = {}
    for precision in ("float32", "bfloat16"):
        task = tiny_task("model.context=none")
        task.generator.forward = lambda *_: SimpleNamespace(refined=random_batch().images)
        torch.manual_seed(5)
        _, logged = run_phase(task.phases(8)[0], task.state, random_batch(), precision=precision)
        penalties[precision] = logged["critic/gradient_penalty"].item()
    assert penalties["bfloat16"] == penalties["float32"]


def is_last_bias(task: InpaintingTask, name: str) -> bool:
    module, _, kind = name.rpartition(".")
    return kind == "bias" and isinstance(task.critic.get_submodule(module), nn.Linear)


# Phases


def test_the_second_phase_has_critic_updates_and_one_of_the_generator() -> None:
    task = tiny_task("optim.d_steps=3")
    for images_seen, names in ((0, []), (6, []), (8, ["critic"] * 3), (400, ["critic"] * 3)):
        assert [phase.network for phase in task.phases(images_seen)] == [*names, "generator"]
    # Every training image of the stream is used once: 1 batch a step, then 4.
    assert [task.position(n) for n in (0, 2, 6, 8, 10)] == [0, 2, 6, 8, 16]


def switch_of(l1s: list[float], **settings: Any) -> list[int | None]:
    """When the second phase begins, as known after each validation, made every 100 images."""
    switch = PhaseSwitch(InpaintingTaskConfig(**settings))
    out = []
    for number, l1 in enumerate(l1s):
        switch.observe(l1, 100 * number)
        out.append(switch.second_phase_at)
    return out


def test_a_plateau_begins_the_second_phase() -> None:
    falling = [1.0, 0.8, 0.6, 0.5]
    assert switch_of(falling * 1, patience=2, min_improvement=0.01) == [None] * 4
    # 0.499 is less than 1 % below the best: after `patience` of such the phase ends, and stays ended.
    flat = [*falling, 0.499, 0.51, 0.2, 0.1]
    assert switch_of(flat, patience=2, min_improvement=0.01) == [None] * 5 + [500] * 3
    assert switch_of(flat, patience=3, min_improvement=0.01) == [None] * 8
    # The best of all counts, not the last one: a slow fall of small steps is an improvement once they add up.
    slow = [1.0, 0.995, 0.989, 0.985, 0.979]
    assert switch_of(slow, patience=2, min_improvement=0.01) == [None] * 5
    assert switch_of([1.0, 2.0, 1.5, 1.2], patience=3, min_improvement=0.0) == [None] * 3 + [300]
    assert switch_of([0.5, 0.5], patience=1, min_improvement=0.0) == [None, 100]
    assert switch_of([1.0, 1.0, 1.0, 1.0], switch_images=700, patience=1) == [700] * 4  # a fixed one does not look


def test_arms_of_a_comparison_start_alike() -> None:
    """Of one seed: critics, and generators around the context block. The images are those of the position."""
    contexts = ("an", "contextual", "none")
    tasks = {context: tiny_task(f"model.context={context}") for context in contexts}
    plain = tasks.pop("none")
    for task in tasks.values():
        for network, theirs in ((task.critic, plain.critic), (task.generator, plain.generator)):
            ours = {name: value for name, value in network.state_dict().items() if not name.startswith("context.")}
            assert ours.keys() == theirs.state_dict().keys() and not changed(theirs, ours)


# Masks


def test_masks_follow_seed_and_position_and_their_kind_is_a_setting() -> None:
    batch = random_batch(4, position=10)
    free = [free_form_mask(32, seed=3, index=10 + i).mask for i in range(4)]
    rectangles = [rectangle_mask(32, seed=3, index=10 + i).mask for i in range(4)]
    task = tiny_task("inpainting.masks=free-form", "run.seed=3")
    assert torch.equal(task._holes_of(batch).masks, torch.stack(free).float())
    mixed = tiny_task("inpainting.masks=mixed", "run.seed=3")._holes_of(batch).masks
    assert torch.equal(mixed, torch.stack([rectangles[0], free[1], rectangles[2], free[3]]).float())


# Validation, and what is shown


@pytest.fixture
def held_out() -> Tensor:
    return torch.from_numpy(random_images(5).images)


def test_validation_is_the_error_of_the_averaged_generator(held_out: Tensor) -> None:
    task = tiny_task(held_out=held_out)
    with torch.no_grad():  # another network than the one that trains
        for parameter in task.average.network.parameters():
            parameter.add_(0.05)
    values = task.validate(0, ProcessGroup())
    l1, coarse_l1, hole_l1 = [], [], []
    for index, image in enumerate(to_float(held_out)):
        mask = rectangle_mask(32, seed=InpaintingTask._VALIDATION_SEED, index=index).mask
        with torch.no_grad():
            coarse, refined = task.average.network(image[None], mask[None])
        l1.append((refined[0] - image).abs().mean())
        coarse_l1.append((coarse[0] - image).abs().mean())
        hole_l1.append((refined[0] - image).abs()[mask.expand(3, -1, -1)].mean())
    for name, errors in (("l1", l1), ("coarse_l1", coarse_l1), ("hole_l1", hole_l1)):
        assert values[f"validation/{name}"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4), name
    assert values["validation/phase"] == 1 and task.validate(8, ProcessGroup())["validation/phase"] == 2
    torch.manual_seed(99)  # nothing is drawn, and the run's seed does not matter
    again = tiny_task("run.seed=9", held_out=held_out)
    again.average.network.load_state_dict(task.average.network.state_dict())
    assert again.validate(0, ProcessGroup()) == values


def test_the_grid_shows_hole_coarse_refined_pasted_and_truth(held_out: Tensor) -> None:
    task = tiny_task(held_out=held_out)
    grid = task.sample_grid(columns=8)
    assert grid.shape == (40, 3, 32, 32)
    with_hole, coarse, refined, pasted, truth = grid.chunk(5)
    assert torch.equal(truth[:5], to_float(held_out)) and not truth[5:].any()
    for i in range(5):
        mask = rectangle_mask(32, seed=InpaintingTask._VALIDATION_SEED, index=i).mask.expand(3, -1, -1)
        assert (with_hole[i][mask] == 1).all() and torch.equal(with_hole[i][~mask], truth[i][~mask])
        assert torch.equal(pasted[i][mask], refined[i][mask]) and torch.equal(pasted[i][~mask], truth[i][~mask])
        assert not torch.equal(coarse[i], refined[i])
    assert torch.equal(grid, task.sample_grid(columns=8))
    assert task.sample_grid(columns=3).shape == (15, 3, 32, 32)


# Whole runs


PLATEAU = ("inpainting.switch_images=0", "inpainting.patience=2", "inpainting.min_improvement=0.9")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a stop, whose second phase begins where the validation says so, at 4 images."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(tiny(*PLATEAU), out, random_images()).reason == "finished"
    return out


def test_resume_is_bit_exact_before_and_after_the_second_phase_begins(tmp_path: Path, whole: Path) -> None:
    for stop in (2, 12, 16):
        run(tiny(*PLATEAU, f"run.duration_images={stop}"), tmp_path / "parts", random_images())
    assert_equal_runs(whole, tmp_path / "parts")


def test_a_start_at_another_size_takes_the_generator_and_a_new_critic(whole: Path) -> None:
    checkpoint = RunDirectory(whole).checkpoints()[-1]
    theirs, header = read_checkpoint(checkpoint)
    task = InpaintingTask(tiny("model.image_size=64"), CPU)
    before = {name: tensor.clone() for name, tensor in task.critic.state_dict().items()}
    (said,) = start_from(str(checkpoint), task.state, header.classes)
    assert said.endswith("; new: the critic, for another size of image")
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.critic.state_dict().items())
    for name, network in (("generator", task.generator), ("ema", task.average.network)):
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, theirs[f"{name}.{key}"]), key
    with pytest.raises(CheckpointError, match="has another generator"):
        start_from(str(checkpoint), InpaintingTask(tiny("model.width=6"), CPU).state, header.classes)


def test_a_plateau_switches_a_run_and_the_checkpoint_knows(whole: Path) -> None:
    rows = rows_of(whole)
    # Nothing falls by 90 %: the first validation is the best one, two more end the phase at 4 images.
    assert [row["validation/phase"] for row in rows if "validation/l1" in row] == [1, 1, *[2] * 7]
    assert [row["images_seen"] for row in rows if "critic/loss" in row] == [6, 8, 10, 12, 14, 16]
    looks = [row for row in rows if "layout/generator.context/entropy" in row]
    assert [row["images_seen"] for row in looks] == [0, 4, 8, 12, 16]
    assert looks[0]["layout/generator.context/rho"] == 0 != looks[-1]["layout/generator.context/rho"]
    assert all(0 < row["layout/generator.context/entropy"] <= 1 for row in looks)
    assert all(sum(row["layout/generator.context/usage"]) == pytest.approx(1) for row in looks)
    for checkpoint in RunDirectory(whole).checkpoints():
        tensors, _ = read_checkpoint(checkpoint)
        assert tensors["number.second_phase_at"].item() == 4
        assert tensors["number.without_improvement"].item() == 2


@pytest.mark.parametrize(
    "settings",
    [
        ("run.channels_last=true", "data.flip=true", "inpainting.masks=mixed", "optim.d_steps=1"),
        ("run.precision=bfloat16", "model.context=contextual", "inpainting.gp_mask=true"),
    ],
    ids=["channels_last-flip-mixed", "bfloat16-contextual-gp_mask"],
)
def test_resume_is_bit_exact_whatever_the_settings(tmp_path: Path, settings: tuple[str, ...]) -> None:
    """With squares cut at random from larger images."""
    quick = ("run.layout_every_images=1000", "run.grid_every_images=1000", "inpainting.switch_images=4")
    check_resume(functools.partial(tiny, *settings, *quick), tmp_path, 4, 8, random_images(height=40, width=48))


def test_held_out_images_are_never_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image number i is of grey level 10 i, so that what trains and what validates can be told."""
    pixels = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None, None, None] * 10, (16, 3, 32, 32)).copy()
    trained: set[int] = set()
    for name in ("_reconstruction_loss", "_critic_loss", "_generator_loss"):
        original = getattr(InpaintingTask, name)

        def spy(self: InpaintingTask, batch: Batch, original: Any = original) -> Any:
            trained.update(((batch.images[:, 0, 0, 0] + 1) * 12.75).round().int().tolist())
            return original(self, batch)

        monkeypatch.setattr(InpaintingTask, name, spy)
    validated: list[Tensor] = []
    original_init = InpaintingTask.__init__

    def spy_on_init(self: InpaintingTask, config: Config, device: torch.device, held_out: Tensor) -> None:
        validated.append(held_out)
        original_init(self, config, device, held_out)

    monkeypatch.setattr(InpaintingTask, "__init__", spy_on_init)
    settings = ("data.held_out_every=5", "inpainting.switch_images=4", "run.duration_images=8", "run.batch_size=4")
    run(tiny(*settings), tmp_path / "run", images_from(pixels))
    assert (validated[0][:, 0, 0, 0] // 10).tolist() == [4, 9, 14]
    assert trained == set(range(16)) - {4, 9, 14}


def test_images_that_are_too_few_or_too_small_are_refused(tmp_path: Path) -> None:
    for setting in ("data.held_out_every=0", "data.held_out_every=17"):
        with pytest.raises(ConfigError, match="of the 16 images of by hand none is held out to validate on"):
            run(tiny(setting), tmp_path / "run", random_images())
    with pytest.raises(ConfigError, match=r"by hand was read at 40x24 pixels, less than model.image_size \(32\)"):
        run(tiny(), tmp_path / "run", random_images(height=24, width=40))
    assert not (tmp_path / "run").exists()


def test_validation_takes_an_even_share_of_the_held_out_images() -> None:
    images = random_images(40, height=34, width=40)
    config = tiny("inpainting.validation_images=4")
    held = InpaintingTask.for_images(config, images, CPU).held_out
    assert held_out_indices(40, 4).tolist() == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]
    assert torch.equal(held, torch.from_numpy(images.images)[[3, 15, 27, 39], :, 1:33, 4:36])
    assert torch.equal(held, cut_centres(torch.from_numpy(images.images)[[3, 15, 27, 39]], 32))


def test_training_squares_are_cut_at_random_places() -> None:
    """Value (y, x) is held by the pixel at row y, column x: the corner of a square can be read off."""
    grid = np.stack(np.broadcast_arrays(np.arange(40)[:, None], np.arange(48)[None], 7)).astype(np.uint8)
    stream = Stream(tiny("run.batch_size=64", "data.flip=false"), images_from(np.stack([grid] * 8)), CPU)
    squares = ((stream.batch(0).images + 1) * 127.5).round().int()
    torch.manual_seed(99)  # whatever a model has drawn in between
    assert torch.equal(squares, ((stream.batch(0).images + 1) * 127.5).round().int())
    tops, lefts = squares[:, 0, 0, 0], squares[:, 1, 0, 0]
    for square, top, left in zip(squares, tops, lefts, strict=True):
        expected = torch.from_numpy(grid.astype(np.int32))[:, top : top + 32, left : left + 32]
        assert torch.equal(square, expected)
    assert (tops.min(), tops.max(), lefts.min(), lefts.max()) == (0, 8, 0, 16)
