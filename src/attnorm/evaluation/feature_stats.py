"""Statistics of features: of images that are made or read batch after batch, kept between calls; and metrics of them.

Three steps that compose: `stats_of_batches` (or, over several processes, `extract_features`) gives FeatureStats of any
images, `RealFeatures` and `image_folders` those of real ones, `metric_values` what two of them say.
"""

# N images, M real ones, D dimensions of their features, L logits, S side of an image.

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import safetensors
import torch
from torch import Tensor

from attnorm.checkpoint import write_tensors
from attnorm.config import ConfigError, did_you_mean
from attnorm.data.images import ImageSet, cut_centres
from attnorm.metrics.features import Extractor, Features
from attnorm.metrics.generative import (
    Gaussian,
    InceptionScore,
    Moments,
    frechet_distance,
    frechet_interval,
    inception_score,
    kernel_distance,
    precision_recall,
    score_interval,
)
from attnorm.metrics.intervals import CONFIDENCE, Interval
from attnorm.system.process_group import ProcessGroup

_log = logging.getLogger(__name__)

SPLITS = 10  # of the Inception Score
NEIGHBOURS = 3  # of precision and recall
KID_SUBSETS, KID_SIZE = 100, 1000
FRECHET_RESAMPLES, SCORE_RESAMPLES = 100, 1000
OF_FEATURES = ("frechet", "is", "kid", "precision-recall")  # what can be told from two sets of features
_FORMAT = 1  # raise it when what is kept of real images changes, so that no older file is taken for a new one

Progress = Callable[[int, int, str], None]  # done, in all, of what
Streaming = TypeVar("Streaming", Moments, InceptionScore)
Values = dict[str, Any]  # fields of a Score


# Which metrics, and what they are called

METRICS = ("frechet", "intra-frechet", "is", "kid", "precision-recall", "layout")  # as --metrics names them
# The published names, which mean the standard extractor.
PUBLISHED = {"fid": "frechet", "intra-fid": "intra-frechet"}


def find_metrics(
    names: Sequence[str], extractor: Extractor | type[Extractor], known: Sequence[str] = METRICS
) -> tuple[str, ...]:
    """The metrics of `known` that the names mean, each once, in that order.

    Raises:
        ConfigError: a name is unknown, or is the published one of another extractor's score.
    """
    found = set()
    for name in names:
        if name in PUBLISHED and not extractor.is_standard:
            raise ConfigError(
                f"--metrics names {name}, but with the extractor {extractor.name} it is none: only the standard "
                f"network's scores bear that name and can be compared with published ones; say {PUBLISHED[name]}, or "
                "--extractor inception"
            )
        metric = PUBLISHED.get(name, name)
        if metric not in known:
            hint = did_you_mean(name, [*known, *PUBLISHED])
            raise ConfigError(f"there is no metric {name!r}; {hint}known are {', '.join(known)}")
        found.add(metric)
    if not found:
        raise ConfigError(f"no metric was named; known are {', '.join(known)}")
    return tuple(metric for metric in known if metric in found)


class Named(NamedTuple):
    """One score of a metric."""

    metric: str  # of Score
    name: str
    protocol: str


def named_scores(metric: str, extractor: Extractor, number: str, against: str) -> list[Named]:
    """The scores that a metric of OF_FEATURES gives.

    Args:
        number: Of generated images, in short.
        against: What the real ones are, in the protocol.
    """
    by, is_standard = extractor.name, extractor.is_standard
    if metric == "is":
        name, short = ("IS", "is") if is_standard else (f"classifier score ({by})", "classifier")
        return [Named(f"is{n}", name, f"{short}{number}_s{n}_{by}") for n in (1, SPLITS)]
    if metric == "frechet":
        name, short = ("FID", "fid") if is_standard else (f"Fréchet distance ({by})", metric)
        return [Named(metric, name, f"{short}{number}_{against}_{by}")]
    if metric == "kid":
        name, short = ("KID", "kid") if is_standard else (f"kernel distance ({by})", "kernel")
        return [Named(metric, name, f"{short}{number}_{against}_{by}")]
    # The published precision and recall are of yet another network's features.
    return [Named(key, f"{key} ({by})", f"pr{number}_k{NEIGHBOURS}_{against}_{by}") for key in ("precision", "recall")]


def short(count: int) -> str:
    """50000 as 50k."""
    return f"{count / 1000:g}k" if count >= 1000 and count % 100 == 0 else str(count)


# Statistics of images


class FeatureRequest(NamedTuple):
    """What is to be kept of features."""

    moments: bool = False
    pooled: bool = False
    logits: bool = False
    score: bool = False


def request_for(metrics: Iterable[str], num: int, dimensions: int, *, intervals: bool) -> FeatureRequest:
    """Of generated images, for metrics of OF_FEATURES."""
    due = set(metrics)
    # No more than D features are a factor by themselves; of more, moments are enough.
    pooled = bool(due & {"kid", "precision-recall"}) or ("frechet" in due and (intervals or num <= dimensions))
    is_scored = "is" in due
    return FeatureRequest("frechet" in due and not pooled, pooled, is_scored and intervals, is_scored)


class FeatureStats(NamedTuple):
    """What was asked for; of several processes, that of all images in the first one only."""

    moments: Moments | None = None
    pooled: Tensor | None = None  # float32 [N, D], on the CPU
    logits: Tensor | None = None  # float32 [N, L], on the CPU
    score: InceptionScore | None = None

    @property
    def num(self) -> int:
        """N, where any of the first three was asked for."""
        rows = next((part for part in (self.pooled, self.logits) if part is not None), None)
        return len(rows) if rows is not None else self.moments.count if self.moments else 0

    def gaussian(self) -> Gaussian:
        """From the features where they were kept: of fewer than D that is exact."""
        if self.pooled is not None:
            return Gaussian.from_features(self.pooled)
        assert self.moments is not None
        return Gaussian.from_moments(self.moments)


def stats_of_batches(batches: Iterable[Tensor], extractor: Extractor, request: FeatureRequest) -> FeatureStats:
    """Of images uint8 [n, 3, H, W], batch after batch, in this process alone; `request.score` is not for these."""
    return _collect(((0, extractor(images)) for images in batches), extractor.dimensions, request)


def _collect(
    parts: Iterable[tuple[int, Features]], dimensions: int, request: FeatureRequest, total: int = 0
) -> FeatureStats:
    """Of features that come in parts, each after the number of its first image of `total`."""
    moments = Moments(dimensions) if request.moments else None
    score = InceptionScore(total, SPLITS) if request.score else None
    pooled: list[Tensor] = []
    logits: list[Tensor] = []
    for start, features in parts:
        if moments is not None:
            moments.add(features.pooled)
        if score is not None:
            score.add(features.logits, start)
        if request.pooled:
            pooled.append(features.pooled.cpu())
        if request.logits:
            logits.append(features.logits.cpu())
    return FeatureStats(moments, torch.cat(pooled) if pooled else None, torch.cat(logits) if logits else None, score)


def extract_features(
    features_of: Callable[[range], Features],
    total: int,
    request: FeatureRequest,
    dimensions: int,
    *,
    batch_size: int,
    group: ProcessGroup,
    progress: Callable[[int, int], None],
) -> FeatureStats:
    """Features of images number 0 .. total - 1. Process r of n makes batches r, r + n, r + 2n, ...; the last batch may
    be smaller, and no image is left out. Batches, and so features, are the same for any number of processes.
    """
    batches = [range(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]

    def own_parts() -> Iterator[tuple[int, Features]]:
        for numbers in batches[group.rank :: group.count]:
            yield numbers.start, features_of(numbers)
            progress(min(numbers.stop + (group.count - 1 - group.rank) * batch_size, total), total)

    own = _collect(own_parts(), dimensions, request, total)

    def in_order(rows_here: Tensor | None) -> Tensor | None:
        gathered = group.gather(torch.empty(0, 0) if rows_here is None else rows_here)
        if group.rank:
            return None
        rows = torch.empty(total, gathered[0].shape[1])
        for rank, part in enumerate(gathered):
            numbers = list(itertools.chain.from_iterable(batches[rank :: group.count]))
            if numbers:  # there may be more processes than batches
                rows[numbers] = part
        return rows

    return FeatureStats(
        _merged(own.moments, group) if own.moments is not None else None,
        in_order(own.pooled) if request.pooled else None,
        in_order(own.logits) if request.logits else None,
        _merged(own.score, group) if own.score is not None else None,
    )


def _merged(own: Streaming, group: ProcessGroup) -> Streaming:
    """The sum over the processes, in their order; of use in the first one only."""
    if group.count == 1:
        return own
    gathered = {name: group.gather(part) for name, part in own.state().items()}
    if group.rank:
        return own
    first, *others = [{name: parts[rank] for name, parts in gathered.items()} for rank in range(group.count)]
    total = own.from_state(first)
    for other in others:
        total.merge(own.from_state(other))
    return total


class RealFeatures:
    """What is made of real images, cut at their centre to S; it is kept under a key made of content, never of a name.

    Args:
        folder: Where; what lies there damaged is made again.
    """

    def __init__(
        self, images: ImageSet, side: int, extractor: Extractor, *, batch_size: int, folder: Path, progress: Progress
    ) -> None:
        self.images, self.side, self.extractor, self.batch_size = images, side, extractor, batch_size
        self.folder, self.progress = folder, progress

    def gaussian(self, chosen: np.ndarray, group: ProcessGroup) -> Gaussian | None:
        """Of the images at the indices `chosen`; in the first process only."""
        is_few = len(chosen) <= self.extractor.dimensions

        def make() -> dict[str, Tensor]:
            stats = self._extract(chosen, FeatureRequest(moments=not is_few, pooled=is_few), group, "real images")
            if group.rank:
                return {}
            made = stats.gaussian()
            return {"mean": made.mean, "factor": made.factor, "count": torch.tensor(made.count)}

        state = self._kept("gaussian", chosen, make, group)
        return Gaussian(state["mean"], state["factor"], int(state["count"])) if state else None

    def pooled(self, chosen: np.ndarray, group: ProcessGroup, what: str = "real images") -> Tensor | None:
        """float32 [M, D], on the CPU; in the first process only."""

        def make() -> dict[str, Tensor]:
            pooled = self._extract(chosen, FeatureRequest(pooled=True), group, what).pooled
            return {} if pooled is None else {"pooled": pooled}

        return self._kept("pooled", chosen, make, group).get("pooled")

    def _extract(self, chosen: np.ndarray, request: FeatureRequest, group: ProcessGroup, what: str) -> FeatureStats:
        def features_of(numbers: range) -> Features:
            pixels, _ = self.images.batch(chosen[numbers.start : numbers.stop])
            return self.extractor(cut_centres(pixels, self.side))

        return extract_features(
            features_of,
            len(chosen),
            request,
            self.extractor.dimensions,
            batch_size=self.batch_size,
            group=group,
            progress=lambda done, total: self.progress(done, total, what),
        )

    def key(self, kind: str, chosen: np.ndarray) -> str:
        """SHA-256 (hex) of all that decides what is kept: pixels, labels and classes, which of them, and extractor."""
        which = hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()
        extractor = self.extractor
        values = [_FORMAT, kind, self.images.fingerprint, which, self.side]
        values += [extractor.name, extractor.weights_sha256, extractor.preprocessing]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def _kept(
        self, kind: str, chosen: np.ndarray, make: Callable[[], dict[str, Tensor]], group: ProcessGroup
    ) -> dict[str, Tensor]:
        """What the first process has kept, or what all make now, which it then keeps; elsewhere nothing."""
        file = self.folder / f"{kind}-{self.key(kind, chosen)[:32]}.safetensors"
        state = read_stats(file) if group.rank == 0 else None
        (is_there,) = group.as_first([state is not None])
        if is_there:
            return state or {}
        state = make()
        if group.rank == 0:
            _write(file, state)
        return state


def read_stats(file: Path) -> dict[str, Tensor] | None:
    """What `_write` left, or None where there is nothing or where it is damaged."""
    if not file.is_file():
        return None
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            if (stored.metadata() or {}).get("sha256") != _hash(state):
                raise ValueError("its content has changed")
        return state
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        _log.warning("making features of real images again: %s is damaged (%s)", file, error)
        return None


def _write(file: Path, state: Mapping[str, Tensor]) -> None:
    plain = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, plain, {"sha256": _hash(plain)})
    except OSError as error:
        _log.warning("features of real images cannot be kept (%s)", error)


def _hash(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {list(state[name].shape)} {state[name].dtype}".encode())
        digest.update(state[name].reshape(-1).numpy().tobytes())
    return digest.hexdigest()


# Metrics of statistics


def metric_values(
    metric: str,
    fakes: FeatureStats,
    reals: Gaussian | Tensor | None,
    device: torch.device,
    *,
    seed: int,
    intervals: bool,
    progress: Progress = lambda done, total, what: None,
) -> list[Values]:
    """What each score of a metric of OF_FEATURES is, in the order of `named_scores`.

    Args:
        reals: The law of the real features for frechet, themselves (float32 [M, D]) for kid and precision-recall.
        device: Where it is computed.
        seed: Of the resamples and of KID's subsets.
        intervals: Add 95% intervals to frechet and to the one-split score, by bootstrap over the generated images.
    """
    if metric == "is":
        return _inception_scores(fakes, device, seed, intervals)
    if metric == "frechet":
        assert isinstance(reals, Gaussian)
        value: Values = {"value": frechet_distance(fakes.gaussian(), reals)}
        if not intervals or fakes.pooled is None:
            return [value]
        found = frechet_interval(
            fakes.pooled.to(device),
            reals,
            value["value"],
            resamples=FRECHET_RESAMPLES,
            seed=seed,
            progress=lambda done, total: progress(done, total, "resamples"),
        )
        return [value | _interval(found, FRECHET_RESAMPLES, seed)]
    assert fakes.pooled is not None and isinstance(reals, Tensor)
    first, second = fakes.pooled.to(device), reals.to(device)
    if metric == "kid":
        distance, spread = kernel_distance(first, second, subsets=KID_SUBSETS, subset_size=KID_SIZE, seed=seed)
        size = min(KID_SIZE, len(first), len(second))
        kid: Values = {"value": distance, "subsets": KID_SUBSETS, "subset_size": size}
        is_drawn = size < max(len(first), len(second))  # else every subset is all images, and nothing varies
        return [kid | {"spread": spread} if is_drawn else kid]
    shares = precision_recall(second, first, neighbours=NEIGHBOURS)
    return [
        {"value": shares.precision, "density": shares.density},
        {"value": shares.recall, "coverage": shares.coverage},
    ]


def _inception_scores(fakes: FeatureStats, device: torch.device, seed: int, intervals: bool) -> list[Values]:
    if fakes.score is not None:
        one, (ten, spread) = fakes.score.score(1)[0], fakes.score.score(SPLITS)
    else:
        assert fakes.logits is not None
        one, (ten, spread) = inception_score(fakes.logits, 1)[0], inception_score(fakes.logits, SPLITS)
    interval: Values = {}
    if intervals and fakes.logits is not None:
        found = score_interval(fakes.logits.to(device), resamples=SCORE_RESAMPLES, seed=seed)
        interval = _interval(found, SCORE_RESAMPLES, seed)
    return [{"value": one} | interval, {"value": ten, "spread": spread}]


def _interval(found: Interval, resamples: int, seed: int) -> Values:
    how = f"bootstrap over generated images, {resamples:,} resamples, about their mean, seed {seed}"
    return found._asdict() | {"interval": f"{CONFIDENCE:.0%}, {how}"}
