"""The subcommand that fills the holes of photographs: inpaint."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from attnorm.cli.terminal import Flag, Run, console, one_bar_each, progress_bar, require_free
from attnorm.config import ConfigError, UserError, printable

if TYPE_CHECKING:
    from torch import Tensor

    from attnorm.inference import Inpainter
    from attnorm.inference.photo_files import Photograph


def inpaint(
    run: Run,
    out: Annotated[Path, tyro.conf.arg(metavar="PATH")],
    image: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")] = None,
    mask: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="MASK")] = None,
    images: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    masks: Annotated[Path | None, tyro.conf.arg(metavar="DIR|FILE")] = None,
    invert: Flag = False,
    threshold: Annotated[int | None, tyro.conf.arg(metavar="T")] = None,
    max_pixels: Annotated[int, tyro.conf.arg(metavar="N")] = 0,
    seams: Flag = False,
    layout: Annotated[Path | None, tyro.conf.arg(metavar="PNG")] = None,
    lossless: Flag = False,
    raw_weights: Flag = False,
    device: str = "auto",
    dry_run: Flag = False,
    overwrite: Flag = False,
) -> None:
    """Fill the holes of photographs: of IMAGE where MASK is white, or of every image of a folder.

    Outside the mask every pixel stays as it is, bit for bit, but in JPEG, which is encoded anew (it is said how much
    changes): let PATH end in .png to avoid that. Format, mode, EXIF data, ICC profile and resolution are the image's.
    With --images, the same command goes on where it was interrupted.

    Args:
        run: A run directory (its latest checkpoint) of an inpainting model, a checkpoint file, a saved model's
            folder, or a model's name (`attnorm models`).
        out: The file to write, in the image's format or PNG or TIFF; with --images a folder.
        image: A photograph of any size; a mask belongs to it as it is shown, turned as its EXIF data say.
        mask: An image file of the same size, white where something is missing.
        images: Fill every image of this folder; subfolders are left alone.
        masks: A folder with a mask of the same stem for each image, or one mask file for all.
        invert: In the mask, black is missing.
        threshold: The least grey, of 0 to 255, that counts as white; if not said, 128, or of a mask with two greys
            the lighter.
        max_pixels: The largest area seen at once; 0: four times that of a training image. Holes in larger pictures
            are filled in windows around them, and a window that is larger still is reduced for it.
        seams: Paste what the network made as it is; otherwise it is shifted smoothly to meet the pixels beside it.
        layout: Draw what AN sees in the refinement stage: the winning entity, and every entity's map.
        lossless: With --images, write JPEG images as PNG (as TIFF where they are CMYK).
        raw_weights: Use the weights as they are, not their average over training.
        device: auto, cpu, cuda or mps.
        dry_run: Say what would be done, check every file, and write nothing.
        overwrite: Replace a file that is there, or write into a folder that is not empty.
    """
    from attnorm.inference import Inpainter
    from attnorm.inference.photo_pairs import output_format, pair_files, read_with_mask

    left_out: list[str] = []
    if images is not None:
        if image is not None or masks is None or layout is not None:
            raise ConfigError("--images takes --masks beside it, and neither IMAGE and MASK nor --layout")
        pairs, images_left, masks_left = pair_files(images, masks)
        left_out += [f"this image has no mask: {path}" for path in images_left]
        left_out += [f"this mask has no image: {path}" for path in masks_left]
        targets = _targets(out, pairs, lossless)
        read = [images, masks, *(path for pair in pairs for path in pair), *images_left, *masks_left]
        _require_apart([("--out", written) for written in (out, *targets)], read)
    else:
        if image is None or mask is None or masks is not None:
            raise ConfigError("expected IMAGE and MASK, or --images DIR and --masks DIR (or one file for all)")
        if lossless:
            raise ConfigError("--lossless is for --images; let --out end in .png")
        pairs, targets = [(image, mask)], [out]
        _require_apart([("--out", out), *([("--layout", layout)] if layout is not None else [])], [image, mask])
        require_free(out, overwrite, is_picture=True)
        if layout is not None:
            require_free(layout, overwrite, is_picture=True)
    inpainter = Inpainter(run, ema=not raw_weights, device=device, max_pixels=max_pixels, seams=seams)
    if images is not None:
        settings = {"threshold": threshold, "invert": invert, "lossless": lossless, "raw_weights": raw_weights}
        settings |= {"seams": seams}
        record: dict[str, Any] = {"checkpoint": str(inpainter.path.resolve()), "images": str(images.resolve())}
        record |= {"masks": str(masks.resolve()) if masks else "", "max_pixels": inpainter.max_pixels, **settings}
        if _goes_on(out, record, overwrite, dry_run):
            jobs = [job for job in zip(pairs, targets, strict=True) if not job[1].exists()]
            console.print(f"{len(pairs) - len(jobs)} of {len(pairs)} images were filled before and stay as they are")
            pairs, targets = [pair for pair, _ in jobs], [target for _, target in jobs]
    for reason in left_out:
        console.print(f"left out, as {reason}", style="yellow")
    num_failed = 0
    with progress_bar() as progress:
        bar = progress.add_task("filling", total=len(pairs), visible=images is not None)
        tell = one_bar_each(progress)
        for (source, its_mask), target in zip(pairs, targets, strict=True):
            try:
                photograph, hole = read_with_mask(source, its_mask, threshold=threshold, invert=invert)
                format = output_format(photograph, target)
                (height, width), share = photograph.size, hole.float().mean().item()
                if dry_run:
                    loss = ", as JPEG, which loses" if format == "JPEG" else ""
                    of = f"{share:.1%} of {width}x{height} pixels"
                    print(printable(f"{source} + {its_mask} -> {target}: {of} to fill{loss}"))
                else:
                    print(printable(_inpaint(inpainter, photograph, hole, target, format, layout, tell)))
            except UserError as error:
                if images is None:
                    raise
                num_failed += 1
                console.print(f"not filled: {error}", style="red")
            progress.update(bar, advance=1)
    if num_failed:
        raise UserError(f"{num_failed} of {len(pairs)} images {'would not be' if dry_run else 'were not'} filled")


def _targets(out: Path, pairs: Sequence[tuple[Path, Path]], lossless: bool) -> list[Path]:
    """Where each image is written; UserError where two would be one file."""
    from attnorm.inference.photo_pairs import lossless_name

    taken: dict[Path, Path] = {}
    for source, _ in pairs:
        target = out / (lossless_name(source) if lossless else source.name)
        if target in taken:
            raise UserError(f"{source} would be written to {target}, as {taken[target]} is; rename one of them")
        taken[target] = source
    return list(taken)


def _require_apart(outputs: Iterable[tuple[str, Path]], inputs: Iterable[Path]) -> None:
    """ConfigError where an output, beside its option, is an input or another output, by whatever name or link."""
    read = {place for path in inputs for place in _places(path)}
    written: dict[str, str] = {}
    for option, path in outputs:
        if not read.isdisjoint(_places(path)):
            raise ConfigError(f"{path} is what is read; choose another {option}")
        if other := written.get(os.path.realpath(path)):
            raise ConfigError(f"{other} and {option} are both {path}; choose another for one of them")
        written[os.path.realpath(path)] = option


def _places(path: Path) -> set[object]:
    """What two names of one file have in common: a path without links, or the file itself."""
    status = path.stat() if path.exists() else None
    return {os.path.realpath(path), *([(status.st_dev, status.st_ino)] if status else [])}


def _goes_on(out: Path, record: dict[str, Any], overwrite: bool, dry_run: bool) -> bool:
    """Whether the folder `out` was begun by the same command, as inpaint.json in it says; else it is begun.

    Raises:
        ConfigError: It is not empty, and was begun by another command, or by none.
    """
    from attnorm.system.files import write_json

    path = out / "inpaint.json"
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is no folder; with --images, --out is one")
    if not overwrite and out.is_dir() and any(entry != path for entry in out.iterdir()):
        begun: Any = None
        with contextlib.suppress(OSError, ValueError):
            begun = json.loads(path.read_bytes())
        if begun == record:
            return True
        if isinstance(begun, dict):
            key = next(key for key in (*record, *begun) if begun.get(key) != record.get(key))
            raise ConfigError(
                f"{out} was filled with {key} {begun.get(key)}, and now it is {record.get(key)}; "
                "choose another --out, or say --overwrite"
            )
        require_free(out, overwrite)
    if not dry_run:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    return False


def _inpaint(
    inpainter: Inpainter,
    photograph: Photograph,
    hole: Tensor,
    out: Path,
    format: str,
    layout: Path | None,
    tell: Callable[[int, int, str], None],
) -> str:
    """Fills and writes one photograph; what is to be said of it."""
    import torch

    from attnorm.reports.figures import holes_figure, save_figure
    from attnorm.system.files import write_atomically

    def progress(done: int, total: int) -> None:
        if total > 1:
            tell(done, total, f"windows of {photograph.path.name}")

    try:
        filled = inpainter.fill(photograph.rgb(), hole, with_layouts=layout is not None, progress=progress)
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
