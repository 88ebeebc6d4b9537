"""The subcommand that scores inpainters beside each other: evaluate inpainters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from attnorm.cli.terminal import (
    Flag,
    Seed,
    one_bar,
    progress_bar,
    read_images,
    require_free,
    require_outside,
    split_names,
)
from attnorm.config import ConfigError, require_seed
from attnorm.settings import override


def evaluate_inpainters(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    manifest: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    cost: Annotated[str, tyro.conf.arg(metavar="SIZE,...")] = "",
    data: Annotated[str, tyro.conf.arg(metavar="SRC")] = "",
    baselines: bool = True,
    lpips_weights: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE")] = (),
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 16,
    seed: Seed = 0,
    seams: bool = True,
    raw_weights: Flag = False,
    device: str = "auto",
    overwrite: Flag = False,
) -> None:
    """Measure inpainters by PSNR, SSIM and MAE beside each other (Table 3, Figure 9), and by cost.

    Args:
        runs: Run directories (their latest checkpoints), or checkpoint files.
        out: Where scores.md, scores.json, scores.csv and image-grid.png go, and with cost, cost.md and cost.json.
        manifest: The test set, as the subcommand manifest has made it.
        cost: Sides in pixels, comma between: time and memory of a forward pass at each, for example 256,512,1024,2048.
        data: Where the manifest's images are, if not where it says.
        baselines: Measure the mean colour and Telea's method too.
        lpips_weights: Measure LPIPS too, with these two files: AlexNet's weights as torchvision publishes them, and
            LPIPS's own (version 0.1, alex).
        batch_size: Images at a time.
        seed: Of the bootstrap.
        seams: Paste what a network made as it is, as the paper does; without, as the subcommand inpaint does it.
        raw_weights: Use the weights as they are, not their average over training.
        device: auto, cpu, cuda or mps.
        overwrite: Write into a folder that is not empty.
    """
    _require_inpainters(runs)
    if out is None:
        raise ConfigError("--out is missing: name the folder for the results of inpainters, for example --out results")
    if manifest is None and not cost:
        raise ConfigError("nothing to measure was named; give --manifest DIR (`attnorm manifest` makes one) or --cost")
    if batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}; expected at least 1 image at a time")
    require_seed("--seed", seed)
    require_outside(out, data)
    require_free(out, overwrite)
    if manifest is not None:
        from attnorm.evaluation import inpainters
        from attnorm.evaluation.test_set import read_examples, read_manifest
        from attnorm.metrics.lpips import load_lpips
        from attnorm.reports.figures import inpainting_figure, save_figure
        from attnorm.reports.inpainting import write_scores_document

        test_set = read_manifest(manifest)
        lpips = load_lpips(lpips_weights, device=device) if lpips_weights else None
        config = test_set.reading
        images = read_images(override(config, [f"data.source={data}"]) if data else config)
        examples = read_examples(test_set, images)
        with progress_bar() as progress:
            evaluation = inpainters.evaluate_inpainters(
                runs,
                test_set,
                examples,
                with_baselines=baselines,
                lpips=lpips,
                ema=not raw_weights,
                seams=seams,
                device=device,
                batch_size=batch_size,
                seed=seed,
                progress=one_bar(progress, "measuring"),
            )
        written = [*inpainters.write_scores(evaluation, out), *write_scores_document(evaluation.scores, out)]
        for path in [*written, save_figure(inpainting_figure(*evaluation.grid), out / "image-grid.png")]:
            print(path)
    if cost:
        _measure_latency(runs, cost, out, device)


def _require_inpainters(runs: Sequence[Path]) -> None:
    from attnorm.checkpoint import read_header
    from attnorm.run_directory import find_checkpoint

    if not runs:
        raise ConfigError("no run was named; expected one or several run directories")
    for run in runs:
        task = read_header(find_checkpoint(run)).config.task
        if task != "inpainting":
            raise ConfigError(
                f"--manifest and --cost are for inpainters, but {run} was trained for {task}; `attnorm evaluate "
                "generators` measures it"
            )


def _measure_latency(runs: Sequence[Path], sizes: str, out: Path, device: str) -> None:
    from attnorm.evaluation.inpainters import name_runs
    from attnorm.evaluation.latency import measure_latency
    from attnorm.reports.inpainting import write_latency

    texts = split_names(sizes)
    if not texts or not all(text.isdecimal() for text in texts):
        raise ConfigError(f"--cost is {sizes!r}; expected sides in pixels with commas between, for example 256,512")
    with progress_bar() as progress:
        tell = one_bar(progress, "timing")
        cells = measure_latency(name_runs(runs), list(map(int, texts)), device=device, progress=tell)
    for path in write_latency(cells, device, out):
        print(path)
