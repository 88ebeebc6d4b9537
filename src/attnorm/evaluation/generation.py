"""Scores of class-conditional generators: FID, intra-FID, Inception Score, KID, precision and recall, and the layouts.

Each score is one line of RUN/evaluation/metrics.jsonl that says by itself how it came about. Its protocol is its name:
`fid50k_train_inception` is of 50,000 generated images against all that the run was trained on. Started by torchrun,
processes share the work.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnorm import __version__
from attnorm.checkpoint import Header
from attnorm.config import ClassConditionalConfig, ConfigError, did_you_mean, require_seed
from attnorm.data.images import ImageSet, held_out_indices
from attnorm.evaluation.collection import (
    SPLITS,
    Collected,
    Progress,
    RealFeatures,
    Wanted,
    collect,
)
from attnorm.inference import Sampler
from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.metrics.features import Extractor, Features
from attnorm.metrics.generative import (
    Gaussian,
    frechet_distance,
    frechet_interval,
    kernel_distance,
    precision_recall,
    score_interval,
)
from attnorm.metrics.intervals import CONFIDENCE, Interval
from attnorm.ops.soft_layout import effective_entities, entity_usage, layout_entropy
from attnorm.run_directory import RunDirectory, find_checkpoint
from attnorm.system.devices import device_name
from attnorm.system.files import (
    append_lines,
    default_cache_dir,
    hash_file,
    read_lines,
    write_json,
    write_lines,
)
from attnorm.system.process_group import ProcessGroup, find_own_device, process_group
from attnorm.system.provenance import commit

_log = logging.getLogger(__name__)

Values = list[dict[str, Any]]  # of the lines of one metric

METRICS = ("frechet", "intra-frechet", "is", "kid", "precision-recall", "layout")
# The published names, which mean the standard extractor.
PUBLISHED = {"fid": "frechet", "intra-fid": "intra-frechet"}

# By name: ImageNet's number of each, and WordNet's, by which its folders are called.
TABLE_2_CLASSES = {
    "stone wall": (825, "n04326547"),
    "geyser": (974, "n09288635"),
    "valley": (979, "n09468604"),
    "coral fungus": (991, "n12985857"),
    "indigo bunting": (14, "n01537544"),
    "redshank": (141, "n02028035"),
    "saint bernard": (247, "n02109525"),
    "tiger cat": (282, "n02123159"),
}

NEIGHBOURS = 3  # of precision and recall
KID_SUBSETS, KID_SIZE = 100, 1000
LAYOUT_IMAGES = 500
# Latents of one --seed, so that two seeds share no image.
SEEDS_APART = 10_000_000
FRECHET_RESAMPLES, SCORE_RESAMPLES = 100, 1000


# What is asked for


def find_metrics(names: Sequence[str], extractor: Extractor | type[Extractor]) -> tuple[str, ...]:
    """The metrics of METRICS that the names mean, each once, in that order.

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
        if metric not in METRICS:
            hint = did_you_mean(name, [*METRICS, *PUBLISHED])
            raise ConfigError(f"there is no metric {name!r}; {hint}known are {', '.join(METRICS)}")
        found.add(metric)
    if not found:
        raise ConfigError(f"no metric was named; known are {', '.join(METRICS)}")
    return tuple(metric for metric in METRICS if metric in found)


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


def find_classes(names: Sequence[str], sampler: Sampler) -> tuple[list[int], str]:
    """Labels of the classes named (by name or number, or all of Table 2 by "table2"; none: all), and what a protocol
    calls them.
    """
    if not names:
        return list(range(len(sampler.classes))), "all"
    if list(names) == ["table2"]:
        return [_table_2_label(name, sampler) for name in TABLE_2_CLASSES], "table2"
    labels = list(dict.fromkeys(sampler.class_index(name) for name in names))
    return labels, ",".join(map(str, labels))


def _table_2_label(name: str, sampler: Sampler) -> int:
    """By WordNet's number, by name, or by ImageNet's number as a name: classes are in the order of their names."""
    number, wordnet = TABLE_2_CLASSES[name]
    plain = [known.casefold().replace("_", " ").replace("-", " ") for known in sampler.classes]
    for label, known in enumerate(plain):
        if known.startswith(wordnet) or known in (name, str(number)):
            return label
    raise ConfigError(
        f"{sampler.path} lacks the class {name!r} ({wordnet}) of Table 2 among its {len(plain)}; name others with "
        "--classes"
    )


def fake_labels(num: int, counts: np.ndarray) -> np.ndarray:
    """Labels of the generated images, int64 [num]: in turn where the data have as many of every class, else in
    proportion to its images (largest remainders), each class spread evenly over the numbers.

    Args:
        counts: Real images of each class.
    """
    if (counts == counts[0]).all():
        return np.arange(num) % len(counts)
    quotas, remainders = np.divmod(num * counts.astype(np.int64), counts.sum())
    quotas[np.argsort(-remainders, kind="stable")[: num - quotas.sum()]] += 1
    labels = np.repeat(np.arange(len(counts)), quotas)
    places = np.concatenate([(np.arange(quota) + 0.5) / max(quota, 1) for quota in quotas])
    return labels[np.argsort(places, kind="stable")]


def _spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the indices (0: all), spread evenly."""
    if not 0 < most < len(indices):
        return indices
    return indices[np.unique(np.linspace(0, len(indices) - 1, most).astype(np.int64))]


def _short(count: int) -> str:
    return f"{count / 1000:g}k" if count >= 1000 and count % 100 == 0 else str(count)


# Lines


def scores_file(path: Path, out: Path | None = None) -> Path:
    """Where the scores of a run or of one of its checkpoint files go: metrics.jsonl in `out`, or in RUN/evaluation.

    Raises:
        ConfigError: the checkpoint file is in no run directory, and there is no `out`.
    """
    if out is not None:
        return out / "metrics.jsonl"
    run = _run_of(find_checkpoint(path))
    if run is None:
        raise ConfigError(f"{path} is in no run directory, where its scores would go; name a folder with --out DIR")
    return run.scores_file


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends lines; those that are there of the same measurements give way."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new, before = {_identity(row) for row in rows}, read_lines(file)
    kept = [row for row in before if _identity(row) not in new]
    if len(kept) < len(before):
        write_lines(file, [*kept, *rows])
    else:
        append_lines(file, rows)


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


def _identity(row: Mapping[str, Any]) -> str:
    """Equal for two lines of one measurement, whenever, wherever and how fast it was made."""
    groups = (row.get("extractor"), row.get("data"))
    extractor, data = (group if isinstance(group, dict) else {} for group in groups)
    parts = [row.get(key) for key in ("metric", "protocol", "site", "checkpoint_sha256", "weights", "seed")]
    counts = [row.get("num_fakes"), row.get("num_reals")]
    which = [data.get("fingerprint"), data.get("image_size"), extractor.get("weights_sha256")]
    return json.dumps([*parts, *counts, *which, extractor.get("preprocessing")])


def _run_of(checkpoint: Path) -> RunDirectory | None:
    folder = checkpoint.resolve().parent
    run = RunDirectory(folder.parent)
    return run if folder.name == "checkpoints" and run.exists() else None


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
) -> list[dict[str, Any]]:
    """Measures one checkpoint, appends a line a score to its metrics.jsonl, and returns these lines; a score that is
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
        evaluation = _Evaluation(
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
            cache_dir=cache_dir or default_cache_dir() / "features",
            overwrite=overwrite,
            group=group,
            progress=progress if group.rank == 0 else lambda done, total, what: None,
        )
        return evaluation.run(scores_file(run, out))


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """One call of `evaluate_generator`; the fields are its arguments."""

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
    cache_dir: Path
    overwrite: bool
    group: ProcessGroup
    progress: Progress

    def run(self, file: Path) -> list[dict[str, Any]]:
        """Measures what is not in the file; every line that was asked for, in the order of METRICS."""
        self.check()
        commit()  # before anything takes long
        rows = {metric: self.plan(metric) for metric in self.metrics}
        old = {_identity(row): row for row in read_lines(file)} if self.group.rank == 0 and not self.overwrite else {}

        def is_there(row: dict[str, Any]) -> bool:
            found = old.get(_identity(row))
            needs_interval = self.intervals and row["metric"] in ("frechet", "is1")
            return found is not None and ("interval" in found or not needs_interval)

        flags = self.group.as_first([not all(map(is_there, planned)) for planned in rows.values()])
        due = {metric for metric, is_due in zip(rows, flags, strict=True) if is_due}
        for metric in rows.keys() - due:
            rows[metric] = [old[_identity(row)] for row in rows[metric]] if self.group.rank == 0 else []
        start = time.monotonic()
        for metric, values in self.measure(due):
            if self.group.rank == 0:
                seconds = {"seconds": round(time.monotonic() - start, 3)}  # since the first work for any of them
                pairs = zip(rows[metric], values, strict=True)
                rows[metric] = [self.complete(row, value) | seconds for row, value in pairs]
                _write(file, rows[metric])
        return [row for metric in self.metrics for row in rows[metric]] if self.group.rank == 0 else []

    def check(self) -> None:
        sampler, images = self.sampler, self.images
        require_measurable(
            self.metrics, self.num, self.fakes_per_class, self.classes, self.subset, batch_size=sampler.batch_size
        )
        if max(self.num, len(sampler.classes) * self.fakes_per_class) > SEEDS_APART:
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
        run = _run_of(self.sampler.path)
        return run is not None and run.read()[1].get("fingerprint") == self.images.fingerprint

    @cached_property
    def held_out_every(self) -> int:
        return self.header.config.data.held_out_every if self.is_train else 0

    @cached_property
    def real(self) -> np.ndarray:
        """Indices of all real images."""
        return np.delete(np.arange(len(self.images)), held_out_indices(len(self.images), self.held_out_every))

    @cached_property
    def measured_against(self) -> np.ndarray:
        """Indices of all of them, or of the subset."""
        return _spread(self.real, self.subset)

    def of_class(self, label: int) -> np.ndarray:
        return _spread(self.real[self.images.labels[self.real] == label], self.subset)

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

    # Lines

    def plan(self, metric: str) -> list[dict[str, Any]]:
        """The metric's lines as far as they are known before it is measured."""
        if metric == "layout":
            num = min(self.num, LAYOUT_IMAGES)
            line = self.line("layout", "layout", f"layout{_short(num)}", num, 0)
            modules = self.sampler.model.named_modules()
            return [line | {"site": name} for name, module in modules if isinstance(module, AttentiveNorm2d)]

        number, by = _short(self.num), self.extractor.name
        is_standard = self.extractor.is_standard
        if metric == "is":
            name, short = ("IS", "is") if is_standard else (f"classifier score ({by})", "classifier")
            splits = {"is1": 1, f"is{SPLITS}": SPLITS}
            return [self.line(key, name, f"{short}{number}_s{n}_{by}", self.num, 0) for key, n in splits.items()]

        if metric == "intra-frechet":
            name, short = ("intra-FID", "intra") if is_standard else (f"intra-class Fréchet distance ({by})", metric)
            num_reals = sum(len(self.of_class(label)) for label in self.labels)
            is_subset = num_reals < np.isin(self.images.labels[self.real], self.labels).sum()
            which = find_classes(self.classes, self.sampler)[1]
            protocol = f"{short}{_short(self.fakes_per_class)}_{self.against(is_subset)}_{by}[{which}]"
            return [
                self.line(metric, name, protocol, self.fakes_per_class * len(self.labels), num_reals)
                | {"subset": bool(is_subset)}
            ]

        is_subset = len(self.measured_against) < len(self.real)
        num_reals = len(self.measured_against if metric == "frechet" else self.few_real)
        # KID, precision and recall look at no more real images than generated ones; the latter two depend on how many.
        few = f"_{_short(num_reals)}reals" if num_reals < len(self.measured_against) else ""
        tail = f"{self.against(is_subset)}{few}_{by}"
        names = {
            "frechet": ("FID", "fid") if is_standard else (f"Fréchet distance ({by})", metric),
            "kid": ("KID", "kid") if is_standard else (f"kernel distance ({by})", "kernel"),
            # The published ones are of yet another network's features.
            "precision": (f"precision ({by})", "pr"),
            "recall": (f"recall ({by})", "pr"),
        }
        lines = []
        for key in ("precision", "recall") if metric == "precision-recall" else (metric,):
            name, short = names[key]
            neighbours = f"_k{NEIGHBOURS}" if short == "pr" else ""
            line = self.line(key, name, f"{short}{number}{neighbours}_{tail}", self.num, num_reals)
            lines.append(line | {"subset": is_subset})
        return lines

    def against(self, is_subset: bool) -> str:
        return ("train" if self.is_train else "other") + (f"_subset{_short(self.subset)}" if is_subset else "")

    def line(self, metric: str, name: str, protocol: str, num_fakes: int, num_reals: int) -> dict[str, Any]:
        extractor = self.extractor
        about_extractor = {
            "name": extractor.name,
            "title": extractor.title,
            "weights_sha256": extractor.weights_sha256,
            "preprocessing": extractor.preprocessing,
        }
        return {
            "metric": metric,
            "name": name,
            "protocol": protocol,
            "extractor": about_extractor if metric != "layout" else None,
            "num_fakes": num_fakes,
            "num_reals": num_reals,
            "data": {
                "source": self.images.source,
                "fingerprint": self.images.fingerprint,
                "split": "train" if self.is_train else "other",
                "held_out_every": self.held_out_every,
                "fit": self.header.config.data.fit,
                "read_at": list(self.images.images.shape[2:]),
                "image_size": self.side,
                "note": self.images.note,
            },
            "labels": self.fake_labels[1] if metric != "intra-frechet" else "as many images of each class",
            "seed": self.seed,
            "subset": False,
            "checkpoint_sha256": self.sha256,
            "weights": "ema" if self.ema else "raw",
        }

    def complete(self, line: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """The line with its values after its names, and at its end whose score it is and where it was measured."""
        path, config = self.sampler.path, self.header.config
        run = _run_of(path)
        names = {key: line[key] for key in ("metric", "name", "protocol")}
        return {
            **names,
            **values,
            **{key: value for key, value in line.items() if key not in names},
            "run": path.stem if run is None else run.path.name,
            "preset": config.preset,
            "run_seed": config.run.seed,
            "checkpoint": path.name if run is None else f"checkpoints/{path.name}",
            "images_seen": self.header.images_seen,
            "training_seconds": self.header.seconds,
            "context": self.model.context,
            "width": self.model.width,
            "commit": commit(),
            "attnorm": __version__,
            "torch": torch.__version__,
            "device": device_name(self.sampler.device),
            "processes": self.group.count,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

    # Values

    def measure(self, due: set[str]) -> Iterator[tuple[str, Values]]:
        """The metrics that are due, the quick ones first, each as soon as it is there; values in the first process
        only. All processes must get through it together.
        """
        if "layout" in due:
            yield "layout", self.layouts() if self.group.rank == 0 else []
        if due & {"frechet", "is", "kid", "precision-recall"}:
            yield from self.over_all_classes(due)
        if "intra-frechet" in due:
            yield "intra-frechet", [self.intra()]

    def over_all_classes(self, due: set[str]) -> Iterator[tuple[str, Values]]:
        """All that can be told from one pass over generated images."""
        wants_frechet, wants_few = "frechet" in due, bool(due & {"kid", "precision-recall"})
        # No more than D features are a factor by themselves; of more, moments are enough.
        keeps = wants_few or (wants_frechet and (self.intervals or self.num <= self.extractor.dimensions))
        wanted = Wanted(
            moments=wants_frechet and not keeps,
            pooled=keeps,
            logits="is" in due and self.intervals,
            score="is" in due,
        )
        fakes = self.fakes(self.fake_labels[0], 0, wanted, self.group, "generated images")
        reals, is_first = self.real_features(), self.group.rank == 0
        if "is" in due:
            yield "is", self.scores(fakes) if is_first else []
        if wants_frechet:
            gaussian = reals.gaussian(self.measured_against, self.group)
            yield "frechet", [self.frechet(fakes, gaussian)] if gaussian is not None else []
        if wants_few:
            pooled = reals.pooled(self.few_real, self.group)
            few = None if pooled is None or fakes.pooled is None else (fakes.pooled, pooled)
            for metric, values in (("kid", self.kid), ("precision-recall", self.precision_recall)):
                if metric in due:
                    yield metric, values(*map(self.on_device, few)) if few else []

    @cached_property
    def few_real(self) -> np.ndarray:
        """Those whose features are all kept: no more than generated ones."""
        return _spread(self.measured_against, self.num)

    def real_features(self) -> RealFeatures:
        return RealFeatures(
            self.images,
            self.side,
            self.extractor,
            batch_size=self.sampler.batch_size,
            folder=self.cache_dir,
            progress=self.progress,
        )

    def seeds(self, numbers: Iterable[int]) -> list[int]:
        """What Sampler makes the images of these numbers from."""
        return [self.seed * SEEDS_APART + number for number in numbers]

    def fakes(self, labels: np.ndarray, start: int, wanted: Wanted, group: ProcessGroup, what: str) -> Collected:
        """Of the images numbered from `start` on."""

        def features_of(numbers: range) -> Features:
            seeds = self.seeds(start + number for number in numbers)
            return self.extractor(self.sampler.sample(seeds, labels[numbers.start : numbers.stop].tolist()).images)

        return collect(
            features_of,
            len(labels),
            wanted,
            self.extractor.dimensions,
            batch_size=self.sampler.batch_size,
            group=group,
            progress=lambda done, total: self.progress(done, total, what),
        )

    def on_device(self, features: Tensor) -> Tensor:
        return features.to(self.extractor.device)

    def scores(self, fakes: Collected) -> Values:
        assert fakes.score is not None
        one, (ten, spread) = fakes.score.score(1)[0], fakes.score.score(SPLITS)
        interval = {}
        if fakes.logits is not None:
            found = score_interval(self.on_device(fakes.logits), resamples=SCORE_RESAMPLES, seed=self.seed)
            interval = self.interval(found, SCORE_RESAMPLES)
        return [{"value": one} | interval, {"value": ten, "spread": spread}]

    def frechet(self, fakes: Collected, reals: Gaussian) -> dict[str, Any]:
        value = frechet_distance(fakes.gaussian(), reals)
        if not self.intervals or fakes.pooled is None:
            return {"value": value}
        found = frechet_interval(
            self.on_device(fakes.pooled),
            reals,
            value,
            resamples=FRECHET_RESAMPLES,
            seed=self.seed,
            progress=lambda done, total: self.progress(done, total, "resamples"),
        )
        return {"value": value} | self.interval(found, FRECHET_RESAMPLES)

    def interval(self, found: Interval, resamples: int) -> dict[str, Any]:
        how = f"bootstrap over generated images, {resamples:,} resamples, about their mean, seed {self.seed}"
        return found._asdict() | {"interval": f"{CONFIDENCE:.0%}, {how}"}

    def kid(self, fakes: Tensor, reals: Tensor) -> Values:
        value, spread = kernel_distance(fakes, reals, subsets=KID_SUBSETS, subset_size=KID_SIZE, seed=self.seed)
        size = min(KID_SIZE, len(fakes), len(reals))
        return [{"value": value, "spread": spread, "subsets": KID_SUBSETS, "subset_size": size}]

    def precision_recall(self, fakes: Tensor, reals: Tensor) -> Values:
        found = precision_recall(reals, fakes, neighbours=NEIGHBOURS)
        return [
            {"value": found.precision, "density": found.density},
            {"value": found.recall, "coverage": found.coverage},
        ]

    def intra(self) -> dict[str, Any]:
        """Mean over the classes of the distance between each one's generated and real images. Every process has classes
        of its own, and keeps the value of each: a thousand take hours, and none is made twice.
        """
        values = torch.zeros(len(self.labels), dtype=torch.float64)
        for index in range(self.group.rank, len(self.labels), self.group.count):
            label = self.labels[index]
            kept = self.cache_dir / f"intra-{self.key_of_class(label)}.json"
            value = None if self.overwrite else _read_value(kept)
            if value is None:
                name = f"{self.sampler.classes[label]} ({index + 1} of {len(self.labels)})"
                value = self.distance_of_class(label, name)
                _keep_value(kept, value)
            values[index] = value
        total = torch.zeros_like(values)
        for part in self.group.gather(values):  # of each class one process has the value, the others 0
            total += part
        names = [self.sampler.classes[label] for label in self.labels]
        return {"value": total.mean().item(), "values": dict(zip(names, total.tolist(), strict=True))}

    def distance_of_class(self, label: int, name: str) -> float:
        alone, is_few = ProcessGroup(), self.fakes_per_class <= self.extractor.dimensions
        pooled = self.real_features().pooled(self.of_class(label), alone, f"real images of {name}")
        assert pooled is not None
        fakes = self.fakes(
            np.full(self.fakes_per_class, label),
            label * self.fakes_per_class,
            Wanted(moments=not is_few, pooled=is_few),
            alone,
            f"generated images of {name}",
        )
        return frechet_distance(fakes.gaussian(), Gaussian.from_features(pooled))

    def key_of_class(self, label: int) -> str:
        """Of all that decides its distance, and of what its line will say of how it came about."""
        reals = self.real_features().key("pooled", self.of_class(label))
        values = [reals, label, self.sha256, self.ema, self.fakes_per_class, self.seed]
        values += [__version__, commit(), torch.__version__, device_name(self.sampler.device)]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]

    def layouts(self) -> Values:
        """Entropy and usage at each site, as of one large batch; its images are spread evenly over all numbers."""
        numbers = _spread(np.arange(self.num), LAYOUT_IMAGES)
        num = len(numbers)
        entropies: dict[str, float] = {}
        usages: dict[str, Tensor] = {}
        for start in range(0, num, self.sampler.batch_size):
            stop = min(start + self.sampler.batch_size, num)
            some = numbers[start:stop]
            labels = self.fake_labels[0][some].tolist()
            seen = self.sampler.sample(self.seeds(some.tolist()), labels, with_layouts=True).layouts
            for site, (_, layout) in seen.items():
                share = (stop - start) / num
                entropies[site] = entropies.get(site, 0.0) + share * layout_entropy(layout).item()
                usages[site] = usages.get(site, torch.zeros(())) + share * entity_usage(layout).cpu().double()
            self.progress(stop, num, "layouts")
        return [
            {
                "value": entropies[line["site"]],
                "usage": usages[line["site"]].tolist(),
                "entities_in_use": effective_entities(usages[line["site"]].tolist()),
            }
            for line in self.plan("layout")
        ]
