"""Images a second of whole steps of a training: by context block and switch, as others make them, by processes."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from attnorm.benchmark.peers import PEERS, Peer
from attnorm.benchmark.training_step import measured_step, random_images
from attnorm.config import Config
from attnorm.data.images import ImageSet
from attnorm.data.stream import Stream, parts_of_batch
from attnorm.system.devices import find_precision, temporary_tf32, why_not_compiled
from attnorm.system.process_group import ProcessGroup
from attnorm.system.randomness import seed_step
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.trainer import make_task, resolve, run_phase, share_batch_norm

# Settings of a step that differ from the plain one, with one switch each, and then with all that are on unless set.
PLAIN = "eager float32"
OFF: dict[str, object] = {
    "precision": "float32",
    "channels_last": False,
    "fused_adam": False,
    "foreach_ema": False,
    "joint_pass": False,
    "fused_resampling": False,
    "prefetch": False,
    "compile": False,
}
SWITCHES: dict[str, dict[str, object]] = {
    PLAIN: {},
    "fused Adam": {"fused_adam": True},
    "foreach average": {"foreach_ema": True},
    "joint pass of D": {"joint_pass": True},
    "fused resampling": {"fused_resampling": True},
    "prefetch": {"prefetch": True},
    "channels_last": {"channels_last": True},
    "torch.compile": {"compile": True},
    "bfloat16": {"precision": "bfloat16"},
    "the defaults": {name: True for name in OFF if name not in ("precision", "compile")},
}
CONTEXTS = {
    "class_conditional": ("none", "an", "self_attention"),
    "inpainting": ("none", "an", "contextual", "self_attention"),
}
FEWEST_ROUNDS = 3

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Speed:
    """Of a whole step, all its updates, with one context block and one switch, or otherwise made."""

    context: str
    switch: str
    seconds: tuple[float, ...]  # of each round
    images: int  # of a step

    @property
    def images_per_second(self) -> float:
        """Of the median round."""
        return self.images / statistics.median(self.seconds)


def measure_speed(config: Config, device: torch.device, *, seconds: float, progress: Progress) -> list[Speed]:
    """Of a configuration's step with every context block and switch, and of others' steps of the same networks.

    Args:
        seconds: To spend on each; at least three rounds are made.
    """
    images = random_images(config)
    steps: dict[tuple[str, str], Callable[[], None]] = {}
    with temporary_tf32(config.run.tf32):
        for context in CONTEXTS[config.task]:
            for switch, changes in switches_of(device).items():
                changed = _with(config, context, OFF | changes, images)
                steps[context, switch] = _step_of(changed, images, device)
            for name, step in _peers_of(_with(config, context, OFF, images), images, device).items():
                steps[context, name] = step
        return _in_turn(steps, config.run.batch_size, seconds, progress)


def switches_of(device: torch.device) -> dict[str, dict[str, object]]:
    """Those worth trying: without units for bfloat16 a step takes many times as long; compiling takes g++."""
    left_out = {"bfloat16"} if find_precision("auto", device) != "bfloat16" else set()
    left_out |= {"torch.compile"} if why_not_compiled() else set()
    return {name: changes for name, changes in SWITCHES.items() if name not in left_out}


def measure_processes(
    config: Config, device: torch.device, group: ProcessGroup, *, seconds: float, progress: Progress
) -> list[Speed]:
    """Of the same step, as it is set, made by all processes of a group together.

    One process alone has to be measured without a group: batch norm and AN's running moments would wait for the others.
    """
    images = random_images(config)
    steps = {
        (context, f"{group.count} processes"): _shared_step(_with(config, context, {}, images), images, device, group)
        for context in CONTEXTS[config.task]
    }
    return _in_turn(steps, config.run.batch_size, seconds, progress, group)


def _shared_step(config: Config, images: ImageSet, device: torch.device, group: ProcessGroup) -> Callable[[], None]:
    size, seen = config.run.batch_size, last_step(config)
    precision = find_precision(config.run.precision, device)
    (part,) = parts_of_batch(size, rank=group.rank, processes=group.count)
    torch.manual_seed(0)
    task, stream = make_task(config, images, device), Stream(config, images, device)
    share_batch_norm(config, task, group)

    def step() -> None:
        group.any_of(False)  # as before every step of a training: all begin together
        seed_step(0, seen)
        for index, phase in enumerate(task.phases(seen)):
            run_phase(phase, task.state, stream.batch(index * size, part), precision=precision, group=group)
        task.state.finish_step(size)

    return step


def _with(config: Config, context: str, changes: Mapping[str, object], images: ImageSet) -> Config:
    model = replace(config.model, context=context)  # type: ignore[arg-type]
    run = replace(config.run, **changes)  # type: ignore[arg-type]
    return resolve(replace(config, model=model, run=run), images)


def last_step(config: Config) -> int:
    """Where in a run the last step begins."""
    return max(config.run.duration_images - config.run.batch_size, 0)


def _step_of(config: Config, images: ImageSet, device: torch.device) -> Callable[[], None]:
    torch.manual_seed(0)
    task = make_task(config, images, device)
    return measured_step(task, config, images, config.run.batch_size, last_step(config), device)


def _peers_of(config: Config, images: ImageSet, device: torch.device) -> dict[str, Callable[[], None]]:
    """None where they have no such task."""
    if config.recipe != "paper" or config.task != "class_conditional":
        return {}
    stream, size = Stream(config, images, device), config.run.batch_size

    def step_of(peer: Peer) -> Callable[[], None]:
        torch.manual_seed(0)
        task = make_task(config, images, device)
        assert isinstance(task, ClassConditionalTask)
        made = peer(task, config)

        def step() -> None:
            made(stream.batch(number * size) for number in itertools.count())
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return step

    return {name: step_of(peer) for name, peer in PEERS.items()}


def _in_turn(
    steps: Mapping[tuple[str, str], Callable[[], None]],
    num_images: int,
    seconds: float,
    progress: Progress,
    group: ProcessGroup = ProcessGroup(),  # noqa: B008
) -> list[Speed]:
    """In rounds, so that what else the machine does meets all of them alike, after one step each that is not timed."""
    for number, (name, step) in enumerate(steps.items()):
        progress(number, len(steps), f"first steps: {', '.join(name)}")
        step()
    times: dict[tuple[str, str], list[float]] = {name: [] for name in steps}
    spent, rounds, is_done = 0.0, 0, False
    while not is_done:
        rounds += 1
        for number, (name, step) in enumerate(steps.items()):
            progress(number, len(steps), f"round {rounds}: {', '.join(name)}")
            begun = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begun)
            spent += times[name][-1]
        (is_done,) = group.as_first([rounds >= FEWEST_ROUNDS and spent >= seconds * len(steps)])
    return [Speed(context, switch, tuple(took), num_images) for (context, switch), took in times.items()]
