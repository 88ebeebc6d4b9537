"""The subcommand that runs controlled experiments: experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from attnorm.cli.terminal import (
    Names,
    console,
    counted,
    read_images,
    require_not_of_a_run,
    require_one_process,
    require_outside,
    split_names,
)
from attnorm.system.progress import humanize


def experiment(
    name: Annotated[Literal["regional-statistics", "diffusion"], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    data: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None,
    scale: Literal["full", "long", "short", "smoke"] = "full",
    arms: Names = "",
) -> None:
    """Measure what a context block is worth, in a controlled experiment.

    The same command goes on where it stopped: a training that is a line of DIR/trainings.jsonl is done. One thread is
    used; `full` takes hours, and its report is written after each seed.

    Args:
        name: regional-statistics: colours of cells whose texture is seen, from cells of the same texture far away.
            diffusion: the loss of a small diffusion U-Net on held-out images of 32 pixels, a block inserted at 16.
        out: Where results, report.md, report.json and the pictures go.
        data: For diffusion: a folder or zip of images, or CIFAR-10; every tenth is held out.
        scale: smoke: seconds, in which nothing is learnt. long: of regional-statistics, five times the steps, for as
            many textures as AN has entities and for more. short: of diffusion, a quarter of the images.
        arms: Blocks to train, comma between; all unless named.
    """
    import torch

    from attnorm.config import ClassConditionalConfig, Config, ConfigError, DataConfig
    from attnorm.experiments import diffusion, regional_statistics
    from attnorm.reports import diffusion as diffusion_report
    from attnorm.reports import regional_statistics as regional_report

    require_one_process("experiment")
    require_outside(out, data or "")
    require_not_of_a_run(out)
    torch.set_num_threads(1)

    def tell(done: int, total: int, what: str, seconds_left: float) -> None:
        left = f", {humanize(seconds_left)} left" if seconds_left else ""
        console.print(f"{done} of {counted(total, 'training')} done{left}: {what}")

    named = split_names(arms)
    if name == "diffusion":
        if data is None:
            raise ConfigError("diffusion needs --data: images to learn")
        images = read_images(
            Config(model=ClassConditionalConfig(image_size=diffusion.IMAGE_SIZE), data=DataConfig(source=data))
        )
        written = diffusion.run(out, images, diffusion_report.write_report, scale=scale, arms=named, progress=tell)
    else:
        if data is not None:
            raise ConfigError(f"{name} makes its own images: leave --data out")
        written = regional_statistics.run(out, regional_report.write_report, scale=scale, arms=named, progress=tell)
    for path in written:
        print(path)
