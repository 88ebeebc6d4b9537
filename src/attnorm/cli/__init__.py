"""The command line: each subcommand parses, calls one function, and says what it wrote.

torch is imported inside the subcommands only, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator, Sequence

import tyro

from attnorm import __version__
from attnorm.cli.bench import bench
from attnorm.cli.converting import convert
from attnorm.cli.evaluate_generators import evaluate_generators
from attnorm.cli.evaluate_images import evaluate_images
from attnorm.cli.evaluate_inpainters import evaluate_inpainters
from attnorm.cli.experiments import experiment
from attnorm.cli.exporting import export
from attnorm.cli.generation import curves, interpolate, layout, page, sample
from attnorm.cli.inpainting import inpaint
from attnorm.cli.manifest import manifest
from attnorm.cli.models import models
from attnorm.cli.reporting import report
from attnorm.cli.reproduction import reproduce
from attnorm.cli.studio import studio
from attnorm.cli.terminal import console, describe_os_error, out_of_memory
from attnorm.cli.training import presets, train
from attnorm.cli.watching import watch
from attnorm.config import UserError, did_you_mean

EPILOGUE = """Attentive Normalization for class-conditional image generation (Wang et al., CVPR 2020).

A first run: attnorm train --preset demo --out runs/demo, then attnorm page runs/demo --out runs/demo-page"""

# As `attnorm --help` lists them. `attnorm evaluate images` is evaluate-images.
SUBCOMMANDS = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(train, watch, sample, interpolate, layout, inpaint, page, curves, export, convert),
        *(manifest, evaluate_generators, evaluate_inpainters, evaluate_images),
        *(bench, experiment, report, reproduce, models, presets, studio),
    )
}
EVALUATED = ("generators", "inpainters", "images")
OF_INPAINTERS = ("--manifest", "--cost", "--baselines", "--no-baselines")
RENAMED = {"--floors": "--baselines", "--no-floors": "--no-baselines"}

# Before torch is imported: its C++ side warns of what is no fault, as of memory freed while a step is measured.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

app = tyro.extras.SubcommandApp()
for name, function in SUBCOMMANDS.items():
    app.command(name=name)(function)


def _evaluated(arguments: Sequence[str]) -> list[str]:
    """`evaluate generators ...` as evaluate-generators; of `evaluate RUN ...`, as it was before there were three, the
    options tell which is meant.
    """
    if list(arguments[:1]) != ["evaluate"]:
        return list(arguments)
    rest = [RENAMED.get(argument, argument) for argument in arguments[1:]]
    if not rest or rest[0] in ("-h", "--help"):
        said = "attnorm evaluate generators | inpainters | images: each says more with --help"
        if rest:
            print(said)
            raise SystemExit(0)
        raise UserError(said)
    if rest[0] in EVALUATED:
        return [f"evaluate-{rest[0]}", *rest[1:]]
    is_inpainting = any(argument.partition("=")[0] in OF_INPAINTERS for argument in rest)
    return ["evaluate-inpainters" if is_inpainting else "evaluate-generators", *rest]


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


@contextlib.contextmanager
def _interrupted_while_importing() -> Iterator[None]:
    """Ends the process at once at a Ctrl-C in the seconds in which torch and others are imported: there Python may
    raise KeyboardInterrupt where it is only printed, or where someone catches it, and the work would go on.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield  # someone else's concern, or ignored on purpose
        return

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                os._exit(130)
            frame = frame.f_back
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A user's mistake ends with status 2 and one line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is escaped, and no error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"attnorm {__version__}")
        return
    names = [*SUBCOMMANDS, "evaluate"]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in names:
        hint = did_you_mean(arguments[0], names)
        text = f"there is no subcommand {arguments[0]!r}; {hint}expected one of {', '.join(names)}"
        console.print(f"attnorm: {text}", style="red")
        raise SystemExit(2)
    try:
        with _interrupted_while_importing():
            app.cli(prog="attnorm", description=EPILOGUE, args=_repeat_set(_evaluated(arguments)))
    except BrokenPipeError:  # `attnorm presets | head`: the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except (UserError, OSError) as error:
        text = describe_os_error(error) if isinstance(error, OSError) else str(error)
        console.quiet = False  # as one of several processes was
        console.print(f"attnorm: {text}", style="red")
        raise SystemExit(2) from None
    except (RuntimeError, MemoryError) as error:
        text = out_of_memory(error)
        if not text:
            raise
        console.print(f"attnorm: {text}", style="red")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
