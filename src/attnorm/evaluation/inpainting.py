"""Inpainting models and two floors on one frozen test set, image by image: Table 3 of the paper, with intervals."""

# M test images, S their size.

from __future__ import annotations

import csv
import io
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnorm import __version__
from attnorm.checkpoint import Header
from attnorm.config import ConfigError, UserError, require_seed
from attnorm.data.images import to_float, to_uint8
from attnorm.evaluation.floors import TELEA_RADIUS, mean_fill, telea_fill
from attnorm.evaluation.manifest import Examples, Manifest
from attnorm.inference import Inpainter
from attnorm.metrics.image_quality import DISTANCE_SCORES, METRICS, REGIONS, SCORES, measure
from attnorm.metrics.intervals import CONFIDENCE, RESAMPLES, Difference, differences
from attnorm.run_directory import RunDirectory
from attnorm.system.devices import device_name, find_device, set_tf32
from attnorm.system.files import hash_file, write_json, write_text

# Table 3: Paris StreetView at 256 pixels; the paper names neither masks nor definitions. See docs/paper.md, row 19.
TABLE_3 = {
    "paper: CA [38]": {"psnr": 23.78, "ssim": 0.8406, "mae": 0.0338},
    "paper: Ours": {"psnr": 25.09, "ssim": 0.8541, "mae": 0.0334},
}
SHEET_ROWS = 8

PROTOCOL = {
    "input": "the centre square; what a hole holds has no influence; float32 without TF32; self-sampling off",
    "rounding": "results are rounded to uint8 before anything is measured",
    "pasted": "the whole image: the result in the hole, the truth outside",
    "hole": "the missing pixels alone; of SSIM, its map at these pixels",
    "raw": "the whole of what the network made, outside the hole too; the floors have none",
    "psnr": "dB, 20 log10(255 / RMSE) over all channels; mean of the images' dB. An image without an error counts as "
    "if one value was off by one level, so that means stay finite",
    "distance": "PSNR of the missing pixels that are so many steps, each to any of the eight neighbours, from the "
    "nearest known one; over the images that have such pixels",
    "ssim": "Gaussian 11x11, sigma 1.5, K 0.01 and 0.03, range 255, population moments, mean of the colours, 5 pixels "
    "cut off at each side",
    "mae": "values in [0, 1]; doubled, in [-1, 1], beside the paper's",
    "interval": f"{CONFIDENCE:.0%}, paired bootstrap over the images: {RESAMPLES:,} resamples, percentiles",
    "mean fill": "each image's mean colour over its known pixels",
    "Telea": f"fast marching (Telea, 2004), radius {TELEA_RADIUS}, extrapolations limited to one grey level",
    "lpips": "not measured: its weights are not among the dependencies",
}

Progress = Callable[[int, int, str], None]  # images done, images in all, what is at work
Fill = Callable[[Tensor, Tensor], Tensor]  # uint8 [N, 3, S, S] and bool [N, 1, S, S] to uint8 [N, 3, S, S]


@dataclass(frozen=True)
class Contestant:
    """A model or a floor, and how it did."""

    name: str
    about: dict[str, Any]  # of a model: checkpoint, hash, seed, ...
    scores: dict[str, np.ndarray]  # float64 [M], by name, SCORES and DISTANCE_SCORES; a floor has none for "raw"

    @property
    def means(self) -> dict[str, float]:
        """Over the images that have the score; without those that no image has."""
        found = {name: values[np.isfinite(values)] for name, values in self.scores.items()}
        return {name: values.mean().item() for name, values in found.items() if len(values)}


class Sheet(NamedTuple):
    """What Figure 9 shows: some of the images, spread evenly."""

    images: Tensor  # uint8 [N, 3, S, S]
    masks: Tensor  # bool [N, 1, S, S]
    results: dict[str, Tensor]  # pasted, uint8 [N, 3, S, S], by contestant


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured."""

    manifest: Manifest
    hole_shares: np.ndarray  # float64 [M]
    models: list[Contestant]
    floors: list[Contestant]
    differences: list[Difference]  # of every two models, and of every model and floor
    seed: int  # of the resamples
    sheet: Sheet


def evaluate(
    runs: Sequence[Path],
    manifest: Manifest,
    examples: Examples,
    *,
    with_floors: bool = True,
    ema: bool = True,
    device: str = "auto",
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress = lambda done, total, name: None,
) -> Evaluation:
    """Fills every image of the test set with each model, one after the other, and measures what comes out.

    Args:
        runs: Run directories (the latest checkpoint is taken) or checkpoint files of the inpainting task.
        examples: The manifest's, as `read_examples` returns them.
        batch_size: Images at a time; it changes results by no more than rounding.
        seed: Of the bootstrap.

    Raises:
        CheckpointError: a run cannot be loaded, or is of another task.
        UserError: a run was trained on images of the manifest.
    """
    require_seed("seed", seed)
    if not runs or batch_size < 1:
        raise ConfigError(f"got {len(runs)} runs, batch_size={batch_size}; expected at least 1 of each")
    find_device(device)
    named = name_runs(runs)
    for path in named.values():  # before the first second is spent
        inpainter = Inpainter(path, ema=ema, device="cpu")
        _require_unseen(manifest, inpainter.path, inpainter.header)

    floors: dict[str, Fill] = {"mean fill": mean_fill, "Telea": telea_fill} if with_floors else {}
    num_images = len(examples.images)
    total = num_images * (len(named) + len(floors))
    shown = np.unique(np.linspace(0, num_images - 1, SHEET_ROWS).astype(np.int64))
    sheet = Sheet(examples.images[shown], examples.masks[shown], {})
    done = itertools.count()

    def run(name: str, fill: Fill, about: dict[str, Any], scores: Sequence[str]) -> Contestant:
        parts, results, seconds = [], [], 0.0
        for images, masks in zip(*(part.split(batch_size) for part in examples), strict=True):
            start = time.monotonic()
            raw = fill(images, masks)
            seconds += time.monotonic() - start
            parts.append(measure(images, raw, masks))
            results.append(torch.where(masks, raw, images))
            for _ in images:
                progress(next(done) + 1, total, name)
        sheet.results[name] = torch.cat(results)[shown]
        values = {score: torch.cat([part[score] for part in parts]).numpy() for score in scores}
        return Contestant(name, {**about, "seconds": seconds}, values)

    models = []
    for name, path in named.items():
        inpainter = Inpainter(path, ema=ema, device=device)
        set_tf32(False)  # equal terms, however trained
        about = {**_about(inpainter), "weights": "ema" if ema else "raw", "device": device_name(inpainter.device)}
        models.append(run(name, partial(_fill, inpainter), about, (*SCORES, *DISTANCE_SCORES)))
    pasted = [score for score in (*SCORES, *DISTANCE_SCORES) if not score.endswith("_raw")]
    found = [run(name, fill, {"device": "cpu"}, pasted) for name, fill in floors.items()]

    scores = {contestant.name: contestant.scores for contestant in (*models, *found)}
    pairs = [*itertools.combinations(named, 2), *itertools.product(named, floors)]
    shares = examples.masks.double().mean((1, 2, 3)).numpy()
    return Evaluation(manifest, shares, models, found, differences(scores, pairs, seed=seed), seed, sheet)


def name_runs(runs: Sequence[Path]) -> dict[str, Path]:
    """Each run by its folder's name, a checkpoint file by its run's and its own; by its path where that is not one."""
    names = []
    for run in runs:
        path = run.resolve()
        is_file = path.is_file() and path.parent.name == "checkpoints"
        names.append(f"{path.parents[1].name}-{int(path.stem)}" if is_file and path.stem.isdecimal() else path.name)
    named = {str(run) if names.count(name) > 1 else name: run for name, run in zip(names, runs, strict=True)}
    if len(named) < len(runs):
        raise ConfigError(f"a run was named twice among {', '.join(map(str, runs))}; name each once")
    return named


def _fill(inpainter: Inpainter, images: Tensor, masks: Tensor) -> Tensor:
    return to_uint8(inpainter.outputs(to_float(images), masks).refined)


def _about(inpainter: Inpainter) -> dict[str, Any]:
    header, config = inpainter.header, inpainter.header.config
    return {
        "checkpoint": str(inpainter.path),
        "sha256": hash_file(inpainter.path),
        "preset": config.preset,
        "context": config.model.context,
        "width": config.model.width,
        "parameters": sum(parameter.numel() for parameter in inpainter.model.parameters()),
        "seed": config.run.seed,
        "images_seen": header.images_seen,
        "switch_images": config.inpainting.switch_images if config.inpainting else None,
        "training_seconds": header.seconds,
        "batch_size": config.run.batch_size,
        "trained_at": config.model.image_size,
        "trained_on": config.data.source,
        "note": header.note,
    }


def _require_unseen(manifest: Manifest, checkpoint: Path, header: Header) -> None:
    """Scores on images that a model was trained on say nothing. Only the same reading of the data can be told."""
    run = RunDirectory(checkpoint.resolve().parent.parent)
    if not run.exists() or run.read()[1].get("fingerprint") != manifest.fingerprint:
        return
    held_out = header.config.data.held_out_every
    if held_out == 0 or manifest.every % held_out:
        rule = f"of which it held out every {held_out}th" if held_out else "all of them"
        raise UserError(
            f"{checkpoint} was trained on images of {manifest.folder}: on the same data, {rule}, and the manifest has "
            f"every {manifest.every}th; make a manifest with --every {held_out or 'N of other images'}"
        )


def write_report(evaluation: Evaluation, out: Path) -> list[Path]:
    """scores.csv (image by image), scores.json and scores.md in `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {"scores.csv": _csv(evaluation), "scores.md": markdown(evaluation)}
    for name, text in texts.items():
        write_text(out / name, text)
    write_json(out / "scores.json", to_dict(evaluation))
    return [out / "scores.csv", out / "scores.json", out / "scores.md"]


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Plain JSON types: protocol, test set, contestants with their means, differences with their intervals."""
    manifest = evaluation.manifest
    return {
        "protocol": PROTOCOL,
        "manifest": {
            "folder": str(manifest.folder),
            "sha256": manifest.sha256,
            "source": manifest.data.source,
            "fingerprint": manifest.fingerprint,
            "note": manifest.note,
            "images": len(manifest.entries),
            "every": manifest.every,
            "image_size": manifest.image_size,
            "masks": manifest.masks,
            "seed": manifest.seed,
            "mean_hole_share": evaluation.hole_shares.mean().item(),
        },
        "models": {model.name: _summary(model) for model in evaluation.models},
        "floors": {floor.name: _summary(floor) for floor in evaluation.floors},
        "bootstrap": {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": evaluation.seed},
        "differences": [
            {**asdict(difference), "is_supported": difference.is_supported} for difference in evaluation.differences
        ],
        "table_3": TABLE_3,
        "attnorm": __version__,
        "torch": torch.__version__,
    }


def _summary(contestant: Contestant) -> dict[str, Any]:
    without_error = int((contestant.scores["mae_pasted"] == 0).sum())
    return {**contestant.about, "images_without_error": without_error, "means": contestant.means}


def _csv(evaluation: Evaluation) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = (*SCORES, *DISTANCE_SCORES)
    writer.writerow(["contestant", "image", "mask", "hole_share", *names])
    for contestant in (*evaluation.models, *evaluation.floors):
        for i, entry in enumerate(evaluation.manifest.entries):
            scores = [contestant.scores[name][i].item() if name in contestant.scores else "" for name in names]
            scores = ["" if score != score else score for score in scores]  # NaN: no pixel is so far from the edge
            share = evaluation.hole_shares[i].item()
            writer.writerow([contestant.name, entry.file, entry.mask, share, *scores])
    return file.getvalue()


DIGITS = {"psnr": 2, "ssim": 4, "mae": 4}
TITLES = {"psnr": "PSNR, dB", "ssim": "SSIM", "mae": "MAE"}


def markdown(evaluation: Evaluation) -> str:
    """Table 3 with the paper's rows below the measured ones, the differences, what they support, and the protocol."""
    manifest = evaluation.manifest
    lines = [
        f"# Inpainting: {len(manifest.entries)} images at {manifest.image_size} pixels",
        "",
        f"Data: {manifest.data.source}, every {manifest.every}th image by name. {manifest.note}".rstrip(),
        f"Masks: {manifest.masks}, seed {manifest.seed}; {evaluation.hole_shares.mean():.1%} of an image are missing "
        f"on average. Manifest: SHA-256 {manifest.sha256}.",
        "",
        *_scores_table(evaluation),
        "",
        "MAE is of values in [0, 1]; x2 is the same in [-1, 1], as which the paper's stands here: it is too large for "
        "[0, 1] at its PSNR (docs/paper.md, row 19). The paper's rows are of Paris StreetView at 256 pixels, with "
        "masks and definitions that it does not name: they are there to be seen, not to be compared with.",
        "",
        "## Differences",
        "",
        f"First minus second, mean over the images, with the {CONFIDENCE:.0%} interval of the paired bootstrap "
        f"({RESAMPLES:,} resamples, seed {evaluation.seed}). Bold where the interval does not contain 0.",
        "",
        *_differences_table(evaluation),
        "",
        *_readings(evaluation),
        "",
        "## PSNR by distance from the hole's edge",
        "",
        "In dB, of the missing pixels that are so many pixels from the nearest known one; mean over the images that "
        "have such pixels. Below, differences as above.",
        "",
        *_distance_tables(evaluation),
        "",
        "The intervals are over test images, for these very weights: they do not say what training again with another "
        f"seed would change. There are {len(evaluation.differences)} of them, and of such intervals one in "
        f"{round(1 / (1 - CONFIDENCE))} leaves out 0 by chance where there is no difference.",
        "",
        "## Models",
        "",
        *_table(
            (
                "model",
                "context",
                "width",
                "parameters",
                "seed",
                "images seen",
                "weights",
                "device",
                "checkpoint SHA-256",
            ),
            [
                (
                    m.name,
                    *(
                        f"{m.about[key]:,}" if key in ("parameters", "images_seen") else str(m.about[key])
                        for key in ("context", "width", "parameters", "seed", "images_seen", "weights", "device")
                    ),
                    m.about["sha256"][:16],
                )
                for m in evaluation.models
            ],
        ),
        "",
        "## Protocol",
        "",
        *(f"- {name}: {text}." for name, text in PROTOCOL.items()),
    ]
    for model in evaluation.models:
        if model.about["note"] not in ("", manifest.note):
            lines.append(f"- training data of {model.name}: {model.about['note']}")
        if model.about["switch_images"] == 0:
            lines.append(
                f"- {model.name} ended its first phase by the L1 on its held-out images, which may be among these."
            )
    return "\n".join(lines) + "\n"


def _scores_table(evaluation: Evaluation) -> list[str]:
    header = ["", *(f"{TITLES[m]}, {r}" for r in REGIONS for m in METRICS)]
    header.insert(4, "MAE x2, pasted")
    rows = []
    for contestant in (*evaluation.models, *evaluation.floors):
        means = contestant.means
        cells = [f"{means[name]:.{DIGITS[name[:4].rstrip('_')]}f}" if name in means else "-" for name in SCORES]
        cells.insert(3, f"{2 * means['mae_pasted']:.4f}")
        rows.append([contestant.name, *cells])
    for name, paper in TABLE_3.items():
        rows.append([name, f"{paper['psnr']:.2f}", f"{paper['ssim']:.4f}", "-", f"{paper['mae']:.4f}", *"-" * 6])
    return _table(header, rows)


def _differences_table(evaluation: Evaluation) -> list[str]:
    found = {(d.first, d.second, d.score): d for d in evaluation.differences}
    rows = []
    for (first, second), region in itertools.product(_pairs(evaluation), REGIONS):
        cells = []
        for metric in METRICS:
            difference = found.get((first, second, f"{metric}_{region}"))
            if difference is not None:
                cells.append(_interval(difference, DIGITS[metric]))
        if cells:
            rows.append([f"{first} - {second}", region, *cells])
    return _table(["", "region", *(TITLES[metric] for metric in METRICS)], rows)


def _distance_tables(evaluation: Evaluation) -> list[str]:
    """Means of the contestants by distance, then differences with their intervals."""
    contestants = (*evaluation.models, *evaluation.floors)
    header = ["", *(name.removeprefix("psnr_") for name in DISTANCE_SCORES)]
    counts = [int(np.isfinite(contestants[0].scores[name]).sum()) for name in DISTANCE_SCORES]
    rows = [["images", *map(str, counts)]]
    for contestant in contestants:
        means = contestant.means
        rows.append([contestant.name, *(f"{means[name]:.2f}" if name in means else "-" for name in DISTANCE_SCORES)])
    found = {(d.first, d.second, d.score): d for d in evaluation.differences}
    differences = []
    for first, second in _pairs(evaluation):
        cells = [_interval(found.get((first, second, name)), 2) for name in DISTANCE_SCORES]
        differences.append([f"{first} - {second}", *cells])
    return [*_table(header, rows), *(["", *_table(header, differences)] if differences else [])]


def _interval(difference: Difference | None, digits: int) -> str:
    if difference is None:
        return "-"
    text = f"{difference.mean:+.{digits}f} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"
    return f"**{text}**" if difference.is_supported else text


def _readings(evaluation: Evaluation) -> list[str]:
    """One sentence a pair: which of the two the intervals favour, in what."""
    lines = []
    for first, second in _pairs(evaluation):
        favoured: dict[str, list[str]] = {first: [], second: [], "undecided": []}
        for difference in evaluation.differences:
            if (difference.first, difference.second, difference.score in SCORES) == (first, second, True):
                is_first = (difference.mean < 0) == difference.score.startswith("mae")  # less error is better
                winner = (first if is_first else second) if difference.is_supported else "undecided"
                metric, _, region = difference.score.partition("_")
                favoured[winner].append(f"{metric.upper()} {region}")
        texts = [f"{name} is better in {', '.join(favoured[name])}" for name in (first, second) if favoured[name]]
        if favoured["undecided"]:
            texts.append(f"undecided: {', '.join(favoured['undecided'])}")
        lines.append(f"- {first} against {second}: {'; '.join(texts)}.")
    return lines


def _pairs(evaluation: Evaluation) -> list[tuple[str, str]]:
    return list(dict.fromkeys((difference.first, difference.second) for difference in evaluation.differences))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
