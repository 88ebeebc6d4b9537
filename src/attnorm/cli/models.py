"""The subcommand about the models that come with the package: models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from attnorm.cli.terminal import Flag, require_free, screen
from attnorm.config import ConfigError, did_you_mean


def models(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = "",
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    overwrite: Flag = False,
) -> None:
    """List the models that come with the package, whose names stand wherever a run is taken; or show one's card.

    Args:
        name: Of one of them: its card, with data, recipe, scores and what it cannot do.
        out: Write a web page that shows them at work.
        overwrite: Write into a folder that is not empty.
    """
    from rich.table import Table

    from attnorm.checkpoint import read_header
    from attnorm.presets import PRESETS
    from attnorm.pretrained import card_text, read_card, shipped

    files = shipped()
    if name and name not in files:
        hint = did_you_mean(name, files)
        raise ConfigError(f"there is no model {name!r}; {hint}there are: {', '.join(files) or 'none'}")
    if out is not None:
        from attnorm.reports.showcase import write_showcase

        require_free(out, overwrite)
        print(write_showcase([name] if name else list(files), out))
        return
    if name:
        print(card_text(name, read_card(name)))
        return
    table = Table("model", "task", "data", "pixels", "size", "score", box=None, pad_edge=False)
    for model, file in files.items():
        config, card = read_header(file).config, read_card(model)
        size = f"{file.stat().st_size / 2**20:.1f} MiB"
        table.add_row(model, config.task, card.data, str(config.model.image_size), size, card.score)
    screen().print(table)
    for both in sorted({*files} & {*PRESETS}):
        print(f"{both} is a preset too, another network: attnorm train --preset {both}, create_model('preset:{both}')")
