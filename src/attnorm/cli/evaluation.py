"""The verbs that measure: manifest, evaluate, bench."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from attnorm import config as configuration
from attnorm.cli.terminal import Names, Overwrite, Seed, console, progress_bar, read_images, require_free, require_seed
from attnorm.config import Config, ConfigError


def manifest(
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    like: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None,
    data: Annotated[str, tyro.conf.arg(metavar="SRC")] = "",
    size: Annotated[int, tyro.conf.arg(metavar="S")] = 0,
    stored_size: Annotated[int, tyro.conf.arg(metavar="S")] = 0,
    fit: Literal["square", "street-view"] = "square",
    masks: Literal["centre", "rectangle", "free-form"] = "centre",
    seed: Seed = 0,
    every: Annotated[int, tyro.conf.arg(metavar="N")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Freeze a test set for inpainting: images by their hashes, each with a mask drawn once; see evaluate.

    Args:
        out: Where manifest.json and the masks go.
        like: Take data, sizes and the images held out from this run; the options below that are named change them.
        data: A folder of images, or anything else that train takes.
        size: Side in pixels at which models are measured, a multiple of 8.
        stored_size: Height at which images are read, of which the centre is cut; 0: size. As data.stored_size in train.
        fit: square, or street-view for Paris StreetView; the run's, if like is given.
        masks: The centre square of half the side, a rectangle at random, or strokes.
        seed: Of the masks.
        every: Take the Nth, 2Nth, ... image by name (10 unless named or the run's); 1 takes all of a test folder.
        overwrite: Write into a folder that is not empty.
    """
    from dataclasses import replace

    from attnorm.checkpoint import RunDirectory
    from attnorm.evaluation.manifest import make_manifest, reading

    source = configuration.DataConfig(source=data, fit=fit, stored_size=stored_size)
    if like is not None:
        config, _ = RunDirectory(like).read()
        source = replace(config.data, source=data or config.data.source, stored_size=stored_size or _side(config))
        size, every = size or config.model.image_size, every or config.data.held_out_every
    if not source.source or not size:
        raise ConfigError("no data or no size was named; give --data SRC --size S, or --like RUN for a run's own")
    require_seed(seed)
    require_free(out, overwrite)
    images = read_images(reading(source, size))
    made = make_manifest(out, images, source, image_size=size, masks=masks, seed=seed, every=every or 10)
    print(f"{len(made.entries)} images of {len(images):,} at {size} pixels, with {masks} masks, in {out}")


def _side(config: Config) -> int:
    return config.data.stored_size or config.model.image_size


def evaluate(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    manifest: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    data: Annotated[str, tyro.conf.arg(metavar="SRC")] = "",
    cost: Annotated[str, tyro.conf.arg(metavar="SIZE,...")] = "",
    floors: bool = True,
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 16,
    seed: Seed = 0,
    raw_weights: Overwrite = False,
    device: str = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Measure inpainting models beside each other: PSNR, SSIM and MAE with intervals (Table 3, Figure 9), and cost.

    Args:
        runs: Run directories (their latest checkpoints), or checkpoint files.
        out: Where scores.md, scores.json, scores.csv, sheet.png and, with cost, cost.md and cost.json go.
        manifest: The test set, as the verb manifest has made it.
        data: Where its images are, if not where the manifest says.
        cost: Sides in pixels, comma between: time and memory of a forward pass at each, for example 256,512,1024,2048.
        floors: Measure the mean colour and Telea's method too.
        batch_size: Images at a time.
        seed: Of the bootstrap.
        raw_weights: Use the weights as they are, not their average over training.
        device: auto, cpu, cuda or mps.
        overwrite: Write into a folder that is not empty.
    """
    from attnorm.checkpoint import find_checkpoint, read_checkpoint

    if not runs:
        raise ConfigError("no run was named; expected one or several run directories")
    for run in runs:
        _, header = read_checkpoint(find_checkpoint(run), prefix="header alone")
        if header.config.task != "inpainting":
            raise ConfigError(
                f"{run} was trained for {header.config.task}: scores of generated images cannot be measured yet, only "
                "those of inpainting models"
            )
    if manifest is None and not cost:
        raise ConfigError("nothing to measure was named; give --manifest DIR (`attnorm manifest` makes one) or --cost")
    require_seed(seed)
    require_free(out, overwrite)
    if manifest is not None:
        _evaluate_inpainting(runs, manifest, data, out, floors, batch_size, seed, not raw_weights, device)
    if cost:
        _measure_cost(runs, cost, out, device)


def _evaluate_inpainting(
    runs: Sequence[Path],
    folder: Path,
    data: str,
    out: Path,
    floors: bool,
    batch_size: int,
    seed: int,
    ema: bool,
    device: str,
) -> None:
    from attnorm.evaluation import inpainting
    from attnorm.evaluation.manifest import read_examples, read_manifest
    from attnorm.figures import inpainting_figure, save_figure

    test_set = read_manifest(folder)
    config = test_set.reading
    images = read_images(configuration.override(config, [f"data.source={data}"]) if data else config)
    examples = read_examples(test_set, images)
    with progress_bar() as progress:
        bar = progress.add_task("measuring")
        evaluation = inpainting.evaluate(
            runs,
            test_set,
            examples,
            with_floors=floors,
            ema=ema,
            device=device,
            batch_size=batch_size,
            seed=seed,
            progress=lambda done, total, name: progress.update(bar, completed=done, total=total, description=name),
        )
    for path in inpainting.write_report(evaluation, out):
        print(path)
    print(save_figure(inpainting_figure(*evaluation.sheet), out / "sheet.png"))


def _measure_cost(runs: Sequence[Path], sizes: str, out: Path, device: str) -> None:
    from attnorm.evaluation.cost import measure_cost, write_cost
    from attnorm.evaluation.inpainting import name_runs

    texts = [text.strip() for text in sizes.split(",") if text.strip()]
    if not texts or not all(text.isdecimal() for text in texts):
        raise ConfigError(f"--cost is {sizes!r}; expected sides in pixels with commas between, for example 256,512")
    with progress_bar() as progress:
        bar = progress.add_task("timing")
        cells = measure_cost(
            name_runs(runs),
            [int(text) for text in texts],
            device=device,
            progress=lambda done, total, name: progress.update(bar, completed=done, total=total, description=name),
        )
    for path in write_cost(cells, device, out):
        print(path)


def bench(
    part: Annotated[Literal["layer"], tyro.conf.Positional, tyro.conf.arg(metavar="PART")],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    cases: Names = "",
    subjects: Names = "",
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    tf32: Overwrite = False,
    seconds: Annotated[float, tyro.conf.arg(metavar="S")] = 1.0,
    threads: Annotated[int, tyro.conf.arg(metavar="T")] = 0,
    retain_memory: Overwrite = False,
    overwrite: Overwrite = False,
) -> None:
    """Time the layer, its implementations and what stands beside it, after checking each; Table 5 of the paper.

    Args:
        part: What is timed: layer (there is nothing else yet).
        out: Where bench.json, bench.md and time-against-pixels.png go.
        cases: Input sizes by name or group ("table5"), comma between; what this device can bear unless named.
        subjects: Of copy, instance_norm, conv1x1+instance_norm, self_attention, an-IMPLEMENTATION ("an": all of them).
        device: auto, cpu or cuda.
        dtype: Of the input; the weights stay in float32, under autocast.
        tf32: Let CUDA round the factors of float32 products.
        seconds: To spend on each subject, case and mode, after a warm-up.
        threads: For torch on the CPU; 0 leaves them as they are.
        retain_memory: Keep freed pages in the process (glibc, CPU), rather than pay for fresh ones at every step.
        overwrite: Write into a folder that is not empty.
    """
    from rich.table import Table

    from attnorm import bench as benchmark

    require_free(out, overwrite)
    report = benchmark.run(
        cases=cases,
        subjects=subjects,
        device=device,
        dtype=dtype,
        tf32=tf32,
        seconds=seconds,
        threads=threads,
        retain=retain_memory,
        console=console,
    )
    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for title, header, rows in benchmark.tables(report):
        table = Table(*header, title=title, title_justify="left", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        screen.print(table, "")
    for disturbance in benchmark.disturbances(report):
        console.print(disturbance, style="yellow")
    for path in benchmark.write_report(report, out):
        print(path)
