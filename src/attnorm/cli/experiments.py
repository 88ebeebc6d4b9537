"""The verb that runs controlled experiments: experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from attnorm.cli.terminal import Names, console, counted, require_one_process


def experiment(
    name: Annotated[Literal["regional-statistics"], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    scale: Literal["full", "smoke"] = "full",
    arms: Names = "",
) -> None:
    """Measure what a context block is worth where the answer is known to lie elsewhere in the image.

    The same command goes on where it stopped: every training is a file in DIR/results, done when it is there. One
    thread is used; `full` takes hours, and its report is written after each seed.

    Args:
        name: regional-statistics: colours of cells whose texture is seen, from cells of the same texture far away.
        out: Where results, predictions, report.md, report.json and the pictures go.
        scale: smoke: seconds, in which nothing is learnt.
        arms: Blocks to train, comma between; all unless named.
    """
    import torch

    from attnorm.evaluation.reproduce import in_words
    from attnorm.experiments import regional_statistics

    require_one_process("experiment")
    torch.set_num_threads(1)

    def tell(done: int, total: int, what: str, seconds_left: float) -> None:
        left = f", {in_words(seconds_left)} left" if seconds_left else ""
        console.print(f"{done} of {counted(total, 'training')} done{left}: {what}")

    named = [arm.strip() for arm in arms.split(",") if arm.strip()]
    for path in regional_statistics.run(out, scale=scale, arms=named, progress=tell):
        print(path)
