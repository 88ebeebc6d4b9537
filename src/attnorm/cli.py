"""The command line: each verb parses, builds one configuration or sampler, calls one function, and says what it wrote.

torch is imported inside the verbs only, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import track

from attnorm import __version__
from attnorm import config as configuration
from attnorm.config import Config, ConfigError, UserError
from attnorm.presets import PRESETS

if TYPE_CHECKING:
    from torch import Tensor

    from attnorm.data.images import ImageSet
    from attnorm.inference import Sampler

app = tyro.extras.SubcommandApp()
console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)

EPILOGUE = """Attentive Normalization for class-conditional image generation (Wang et al., CVPR 2020).

A first run: attnorm train --preset demo --out runs/demo, then attnorm page runs/demo --out runs/demo-page"""

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Seed = Annotated[int, tyro.conf.arg(metavar="S")]
Overwrite = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Names = Annotated[str, tyro.conf.arg(metavar="NAME,...")]


@app.command
def train(
    preset: Annotated[str, tyro.conf.arg(metavar="P")],
    out: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None,
    data: Annotated[str, tyro.conf.arg(metavar="SRC")] = "",
    settings: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set", metavar="KEY=VALUE")
    ] = (),
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Train a generator; the same command goes on where an earlier one stopped.

    Args:
        preset: A named run; `attnorm presets` lists them.
        out: The run directory: made, or resumed.
        data: A folder of class folders, a folder of images, a zip of either, CIFAR-10's binary files, or "builtin".
        settings: Change a setting of the preset, for example --set model.width=32 run.batch_size=64.
        dry_run: Print the resolved configuration and stop.
    """
    if preset not in PRESETS:
        raise ConfigError(_no_such("preset", preset, list(PRESETS), "`attnorm presets` lists them"))
    config = configuration.override(PRESETS[preset][1], settings)
    if data:
        config = configuration.override(config, [f"data.source={data}"])
    if dry_run:
        values = configuration.to_dict(config)
        values["model"]["an"]["temperature"] = config.model.temperature
        print(json.dumps(values, indent=2))
        return
    if out is None:
        raise ConfigError("--out is missing: name the run directory to make or resume, for example --out runs/first")
    if not config.data.source:
        raise ConfigError(
            f"--data is missing: the preset {preset} needs a folder, a zip, CIFAR-10's files or 'builtin'"
        )
    _train(config, out)


def _train(config: Config, out: Path) -> None:
    import torch

    from attnorm.training.trainer import TrainingError
    from attnorm.training.trainer import train as run_training

    images = _load_images(config)
    try:
        outcome = run_training(config, images, out, console=console)
    except TrainingError as error:
        console.print(f"attnorm: {error}", style="red")
        raise SystemExit(1) from None
    except torch.OutOfMemoryError:
        console.print(
            "attnorm: the device is out of memory; a new run with a smaller run.batch_size or run.precision=bfloat16 "
            "needs less. What was saved is whole",
            style="red",
        )
        raise SystemExit(1) from None
    except OSError as error:
        if not (out / "config.json").is_file():
            raise
        console.print(
            f"attnorm: training stopped: {error}; the last checkpoint is whole, resume when mended", style="red"
        )
        raise SystemExit(1) from None
    print(f"{outcome.reason} at {outcome.images_seen:,} images; checkpoint {outcome.checkpoint}")
    if outcome.reason == "interrupted":
        console.print("The same command goes on from here.")
        raise SystemExit(130)
    if outcome.reason == "out of time":
        console.print("Raise run.max_minutes (0: no limit) and give the same command to go on.")


def _load_images(config: Config) -> ImageSet:
    from rich.progress import Progress

    from attnorm.data.images import load_images

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reading images", total=None)
        try:
            images = load_images(
                config.data.source,
                config.model.image_size,
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
    num_classes = len(images.classes)
    console.print(
        f"{len(images):,} images of {num_classes} class{'es' if num_classes > 1 else ''} from {images.source}"
    )
    if images.skipped:
        named = "\n  ".join(images.skipped[:10])
        more = f"\n  and {len(images.skipped) - 10} more" if len(images.skipped) > 10 else ""
        console.print(f"skipped {len(images.skipped)}:\n  {named}{more}", style="yellow", markup=False)
    if images.note:
        console.print(images.note, style="yellow", markup=False)
    return images


@app.command
def sample(
    run: Run,
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    num: Annotated[int, tyro.conf.arg(metavar="N")] = 64,
    seed: Seed = 0,
    classes: Names = "",
    raw_weights: Overwrite = False,
    device: str = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write images of a trained generator as PNG files, one folder a class. The same seed gives the same files.

    Args:
        run: A run directory (its latest checkpoint), or a checkpoint file.
        out: Where the images go: DIR/CLASS/SEED.png, a grid of the first ones, and samples.json.
        num: How many images in all; they go round the classes.
        seed: Image number i is made from seed S + i.
        classes: By name or number, comma between; all classes unless named.
        raw_weights: Use the weights as they are, not their average over training.
        device: auto, cpu, cuda or mps.
        overwrite: Write into a folder that is not empty.
    """
    from PIL import Image

    from attnorm.checkpoint import write_atomically, write_json
    from attnorm.figures import images_figure, save_figure

    if num < 1:
        raise ConfigError(f"--num is {num}; expected at least 1 image")
    _require_seed(seed, num)
    sampler = _sampler(run, ema=not raw_weights, device=device)
    chosen = _classes(sampler, classes)
    _require_free(out, overwrite)
    seeds = [seed + i for i in range(num)]
    labels = [chosen[i % len(chosen)] for i in range(num)]
    folders = {label: out / _folder_name(sampler, label) for label in sorted(set(labels))}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    firsts: dict[int, list[Tensor]] = {label: [] for label in chosen}
    number = 0
    batches = sampler.batches(seeds, labels)
    for batch in track(
        batches, "sampling", total=-(-num // sampler.batch_size), console=console, disable=not console.is_terminal
    ):
        for pixels in batch:
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            file = folders[labels[number]] / f"{seeds[number]:06d}.png"
            write_atomically(file, functools.partial(image.save, format="PNG"))
            if len(firsts[labels[number]]) < 8:
                firsts[labels[number]].append(pixels)
            number += 1
    shown = [label for label in chosen if firsts[label]][:20]
    grid = images_figure([firsts[label] for label in shown], [sampler.classes[label] for label in shown])
    save_figure(grid, out / "grid.png")
    record = {
        "checkpoint": str(sampler.path),
        "images_seen": sampler.header.images_seen,
        "weights": "raw" if raw_weights else "ema",
        "seeds": [seed, seed + num - 1],
        "classes": [sampler.classes[label] for label in chosen],
        "note": sampler.header.note,
    }
    write_json(out / "samples.json", record)
    print(f"{num} images of {len(folders)} classes in {out}, and {out / 'grid.png'}")


@app.command
def interpolate(
    run: Run,
    start: Annotated[str, tyro.conf.arg(name="from", metavar="A")],
    end: Annotated[str, tyro.conf.arg(name="to", metavar="B")],
    out: Annotated[Path, tyro.conf.arg(metavar="PNG")],
    steps: Annotated[int, tyro.conf.arg(metavar="N")] = 8,
    via: Names = "",
    seed: Seed = 0,
    entity: Annotated[int | None, tyro.conf.arg(metavar="K")] = None,
    device: str = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Walk from one class to another with the latent fixed (Figure 8), with one entity's map under each image.

    Args:
        run: A run directory (its latest checkpoint), or a checkpoint file.
        start: The first class, by name or number.
        end: The last class.
        out: The picture to write.
        steps: Images from one class to the next, both ends included.
        via: Classes to pass through in between, comma between.
        seed: Of the latent.
        entity: Whose map is shown; the one whose map varies most unless named.
        device: auto, cpu, cuda or mps.
        overwrite: Replace a picture that is there.
    """
    from attnorm.figures import interpolation_figure, most_telling_entity, save_figure

    if steps < 2:
        raise ConfigError(f"--steps is {steps}; expected at least 2")
    _require_seed(seed)
    sampler = _sampler(run, device=device)
    middle = [name for name in via.split(",") if name]
    walk = [sampler.class_index(name) for name in (start, *middle, end)]
    _require_free(out, overwrite, is_picture=True)
    images, layouts = sampler.interpolate(seed, walk, steps)
    layout = next(iter(layouts.values())).layout if layouts else None
    if layout is not None and entity is not None and not 0 <= entity < layout.shape[1]:
        raise ConfigError(f"--entity is {entity}; this layer has entities 0 to {layout.shape[1] - 1}")
    shown = most_telling_entity(layout) if layout is not None and entity is None else entity or 0
    titles = ["" for _ in images]
    for index, label in enumerate(walk):
        titles[index * (steps - 1)] = sampler.classes[label]
    save_figure(interpolation_figure(images, layout, shown, titles), out)
    print(f"{out}" + (f", with the map of entity {shown}" if layout is not None else "; no AN layer, so no maps"))


@app.command
def layout(
    run: Run,
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    classes: Names = "",
    seed: Seed = 0,
    device: str = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Draw what the AN layer sees: image, winning entity, every entity's map (Figure 5); region statistics (Figure 4).

    Args:
        run: A run directory (its latest checkpoint), or a checkpoint file.
        out: Where layouts.png, statistics.png and layouts.json go.
        classes: By name or number, comma between; the first ten unless named.
        seed: Of the first image.
        device: auto, cpu, cuda or mps.
        overwrite: Write into a folder that is not empty.
    """
    from attnorm.figures import write_layouts

    _require_seed(seed)
    sampler = _sampler(run, device=device)
    chosen = _classes(sampler, classes)[:10] if not classes else _classes(sampler, classes)
    _require_free(out, overwrite)
    for path in write_layouts(sampler, chosen, seed, out):
        print(path)


@app.command
def page(
    run: Run,
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    device: str = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write a web page about a run: samples by class, layouts, an interpolation, the training curves.

    Args:
        run: A run directory.
        out: Where index.html and its pictures go.
        device: auto, cpu, cuda or mps.
        overwrite: Write into a folder that is not empty.
    """
    from attnorm.page import write_page

    sampler = _sampler(run, device=device)
    _require_free(out, overwrite)
    print(write_page(run, sampler, out))


@app.command
def curves(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Annotated[Path, tyro.conf.arg(metavar="PNG")],
    overwrite: Overwrite = False,
) -> None:
    """Plot losses, scores, and the layouts' entropy and entities in use of one or several runs against images seen.

    Args:
        runs: Run directories; each is named by its folder.
        out: The picture to write.
        overwrite: Replace a picture that is there.
    """
    from attnorm.figures import curves_figure, save_figure

    if not runs:
        raise ConfigError("no run was named; expected one or several run directories")
    _require_free(out, overwrite, is_picture=True)
    names = [run.resolve().name for run in runs]
    named = {str(run) if names.count(name) > 1 else name: run for name, run in zip(names, runs, strict=True)}
    print(save_figure(curves_figure(named), out))


@app.command
def presets() -> None:
    """List the named runs, their context sites and their parameter counts (at the data's usual number of classes)."""
    from rich.table import Table

    from attnorm.models.class_conditional import describe

    table = Table("preset", "what it is", "pixels", "classes", "context sites", "G", "D", box=None, pad_edge=False)
    for name, (description, config) in PRESETS.items():
        num_classes = 1000 if name.startswith("paper-imagenet") else 10
        sites, g_parameters, d_parameters = describe(config.model, num_classes)
        table.add_row(
            name,
            description,
            str(config.model.image_size),
            str(num_classes),
            sites,
            f"{g_parameters:,}",
            f"{d_parameters:,}",
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def _sampler(run: Path, *, ema: bool = True, device: str = "auto") -> Sampler:
    from attnorm.inference import Sampler

    return Sampler(run, ema=ema, device=device)


def _classes(sampler: Sampler, names: str) -> list[int]:
    if not names:
        return list(range(len(sampler.classes)))
    chosen = list(dict.fromkeys(sampler.class_index(name.strip()) for name in names.split(",") if name.strip()))
    if not chosen:
        raise ConfigError(f"--classes is {names!r}; expected names or numbers with commas between, or none for all")
    return chosen


def _folder_name(sampler: Sampler, label: int) -> str:
    """A class's name, where it can be a folder's."""
    name = sampler.classes[label]
    return name if name not in ("", ".", "..") and "/" not in name and "\\" not in name else f"class-{label}"


def _require_seed(seed: int, count: int = 1) -> None:
    if not 0 <= seed <= 2**63 - count:
        raise ConfigError(f"--seed is {seed}; expected a whole number from 0 up to 2^63")


def _require_free(out: Path, overwrite: bool, *, is_picture: bool = False) -> None:
    if is_picture and out.is_dir():
        raise ConfigError(f"{out} is a folder; expected a picture's name, for example {out / 'picture.png'}")
    occupied = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if occupied and not overwrite:
        raise ConfigError(f"{out} is already there; choose another --out, or say --overwrite")
    if out.suffix == "" and out.is_file():
        raise ConfigError(f"{out} is a file; expected a folder")


def _no_such(kind: str, name: str, known: Sequence[str], remedy: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"there is no {kind} {name!r}; " + (f"did you mean {near[0]}? " if near else "") + remedy


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
    except KeyboardInterrupt:
        raise SystemExit(130) from None
