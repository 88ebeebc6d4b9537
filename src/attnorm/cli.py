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
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress, track

from attnorm import __version__
from attnorm import config as configuration
from attnorm.config import ClassConditionalConfig, Config, ConfigError, UserError
from attnorm.presets import PRESETS

if TYPE_CHECKING:
    from torch import Tensor

    from attnorm.data.images import ImageSet
    from attnorm.data.photographs import Photograph
    from attnorm.inference import Inpainter, Sampler

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
                config.data.stored_size or config.model.image_size,
                fit=config.data.fit,
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
def inpaint(
    run: Run,
    out: Annotated[Path, tyro.conf.arg(metavar="PATH")],
    image: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")] = None,
    mask: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="MASK")] = None,
    images: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    masks: Annotated[Path | None, tyro.conf.arg(metavar="DIR|FILE")] = None,
    invert: Overwrite = False,
    threshold: Annotated[int, tyro.conf.arg(metavar="T")] = 128,
    max_pixels: Annotated[int, tyro.conf.arg(metavar="N")] = 0,
    layout: Annotated[Path | None, tyro.conf.arg(metavar="PNG")] = None,
    lossless: Overwrite = False,
    raw_weights: Overwrite = False,
    device: str = "auto",
    dry_run: Overwrite = False,
    overwrite: Overwrite = False,
) -> None:
    """Fill the holes of photographs: of IMAGE where MASK is white, or of every image of a folder.

    Outside the mask every pixel stays as it is, bit for bit, but in JPEG, which is encoded anew (it is said how much
    changes): let PATH end in .png to avoid that. Format, mode, EXIF data, ICC profile and resolution are the image's.

    Args:
        run: A run directory (its latest checkpoint) of an inpainting model, or a checkpoint file.
        out: The file to write, in the image's format or PNG or TIFF; with --images a folder.
        image: A photograph of any size; a mask belongs to it as it is shown, turned as its EXIF data say.
        mask: An image file of the same size, white where something is missing.
        images: Fill every image of this folder; subfolders are left alone.
        masks: A folder with a mask of the same stem for each image, or one mask file for all.
        invert: In the mask, black is missing.
        threshold: The least grey, of 0 to 255, that counts as white.
        max_pixels: The largest area seen at once; 0: four times that of a training image. Holes in larger pictures
            are filled in windows around them, and a window that is larger still is reduced for it.
        layout: Draw what AN sees in the refinement stage: the winning entity, and every entity's map.
        lossless: With --images, write JPEG images as PNG (as TIFF where they are CMYK).
        raw_weights: Use the weights as they are, not their average over training.
        device: auto, cpu, cuda or mps.
        dry_run: Say what would be done, check every file, and write nothing.
        overwrite: Replace a file that is there, or write into a folder that is not empty.
    """
    from attnorm.data.photographs import output_format, pair_files, read_with_mask
    from attnorm.inference import Inpainter

    if images is not None:
        if image is not None or masks is None or layout is not None:
            raise ConfigError("--images takes --masks beside it, and neither IMAGE and MASK nor --layout")
        pairs, images_left, masks_left = pair_files(images, masks)
        if out.exists() and out.samefile(images):
            raise ConfigError(f"{out} is the folder of the images; choose another --out")
        left_out = [f"this image has no mask: {path}" for path in images_left]
        left_out += [f"this mask has no image: {path}" for path in masks_left]
    else:
        if image is None or mask is None or masks is not None:
            raise ConfigError("expected IMAGE and MASK, or --images DIR and --masks DIR (or one file for all)")
        if lossless:
            raise ConfigError("--lossless is for --images; let --out end in .png")
        if out.exists() and any(path.exists() and out.samefile(path) for path in (image, mask)):
            raise ConfigError(f"{out} is what is read; choose another --out")
        pairs, left_out = [(image, mask)], []
    _require_free(out, overwrite, is_picture=images is None)
    if layout is not None:
        _require_free(layout, overwrite, is_picture=True)
    inpainter = Inpainter(run, ema=not raw_weights, device=device, max_pixels=max_pixels)
    for reason in left_out:
        console.print(f"left out, as {reason}", style="yellow")
    targets: set[Path] = set()
    num_failed = 0
    shown = console.is_terminal and images is not None
    for source, its_mask in track(pairs, "filling", console=console, transient=True, disable=not shown):
        try:
            photograph, hole = read_with_mask(source, its_mask, threshold=threshold, invert=invert)
            target = out if images is None else out / source.name
            if lossless and photograph.format == "JPEG":
                target = target.with_suffix(".tif" if photograph.mode == "CMYK" else ".png")
            if target in targets:
                raise UserError(f"{source} would be written to {target}, as another image is; rename one of them")
            targets.add(target)
            format = output_format(photograph, target)
            (height, width), share = photograph.size, hole.float().mean().item()
            if dry_run:
                loss = ", as JPEG, which loses" if format == "JPEG" else ""
                print(f"{source} + {its_mask} -> {target}: {share:.1%} of {width}x{height} pixels to fill{loss}")
            else:
                print(_inpaint(inpainter, photograph, hole, target, format, layout))
        except UserError as error:
            if images is None:
                raise
            num_failed += 1
            console.print(f"not filled: {error}", style="red")
    if num_failed:
        raise UserError(f"{num_failed} of {len(pairs)} images {'would not be' if dry_run else 'were not'} filled")


def _inpaint(
    inpainter: Inpainter, photograph: Photograph, hole: Tensor, out: Path, format: str, layout: Path | None
) -> str:
    """Fills and writes one photograph; what is to be said of it."""
    import torch

    from attnorm.checkpoint import write_atomically
    from attnorm.figures import holes_figure, save_figure

    try:
        filled = inpainter.fill(photograph.rgb(), hole, with_layouts=layout is not None)
    except torch.OutOfMemoryError:
        raise UserError(
            f"the device is out of memory for {photograph.path}; a smaller --max-pixels, or --device cpu, needs less"
        ) from None
    result = photograph.with_hole_filled(filled.image, hole)
    data = result.encoded(format)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda temporary: temporary.write_bytes(data))
    (height, width), num_windows = photograph.size, len(filled.views)
    said = f"{out}: {hole.float().mean().item():.1%} of {width}x{height} pixels filled in "
    said += "one window" if num_windows == 1 else f"{num_windows} windows"
    if format == "JPEG":
        change = result.largest_change(data, hole)
        said += f"; JPEG was encoded anew, which changed the other pixels by up to {change} of 255"
    if photograph.note:
        said += f"; {photograph.note}"
    if layout is not None:
        said += f"\n{save_figure(holes_figure(filled.views[:8]), layout)}"
        said += f", of the first 8 of {num_windows} windows" if num_windows > 8 else ""
    return said


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
    overwrite: Overwrite = False,
) -> None:
    """Freeze a test set for inpainting: images by their hashes, each with a mask drawn once; see evaluate.

    Args:
        out: Where manifest.json and the masks go.
        like: Take data, sizes and the images held out from this run; the options below that are named change them.
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

    from attnorm.checkpoint import RunDirectory
    from attnorm.evaluation.manifest import make_manifest, reading

    source = configuration.DataConfig(source=data, fit=fit, stored_size=stored_size)
    if like is not None:
        config, _ = RunDirectory(like).read()
        source = replace(config.data, source=data or config.data.source, stored_size=stored_size or _side(config))
        size, every = size or config.model.image_size, every or config.data.held_out_every
    if not source.source or not size:
        raise ConfigError("no data or no size was named; give --data SRC --size S, or --like RUN for a run's own")
    _require_seed(seed)
    _require_free(out, overwrite)
    images = _load_images(reading(source, size))
    made = make_manifest(out, images, source, image_size=size, masks=masks, seed=seed, every=every or 10)
    print(f"{len(made.entries)} images of {len(images):,} at {size} pixels, with {masks} masks, in {out}")


def _side(config: Config) -> int:
    return config.data.stored_size or config.model.image_size


@app.command
def evaluate(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    manifest: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    data: Annotated[str, tyro.conf.arg(metavar="SRC")] = "",
    cost: Annotated[str, tyro.conf.arg(metavar="SIZE,...")] = "",
    floors: bool = True,
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 16,
    seed: Seed = 0,
    raw_weights: Overwrite = False,
    device: str = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Measure inpainting models beside each other: PSNR, SSIM and MAE with intervals (Table 3, Figure 9), and cost.

    Args:
        runs: Run directories (their latest checkpoints), or checkpoint files.
        out: Where scores.md, scores.json, scores.csv, sheet.png and, with cost, cost.md and cost.json go.
        manifest: The test set, as the verb manifest has made it.
        data: Where its images are, if not where the manifest says.
        cost: Sides in pixels, comma between: time and memory of a forward pass at each, for example 256,512,1024,2048.
        floors: Measure the mean colour and Telea's method too.
        batch_size: Images at a time.
        seed: Of the bootstrap.
        raw_weights: Use the weights as they are, not their average over training.
        device: auto, cpu, cuda or mps.
        overwrite: Write into a folder that is not empty.
    """
    from attnorm.checkpoint import find_checkpoint, read_checkpoint

    if not runs:
        raise ConfigError("no run was named; expected one or several run directories")
    for run in runs:
        _, header = read_checkpoint(find_checkpoint(run), prefix="header alone")
        if header.config.task != "inpainting":
            raise ConfigError(
                f"{run} was trained for {header.config.task}: scores of generated images cannot be measured yet, only "
                "those of inpainting models"
            )
    if manifest is None and not cost:
        raise ConfigError("nothing to measure was named; give --manifest DIR (`attnorm manifest` makes one) or --cost")
    _require_seed(seed)
    _require_free(out, overwrite)
    if manifest is not None:
        _evaluate_inpainting(runs, manifest, data, out, floors, batch_size, seed, not raw_weights, device)
    if cost:
        _measure_cost(runs, cost, out, device)


def _evaluate_inpainting(
    runs: Sequence[Path],
    folder: Path,
    data: str,
    out: Path,
    floors: bool,
    batch_size: int,
    seed: int,
    ema: bool,
    device: str,
) -> None:
    from attnorm.evaluation import inpainting
    from attnorm.evaluation.manifest import read_examples, read_manifest
    from attnorm.figures import inpainting_figure, save_figure

    test_set = read_manifest(folder)
    config = test_set.reading
    images = _load_images(configuration.override(config, [f"data.source={data}"]) if data else config)
    examples = read_examples(test_set, images)
    with _progress() as progress:
        bar = progress.add_task("measuring")
        evaluation = inpainting.evaluate(
            runs,
            test_set,
            examples,
            with_floors=floors,
            ema=ema,
            device=device,
            batch_size=batch_size,
            seed=seed,
            progress=lambda done, total, name: progress.update(bar, completed=done, total=total, description=name),
        )
    for path in inpainting.write_report(evaluation, out):
        print(path)
    print(save_figure(inpainting_figure(*evaluation.sheet), out / "sheet.png"))


def _measure_cost(runs: Sequence[Path], sizes: str, out: Path, device: str) -> None:
    from attnorm.evaluation.cost import measure_cost, write_cost
    from attnorm.evaluation.inpainting import name_runs

    texts = [text.strip() for text in sizes.split(",") if text.strip()]
    if not texts or not all(text.isdecimal() for text in texts):
        raise ConfigError(f"--cost is {sizes!r}; expected sides in pixels with commas between, for example 256,512")
    with _progress() as progress:
        bar = progress.add_task("timing")
        cells = measure_cost(
            name_runs(runs),
            [int(text) for text in texts],
            device=device,
            progress=lambda done, total, name: progress.update(bar, completed=done, total=total, description=name),
        )
    for path in write_cost(cells, device, out):
        print(path)


def _progress() -> Progress:
    """A bar with the time left, on a terminal."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)


@app.command
def bench(
    part: Annotated[Literal["layer"], tyro.conf.Positional, tyro.conf.arg(metavar="PART")],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    cases: Names = "",
    subjects: Names = "",
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    tf32: Overwrite = False,
    seconds: Annotated[float, tyro.conf.arg(metavar="S")] = 1.0,
    threads: Annotated[int, tyro.conf.arg(metavar="T")] = 0,
    retain_memory: Overwrite = False,
    overwrite: Overwrite = False,
) -> None:
    """Time the layer, its implementations and what stands beside it, after checking each; Table 5 of the paper.

    Args:
        part: What is timed: layer (there is nothing else yet).
        out: Where bench.json, bench.md and time-against-pixels.png go.
        cases: Input sizes by name or group ("table5"), comma between; what this device can bear unless named.
        subjects: Of copy, instance_norm, conv1x1+instance_norm, self_attention, an-IMPLEMENTATION ("an": all of them).
        device: auto, cpu or cuda.
        dtype: Of the input; the weights stay in float32, under autocast.
        tf32: Let CUDA round the factors of float32 products.
        seconds: To spend on each subject, case and mode, after a warm-up.
        threads: For torch on the CPU; 0 leaves them as they are.
        retain_memory: Keep freed pages in the process (glibc, CPU), rather than pay for fresh ones at every step.
        overwrite: Write into a folder that is not empty.
    """
    from rich.table import Table

    from attnorm import bench as benchmark

    _require_free(out, overwrite)
    report = benchmark.run(
        cases=cases,
        subjects=subjects,
        device=device,
        dtype=dtype,
        tf32=tf32,
        seconds=seconds,
        threads=threads,
        retain=retain_memory,
        console=console,
    )
    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for title, header, rows in benchmark.tables(report):
        table = Table(*header, title=title, title_justify="left", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        screen.print(table, "")
    for disturbance in benchmark.disturbances(report):
        console.print(disturbance, style="yellow")
    for path in benchmark.write_report(report, out):
        print(path)


@app.command
def presets() -> None:
    """List the named runs, their context sites and their parameter counts (at the data's usual number of classes)."""
    from rich.table import Table

    table = Table("preset", "what it is", "pixels", "classes", "context sites", "G", "D", box=None, pad_edge=False)
    for name, (description, config) in PRESETS.items():
        num_classes = 1000 if name.startswith("paper-imagenet") else 10 if config.task == "class_conditional" else 0
        sites, g_parameters, d_parameters = _describe(config, num_classes)
        table.add_row(
            name,
            description,
            str(config.model.image_size),
            str(num_classes or "-"),
            sites,
            f"{g_parameters:,}",
            f"{d_parameters:,}",
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def _describe(config: Config, num_classes: int) -> tuple[str, int, int]:
    """Where the context blocks are, and the parameters of both networks; built without memory."""
    import torch

    from attnorm.models.class_conditional import describe
    from attnorm.models.inpainting import Critic, InpaintingGenerator

    if isinstance(config.model, ClassConditionalConfig):
        return describe(config.model, num_classes)
    with torch.device("meta"):
        networks = InpaintingGenerator(config.model), Critic(config.model)
    site = "none" if config.model.context == "none" else f"G second stage ({4 * config.model.width} channels)"
    g_parameters, d_parameters = (sum(p.numel() for p in network.parameters()) for network in networks)
    return site, g_parameters, d_parameters


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
