"""Several processes train as one with the whole batch. This file is what they run; one is what they are held to.

In float64 and with AN awake: what two or four processes make of their share of a batch is what one makes of the whole,
to 1e-10.
"""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from attnorm import AttentiveNorm2d
from attnorm.checkpoint import read_checkpoint
from attnorm.config import Config, ConfigError
from attnorm.data.images import ImageSet, fingerprint
from attnorm.data.stream import Batch, Stream, parts_of_batch
from attnorm.layers.batch_norm import BatchNorm2d
from attnorm.layers.linear_attention import LinearAttention2d
from attnorm.layers.self_attention import SelfAttention2d
from attnorm.presets import PRESETS
from attnorm.run_directory import RunDirectory
from attnorm.settings import override
from attnorm.system.process_group import ProcessGroup, process_group
from attnorm.system.randomness import drawing_for, seed_step
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.inpainting import InpaintingTask
from attnorm.training.losses import gradient_penalty
from attnorm.training.resume import require_trainable
from attnorm.training.trainer import run_phase, share_batch_norm, train

CPU = torch.device("cpu")
CONDITIONAL = (
    *("model.image_size=32", "model.num_classes=3", "model.width=2", "model.latent_dim=4", "model.an.num_entities=4"),
    *("run.batch_size=4", "optim.orthogonality_weight=0.1"),
)
INPAINTING = ("model.width=2", "run.batch_size=4", "inpainting.switch_images=4", "optim.d_steps=1")
# What is exact with parts one after another: no moment is made of a batch.
IN_PARTS = ("run.accumulate=2", "run.batch_size=8", "model.an.temperature=0.5")


def awake(task: Any) -> Any:
    for network in task.state.networks.values():
        for module in network.modules():
            if isinstance(module, AttentiveNorm2d):
                nn.init.constant_(module.rho, 0.5)
                if module.self_sampling:
                    nn.init.constant_(module.t, 1.0)
    return task


def conditional(*settings: str) -> ClassConditionalTask:
    torch.manual_seed(0)
    return awake(ClassConditionalTask(override(Config(), [*CONDITIONAL, *settings]), CPU))


def inpainting(*settings: str) -> InpaintingTask:
    torch.manual_seed(0)
    return awake(InpaintingTask(override(PRESETS["inpaint-smoke"][1], [*INPAINTING, *settings]), CPU))


def in_evaluation(task: ClassConditionalTask) -> ClassConditionalTask:
    """Without moments of the batch, which parts one after another cannot have."""
    for module in task.generator.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return task


def batch_of(task: Any, position: int, part: Any) -> Batch:
    size = task.config.model.image_size
    count = task.config.run.batch_size
    small = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(position)) * 2 - 1
    own = slice(0, count) if part is None else slice(part.start, part.stop)
    images = F.interpolate(small, size=size)[own]
    return Batch(images, (torch.arange(count) % 3)[own], position + own.start, part)


def gradients_of_two_steps(task: Any, group: ProcessGroup) -> dict[str, Tensor]:
    """Of every phase and parameter, with the loss; and the whole state at the end."""
    settings, found = task.config.run, {}
    parts = parts_of_batch(settings.batch_size, rank=group.rank, processes=group.count, accumulate=settings.accumulate)
    share_batch_norm(task.config, task, group)
    for optimiser in task.state.optimisers.values():
        for parameters in optimiser.param_groups:
            parameters["eps"] = 1e-3  # lest Adam makes steps of roundings, where a gradient is zero by mathematics
    for step in range(2):
        seed_step(0, 4 + 4 * step)
        for index, phase in enumerate(task.phases(4 + 4 * step)):
            batches = [batch_of(task, 10 * step + index, part) for part in parts]
            loss, _ = run_phase(phase, task.state, *batches, group=group)
            group.average([loss])
            found[f"{step}.{index}.loss"] = loss
            for name, parameter in task.state.networks[phase.network].named_parameters():
                assert parameter.grad is not None
                found[f"{step}.{index}.{name}"] = parameter.grad.clone()
        group.average(task.state.moments_of_a_part())
        task.state.finish_step(4)
    return found | {f"state.{name}": tensor.clone() for name, tensor in task.state.tensors().items()}


def r1(group: ProcessGroup) -> dict[str, Tensor]:
    """The gradient of a gradient penalty alone, through AN and spectral norm."""
    task = conditional("optim.g_lr=1e-3")
    (part,) = parts_of_batch(4, rank=group.rank, processes=group.count)
    batch = batch_of(task, 3, part)
    images = batch.images.clone().requires_grad_()
    seed_step(0, 0)
    with drawing_for(part):
        penalty = gradient_penalty(task.discriminator(images, batch.labels).score, images)
    penalty.backward()
    gradients = {name: p.grad for name, p in task.discriminator.named_parameters() if p.grad is not None}
    group.average([*gradients.values()])
    assert len(gradients) > 10
    return gradients


def batch_norm(group: ProcessGroup, size: int = 0) -> dict[str, Tensor]:
    """Output, first and second derivatives, and running moments, of channels far from zero; in groups of so many."""
    whole = 30 + torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    own = whole.chunk(group.count)[group.rank].clone().requires_grad_()
    norm = BatchNorm2d(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 2.0]))
    if group.count > 1:
        task: Any = SimpleNamespace(state=SimpleNamespace(networks={"generator": norm}))
        share_batch_norm(override(Config(), [f"run.batch_norm_group={size}"]), task, group)
    y = torch.cat([norm(part) for part in own.chunk(2)]) if size and group.count == 1 else norm(own)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), own, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), own)
    parts = {"y": y.detach(), "gradient": gradient.detach(), "second": second}
    gathered = {name: torch.cat(all_of(part, group)) for name, part in parts.items()}
    if size:  # each group has running moments of its own
        return gathered
    return gathered | {f"running.{name}": buffer for name, buffer in norm.named_buffers()}


def parallel(group: ProcessGroup) -> dict[str, Tensor]:
    """Gradients of the layer within torch's own DistributedDataParallel."""
    torch.manual_seed(0)  # shared_sampling: all processes draw the same positions
    layer = AttentiveNorm2d(4, 3, shared_sampling=True, reduction=2, temperature=0.1)
    x, projection = torch.randn(2, 4, 4, 4, 4).unbind()
    nn.init.constant_(layer.rho, 0.7)
    model = DistributedDataParallel(layer) if group.count > 1 else layer
    own = slice(4 // group.count * group.rank, 4 // group.count * (group.rank + 1))
    for _ in range(2):  # a parameter that is not used would make the second forward pass raise
        layer.zero_grad()
        out = model(x[own], generator=torch.Generator().manual_seed(2))
        (out * projection[own]).mean().backward()
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


def sharded(group: ProcessGroup) -> dict[str, Tensor]:
    """Gradients of the blocks, each parameter divided among the processes by torch's own fully_shard (FSDP2)."""
    torch.manual_seed(0)
    layer = AttentiveNorm2d(4, 3, shared_sampling=True, reduction=2, temperature=0.1)
    network = nn.Sequential(layer, SelfAttention2d(4), LinearAttention2d(4))
    x, projection = torch.randn(2, 4, 4, 4, 4).unbind()
    for gate in (layer.rho, network[1].gate, network[2].gate):
        nn.init.constant_(gate, 0.7)
    if group.count > 1:
        mesh = init_device_mesh("cpu", (group.count,))
        fully_shard(layer, mesh=mesh)
        fully_shard(network, mesh=mesh)
    own = slice(4 // group.count * group.rank, 4 // group.count * (group.rank + 1))
    torch.manual_seed(2)  # of the positions
    loss = (network(x[own]) * projection[own]).mean()
    (loss + layer.orthogonality_penalty()).backward()  # Eq. 1, of weights that are divided again by now
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}


def features(group: ProcessGroup) -> dict[str, Tensor]:
    """Moments of the features that temperature="auto" takes, where the first process has one image or none."""
    x = (2000 + torch.randn(4, 4, 5, 5, generator=torch.Generator().manual_seed(1))).float()
    torch.manual_seed(0)
    layer = AttentiveNorm2d(4, num_entities=3).float()
    for step, first in enumerate((1, 1, 0)):
        own = slice(first) if group.rank == 0 else slice(first, None)
        layer((step + 1) * (x if group.count == 1 else x[own]))
    return {name: buffer.double() for name, buffer in layer.named_buffers()}


def all_of(part: Tensor, group: ProcessGroup) -> list[Tensor]:
    if group.count == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(group.count)]
    torch.distributed.all_gather(parts, part.contiguous())
    return parts


EXACT: dict[str, Callable[[ProcessGroup], dict[str, Tensor]]] = {
    "class-conditional": lambda group: gradients_of_two_steps(conditional(), group),
    "auxiliary": lambda group: gradients_of_two_steps(conditional("model.head=auxiliary", "optim.d_steps=2"), group),
    "inpainting": lambda group: gradients_of_two_steps(inpainting(), group),
    "inpainting in parts": lambda group: gradients_of_two_steps(inpainting(*IN_PARTS), group),
    "r1": r1,
    "batch norm": batch_norm,
    "batch norm in pairs": lambda group: batch_norm(group, size=2),
    "DistributedDataParallel": parallel,
    "fully_shard": sharded,
    "moments of features": features,
}
CHECKED = {
    2: [name for name in EXACT if name not in ("class-conditional", "batch norm in pairs")],
    4: ["class-conditional", "inpainting", "batch norm", "batch norm in pairs"],
}
ONE: dict[str, Callable[[ProcessGroup], dict[str, Tensor]]] = EXACT | {
    "inpainting in parts": lambda group: gradients_of_two_steps(inpainting(*IN_PARTS, "run.accumulate=1"), group),
}

of_one = functools.cache(lambda name: ONE[name](ProcessGroup()))


# Whole runs

TINY = (
    *CONDITIONAL,
    *("run.device=cpu", "run.duration_images=16", "run.log_every_images=4", "run.layout_every_images=8"),
    *("run.grid_every_images=8", "run.checkpoint_every_images=8", "run.keep_checkpoints=9", "model.num_classes=0"),
)


def images() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 3, 32, 32), dtype=np.uint8)
    labels, classes = np.arange(24, dtype=np.int64) % 3, ("a", "b", "c")
    return ImageSet(pixels, labels, classes, "by hand", fingerprint(pixels, labels, classes))


def validation(group: ProcessGroup) -> dict[str, float]:
    """Of five held-out images, two at a time: some processes have none."""
    task = inpainting("run.accumulate=2")
    task.held_out = torch.from_numpy(images().images[:5])
    return task.validate(0, group)


def run(out: Path, group: ProcessGroup, *settings: str) -> str:
    """What is said of it."""
    said = io.StringIO()
    console = Console(file=said, width=200, quiet=group.rank > 0)
    train(override(Config(), [*TINY, *settings]), images(), out, console=console, group=group)
    return said.getvalue()


def errors(group: ProcessGroup) -> dict[str, str]:
    """What becomes of an error of the second process, and of one of both."""
    found = {}
    for name, failing in (("second", (1,)), ("both", (0, 1)), ("none", ())):

        def work(failing: tuple[int, ...] = failing) -> int:
            if group.rank in failing:
                raise ConfigError(f"{group.rank} cannot")
            return group.rank

        try:
            found[name] = str(group.together(work))
        except (ConfigError, SystemExit) as error:
            found[name] = f"{type(error).__name__}: {error}"
    found["flags"] = str(group.any_of(group.rank == 1, False))
    found["smallest"] = str(group.smallest(torch.tensor(float(group.rank) - 3)).item())
    found["says"] = "yes" if group.says("it") else "no"
    return found


def work(folder: Path) -> None:
    """What each of the processes does."""
    torch.set_num_threads(1)
    with process_group() as group:
        torch.set_default_dtype(torch.float64)
        for name in CHECKED[group.count]:
            found = EXACT[name](group)
            if group.rank == 0 or name == "class-conditional":  # of which all keep what they hold
                save_file({key: value.contiguous() for key, value in found.items()}, folder / f"{name}{group.rank}")
        torch.set_default_dtype(torch.float32)
        text = "\n".join(f"{name}: {value}" for name, value in errors(group).items())
        (folder / f"errors{group.rank}").write_text(text)
        (folder / f"validation{group.rank}").write_text(json.dumps(validation(group)))
        settings = () if group.count == 2 else ("run.batch_norm_group=2",)
        said = run(folder / "whole", group, *settings)
        said += run(folder / "parts", group, "run.duration_images=8", *settings)
        if group.rank == 0:
            shutil.copytree(folder / "parts", folder / "begun")
        (folder / f"said{group.rank}").write_text(said + run(folder / "parts", group, *settings))
        if group.count > 2:
            return
        run(folder / "own", group, "run.batch_norm_group=1", "run.duration_images=8")


def start(count: int, folder: Path) -> None:
    """Forks them, so that torch is imported once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def one(rank: int) -> None:
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        work(folder)

    folder.mkdir()
    started = [multiprocessing.get_context("fork").Process(target=one, args=(rank,)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * count


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two and four processes have made, once for all tests here, in folders that are called 2 and 4."""
    folder = tmp_path_factory.mktemp("processes")
    command, environment = [sys.executable, __file__, folder], os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=500)
    return folder


def assert_equal_but_for_rounding(
    ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10
) -> None:
    compared = [key for key in expected if expected[key].is_floating_point()]
    for key in compared:
        scale = max(expected[key].abs().max().item(), 1e-3)
        torch.testing.assert_close(ours[key], expected[key], rtol=tolerance, atol=tolerance * scale, msg=key)
    assert len(compared) >= 3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("count", "name"), [(count, name) for count, names in CHECKED.items() for name in names])
def test_processes_are_one_with_the_whole_batch(made: Path, count: int, name: str) -> None:
    ours, expected = load_file(made / f"{count}" / f"{name}0"), of_one(name)
    assert ours.keys() == expected.keys()
    assert_equal_but_for_rounding(ours, expected, 1e-4 if name == "moments of features" else 1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["class-conditional", "inpainting"])
def test_parts_one_after_another_are_the_whole_batch(name: str) -> None:
    """Where nothing is normalized by moments of a batch: their gradients, and the state after two steps."""
    make = {"class-conditional": lambda *more: in_evaluation(conditional(*more)), "inpainting": inpainting}[name]
    settings = ("model.an.temperature=0.5",)
    whole = gradients_of_two_steps(make(*settings), ProcessGroup())
    parts = gradients_of_two_steps(make(*settings, "run.accumulate=4"), ProcessGroup())
    assert_equal_but_for_rounding(parts, whole)


def test_all_processes_hold_the_same_state(made: Path) -> None:
    first, *others = (load_file(made / "4" / f"class-conditional{rank}") for rank in range(4))
    assert [name for name in first if not all(torch.equal(first[name], other[name]) for other in others)] == []


@pytest.mark.parametrize("count", [2, 4])
def test_an_error_in_one_process_ends_all_with_one_message(made: Path, count: int) -> None:
    texts = [(made / f"{count}" / f"errors{rank}").read_text() for rank in range(count)]
    first, second, *others = (dict(line.split(": ", 1) for line in text.splitlines()) for text in texts)
    assert (first["second"], second["second"]) == ("SystemExit: 1", "ConfigError: 1 cannot")
    assert (first["both"], second["both"]) == ("ConfigError: 0 cannot", "SystemExit: 2")
    assert (first["none"], second["none"]) == ("0", "1")
    assert first["flags"] == second["flags"] == "[True, False]"
    assert first["smallest"] == second["smallest"] == "-3.0"
    assert [other["second"] for other in others] == ["SystemExit: 1"] * len(others)
    assert sorted(one["says"] for one in (first, second, *others)) == ["no"] * (count - 1) + ["yes"]


@pytest.mark.parametrize("count", [2, 4])
def test_a_validation_is_divided_among_the_processes_and_known_to_all(made: Path, count: int) -> None:
    first, *others = (json.loads((made / f"{count}" / f"validation{rank}").read_text()) for rank in range(count))
    assert first == pytest.approx(validation(ProcessGroup()), rel=1e-5) and first["validation/l1"] > 0.1
    assert others == [first] * (count - 1)


def tensors_of(out: Path, images_seen: int) -> dict[str, Tensor]:
    return read_checkpoint(RunDirectory(out).checkpoint_file(images_seen))[0]


@pytest.mark.parametrize("count", [2, 4])
def test_a_run_of_processes_is_resumed_bit_for_bit(made: Path, count: int) -> None:
    folder = made / f"{count}"
    whole, parts = (tensors_of(folder / name, 16) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    assert read_checkpoint(RunDirectory(folder / "whole").checkpoint_file(16))[1].processes == count
    assert "went so far" not in (folder / "said0").read_text() and (folder / "said1").read_text() == ""


def test_a_run_goes_on_in_another_number_of_processes(made: Path, tmp_path: Path) -> None:
    """The losses of the processes, to the rounding of float32, as long as Adam has not made much of it."""
    said = run(made / "2" / "begun", ProcessGroup())
    assert "went so far in 2 process(es) and goes on in 1: the same images" in " ".join(said.split())
    run(tmp_path / "one", ProcessGroup(), "run.duration_images=8")
    folders = (tmp_path / "one", made / "2" / "whole", made / "2" / "begun")
    one, several, on = (RunDirectory(path).read_metrics() for path in folders)
    assert [row["images_seen"] for row in on] == [row["images_seen"] for row in several]
    losses = [[row["discriminator/loss"] for row in rows if "step" in row] for rows in (one, several, on)]
    assert losses[1][:2] == pytest.approx(losses[0], rel=2e-3) and losses[2] == pytest.approx(losses[1], rel=2e-2)


def test_moments_of_each_process_are_averaged(made: Path) -> None:
    """run.batch_norm_group=1: other moments than those of all images, and one checkpoint."""
    own, shared = (tensors_of(made / "2" / name, 8)["generator.norm.running_var"] for name in ("own", "whole"))
    assert own.isfinite().all() and not torch.allclose(own, shared, rtol=1e-4)


# Without other processes


def test_a_part_of_a_batch_is_that_part_of_it() -> None:
    config = override(Config(), [*TINY, "run.batch_size=8", "data.flip=true", "data.held_out_every=5"])
    pixels = np.random.default_rng(0).integers(0, 256, (24, 3, 40, 36), dtype=np.uint8)
    stream = Stream(config, ImageSet(pixels, np.arange(24) % 3, ("a", "b", "c"), "", ""), CPU)
    whole = stream.batch(13)
    parts = [part for rank in (0, 1) for part in parts_of_batch(8, rank=rank, processes=2, accumulate=2)]
    batches = [stream.batch(13, part) for part in parts]
    assert [batch.position for batch in batches] == [13, 15, 17, 19]
    assert torch.equal(torch.cat([batch.images for batch in batches]), whole.images)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), whole.labels)
    assert parts_of_batch(8) == [None]


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    config = override(Config(), [*TINY, "run.accumulate=2"])
    with pytest.raises(ConfigError, match=r"batch_size is 4; expected a multiple of 6, as 3 process"):
        require_trainable(config, tmp_path, ProcessGroup(0, 3))
    with pytest.raises(ConfigError, match=r"batch_norm_group is 3: 2 processes are no multiple"):
        require_trainable(override(config, ["run.batch_norm_group=3"]), tmp_path, ProcessGroup(0, 2))
    require_trainable(override(config, ["run.batch_norm_group=2"]), tmp_path / "run", ProcessGroup(0, 2))


if __name__ == "__main__":
    for number in (2, 4):
        start(number, Path(sys.argv[1]) / f"{number}")
