"""The verb that fills the holes of photographs: inpaint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.progress import track

from attnorm.cli.terminal import Overwrite, Run, console, require_free
from attnorm.config import ConfigError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from attnorm.data.photographs import Photograph
    from attnorm.inference import Inpainter


def inpaint(
    run: Run,
    out: Annotated[Path, tyro.conf.arg(metavar="PATH")],
    image: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")] = None,
    mask: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="MASK")] = None,
    images: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    masks: Annotated[Path | None, tyro.conf.arg(metavar="DIR|FILE")] = None,
    invert: Overwrite = False,
    threshold: Annotated[int | None, tyro.conf.arg(metavar="T")] = None,
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
        threshold: The least grey, of 0 to 255, that counts as white; if not said, 128, or of a mask with two greys
            the lighter.
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
    require_free(out, overwrite, is_picture=images is None)
    if layout is not None:
        require_free(layout, overwrite, is_picture=True)
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
