"""The subcommand that hands a generator to other runtimes: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from attnorm.cli.terminal import Flag, Run, console, require_ending, require_free


def export(
    run: Run,
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")],
    format: Literal["onnx", "torch-export", "web"] = "onnx",
    onnxruntime_web: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None,
    raw_weights: Flag = False,
    overwrite: Flag = False,
) -> None:
    """Write a trained generator as one file for other runtimes, with batch, height and width left free.

    Inputs are float32: z and a mixture of classes for a class-conditional generator, image in [-1, 1] and mask (not 0:
    missing) for an inpainter. What the file is and wants is in its metadata. It is compared with the network first.

    Args:
        run: A run directory (its latest checkpoint), a checkpoint file, a saved model's folder, or a model's name
            (`attnorm models`).
        out: The file, FILE.onnx, FILE.pt2 or FILE.html, as the format says.
        format: onnx for onnxruntime, in browsers too; torch-export for torch.export.load; web for a page of HTML that
            fills holes by itself, of an inpainter: it takes the npm package onnxruntime-web inside.
        onnxruntime_web: Where `npm install onnxruntime-web` put it, if not in node_modules here or above.
        raw_weights: Use the weights as they are, not their average over training.
        overwrite: Write over a file that is there.
    """
    from attnorm.export import export as write
    from attnorm.fill_page import write_page
    from attnorm.registry import load

    require_ending(
        out, f"{format}, as --format says", {"onnx": ".onnx", "torch-export": ".pt2", "web": ".html"}[format]
    )
    require_free(out, overwrite)
    loaded = load(run, ema=not raw_weights)
    with console.status("exporting; this takes up to a minute"):
        difference = write_page(loaded, out, onnxruntime_web) if format == "web" else write(loaded, out, format)
    console.print(f"its pictures are within {difference:.1g} of the network's (values from -1 to 1)")
    print(out)
