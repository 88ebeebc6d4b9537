"""The subcommand that opens the studio."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from attnorm.cli.terminal import Flag, console
from attnorm.config import ConfigError


def studio(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = (),
    host: Annotated[str, tyro.conf.arg(metavar="HOST")] = "127.0.0.1",
    port: Annotated[int, tyro.conf.arg(metavar="N")] = 8420,
    token: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "",
    device: str = "auto",
    no_open: Flag = False,
) -> None:
    """Open the studio in the browser: generate, morph, see what the layer sees, fill holes, watch runs.

    Nothing leaves this machine. Ctrl-C ends it.

    Args:
        runs: Run directories, or folders of them; no other file is read.
        host: The address to listen at. All but this machine's own (127.0.0.1) asks for a token.
        port: 0 takes any free one.
        token: What those who open it elsewhere must know; a new one each time unless given.
        device: auto, cpu, cuda or mps.
        no_open: Only print the address.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the studio needs {error.name}, which is not installed: pip install 'attnorm[studio]'"
        ) from None
    from attnorm.studio.server import serve

    for run in runs:
        if not run.is_dir():
            raise ConfigError(f"{run} is no folder; expected run directories, or folders of them")
    serve(runs, host=host, port=port, token=token, device=device, opens=not no_open, say=console.print)
