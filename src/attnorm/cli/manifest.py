"""The subcommand that freezes a test set: manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from attnorm.cli.terminal import Flag, Seed, read_images, require_free, require_outside
from attnorm.config import Config, ConfigError, DataConfig, require_seed


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
    overwrite: Flag = False,
) -> None:
    """Freeze a test set for inpainting: images by their hashes, each with a mask drawn once; see evaluate.

    Args:
        out: Where manifest.json and the masks go.
        like: Take data (but of a model's name), sizes and the images held out from this run; the options below that
            are named change them.
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

    from attnorm.checkpoint import read_header
    from attnorm.data.sources import find_source
    from attnorm.evaluation.test_set import make_manifest, reading
    from attnorm.run_directory import RunDirectory, find_checkpoint

    source = DataConfig(source=data, fit=fit, stored_size=stored_size)
    if like is not None:
        is_run = RunDirectory(like).exists()
        config = RunDirectory(like).read()[0] if is_run else read_header(find_checkpoint(like)).config
        source = replace(config.data, source=data or config.data.source, stored_size=stored_size or _side(config))
        size, every = size or config.model.image_size, every or config.data.held_out_every
    if not source.source:
        raise ConfigError("no data was named; give --data SRC and --size S, or --like RUN for a run's own")
    if not size:
        if source.source != "builtin":
            try:
                find_source(Path(source.source).expanduser())
            except ValueError as error:
                raise ConfigError(str(error)) from None
        raise ConfigError("no size was named; give --size S, or --like RUN for a run's own")
    require_seed("--seed", seed)
    require_outside(out, source.source)
    require_free(out, overwrite)
    images = read_images(reading(source, size))
    made = make_manifest(out, images, source, image_size=size, masks=masks, seed=seed, every=every or 10)
    print(f"{len(made.entries)} images of {len(images):,} at {size} pixels, with {masks} masks, in {out}")


def _side(config: Config) -> int:
    return config.data.stored_size or config.model.image_size
