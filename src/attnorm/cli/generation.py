"""The subcommands that show what a generator has learnt: sample, interpolate, layout, page, curves."""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.progress import track

from attnorm.cli.terminal import Flag, Names, Run, Seed, console, counted, require_ending, require_free, split_names
from attnorm.config import ConfigError, require_seed

MOST_IMAGES_OF_A_WALK = 500  # side by side: a picture has at most 65,536 columns of pixels

if TYPE_CHECKING:
    from torch import Tensor

    from attnorm.inference import Sampler


def sample(
    run: Run,
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    num: Annotated[int, tyro.conf.arg(metavar="N")] = 64,
    seed: Seed = 0,
    classes: Names = "",
    raw_weights: Flag = False,
    device: str = "auto",
    overwrite: Flag = False,
) -> None:
    """Write images of a trained generator as PNG files, one folder a class.

    The same seed gives the same files, on the same machine with the same number of threads.

    Args:
        run: A run directory (its latest checkpoint), a checkpoint file, a saved model's folder, or a model's name
            (`attnorm models`).
        out: Where the images go: DIR/CLASS/SEED.png, a grid of the first ones, and samples.json.
        num: How many images in all; they go round the classes.
        seed: Image number i is made from seed S + i.
        classes: By name or number, comma between; all classes unless named.
        raw_weights: Use the weights as they are, not their average over training.
        device: auto, cpu, cuda or mps.
        overwrite: Write into a folder that is not empty.
    """
    from PIL import Image

    from attnorm.reports.figures import images_figure, save_figure
    from attnorm.system.files import write_atomically, write_json

    if num < 1:
        raise ConfigError(f"--num is {num}; expected at least 1 image")
    require_seed("--seed", seed)
    sampler = _sampler(run, ema=not raw_weights, device=device)
    chosen = _classes(sampler, classes)
    require_free(out, overwrite)
    seeds = [seed + i for i in range(num)]
    labels = [chosen[i % len(chosen)] for i in range(num)]
    names = folder_names(sampler.classes)
    folders = {label: out / names[label] for label in sorted(set(labels))}
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
    of = f"{counted(num, 'image')} of {counted(len(folders), 'class', 'classes')}"
    print(f"{of} in {out}, and {out / 'grid.png'}")


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
    overwrite: Flag = False,
) -> None:
    """Walk from one class to another with the latent fixed (Figure 8), with one entity's map under each image.

    Args:
        run: A run directory (its latest checkpoint), a checkpoint file, a saved model's folder, or a model's name
            (`attnorm models`).
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
    from attnorm.reports.figures import write_walk

    if steps < 2:
        raise ConfigError(f"--steps is {steps}; expected at least 2")
    require_seed("--seed", seed)
    require_ending(out, "PNG", ".png")
    sampler = _sampler(run, device=device)
    walk = [sampler.class_index(name) for name in (start, *split_names(via), end)]
    require_free(out, overwrite, is_picture=True)
    num_images = (len(walk) - 1) * (steps - 1) + 1
    if num_images > MOST_IMAGES_OF_A_WALK:
        raise ConfigError(
            f"--steps is {steps}, which makes {num_images:,} images; expected at most {MOST_IMAGES_OF_A_WALK} of them"
        )
    shown = write_walk(sampler, seed, walk, steps, out, entity=entity)
    print(f"{out}" + ("; no AN layer, so no maps" if shown is None else f", with the map of entity {shown}"))


def layout(
    run: Run,
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    classes: Names = "",
    seed: Seed = 0,
    device: str = "auto",
    overwrite: Flag = False,
) -> None:
    """Draw what the AN layer sees: image, winning entity, every entity's map (Figure 5); region statistics (Figure 4).

    Prints a line for each site: entropy of the layout, entities in use, rho, spread of the logits, asleep or awake.

    Args:
        run: A run directory (its latest checkpoint), a checkpoint file, a saved model's folder, or a model's name
            (`attnorm models`).
        out: Where layouts.png, statistics.png and layouts.json go.
        classes: By name or number, comma between; the first ten unless named.
        seed: Of the first image.
        device: auto, cpu, cuda or mps.
        overwrite: Write into a folder that is not empty.
    """
    import torch

    from attnorm.layers.diagnose import diagnose
    from attnorm.reports.figures import write_layouts

    require_seed("--seed", seed)
    sampler = _sampler(run, device=device)
    chosen = _classes(sampler, classes)[: None if classes else 10]
    require_free(out, overwrite)
    written = write_layouts(sampler, chosen, seed, out)
    latents = sampler.latents(range(seed, seed + len(chosen))).to(sampler.device)
    for site in diagnose(sampler.model, latents, torch.tensor(chosen, device=sampler.device)):
        print(site)
    for path in written:
        print(path)


def page(
    run: Run,
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    device: str = "auto",
    overwrite: Flag = False,
) -> None:
    """Write a web page about a run: samples by class, layouts, an interpolation, the training curves.

    Args:
        run: A run directory, a saved model's folder, or a model's name (`attnorm models`).
        out: Where index.html and its pictures go.
        device: auto, cpu, cuda or mps.
        overwrite: Write into a folder that is not empty.
    """
    from attnorm.reports.page import write_page

    sampler = _sampler(run, device=device)
    require_free(out, overwrite)
    print(write_page(run, sampler, out))


def curves(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Annotated[Path, tyro.conf.arg(metavar="PNG")],
    overwrite: Flag = False,
) -> None:
    """Plot losses, scores, layouts and Fréchet distances of one or several runs against images seen, and against hours.

    Args:
        runs: Run directories; each is named by its folder.
        out: The picture to write.
        overwrite: Replace a picture that is there.
    """
    from attnorm.reports.figures import curves_figure, save_figure

    if not runs:
        raise ConfigError("no run was named; expected one or several run directories")
    require_ending(out, "PNG", ".png")
    require_free(out, overwrite, is_picture=True)
    names = [run.resolve().name for run in runs]
    named = {str(run) if names.count(name) > 1 else name: run for name, run in zip(names, runs, strict=True)}
    print(save_figure(curves_figure(named), out))


def _sampler(run: Path, *, ema: bool = True, device: str = "auto") -> Sampler:
    from attnorm.inference import Sampler

    return Sampler(run, ema=ema, device=device)


def _classes(sampler: Sampler, names: str) -> list[int]:
    if not names:
        return list(range(len(sampler.classes)))
    chosen = list(dict.fromkeys(map(sampler.class_index, split_names(names))))
    if not chosen:
        raise ConfigError(f"--classes is {names!r}; expected names or numbers with commas between, or none for all")
    return chosen


def folder_names(classes: Sequence[str]) -> list[str]:
    """Each class's name where it can be a folder's, else its number; no two are one folder, on any file system."""
    others = ("grid.png", "samples.json")
    names: list[str] = []

    def is_free(name: str) -> bool:
        alike = unicodedata.normalize("NFC", name).casefold()
        return all(alike != unicodedata.normalize("NFC", taken).casefold() for taken in (*others, *names))

    for label, name in enumerate(classes):
        is_name = name not in ("", ".", "..") and len(os.fsencode(name)) <= 255 and not _NO_FOLDER.search(name)
        numbered = f"class-{label}"
        while not is_free(numbered) or numbered in classes:
            numbered += "-"
        names.append(name if is_name and is_free(name) else numbered)
    return names


_NO_FOLDER = re.compile(r"[/\\\x00-\x1f]")
