"""The subcommands that train: train, presets."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from attnorm.cli.terminal import (
    Flag,
    Settings,
    console,
    describe_os_error,
    one_bar,
    print_table,
    progress_bar,
    read_images,
    require_outside,
    require_writable,
    say_what_is_there,
    screen,
)
from attnorm.config import ClassConditionalConfig, Config, ConfigError, did_you_mean
from attnorm.presets import PRESETS
from attnorm.settings import override, to_dict

if TYPE_CHECKING:
    from attnorm.system.process_group import ProcessGroup


def train(
    preset: Annotated[str, tyro.conf.arg(metavar="P")],
    out: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None,
    data: Annotated[str, tyro.conf.arg(metavar="SRC")] = "",
    settings: Settings = (),
    dry_run: Flag = False,
) -> None:
    """Train a generator; the same command goes on where an earlier one stopped.

    Args:
        preset: A named run; `attnorm presets` lists them.
        out: The run directory: made, or resumed.
        data: A folder of class folders, a folder of images, a zip of either, tar shards (a folder of them, or
            "s-{000..099}.tar"), CIFAR-10's binary files, or "builtin".
        settings: Change a setting of the preset, for example --set model.width=32 run.batch_size=64.
        dry_run: Print the resolved configuration, say what images are there, by their names, and what memory and time
            the run will take, and stop.
    """
    config = _configuration(preset, settings)
    if data:
        config = override(config, [f"data.source={data}"])
    require_outside(out, config.data.source)
    if dry_run:
        if config.data.source not in ("", "builtin"):
            say_what_is_there(config.data.source)
        values = to_dict(config)
        values["model"]["an"]["temperature"] = config.model.temperature
        print(json.dumps(values, indent=2), flush=True)
        _say_what_it_takes(config)
        return
    if out is None:
        raise ConfigError("--out is missing: name the run directory to make or resume, for example --out runs/first")
    if not config.data.source:
        raise ConfigError(
            f"--data is missing: the preset {preset} needs a folder, a zip, tar shards, CIFAR-10's files or 'builtin'"
        )
    from attnorm.system.process_group import ProcessGroup, process_group

    try:
        with process_group() as group:
            try:
                _train(config, out, group)
            except RuntimeError as error:
                _end_if_one_is_lost(error, out, group)
                raise
    except RuntimeError as error:  # while they meet
        _end_if_one_is_lost(error, out, ProcessGroup())
        raise


def _end_if_one_is_lost(error: RuntimeError, out: Path, group: ProcessGroup) -> None:
    """Says so, in one process, and ends this one."""
    from attnorm.run_directory import RunDirectory
    from attnorm.system.process_group import is_loss_of_a_process

    if os.environ.get("WORLD_SIZE", "1") == "1" or not is_loss_of_a_process(error):
        return
    if group.says("that one is lost"):
        console.quiet = False
        kept = RunDirectory(out).checkpoints()
        console.print(
            "attnorm: another process of this training was lost; the last checkpoint is "
            f"{kept[-1] if kept else 'none'}; the same command goes on from there",
            style="red",
        )
    sys.stderr.flush()
    os._exit(1)  # without a word to those that are gone


def _configuration(preset: str, settings: tuple[str, ...]) -> Config:
    if preset not in PRESETS:
        hint = did_you_mean(preset, PRESETS)
        raise ConfigError(f"there is no preset {preset!r}; {hint}`attnorm presets` lists them")
    return override(PRESETS[preset][1], settings)


def _train(config: Config, out: Path, group: ProcessGroup) -> None:
    from attnorm.run_directory import RunDirectory
    from attnorm.training.resume import require_trainable
    from attnorm.training.trainer import TrainingError
    from attnorm.training.trainer import train as run_training

    def check() -> None:  # before minutes of decoding
        require_trainable(config, out, group)
        require_writable(out)

    group.together(check)
    console.quiet = group.rank > 0  # it says what the others would say too
    is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"  # who decodes on this machine, for all that are on it
    images = group.together(lambda: read_images(config) if is_first_here else None)
    images = group.together(lambda: images or read_images(config))
    try:
        outcome = run_training(config, images, out, console=console, group=group)
    except TrainingError as error:
        console.print(f"attnorm: {error}", style="red")
        raise SystemExit(1) from None
    except OSError as error:
        console.quiet = False
        if not (out / "config.json").is_file():
            raise
        kept = RunDirectory(out).checkpoints()
        last = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        why = describe_os_error(error)
        console.print(
            f"attnorm: training stopped: {why}; {last}; the same command goes on when that is mended", style="red"
        )
        raise SystemExit(1) from None
    if group.rank == 0:
        print(f"{outcome.reason} at {outcome.images_seen:,} images; checkpoint {outcome.checkpoint}")
    if outcome.reason == "interrupted":
        console.print("The same command goes on from here.")
        raise SystemExit(130)
    if outcome.reason == "out of time":
        console.print("Raise run.max_minutes (0: no limit) and give the same command to go on.")


def _say_what_it_takes(config: Config) -> None:
    from attnorm.benchmark.training_step import estimate
    from attnorm.system.devices import device_name, find_device, memory_of

    device, processes = find_device(config.run.device), int(os.environ.get("WORLD_SIZE", "1"))
    if os.environ.get("RANK", "0") != "0":
        return
    console.print("measuring a few steps on random images ...")
    found = estimate(config, device, processes=processes)
    there = memory_of(device)
    of = f" of {there / 2**30:.1f} GiB" if there else ""
    each = " in each process" if processes > 1 else ""
    seconds = min(found.seconds, config.run.max_minutes * 60 or found.seconds)
    limit = f" (run.max_minutes ends it after {seconds / 3600:,.2f})" if seconds < found.seconds else ""
    console.print(
        f"about {found.bytes / 2**30:.2f} GiB{of}{each} on {device_name(device)}, of which "
        f"{found.state_bytes / 2**30:.2f} for weights and moments; {found.images_per_second * processes:,.1f} images a "
        f"second, {found.seconds / 3600:,.2f} hours for {config.run.duration_images:,} images{limit}"
    )
    if there and found.bytes > there:
        console.print(
            "that is too much: a larger run.accumulate needs less, as does run.precision=bfloat16", style="yellow"
        )


def bench_training(
    preset: str, settings: tuple[str, ...], out: Path, device: str, seconds: float, threads: int
) -> None:
    """`attnorm bench train`, of one process or of several together."""
    import torch

    from attnorm.benchmark.training_speed import measure_processes, measure_speed
    from attnorm.reports.training_speed import table, write_speeds
    from attnorm.system.process_group import find_own_device, process_group

    config = _configuration(preset, settings)
    if threads:
        torch.set_num_threads(threads)
    with process_group() as group, progress_bar() as progress:
        found, bar = find_own_device(device), one_bar(progress, "timing")
        if group.count > 1:
            speeds = measure_processes(config, found, group, seconds=seconds, progress=bar)
        else:
            speeds = measure_speed(config, found, seconds=seconds, progress=bar)
    if group.rank:
        return
    print_table(table(speeds))
    for path in write_speeds(speeds, config, found, out, processes=group.count):
        print(path)


def presets() -> None:
    """List the named runs, their context sites and their parameter counts (at the data's usual number of classes)."""
    from rich.table import Table

    table = Table("preset", "what it is", "pixels", "classes", "context sites", "G", "D", box=None, pad_edge=False)
    for name, (description, config) in PRESETS.items():
        num_classes = 1000 if name.startswith("paper-imagenet") else 10 if config.task == "class_conditional" else 0
        sites, g_parameters, d_parameters = _describe(config, num_classes)
        table.add_row(
            name,
            description,
            str(config.model.image_size),
            str(num_classes or "-"),
            sites,
            f"{g_parameters:,}",
            f"{d_parameters:,}",
        )
    screen().print(table)


def _describe(config: Config, num_classes: int) -> tuple[str, int, int]:
    """Where the context blocks are, and the parameters of both networks; built without memory."""
    import torch

    from attnorm.models.class_conditional import describe
    from attnorm.models.inpainting import Critic, InpaintingGenerator

    if isinstance(config.model, ClassConditionalConfig):
        return describe(config.model, num_classes)
    with torch.device("meta"):
        networks = InpaintingGenerator(config.model), Critic(config.model)
    site = "none" if config.model.context == "none" else f"G second stage ({4 * config.model.width} channels)"
    g_parameters, d_parameters = (sum(p.numel() for p in network.parameters()) for network in networks)
    return site, g_parameters, d_parameters
