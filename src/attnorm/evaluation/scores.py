"""A score as a typed record that says how it came about, and all that is known of a metric: one table.

A run's scores are lines of RUN/evaluation/metrics.jsonl. Lines of every earlier version are read: what they do not say
has its default here.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from attnorm.checkpoint import CheckpointError
from attnorm.config import ConfigError
from attnorm.metrics.features import Extractor
from attnorm.run_directory import RunDirectory
from attnorm.settings import from_dict
from attnorm.system.files import append_lines, hash_file, read_lines, write_lines


@dataclass(frozen=True)
class Metric:
    """What tables, comparisons and figures must know of a kind of score."""

    key: str  # Score.metric
    title: str
    digits: int  # after the point
    is_less_better: bool = False


METRICS = {
    metric.key: metric
    for metric in (
        Metric("frechet", "Fréchet distance", 2, is_less_better=True),
        Metric("intra-frechet", "intra-class Fréchet distance", 2, is_less_better=True),
        Metric("is1", "Inception Score, one split", 2),
        Metric("is10", "Inception Score, ten splits", 2),
        Metric("kid", "kernel distance", 5, is_less_better=True),
        Metric("precision", "precision", 3),
        Metric("recall", "recall", 3),
        Metric("layout", "entropy of the layout", 3),
        Metric("psnr", "PSNR, dB", 2),
        Metric("ssim", "SSIM", 4),
        Metric("mae", "MAE", 4, is_less_better=True),
        Metric("lpips", "LPIPS", 4, is_less_better=True),
    )
}


@dataclass(frozen=True, kw_only=True)
class UsedExtractor:
    """Whose features a score is of."""

    name: str = ""
    title: str = ""
    weights_sha256: str = ""
    preprocessing: str = ""

    @classmethod
    def of(cls, extractor: Extractor) -> UsedExtractor:
        return cls(
            name=extractor.name,
            title=extractor.title,
            weights_sha256=extractor.weights_sha256,
            preprocessing=extractor.preprocessing,
        )


@dataclass(frozen=True, kw_only=True)
class UsedData:
    """What real images a score was measured against."""

    source: str = ""
    fingerprint: str = ""  # of pixels, labels and classes
    split: str = ""  # "train": those of the run; "other"
    held_out_every: int = 0
    fit: str = "square"
    read_at: tuple[int, ...] = ()  # height and width in pixels
    image_size: int = 0  # at which they were compared
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number, its interval, and its provenance."""

    metric: str  # a key of METRICS
    name: str = ""  # "FID" of the standard extractor alone
    protocol: str = "no protocol"  # for example fid50k_train_inception
    value: float
    spread: float | None = None  # standard deviation over splits or subsets
    low: float | None = None
    high: float | None = None
    bias: float | None = None  # of the resamples' mean
    interval: str = ""  # how it was made
    values: dict[str, float] = field(default_factory=dict)  # of each class
    density: float | None = None
    coverage: float | None = None
    subsets: int | None = None  # of KID
    subset_size: int | None = None
    site: str = ""  # of a layout
    usage: tuple[float, ...] = ()  # share of the pixels that each entity wins
    entities_in_use: float | None = None
    extractor: UsedExtractor | None = None
    num_fakes: int = 0
    num_reals: int = 0
    data: UsedData = UsedData()  # the real images
    fakes: UsedData | None = None  # images that came as files
    labels: str = ""  # how those of the generated images were chosen
    seed: int = 0
    subset: bool = False  # whether it is an estimate from a part of the real images
    checkpoint_sha256: str = ""
    weights: str = "ema"
    run: str = ""
    preset: str = ""
    run_seed: int = 0
    checkpoint: str = ""  # below the run directory
    images_seen: int = 0
    training_seconds: float | None = None
    context: str = ""
    width: int = 0
    commit: str = ""
    attnorm: str = ""
    torch: str = ""
    device: str = ""
    processes: int = 1
    date: str = ""
    seconds: float | None = None  # since the first work for any score of the same call

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two scores of one measurement, whenever, wherever and how fast it was made."""
        extractor = self.extractor or UsedExtractor()
        return (
            *(self.metric, self.protocol, self.site, self.checkpoint_sha256, self.weights, self.seed),
            *(self.num_fakes, self.num_reals, self.data.fingerprint, self.data.image_size),
            *(extractor.weights_sha256, extractor.preprocessing, self.fakes.fingerprint if self.fakes else ""),
        )

    @property
    def text(self) -> str:
        """As tables show it: the value, its spread after the sign, its interval in brackets."""
        digits = METRICS[self.metric].digits if self.metric in METRICS else 3
        text = f"{self.value:.{digits}f}"
        if self.spread is not None:
            text += f" ± {self.spread:.{digits}f}"
        if self.low is not None and self.high is not None:
            text += f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what was not measured is left out."""
        values = asdict(self)
        optional = {item.name for item in fields(self) if item.default in (None, "", ()) or item.name == "values"}
        return {
            name: value for name, value in values.items() if name not in optional or value not in (None, "", (), {})
        }


def score_from_dict(values: Mapping[str, Any]) -> Score:
    """The inverse of `to_dict`; what this version does not know is left out.

    Raises:
        ConfigError: a value is missing, of another kind, or no finite number.
    """
    score = from_dict(Score, _without_nothing(values), ignore_unknown=True)
    if score.metric == "layout" and not score.site:
        raise ConfigError("site is missing")
    return score


def _without_nothing(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the nulls that earlier versions wrote."""
    return {
        name: _without_nothing(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }


def read_scores(file: Path) -> list[Score]:
    """The scores of a metrics.jsonl, none where there is no file; a line that a kill cut short is left out.

    Raises:
        CheckpointError: a line is not what `attnorm evaluate` writes.
    """
    scores = []
    for line in read_lines(file):
        try:
            scores.append(score_from_dict(line))
        except ConfigError as error:
            raise CheckpointError(
                f"{file} has a line that is no score: {error}; expected what `attnorm evaluate` writes"
            ) from error
    return scores


def write_scores(file: Path, scores: Sequence[Score]) -> None:
    """Appends lines; those that are there of the same measurements give way."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new, before = {score.identity for score in scores}, read_lines(file)
    kept = [line for line in before if score_from_dict(line).identity not in new]
    lines = [score.to_dict() for score in scores]
    if len(kept) < len(before):
        write_lines(file, [*kept, *lines])
    else:
        append_lines(file, lines)


def scores_of_run(run: RunDirectory) -> tuple[list[Score], int]:
    """What was measured of a run, and how many more scores are outdated: their checkpoint was trained anew."""
    scores = read_scores(run.scores_file)
    current = [score for score in scores if not _is_outdated(score, run.path)]
    return current, len(scores) - len(current)


def _is_outdated(score: Score, run: Path) -> bool:
    checkpoint = run / score.checkpoint
    if not checkpoint.is_file() or not score.checkpoint_sha256 or not score.date:
        return False
    with contextlib.suppress(ValueError):  # of a date that is none
        if checkpoint.stat().st_mtime <= datetime.datetime.fromisoformat(score.date).timestamp():
            return False  # without reading it
    return hash_file(checkpoint) != score.checkpoint_sha256
