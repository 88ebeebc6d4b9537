"""The subcommand that times the layer, and a step of a training: bench."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import tyro

from attnorm.cli.terminal import Flag, Names, Settings, console, one_bar, print_table, progress_bar, require_free
from attnorm.config import ConfigError


def bench(
    part: Annotated[Literal["layer", "train"], tyro.conf.Positional, tyro.conf.arg(metavar="PART")],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    preset: Annotated[str, tyro.conf.arg(metavar="P")] = "cifar10-an",
    settings: Settings = (),
    cases: Names = "",
    implementations: Names = "",
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    tf32: Flag = False,
    seconds: Annotated[float, tyro.conf.arg(metavar="S")] = 1.0,
    threads: Annotated[int, tyro.conf.arg(metavar="T")] = 0,
    retain_memory: Flag = False,
    overwrite: Flag = False,
) -> None:
    """Time the layer, its implementations and what stands beside it, after checking each; Table 5 of the paper.

    Args:
        part: What is timed: layer, or train: a whole step of a training with every context block and switch, and as
            others make it; under torchrun, as all processes make it together.
        out: Where bench.json, bench.md and time-against-pixels.png go; of train: train.json and train.md.
        preset: Of train: the training configuration; of its context block, precision and memory format all are tried.
        settings: Of train: change a setting of the preset, for example --set run.batch_size=16.
        cases: Input sizes by name or group ("table5"), comma between; what this device can bear unless named.
        implementations: Of copy, instance_norm, group_norm, region_norm, conv+instance_norm, linear_attention,
            self_attention, an-reference, an-fused, an-inductor, an-native, an-triton ("an": all of these).
        device: auto, cpu or cuda.
        dtype: Of the input; the weights stay in float32, under autocast.
        tf32: Let CUDA round the factors of float32 products.
        seconds: To spend on each implementation, case and mode, after a warm-up.
        threads: For torch on the CPU; 0 leaves them as they are.
        retain_memory: Keep freed pages in the process (glibc, CPU), rather than pay for fresh ones at every step.
        overwrite: Write into a folder that is not empty.
    """
    from attnorm.benchmark.run import run
    from attnorm.reports import benchmark as reports

    require_free(out, overwrite)
    if not 0 < seconds < math.inf or threads < 0:
        raise ConfigError(f"--seconds is {seconds:g}, --threads {threads}; expected more than 0, and 0 or more")
    own = {"--preset": preset != "cifar10-an", "--set": settings != ()}
    others = {
        "--cases": cases != "",
        "--implementations": implementations != "",
        "--dtype": dtype != "float32",
        "--tf32": tf32,
        "--retain-memory": retain_memory,
    }
    if useless := [name for name, is_given in (others if part == "train" else own).items() if is_given]:
        raise ConfigError(f"bench {part} has no {', '.join(useless)}; leave out what the other part takes")
    if part == "train":
        from attnorm.cli.training import bench_training

        bench_training(preset, settings, out, device, seconds, threads)
        return
    with progress_bar() as progress:
        report = run(
            cases=cases,
            implementations=implementations,
            device=device,
            dtype=dtype,
            tf32=tf32,
            seconds=seconds,
            threads=threads,
            retain=retain_memory,
            progress=one_bar(progress, "timing"),
        )
    for table in reports.tables(report):
        print_table(table)
    for disturbance in reports.disturbances(report):
        console.print(disturbance, style="yellow")
    for path in reports.write_report(report, out):
        print(path)
