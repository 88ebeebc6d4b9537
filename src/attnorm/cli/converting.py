"""The subcommand that reads other people's weights: convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from attnorm.cli.terminal import Flag, console, require_free
from attnorm.config import ConfigError


def convert(
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    classes: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    overwrite: Flag = False,
) -> None:
    """Make a folder that stands wherever a run is taken from the weights of another project's generator: of
    torch-mimicry (SNGAN, SAGAN, cGAN-PD and others), BigGAN-PyTorch, or DeepFill v1 (TensorFlow's, or its port).

    The format is told by the names in the file. What our networks cannot represent is refused: docs/migration.md.

    Args:
        file: A safetensors file, or one of torch's (.pth, .pt), read by its restricted reader: nothing in it is run.
        out: The folder: config.json, model.safetensors, README.md (needs the extra hub).
        classes: A text file with a name a line, in the order of the labels; without it classes have numbers.
        overwrite: Write into a folder that is not empty.
    """
    from attnorm.migration import convert as read

    require_free(out, overwrite)
    names: tuple[str, ...] = ()
    if classes is not None:
        try:
            lines = classes.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{classes} is not text in UTF-8; expected a name of a class a line") from error
        names = tuple(line.strip() for line in lines if line.strip())
    network = read(file, names)
    network.save_pretrained(out)
    assert network.header is not None
    console.print(network.header.note)
    print(out)
