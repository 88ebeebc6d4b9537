"""Scores of class-conditional generators: FID, intra-FID, Inception Score, KID, precision and recall, and the layouts.

Each is a line of RUN/evaluation/metrics.jsonl. Its protocol is its name: `fid50k_train_inception` is of 50,000
generated images against all that the run was trained on. Started by torchrun, processes share the work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attnorm import __version__
from attnorm.data.images import ImageSet, spread
from attnorm.evaluation.feature_stats import (
    OF_FEATURES,
    FeatureRequest,
    FeatureStats,
    Progress,
    RealFeatures,
    Values,
    extract_features,
    find_metrics,
    metric_values,
    request_for,
)
from attnorm.evaluation.protocol import LAYOUT_IMAGES, SEEDS_APART, Protocol, scores_file
from attnorm.evaluation.scores import Score, read_scores, write_scores
from attnorm.inference import Sampler
from attnorm.metrics.features import Extractor, Features
from attnorm.metrics.generative import Gaussian, frechet_distance
from attnorm.ops.soft_layout import effective_entities, entity_usage, layout_entropy
from attnorm.run_directory import find_checkpoint
from attnorm.system.devices import device_name
from attnorm.system.files import default_cache_dir, write_json
from attnorm.system.process_group import ProcessGroup, find_own_device, process_group
from attnorm.system.provenance import commit

_log = logging.getLogger(__name__)


# The measurement


def evaluate_generator(
    run: Path,
    images: ImageSet,
    extractor: Extractor,
    *,
    metrics: Sequence[str],
    num: int = 50_000,
    fakes_per_class: int = 5_000,
    classes: Sequence[str] = (),
    subset: int = 0,
    seed: int = 0,
    intervals: bool = False,
    ema: bool = True,
    device: str = "auto",
    batch_size: int = 50,
    cache_dir: Path | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> list[Score]:
    """Measures one checkpoint, appends a line a score to its metrics.jsonl, and returns these scores; a score that is
    there already is returned as it is, and not measured again. Of several processes, the first writes and returns.

    Generated image number i is made by Sampler from 10,000,000 seed + i, so that two seeds share none, in evaluation
    mode, rounded to uint8, with the labels of `fake_labels`. Of class c, intra-frechet takes the numbers from
    c * fakes_per_class on. Real images are all of `images` but those that the run held out, cut at the centre to the
    model's size.

    Args:
        run: A run directory (its latest checkpoint is taken) or a checkpoint file.
        images: The run's data, or other ones of its kind; protocols then say "other" and not "train".
        metrics: Of METRICS; "layout" needs AN in the generator, and gives no line without.
        num: Generated images, but for intra-frechet and layout (at most 500).
        fakes_per_class: Of intra-frechet.
        classes: Of intra-frechet, by name or number, or ("table2",); all unless named.
        subset: Measure against so many real images only (of intra-frechet: of each class); 0: all.
        intervals: Add 95% intervals, by bootstrap over the generated images, of frechet and of the one-split score.
        cache_dir: Where what is made of real images is kept; by default "features" in the cache folder of the data.
        out: Where metrics.jsonl goes; by default RUN/evaluation.
        overwrite: Measure again what was measured; the new lines replace the old ones.
        progress: Called with (done, total, what is done).

    Raises:
        CheckpointError: the checkpoint cannot be used, or a class is unknown.
        ConfigError: what is asked for cannot be measured.
    """
    with process_group() as group:
        checkpoint = Path(group.text_of_first(str(find_checkpoint(run))))  # training may go on and save another one
        protocol = Protocol(
            sampler=Sampler(checkpoint, ema=ema, device=str(find_own_device(device)), batch_size=batch_size),
            images=images,
            extractor=extractor,
            metrics=find_metrics(metrics, extractor),
            num=num,
            fakes_per_class=fakes_per_class,
            classes=tuple(classes),
            subset=subset,
            seed=seed,
            intervals=intervals,
            ema=ema,
        )
        evaluation = _Evaluation(
            protocol=protocol,
            cache_dir=cache_dir or default_cache_dir() / "features",
            overwrite=overwrite,
            group=group,
            progress=progress if group.rank == 0 else lambda done, total, what: None,
        )
        return evaluation.run(scores_file(run, out))


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """One call of `evaluate_generator`."""

    protocol: Protocol
    cache_dir: Path
    overwrite: bool
    group: ProcessGroup
    progress: Progress

    def run(self, file: Path) -> list[Score]:
        """Measures what is not in the file; every score that was asked for, in the order of METRICS."""
        self.protocol.check()
        commit()  # before anything takes long
        is_first = self.group.rank == 0
        scores = {metric: self.protocol.plan(metric) for metric in self.protocol.metrics}
        old = {score.identity: score for score in read_scores(file)} if is_first and not self.overwrite else {}

        def is_there(score: Score) -> bool:
            found = old.get(score.identity)
            needs_interval = self.protocol.intervals and score.metric in ("frechet", "is1")
            return found is not None and (found.low is not None or not needs_interval)

        flags = self.group.as_first([not all(map(is_there, planned)) for planned in scores.values()])
        due = {metric for metric, is_due in zip(scores, flags, strict=True) if is_due}
        for metric in scores.keys() - due:
            scores[metric] = [old[score.identity] for score in scores[metric]] if is_first else []
        start = time.monotonic()
        for metric, values in self.measure(due):
            if is_first:
                seconds = round(time.monotonic() - start, 3)  # since the first work for any of them
                pairs = zip(scores[metric], values, strict=True)
                scores[metric] = [
                    self.protocol.complete(replace(score, **value), seconds, self.group.count) for score, value in pairs
                ]
                write_scores(file, scores[metric])
        return [score for metric in self.protocol.metrics for score in scores[metric]] if is_first else []

    # Values

    def measure(self, due: set[str]) -> Iterator[tuple[str, list[Values]]]:
        """The metrics that are due, the quick ones first, each as soon as it is there; values in the first process
        only. All processes must get through it together.
        """
        if "layout" in due:
            yield "layout", self.layouts() if self.group.rank == 0 else []
        if due & set(OF_FEATURES):
            yield from self.over_all_classes(due)
        if "intra-frechet" in due:
            yield "intra-frechet", [self.intra()]

    def over_all_classes(self, due: set[str]) -> Iterator[tuple[str, list[Values]]]:
        """All that can be told from one pass over generated images."""
        request = request_for(
            due, self.protocol.num, self.protocol.extractor.dimensions, intervals=self.protocol.intervals
        )
        fakes = self.fakes(self.protocol.fake_labels[0], 0, request, self.group, "generated images")
        features = self.real_features()
        if "is" in due:
            yield "is", self.values("is", fakes, None)
        if "frechet" in due:
            yield (
                "frechet",
                self.values("frechet", fakes, features.gaussian(self.protocol.measured_against, self.group)),
            )
        if few := [metric for metric in ("kid", "precision-recall") if metric in due]:
            pooled = features.pooled(self.protocol.few_real, self.group)
            for metric in few:
                yield metric, self.values(metric, fakes, pooled)

    def values(self, metric: str, fakes: FeatureStats, reals: Gaussian | Tensor | None) -> list[Values]:
        """In the first process; it alone has the statistics."""
        if self.group.rank:
            return []
        return metric_values(
            metric,
            fakes,
            reals,
            self.protocol.extractor.device,
            seed=self.protocol.seed,
            intervals=self.protocol.intervals,
            progress=self.progress,
        )

    def real_features(self) -> RealFeatures:
        return RealFeatures(
            self.protocol.images,
            self.protocol.side,
            self.protocol.extractor,
            batch_size=self.protocol.sampler.batch_size,
            folder=self.cache_dir,
            progress=self.progress,
        )

    def seeds(self, numbers: Iterable[int]) -> list[int]:
        """What Sampler makes the images of these numbers from."""
        return [self.protocol.seed * SEEDS_APART + number for number in numbers]

    def fakes(
        self, labels: np.ndarray, start: int, request: FeatureRequest, group: ProcessGroup, what: str
    ) -> FeatureStats:
        """Of the images numbered from `start` on."""

        def features_of(numbers: range) -> Features:
            seeds = self.seeds(start + number for number in numbers)
            return self.protocol.extractor(
                self.protocol.sampler.sample(seeds, labels[numbers.start : numbers.stop].tolist()).images
            )

        return extract_features(
            features_of,
            len(labels),
            request,
            self.protocol.extractor.dimensions,
            batch_size=self.protocol.sampler.batch_size,
            group=group,
            progress=lambda done, total: self.progress(done, total, what),
        )

    def intra(self) -> Values:
        """Mean over the classes of the distance between each one's generated and real images. Every process has classes
        of its own, and keeps the value of each: a thousand take hours, and none is made twice.
        """
        values = torch.zeros(len(self.protocol.labels), dtype=torch.float64)
        for index in range(self.group.rank, len(self.protocol.labels), self.group.count):
            label = self.protocol.labels[index]
            kept = self.cache_dir / f"intra-{self.key_of_class(label)}.json"
            value = None if self.overwrite else _read_value(kept)
            if value is None:
                name = f"{self.protocol.sampler.classes[label]} ({index + 1} of {len(self.protocol.labels)})"
                value = self.distance_of_class(label, name)
                _keep_value(kept, value)
            values[index] = value
        total = torch.zeros_like(values)
        for part in self.group.gather(values):  # of each class one process has the value, the others 0
            total += part
        names = [self.protocol.sampler.classes[label] for label in self.protocol.labels]
        return {"value": total.mean().item(), "values": dict(zip(names, total.tolist(), strict=True))}

    def distance_of_class(self, label: int, name: str) -> float:
        alone, is_few = ProcessGroup(), self.protocol.fakes_per_class <= self.protocol.extractor.dimensions
        pooled = self.real_features().pooled(self.protocol.of_class(label), alone, f"real images of {name}")
        assert pooled is not None
        fakes = self.fakes(
            np.full(self.protocol.fakes_per_class, label),
            label * self.protocol.fakes_per_class,
            FeatureRequest(moments=not is_few, pooled=is_few),
            alone,
            f"generated images of {name}",
        )
        return frechet_distance(fakes.gaussian(), Gaussian.from_features(pooled))

    def key_of_class(self, label: int) -> str:
        """Of all that decides its distance, and of what its line will say of how it came about."""
        reals = self.real_features().key("pooled", self.protocol.of_class(label))
        values = [
            reals,
            label,
            self.protocol.sha256,
            self.protocol.ema,
            self.protocol.fakes_per_class,
            self.protocol.seed,
        ]
        values += [__version__, commit(), torch.__version__, device_name(self.protocol.sampler.device)]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]

    def layouts(self) -> list[Values]:
        """Entropy and usage at each site, as of one large batch; its images are spread evenly over all numbers."""
        numbers = spread(np.arange(self.protocol.num), LAYOUT_IMAGES)
        num = len(numbers)
        entropies: dict[str, float] = {}
        usages: dict[str, Tensor] = {}
        for start in range(0, num, self.protocol.sampler.batch_size):
            some = numbers[start : start + self.protocol.sampler.batch_size]
            labels = self.protocol.fake_labels[0][some].tolist()
            seen = self.protocol.sampler.sample(self.seeds(some.tolist()), labels, with_layouts=True).layouts
            for site, (_, layout) in seen.items():
                share = len(some) / num
                entropies[site] = entropies.get(site, 0.0) + share * layout_entropy(layout).item()
                usages[site] = usages.get(site, torch.zeros(())) + share * entity_usage(layout).cpu().double()
            self.progress(start + len(some), num, "layouts")
        return [
            {
                "value": entropies[score.site],
                "usage": tuple(usages[score.site].tolist()),
                "entities_in_use": effective_entities(usages[score.site].tolist()),
            }
            for score in self.protocol.plan("layout")
        ]


def _read_value(file: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return float(json.loads(file.read_text(encoding="utf-8"))["value"])
    return None


def _keep_value(file: Path, value: float) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"value": value})
    except OSError as error:
        _log.warning("the distance of a class cannot be kept in %s (%s)", file.parent, error)
