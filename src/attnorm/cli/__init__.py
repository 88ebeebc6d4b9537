"""The command line: each verb parses, builds one configuration or sampler, calls one function, and says what it wrote.

torch is imported inside the verbs only, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Sequence

import tyro

from attnorm import __version__
from attnorm.cli.evaluation import bench, evaluate, manifest
from attnorm.cli.generation import curves, interpolate, layout, page, sample
from attnorm.cli.inpainting import inpaint
from attnorm.cli.reporting import report
from attnorm.cli.reproduction import reproduce
from attnorm.cli.terminal import console
from attnorm.cli.training import presets, train
from attnorm.config import UserError

EPILOGUE = """Attentive Normalization for class-conditional image generation (Wang et al., CVPR 2020).

A first run: attnorm train --preset demo --out runs/demo, then attnorm page runs/demo --out runs/demo-page"""

# As `attnorm --help` lists them.
VERBS = (
    *(train, sample, interpolate, layout, inpaint, page, curves),
    *(manifest, evaluate, bench, report, reproduce, presets),
)

app = tyro.extras.SubcommandApp()
for verb in VERBS:
    app.command(verb)


def _repeat_set(arguments: Sequence[str]) -> list[str]:
    """`--set a=1 b=2` as `--set a=1 --set b=2`: both are meant to work, and none of them to be dropped."""
    out: list[str] = []
    in_set = False
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="-"):
        if argument == "--set" and not following.startswith("-"):
            in_set = True
            continue
        in_set = in_set and not argument.startswith("-")
        out += ["--set", argument] if in_set else [argument]
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A user's mistake ends with status 2 and one line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text that the terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"attnorm {__version__}")
        return
    try:
        app.cli(prog="attnorm", description=EPILOGUE, args=_repeat_set(arguments))
    except BrokenPipeError:  # `attnorm presets | head`: the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except (UserError, OSError) as error:
        console.print(f"attnorm: {error}", style="red")
        raise SystemExit(2) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; it is not imported here
            raise
        console.print("attnorm: the device is out of memory; a smaller batch or --device cpu needs less", style="red")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
