"""What of a generator is measured, against what, and what its scores say of that."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from attnorm import __version__
from attnorm.checkpoint import Header
from attnorm.config import ClassConditionalConfig, ConfigError, require_seed
from attnorm.data.images import ImageSet, spread, trained_indices
from attnorm.evaluation.classes import fake_labels, find_classes
from attnorm.evaluation.feature_stats import NEIGHBOURS, SPLITS, named_scores, short
from attnorm.evaluation.scores import Score, UsedData, UsedExtractor
from attnorm.inference import Sampler
from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.metrics.features import Extractor
from attnorm.run_directory import RunDirectory, find_checkpoint
from attnorm.system.devices import device_name
from attnorm.system.files import hash_file
from attnorm.system.provenance import commit

LAYOUT_IMAGES = 500
# Latents of one --seed, so that two seeds share no image.
SEEDS_APART = 10_000_000


def require_measurable(
    metrics: Sequence[str], num: int, fakes_per_class: int, classes: Sequence[str], subset: int, batch_size: int
) -> None:
    """What can be told of the arguments of `evaluate_generator` before any data are read; ConfigError where not."""
    least = SPLITS if "is" in metrics else NEIGHBOURS + 1
    if num < least:
        raise ConfigError(f"--num is {num}; expected at least {least} generated images for these metrics")
    if fakes_per_class < 2:
        raise ConfigError(f"--fakes-per-class is {fakes_per_class}; expected at least 2")
    if subset and subset <= NEIGHBOURS:
        raise ConfigError(f"--subset is {subset}; expected 0 (all real images) or at least {NEIGHBOURS + 1}")
    if batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}; expected at least 1 image at a time")
    if classes and "intra-frechet" not in metrics:
        raise ConfigError(
            f"--classes is for intra-frechet, but only {', '.join(metrics)} would be measured, of all classes; add "
            "intra-frechet to --metrics, or leave --classes out"
        )


def scores_file(path: Path, out: Path | None = None) -> Path:
    """Where the scores of a run or of one of its checkpoint files go: metrics.jsonl in `out`, or in RUN/evaluation.

    Raises:
        ConfigError: the checkpoint file is in no run directory, and there is no `out`.
    """
    if out is not None:
        return out / "metrics.jsonl"
    run = run_of(find_checkpoint(path))
    if run is None:
        raise ConfigError(f"{path} is in no run directory, where its scores would go; name a folder with --out DIR")
    return run.scores_file


def run_of(checkpoint: Path) -> RunDirectory | None:
    folder = checkpoint.resolve().parent
    run = RunDirectory(folder.parent)
    return run if folder.name == "checkpoints" and run.exists() else None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The fields are arguments of `evaluate_generator`."""

    sampler: Sampler
    images: ImageSet
    extractor: Extractor
    metrics: tuple[str, ...]
    num: int
    fakes_per_class: int
    classes: tuple[str, ...]
    subset: int
    seed: int
    intervals: bool
    ema: bool

    def check(self) -> None:
        sampler, images = self.sampler, self.images
        require_measurable(
            self.metrics, self.num, self.fakes_per_class, self.classes, self.subset, batch_size=sampler.batch_size
        )
        of_classes = len(sampler.classes) * self.fakes_per_class if "intra-frechet" in self.metrics else 0
        if max(self.num, of_classes) > SEEDS_APART:
            raise ConfigError(
                f"--num is {self.num}, and --fakes-per-class {self.fakes_per_class} for {len(sampler.classes)} "
                f"classes; expected at most {SEEDS_APART:,} generated images in all"
            )
        require_seed("--seed", self.seed)
        height, width = images.images.shape[2:]
        if min(height, width) < self.side:
            raise ConfigError(
                f"{images.source} was read at {width}x{height} pixels, less than the {self.side} of {sampler.path}; "
                "read it at that size or a larger one"
            )
        if len(self.measured_against) <= NEIGHBOURS:
            raise ConfigError(
                f"{images.source} has {len(self.measured_against)} images to measure against; expected at least "
                f"{NEIGHBOURS + 1}"
            )
        if "intra-frechet" not in self.metrics:
            return
        if images.classes != sampler.classes:
            raise ConfigError(
                f"intra-frechet compares class by class, but {images.source} has not the classes of {sampler.path}; "
                "name its own data"
            )
        for label in self.labels:
            if len(self.of_class(label)) < 2:
                raise ConfigError(
                    f"{images.source} has {len(self.of_class(label))} real images of {sampler.classes[label]!r}; "
                    "expected at least 2 of every class: leave it out with --classes"
                )

    # What is measured, and against what

    @cached_property
    def header(self) -> Header:
        return self.sampler.header

    @cached_property
    def model(self) -> ClassConditionalConfig:
        assert isinstance(self.header.config.model, ClassConditionalConfig)
        return self.header.config.model

    @cached_property
    def side(self) -> int:
        return self.model.image_size

    @cached_property
    def sha256(self) -> str:
        return hash_file(self.sampler.path)

    @cached_property
    def labels(self) -> list[int]:
        """Those of intra-frechet."""
        return find_classes(self.classes, self.sampler)[0]

    @cached_property
    def is_train(self) -> bool:
        """Whether the images are the very ones among which the run's training images were."""
        run = run_of(self.sampler.path)
        return run is not None and run.read()[1].get("fingerprint") == self.images.fingerprint

    @cached_property
    def held_out_every(self) -> int:
        return self.header.config.data.held_out_every if self.is_train else 0

    @cached_property
    def real(self) -> np.ndarray:
        """Indices of all real images."""
        return trained_indices(len(self.images), self.held_out_every)

    @cached_property
    def measured_against(self) -> np.ndarray:
        """Indices of all of them, or of the subset."""
        return spread(self.real, self.subset)

    def of_class(self, label: int) -> np.ndarray:
        return spread(self.real[self.images.labels[self.real] == label], self.subset)

    @cached_property
    def fake_labels(self) -> tuple[np.ndarray, str]:
        """Labels of the generated images, and how they were chosen."""
        num_classes = len(self.sampler.classes)
        if self.images.classes != self.sampler.classes:  # then the data do not say how many of each there should be
            return fake_labels(self.num, np.ones(num_classes, np.int64)), f"all {num_classes} classes in turn"
        counts = np.bincount(self.images.labels[self.real], minlength=num_classes)
        is_balanced = (counts == counts[0]).all()
        how = "in turn, as the data have as many of each" if is_balanced else "in proportion to their real images"
        return fake_labels(self.num, counts), f"all {num_classes} classes {how}"

    # Scores

    def plan(self, metric: str) -> list[Score]:
        """The metric's scores as far as they are known before it is measured; their values are NaN."""
        if metric == "layout":
            num = min(self.num, LAYOUT_IMAGES)
            score = self.score("layout", "layout", f"layout{short(num)}", num, 0)
            modules = self.sampler.model.named_modules()
            return [replace(score, site=name) for name, module in modules if isinstance(module, AttentiveNorm2d)]
        if metric == "is":
            return [
                self.score(*named, self.num, 0) for named in named_scores("is", self.extractor, short(self.num), "")
            ]
        if metric == "intra-frechet":
            return [self.plan_intra()]
        is_subset = len(self.measured_against) < len(self.real)
        num_reals = len(self.measured_against if metric == "frechet" else self.few_real)
        # KID, precision and recall look at no more real images than generated ones; the latter two depend on how many.
        few = f"_{short(num_reals)}reals" if num_reals < len(self.measured_against) else ""
        found = named_scores(metric, self.extractor, short(self.num), self.against(is_subset) + few)
        return [replace(self.score(*named, self.num, num_reals), subset=is_subset) for named in found]

    def plan_intra(self) -> Score:
        by = self.extractor.name
        name, brief = ("intra-FID", "intra")
        if not self.extractor.is_standard:
            name, brief = f"intra-class Fréchet distance ({by})", "intra-frechet"
        num_reals = sum(len(self.of_class(label)) for label in self.labels)
        is_subset = bool(num_reals < np.isin(self.images.labels[self.real], self.labels).sum())
        which = find_classes(self.classes, self.sampler)[1]
        protocol = f"{brief}{short(self.fakes_per_class)}_{self.against(is_subset)}_{by}[{which}]"
        score = self.score("intra-frechet", name, protocol, self.fakes_per_class * len(self.labels), num_reals)
        return replace(score, subset=is_subset, labels="as many images of each class")

    def against(self, is_subset: bool) -> str:
        return ("train" if self.is_train else "other") + (f"_subset{short(self.subset)}" if is_subset else "")

    def score(self, metric: str, name: str, protocol: str, num_fakes: int, num_reals: int) -> Score:
        return Score(
            metric=metric,
            name=name,
            protocol=protocol,
            value=math.nan,
            extractor=UsedExtractor.of(self.extractor) if metric != "layout" else None,
            num_fakes=num_fakes,
            num_reals=num_reals,
            data=UsedData(
                source=self.images.source,
                fingerprint=self.images.fingerprint,
                split="train" if self.is_train else "other",
                held_out_every=self.held_out_every,
                fit=self.header.config.data.fit,
                read_at=self.images.images.shape[2:],
                image_size=self.side,
                note=self.images.note,
            ),
            labels=self.fake_labels[1],
            seed=self.seed,
            checkpoint_sha256=self.sha256,
            weights="ema" if self.ema else "raw",
        )

    def complete(self, score: Score, seconds: float, processes: int) -> Score:
        """With whose score it is and where it was measured."""
        path, config = self.sampler.path, self.header.config
        run = run_of(path)
        return replace(
            score,
            run=path.stem if run is None else run.path.name,
            preset=config.preset,
            run_seed=config.run.seed,
            checkpoint=path.name if run is None else f"checkpoints/{path.name}",
            images_seen=self.header.images_seen,
            training_seconds=self.header.seconds,
            context=self.model.context,
            width=self.model.width,
            commit=commit(),
            attnorm=__version__,
            torch=torch.__version__,
            device=device_name(self.sampler.device),
            processes=processes,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seconds=seconds,
        )

    @cached_property
    def few_real(self) -> np.ndarray:
        """Those whose features are all kept: no more than generated ones."""
        return spread(self.measured_against, self.num)
