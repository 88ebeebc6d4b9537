"""Scores of images that any model made: a folder or zip against another one, or against statistics saved before.

Statistics are a safetensors file: the law of the features (mean [D], factor [D, R], count), some features themselves
where KID, precision or recall are to come (pooled [M, D]), and in its header how they were made.
"""

# N images, D dimensions of their features, H height and W width.

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from attnorm import __version__
from attnorm.checkpoint import write_tensors
from attnorm.config import ConfigError, UserError
from attnorm.data.images import load_images, spread
from attnorm.data.sources import Contents, find_source
from attnorm.evaluation.feature_stats import (
    NEIGHBOURS,
    OF_FEATURES,
    SPLITS,
    FeatureRequest,
    Progress,
    find_metrics,
    metric_values,
    named_scores,
    request_for,
    short,
    stats_of_batches,
)
from attnorm.evaluation.scores import Score, UsedData, UsedExtractor
from attnorm.metrics.features import Extractor
from attnorm.metrics.generative import Gaussian
from attnorm.settings import from_dict
from attnorm.system.devices import device_name
from attnorm.system.provenance import commit

HEADER_KEY = "attnorm.statistics"


@dataclass(frozen=True, kw_only=True)
class StatisticsProtocol:
    """How statistics were made; those of other protocols cannot be compared."""

    extractor: UsedExtractor
    size: int  # pixels to which the centre square was resized; 0: images as they are
    data: UsedData
    num_images: int
    format_version: int = 1


class Statistics(NamedTuple):
    """What there is of real images."""

    law: Gaussian
    pooled: Tensor | None  # float32 [M, D] of M images spread evenly
    protocol: StatisticsProtocol


class _Images(NamedTuple):
    """An open folder or zip."""

    num: int  # what a progress is of
    batches: Iterator[Tensor]  # uint8 [n, 3, H, W]
    describe: Callable[[], UsedData]  # once all were read


def evaluate_images(
    fakes: Path,
    reals: Path,
    extractor: Extractor,
    *,
    metrics: Sequence[str] = ("frechet",),
    size: int = 0,
    seed: int = 0,
    intervals: bool = False,
    batch_size: int = 50,
    save_statistics: Path | None = None,
    progress: Progress = lambda done, total, what: None,
) -> list[Score]:
    """Scores of a folder or zip of images against real ones.

    Args:
        fakes: A folder or zip of images, with class folders or without; all of them count.
        reals: The same of real images, or a file of statistics (.safetensors).
        metrics: Of frechet (fid), is, kid and precision-recall.
        size: Cut each image's centre square and resize it to so many pixels, as training does; 0: take it as it is, and
            all must have one size, fakes and reals.
        seed: Of the resamples and of KID's subsets.
        intervals: As of `metric_values`.
        save_statistics: Where those of the real images are kept for another time.

    Raises:
        ConfigError: the arguments do not fit together, or the statistics are of another protocol.
        UserError: images cannot be read, or are too few.
    """
    found, start = find_metrics(metrics, extractor, OF_FEATURES), time.monotonic()
    wants_pooled = bool({"kid", "precision-recall"} & set(found))
    if save_statistics is not None and save_statistics.suffix != ".safetensors":
        raise ConfigError(f"{save_statistics} is for statistics; let its name end in .safetensors")
    known: Statistics | None = None
    if reals.is_file() and reals.suffix == ".safetensors":
        known = read_statistics(reals, extractor, size=size, needs_pooled=wants_pooled)
    request = request_for(found, 0, extractor.dimensions, intervals=intervals)
    images = _open(fakes, size, batch_size, _teller(progress, "generated images"))
    stats = stats_of_batches(images.batches, extractor, request._replace(logits="is" in found, score=False))
    used, num = images.describe(), stats.num
    least = SPLITS if "is" in found else NEIGHBOURS + 1
    if num < least:
        raise UserError(f"{fakes} has {num} images that can be read; expected at least {least} for these metrics")
    if known is None and (set(found) != {"is"} or save_statistics is not None):
        tell = _teller(progress, "real images")
        known = make_statistics(reals, extractor, size=size, batch_size=batch_size, keep=wants_pooled, progress=tell)
    if known is not None:
        _require_one_size(used, known.protocol.data, size)
        if save_statistics is not None:
            write_statistics(known, save_statistics)
    about = Score(
        metric="",
        value=math.nan,
        extractor=UsedExtractor.of(extractor),
        num_fakes=num,
        fakes=used,
        seed=seed,
        weights="",
        commit=commit(),
        attnorm=__version__,
        torch=torch.__version__,
        device=device_name(extractor.device),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    scores = []
    for metric in found:
        against = None if metric == "is" or known is None else _against(metric, known, num)
        values = metric_values(
            metric, stats, against, extractor.device, seed=seed, intervals=intervals, progress=progress
        )
        of_metric = about
        if known is not None and against is not None:
            num_reals = against.count if isinstance(against, Gaussian) else len(against)
            of_metric = replace(about, num_reals=num_reals, data=known.protocol.data)
        protocol = f"images_{short(of_metric.num_reals)}reals"
        seconds = round(time.monotonic() - start, 3)
        for named, value in zip(named_scores(metric, extractor, short(num), protocol), values, strict=True):
            scores.append(replace(of_metric, **named._asdict(), **value, seconds=seconds))
    return scores


def _against(metric: str, reals: Statistics, num: int) -> Gaussian | Tensor:
    """What a metric needs of the real images: no more of them than there are generated ones, but for the distance."""
    if metric == "frechet":
        return reals.law
    assert reals.pooled is not None
    return reals.pooled[spread(np.arange(len(reals.pooled)), num)]


def _teller(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(done, total, what)


def _require_one_size(fakes: UsedData, reals: UsedData, size: int) -> None:
    if not size and fakes.read_at != reals.read_at:
        sizes = [f"{width}x{height}" for height, width in (fakes.read_at, reals.read_at)]
        raise ConfigError(
            f"{fakes.source} has images of {sizes[0]} pixels, and the real ones {sizes[1]}: a score would tell that; "
            "give --size S to have both cut at the centre and resized"
        )


# Reading


def _open(path: Path, size: int, batch_size: int, progress: Callable[[int, int], None]) -> _Images:
    if size < 0 or batch_size < 1:
        raise ConfigError(f"--size is {size}, --batch-size {batch_size}; expected 0 or more, and at least 1")
    try:
        return _resized(path, size, batch_size, progress) if size else _as_they_are(path, batch_size, progress)
    except ValueError as error:
        raise UserError(str(error)) from error


def _resized(path: Path, size: int, batch_size: int, progress: Callable[[int, int], None]) -> _Images:
    images = load_images(path, size)

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(images), batch_size):
            indices = np.arange(start, min(start + batch_size, len(images)))
            yield images.batch(indices)[0]
            progress(int(indices[-1]) + 1, len(images))

    used = UsedData(
        source=images.source,
        fingerprint=images.fingerprint,
        split="other",
        read_at=(size, size),
        image_size=size,
        note=images.note,
    )
    return _Images(len(images), batches(), lambda: used)


def _as_they_are(path: Path, batch_size: int, progress: Callable[[int, int], None]) -> _Images:
    """Decoded one after the other, in the order of their names; all of one size."""
    source = find_source(path.expanduser())
    digest, shapes = hashlib.sha256(), set[tuple[int, int]]()

    def pixels(contents: Contents) -> Iterator[Tensor]:
        for index, (_, name) in enumerate(contents.files):
            try:
                image = contents.load(index)
            except (OSError, ValueError) as error:
                raise UserError(f"{name} of {path} cannot be read ({error}); remove it, or give --size S") from error
            values = np.array(image.convert("RGB"))
            shapes.add(values.shape[:2])
            if len(shapes) > 1:
                sizes = " and ".join(f"{width}x{height}" for height, width in sorted(shapes))
                raise ConfigError(
                    f"{path} has images of {sizes} pixels ({name}); give --size S to have all cut and resized"
                )
            digest.update(values.tobytes())
            progress(index + 1, len(contents.files))
            yield torch.from_numpy(values).permute(2, 0, 1)

    def batches() -> Iterator[Tensor]:
        with source.open() as contents:
            images = pixels(contents)
            while some := list(itertools.islice(images, batch_size)):
                yield torch.stack(some)

    def describe() -> UsedData:
        (shape,) = shapes or {(0, 0)}
        digest_of_all = hashlib.sha256(f"{shape}".encode() + digest.digest()).hexdigest()
        return UsedData(source=str(path), fingerprint=digest_of_all, split="other", read_at=shape, image_size=shape[0])

    return _Images(0, batches(), describe)


# Statistics


def make_statistics(
    path: Path,
    extractor: Extractor,
    *,
    size: int = 0,
    batch_size: int = 50,
    keep: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """Of a folder or zip of real images; with `keep`, their features too."""
    images = _open(path, size, batch_size, progress)
    stats = stats_of_batches(images.batches, extractor, FeatureRequest(moments=not keep, pooled=keep))
    if stats.num <= NEIGHBOURS:
        raise UserError(f"{path} has {stats.num} images to measure against; expected at least {NEIGHBOURS + 1}")
    protocol = StatisticsProtocol(
        extractor=UsedExtractor.of(extractor), size=size, data=images.describe(), num_images=stats.num
    )
    return Statistics(stats.gaussian(), stats.pooled, protocol)


def write_statistics(statistics: Statistics, file: Path) -> None:
    """A safetensors file with the protocol in its header."""
    law = statistics.law
    tensors = {"mean": law.mean, "factor": law.factor, "count": torch.tensor(law.count)}
    if statistics.pooled is not None:
        tensors["pooled"] = statistics.pooled
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, tensors, {HEADER_KEY: json.dumps(asdict(statistics.protocol))})


def read_statistics(file: Path, extractor: Extractor, *, size: int = 0, needs_pooled: bool = False) -> Statistics:
    """What `write_statistics` left.

    Raises:
        ConfigError: they are of another extractor, preprocessing or size, or lack the features that are needed.
        UserError: the file cannot be read, or holds no statistics.
    """
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            text = (stored.metadata() or {}).get(HEADER_KEY)
            if text is None:
                raise UserError(
                    f"{file} holds no statistics; `attnorm evaluate images` writes them with --save-statistics"
                )
            protocol = from_dict(StatisticsProtocol, json.loads(text), ignore_unknown=True)
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read as statistics ({error}); make them again") from error
    used = UsedExtractor.of(extractor)
    for what, there, wanted in (
        ("the extractor", protocol.extractor.name, used.name),
        ("the extractor's weights", protocol.extractor.weights_sha256, used.weights_sha256),
        ("the preprocessing", protocol.extractor.preprocessing, used.preprocessing),
        ("the size", protocol.size, size),
    ):
        if there != wanted:
            raise ConfigError(
                f"{file} is of another protocol: {what} is {there!r}, and here {wanted!r}; make statistics with these "
                "settings, or measure with those"
            )
    if needs_pooled and "pooled" not in tensors:
        raise ConfigError(
            f"{file} has no features of single images, which kid and precision-recall need; make it again with these "
            "among --metrics, or leave them out"
        )
    law = Gaussian(tensors["mean"], tensors["factor"].contiguous(), int(tensors["count"]))
    return Statistics(law, tensors.get("pooled"), protocol)
