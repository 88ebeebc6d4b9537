"""The subcommand that scores images of any model: evaluate images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from attnorm.cli.evaluate_generators import print_scores
from attnorm.cli.terminal import (
    Flag,
    Names,
    Seed,
    one_bar_each,
    progress_bar,
    require_not_of_a_run,
    require_writable,
    split_names,
)
from attnorm.config import ConfigError, require_seed


def evaluate_images(
    fakes: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FAKES")],
    reals: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="REALS")],
    metrics: Names = "frechet",
    size: Annotated[int, tyro.conf.arg(metavar="S")] = 0,
    extractor: Annotated[str, tyro.conf.arg(metavar="E")] = "inception",
    inception_weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    intervals: Flag = False,
    save_statistics: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 50,
    seed: Seed = 0,
    device: str = "auto",
) -> None:
    """Score a folder or zip of images, of any model, against another one or against statistics saved before.

    Args:
        fakes: A folder or zip of images.
        reals: The same of real images, or what --save-statistics has written of them.
        metrics: Of frechet (fid with inception), is, kid, precision-recall.
        size: Cut the centre square of every image and resize it to so many pixels; 0: images as they are, of one size.
        extractor: inception, whose Fréchet distance is FID; or efficientnet-lite0, which needs no network.
        inception_weights: The extractor's weights, downloaded once unless named.
        intervals: Add 95% intervals of the Fréchet distance and of the one-split Inception Score.
        save_statistics: Keep what was made of the real images in this file (.safetensors).
        out: Where metrics.jsonl with all that is known of the scores goes; nowhere unless named.
        batch_size: Images at a time.
        seed: Of the bootstrap and of KID's subsets.
        device: auto, cpu, cuda or mps.
    """
    from attnorm.evaluation import image_folders
    from attnorm.evaluation.scores import read_scores, write_scores
    from attnorm.metrics.features import load_extractor
    from attnorm.system.devices import find_device

    require_seed("--seed", seed)
    for path in (fakes, reals):
        if not path.expanduser().exists():
            raise ConfigError(f"{path} does not exist; expected a folder or zip of images, or saved statistics")
    for written in (out, save_statistics):
        if written is not None:
            require_writable(written)
    if out is not None:  # before the work, not behind it
        require_not_of_a_run(out)
        if out.is_file():
            raise ConfigError(f"{out} is a file; expected a folder there; choose another --out")
        read_scores(out / "metrics.jsonl")
    loaded = load_extractor(extractor, device=find_device(device), inception_weights=inception_weights)
    with progress_bar() as progress:
        scores = image_folders.evaluate_images(
            fakes,
            reals,
            loaded,
            metrics=split_names(metrics),
            size=size,
            seed=seed,
            intervals=intervals,
            batch_size=batch_size,
            save_statistics=save_statistics,
            progress=one_bar_each(progress),
        )
    print_scores(f"{fakes} against {reals}", scores)
    if out is not None:
        write_scores(out / "metrics.jsonl", scores)
        print(out / "metrics.jsonl")
    if save_statistics is not None:
        print(save_statistics)
