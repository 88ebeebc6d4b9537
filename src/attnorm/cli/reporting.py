"""The subcommand that sets what was measured beside what the paper prints: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from attnorm.cli.terminal import Flag, one_bar, progress_bar, require_free
from attnorm.config import ConfigError


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    inpainting: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR")] = (),
    bench: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR")] = (),
    device: str = "auto",
    overwrite: Flag = False,
) -> None:
    """Lay out Tables 1 to 5 and Figures 4, 5 and 7 to 9 as the paper does, measured beside printed.

    Nothing is trained or measured: rows without a run are shown as such.

    Args:
        runs: Class-conditional run directories, with the scores that evaluate has written into them.
        out: Where report.md, report.html (one file, pictures inside), report.json and pictures/ go.
        inpainting: Folders that evaluate of inpainting models has written (Table 3, Figure 9).
        bench: Folders that bench layer has written (Table 5).
        device: Where the figures' images are made: auto, cpu, cuda or mps.
        overwrite: Write into a folder that is not empty.
    """
    from attnorm.reports.report import build_report, write_report
    from attnorm.system.devices import find_device

    if not (runs or inpainting or bench):
        raise ConfigError("nothing to report on was named; give run directories, --inpainting DIR or --bench DIR")
    find_device(device)
    built = build_report(runs, inpainting, bench)
    require_free(out, overwrite)
    with progress_bar() as progress:
        paths = write_report(built, out, device=device, progress=one_bar(progress, "drawing"))
    for path in paths:
        print(path)
