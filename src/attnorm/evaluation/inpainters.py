"""Inpainting models and two baselines on one frozen test set, image by image: Table 3 of the paper, with intervals."""

# M test images, S their size.

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnorm import __version__
from attnorm.checkpoint import CheckpointError, Header
from attnorm.config import Config, ConfigError, UserError, require_seed
from attnorm.data.images import spread, to_float, to_uint8
from attnorm.evaluation.baselines import TELEA_RADIUS, mean_fill, telea_fill
from attnorm.evaluation.test_set import Examples, Manifest
from attnorm.inference import Inpainter
from attnorm.inference.seams import without_seam
from attnorm.metrics.image_quality import DISTANCE_SCORES, SCORES, measure
from attnorm.metrics.intervals import CONFIDENCE, RESAMPLES, Difference, differences
from attnorm.run_directory import RunDirectory
from attnorm.settings import MAY_DIFFER, flatten, from_dict
from attnorm.system.devices import device_name, find_device
from attnorm.system.files import hash_file, write_json, write_text
from attnorm.system.provenance import commit

GRID_ROWS = 8
LPIPS = "lpips_pasted"

PROTOCOL = {
    "input": "the centre square; what a hole holds has no influence; float32 without TF32; self-sampling off",
    "rounding": "results are rounded to uint8 before anything is measured",
    "pasted": "the whole image: the result in the hole, the truth outside",
    "hole": "the missing pixels alone; of SSIM, its map at these pixels",
    "raw": "the whole of what the network made, outside the hole too; the baselines have none",
    "seams": "where they were taken out, what the network made was shifted to meet the known pixels, as "
    "`attnorm inpaint` does it; else it is pasted as it is",
    "psnr": "dB, 20 log10(255 / RMSE) over all channels; mean of the images' dB. An image without an error counts as "
    "if one value was off by one level, so that means stay finite",
    "distance": "PSNR of the missing pixels that are so many steps, each to any of the eight neighbours, from the "
    "nearest known one; over the images that have such pixels",
    "ssim": "Gaussian 11x11, sigma 1.5, K 0.01 and 0.03, range 255, population moments, mean of the colours, 5 pixels "
    "cut off at each side",
    "mae": "values in [0, 1]; doubled, in [-1, 1], beside the paper's",
    "interval": f"{CONFIDENCE:.0%}, paired bootstrap over the images: {RESAMPLES:,} resamples, percentiles",
    "mean fill": "each image's mean colour over its known pixels",
    "Telea": f"fast marching (Telea, 2004) by OpenCV, radius {TELEA_RADIUS}",
}

Progress = Callable[[int, int, str], None]  # images done, images in all, what is at work
Fill = Callable[[Tensor, Tensor], Tensor]  # uint8 [N, 3, S, S] and bool [N, 1, S, S] to uint8 [N, 3, S, S]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A model or a baseline, how it did, and where it comes from; a baseline has no more than the first four."""

    means: dict[str, float]  # over the images that have the score; SCORES and DISTANCE_SCORES
    device: str = ""
    seconds: float | None = None  # of filling the test set
    images_without_error: int | None = None
    checkpoint: str = ""
    sha256: str = ""
    preset: str = ""
    row: str = ""
    settings: str = ""  # a hash of all that the runs of a row have in common
    context: str = ""
    width: int | None = None
    parameters: int | None = None
    seed: int | None = None
    images_seen: int | None = None
    switch_images: int | None = None
    training_seconds: float | None = None
    batch_size: int | None = None
    trained_at: int | None = None  # pixels
    trained_on: str = ""
    note: str = ""
    weights: str = ""
    seams: str = ""  # "none": taken out


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """What scores.json says of the manifest."""

    folder: str = ""
    sha256: str
    source: str
    fingerprint: str = ""
    note: str = ""
    images: int
    every: int = 0
    image_size: int
    masks: str
    seed: int = 0
    mean_hole_share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class InpaintingScores:
    """What scores.json holds."""

    manifest: TestSet
    models: Mapping[str, Method]
    baselines: Mapping[str, Method]
    differences: tuple[Difference, ...]  # of every two models, and of every model and baseline
    bootstrap: Bootstrap
    images_with: Mapping[str, int]  # how many have a score, of DISTANCE_SCORES


class ImageGrid(NamedTuple):
    """What Figure 9 shows: some of the images, spread evenly."""

    images: Tensor  # uint8 [N, 3, S, S]
    masks: Tensor  # bool [N, 1, S, S]
    results: dict[str, Tensor]  # pasted, uint8 [N, 3, S, S], by method


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured."""

    scores: InpaintingScores
    by_image: dict[str, dict[str, np.ndarray]]  # of each method, float64 [M] by score; a baseline has none for "raw"
    hole_shares: np.ndarray  # float64 [M]
    manifest: Manifest
    grid: ImageGrid


def evaluate_inpainters(
    runs: Sequence[Path],
    manifest: Manifest,
    examples: Examples,
    *,
    with_baselines: bool = True,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    ema: bool = True,
    seams: bool = True,
    device: str = "auto",
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress = lambda done, total, name: None,
) -> Evaluation:
    """Fills every image of the test set with each model, one after the other, and measures what comes out.

    Args:
        runs: Run directories (the latest checkpoint is taken) or checkpoint files of the inpainting task.
        examples: The manifest's, as `read_examples` returns them.
        lpips: `metrics.lpips.Lpips`, where its weights are at hand: the whole image is then measured by it too.
        seams: Measure what the networks made, pasted as it is, as the paper does; False: as `Inpainter.fill` does it.
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
    fills: dict[str, Fill] = {"mean fill": mean_fill, "Telea": telea_fill} if with_baselines else {}
    total = len(examples.images) * (len(named) + len(fills))
    shown = spread(np.arange(len(examples.images)), GRID_ROWS)
    grid = ImageGrid(examples.images[shown], examples.masks[shown], {})
    by_image: dict[str, dict[str, np.ndarray]] = {}

    def run(name: str, fill: Fill, names: Sequence[str]) -> dict[str, Any]:
        """Measures one method; what every method says of itself."""
        before = len(by_image) * len(examples.images)
        found, pasted, seconds = _measure(
            examples, fill, batch_size, lpips, lambda done: progress(before + done, total, name)
        )
        by_image[name], grid.results[name] = {score: found[score].numpy() for score in names}, pasted[shown]
        without_error = int((found["mae_pasted"] == 0).sum())
        return {"means": _means(by_image[name]), "seconds": seconds, "images_without_error": without_error}

    names = (*SCORES, *DISTANCE_SCORES, *(() if lpips is None else (LPIPS,)))
    models = {}
    for name, path in named.items():
        inpainter = Inpainter(path, ema=ema, device=device, seams=seams)
        inpainter.tf32 = False  # equal terms, however trained
        results = run(name, partial(_fill, inpainter), names)
        models[name] = Method(**results, **_about(inpainter, ema))
    pasted = [score for score in names if not score.endswith("_raw")]
    baselines = {name: Method(**run(name, fill, pasted), device="cpu") for name, fill in fills.items()}
    pairs = [*itertools.combinations(models, 2), *itertools.product(models, baselines)]
    shares = examples.masks.double().mean((1, 2, 3)).numpy()
    first = next(iter(by_image.values()))
    scores = InpaintingScores(
        manifest=_describe(manifest, shares),
        models=models,
        baselines=baselines,
        differences=tuple(differences(by_image, pairs, seed=seed)),
        bootstrap=Bootstrap(seed=seed),
        images_with={name: int(np.isfinite(first[name]).sum()) for name in DISTANCE_SCORES},
    )
    return Evaluation(scores, by_image, shares, manifest, grid)


def _measure(
    examples: Examples,
    fill: Fill,
    batch_size: int,
    lpips: Callable[[Tensor, Tensor], Tensor] | None,
    progress: Callable[[int], None],
) -> tuple[dict[str, Tensor], Tensor, float]:
    """Scores of every image, the pasted results, and the seconds of filling."""
    parts, results, seconds, done = [], [], 0.0, 0
    for images, masks in zip(*(part.split(batch_size) for part in examples), strict=True):
        start = time.monotonic()
        raw = fill(images, masks)
        seconds += time.monotonic() - start
        results.append(torch.where(masks, raw, images))
        own = {} if lpips is None else {LPIPS: lpips(images, results[-1])}
        parts.append(measure(images, raw, masks) | own)
        done += len(images)
        progress(done)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, torch.cat(results), seconds


def _means(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Over the images that have the score; without those that no image has."""
    found = {name: values[np.isfinite(values)] for name, values in scores.items()}
    return {name: values.mean().item() for name, values in found.items() if len(values)}


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
    truth = to_float(images)
    made = inpainter.outputs(truth, masks).refined
    if not inpainter.seams:
        made = torch.stack([without_seam(*example) for example in zip(made, truth, masks, strict=True)])
    return to_uint8(made)


def _about(inpainter: Inpainter, ema: bool) -> dict[str, Any]:
    header, config = inpainter.header, inpainter.header.config
    return {
        "device": device_name(inpainter.device),
        "checkpoint": str(inpainter.path),
        "sha256": hash_file(inpainter.path),
        "preset": config.preset,
        "row": config.row,
        "settings": _settings(config),
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
        "weights": "ema" if ema else "raw",
        "seams": "" if inpainter.seams else "none",
    }


def _settings(config: Config) -> str:
    """A hash of the settings that runs of a row share: of where a run began, that it did not begin anew."""
    shared = {name: value for name, value in flatten(config).items() if name not in MAY_DIFFER}
    shared["run.start_from"] = bool(config.run.start_from)
    return hashlib.sha256(json.dumps(shared, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _describe(manifest: Manifest, shares: np.ndarray) -> TestSet:
    return TestSet(
        folder=str(manifest.folder),
        sha256=manifest.sha256,
        source=manifest.data.source,
        fingerprint=manifest.fingerprint,
        note=manifest.note,
        images=len(manifest.entries),
        every=manifest.every,
        image_size=manifest.image_size,
        masks=manifest.masks,
        seed=manifest.seed,
        mean_hole_share=shares.mean().item(),
    )


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


# Files


def write_scores(evaluation: Evaluation, out: Path) -> list[Path]:
    """scores.csv (image by image) and scores.json in `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "scores.csv", _csv(evaluation))
    write_json(out / "scores.json", to_dict(evaluation.scores))
    return [out / "scores.csv", out / "scores.json"]


def to_dict(scores: InpaintingScores) -> dict[str, Any]:
    """Plain JSON types."""

    def plain(methods: Mapping[str, Method]) -> dict[str, Any]:
        return {
            name: {key: value for key, value in asdict(method).items() if value not in (None, "")}
            for name, method in methods.items()
        }

    return {
        "protocol": PROTOCOL,
        "manifest": asdict(scores.manifest),
        "models": plain(scores.models),
        "baselines": plain(scores.baselines),
        "bootstrap": asdict(scores.bootstrap),
        "differences": [{**asdict(found), "is_supported": found.is_supported} for found in scores.differences],
        "images_with": dict(scores.images_with),
        "attnorm": __version__,
        "torch": torch.__version__,
        "commit": commit(),
    }


def read_scores(folder: Path) -> InpaintingScores:
    """The scores.json in `folder`, of this or an earlier version.

    Raises:
        CheckpointError: there is none, or it is not what `attnorm evaluate inpainters` writes.
    """
    file = folder / "scores.json"
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        baselines = values["floors"] if "floors" in values else values["baselines"]  # as they were called
        methods = [
            {name: from_dict(Method, method, prefix=f"{name}.", ignore_unknown=True) for name, method in group.items()}
            for group in (values["models"], baselines)
        ]
        return InpaintingScores(
            manifest=from_dict(TestSet, values["manifest"], prefix="manifest.", ignore_unknown=True),
            models=methods[0],
            baselines=methods[1],
            differences=tuple(from_dict(Difference, found, ignore_unknown=True) for found in values["differences"]),
            bootstrap=from_dict(Bootstrap, values["bootstrap"], ignore_unknown=True),
            images_with=values.get("images_with", {}),
        )
    except (OSError, json.JSONDecodeError, AttributeError, KeyError, TypeError, ConfigError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{folder} holds no scores.json that can be read ({what}); expected what `attnorm evaluate inpainters` "
            "writes; measure again"
        ) from error


def _csv(evaluation: Evaluation) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    first = next(iter(evaluation.by_image.values()))
    names = (*SCORES, *DISTANCE_SCORES, *((LPIPS,) if LPIPS in first else ()))
    writer.writerow(["method", "image", "mask", "hole_share", *names])
    for method, found in evaluation.by_image.items():
        for i, entry in enumerate(evaluation.manifest.entries):
            scores = [found[name][i].item() if name in found else "" for name in names]
            scores = ["" if score != score else score for score in scores]  # NaN: no pixel is so far from the edge
            writer.writerow([method, entry.file, entry.mask, evaluation.hole_shares[i].item(), *scores])
    return file.getvalue()
