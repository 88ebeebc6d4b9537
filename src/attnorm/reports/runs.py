"""What class-conditional runs left behind, read for tables: settings, cost, scores, and which row of the paper each is.

A score shares a column only with scores that were measured in the same way, a run a training configuration only with
runs that differ in nothing but row and seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from attnorm.checkpoint import Header, read_header
from attnorm.config import ClassConditionalConfig, Config, ConfigError
from attnorm.evaluation.scores import Score, UsedExtractor, scores_of_run
from attnorm.models.class_conditional import describe
from attnorm.presets import CONTEXT_ROWS, FAMILIES, ROWS
from attnorm.reports.paper import TABLE_1, TABLE_4
from attnorm.run_directory import RunDirectory
from attnorm.settings import MAKES_A_ROW, MAY_DIFFER, flatten


class Layout(NamedTuple):
    """What one AttentiveNorm2d of a run's generator or discriminator sees."""

    site: str
    entropy: float  # normalised: 1 is uniform
    usage: tuple[float, ...]  # share of the pixels that each entity wins
    images_seen: int
    source: str  # who looked


@dataclass(frozen=True)
class Run:
    """A class-conditional run, as its directory describes it."""

    name: str
    path: Path
    row: str  # by which presets.ROWS calls what was trained; "" for what is not there
    config: Config  # of its latest checkpoint; without one, as it was started
    classes: tuple[str, ...]
    data: Mapping[str, Any]  # of config.json: source, fingerprint, ...
    parameters: tuple[int, int]  # of G and D
    images_seen: int
    seconds: float  # of training
    note: str  # what a reader must know of the data
    scores: tuple[Score, ...]
    layouts: tuple[Layout, ...]
    failure: str  # why there is nothing to measure; "" where there is

    @property
    def model(self) -> ClassConditionalConfig:
        assert isinstance(self.config.model, ClassConditionalConfig)
        return self.config.model

    @cached_property
    def scored_at(self) -> int | None:
        """Images seen by the checkpoint whose scores are shown: the latest with a distance to all real images, for want
        of one with any other score, and only then with one to a subset. The Inception Score, which needs no real
        images, does not make a subset estimate a whole one.
        """
        distances = [s for s in self.scores if s.metric in ("frechet", "intra-frechet") and not s.subset]
        if distances:
            return max(score.images_seen for score in distances)
        estimated = {score.images_seen for score in self.scores if score.subset}
        whole = [
            score.images_seen
            for score in self.scores
            if not score.subset and not (score.metric.startswith("is") and score.images_seen in estimated)
        ]
        return max(whole or [score.images_seen for score in self.scores], default=None)

    @property
    def shown_at(self) -> int:
        """Images seen by what the row describes."""
        return self.images_seen if self.scored_at is None else self.scored_at

    @property
    def label(self) -> str:
        """What the tables call it."""
        if self.config.recipe != "paper":
            return CONTEXT_ROWS[self.config.row][0] if self.config.row in CONTEXT_ROWS else _variant(self.config)
        return LABELS[self.row] if self.row else _variant(self.config)

    @property
    def tau(self) -> str:
        """Which one its AN has: auto, of the paper, or its own number; "" without AN."""
        return _tau(self.config)

    def find(self, column: Column) -> Score | None:
        """Its score in a column: of several draws the first seed's, of a repetition the last."""
        found = [s for s in self.scores if column_of(s) == column and s.images_seen == self.scored_at]
        return min(reversed(found), key=lambda score: score.seed, default=None)

    @property
    def training_configuration(self) -> dict[str, Any]:
        """Every setting that runs of one table share."""
        settings = {key: value for key, value in flatten(self.config).items() if key not in MAKES_A_ROW | MAY_DIFFER}
        return {**settings, "data": self.data.get("fingerprint", "")}


class Column(NamedTuple):
    """What scores must have in common to stand beneath each other."""

    metric: str
    name: str
    protocol: str
    subset: bool
    weights: str
    extractor: str  # SHA-256 of its weights, and the preprocessing
    num_fakes: int
    num_reals: int
    image_size: int
    split: str
    fingerprint: str  # of the real images


# What a column says of itself where its name and protocol do not tell it from another.
COLUMN_DETAILS = {
    "weights": "{} weights",
    "extractor": "extractor {:.8}",
    "num_fakes": "{:,} generated",
    "num_reals": "{:,} real",
    "image_size": "{} pixels",
    "split": "{} images",
    "fingerprint": "data {:.8}",
}


def read_run(name: str, path: Path, failure: str) -> Run:
    if path.is_file():
        raise ConfigError(f"{path} is a file; expected a run directory, whose scores and curves are shown too")
    directory = RunDirectory(path)
    config, data = directory.read()
    classes, header = tuple(data.get("classes", ())), Header(config, (), 0, 0.0, data.get("note", ""))
    checkpoint = directory.latest()
    if checkpoint is not None:
        header = read_header(checkpoint)
        classes = header.classes
    elif not failure:
        failure = "no checkpoint yet"
    model = header.config.model
    if not isinstance(model, ClassConditionalConfig):
        raise ConfigError(
            f"{path} was trained for {config.task}; expected class-conditional runs, and of inpainters what `attnorm "
            "evaluate` wrote, as --inpainting DIR"
        )
    _, g_parameters, d_parameters = describe(model, max(len(classes), 1))
    scores, num_outdated = scores_of_run(directory)
    if num_outdated:
        outdated = f"{name}: scores of checkpoints that have been trained anew are left out; measure again."
        header = replace(header, note=" ".join(filter(None, (header.note, outdated))))
    return Run(
        name=name,
        path=path,
        row=row_of(header.config),
        config=header.config,
        classes=classes,
        data=data,
        parameters=(g_parameters, d_parameters),
        images_seen=header.images_seen,
        seconds=header.seconds,
        note=header.note,
        scores=tuple(score for score in scores if score.metric != "layout"),
        layouts=_layouts(directory, [score for score in scores if score.metric == "layout"]),
        failure=failure,
    )


def _layouts(directory: RunDirectory, scores: Sequence[Score]) -> tuple[Layout, ...]:
    """What evaluation saw last at each site of the generator; without it, what training logged last at every site."""
    # Of one checkpoint the average's before the raw weights', as of scores, and of several draws the first seed's.
    order = sorted(scores, key=lambda score: (score.images_seen, score.weights == "ema", -score.seed))
    latest = {score.site: score for score in order}
    if latest:
        return tuple(
            Layout(
                site,
                score.value,
                score.usage,
                score.images_seen,
                f"evaluate, {score.num_fakes:,} images" if score.num_fakes else "evaluate",
            )
            for site, score in sorted(latest.items())
        )
    found: dict[str, Layout] = {}
    for row in directory.read_metrics():
        for key in row:
            site = key.removeprefix("layout/").removesuffix("/entropy")
            if key == f"layout/{site}/entropy" and f"layout/{site}/usage" in row:
                usage = tuple(row[f"layout/{site}/usage"])
                found[site] = Layout(site, row[key], usage, row["images_seen"], "training's log, one batch")
    return tuple(sorted(found.values(), reverse=True))  # the generator's before the discriminator's


# Which row a run is


LABELS = {printed.row: printed.label for printed in (*TABLE_1, *TABLE_4)}  # of "an", that of Table 4


def row_of(config: Config) -> str:
    """The name in presets.ROWS of what these settings train; "" for something else.

    A row of a family whose own settings depart from the paper's (fewer entities, say) is that row too; so is one whose
    tau is the layer's own or the paper's: `training_configurations` keeps these apart. Of another recipe none is.
    """
    if config.recipe != "paper":
        return ""
    return config.row.removesuffix("-auto").removesuffix("-fixed") or _guessed_row(config)


def _guessed_row(config: Config) -> str:
    """From the settings, whatever their preset is called: runs of earlier versions do not say, nor do those in which a
    setting of a row was changed.
    """
    bases = [Config()]
    bases += [base() for family, base in FAMILIES.items() if config.preset.startswith(f"{family}-")]
    for base, (row, (_, change)) in itertools.product(bases, ROWS.items()):
        if _of_the_row(change(base)) == _of_the_row(config):
            return row
    return ""


def _tau(config: Config) -> str:
    """Which tau AN has: auto, of the paper, or its own number; "" without AN."""
    model = config.model
    if model.context == "none" or not model.context.startswith("an"):
        return ""
    if model.temperature == "auto":
        return "auto"
    rule = replace(model, an=replace(model.an, temperature=None)).temperature
    return "of the paper" if math.isclose(model.temperature, float(rule)) else f"{model.temperature:g}"


def _of_the_row(config: Config) -> dict[str, Any]:
    """The settings in which rows differ, those without an effect left out."""
    model = config.model
    assert isinstance(model, ClassConditionalConfig)
    names = ["model.context", "model.head", "model.g_spectral_norm", "model.d_spectral_norm"]
    settings = flatten(config)
    if model.context != "none":
        names.append("model.an_blocks")
    if model.context == "an":
        names += [key for key in settings if key.startswith("model.an.") and key != "model.an.impl"]
        names += ["model.site", "optim.orthogonality_weight"]
        if _tau(config) in ("auto", "of the paper"):
            settings["model.an.temperature"] = None
    return {name: settings[name] for name in names}


def _variant(config: Config) -> str:
    """A name for what the paper does not have: in what it departs from AN, or from no context block."""
    assert isinstance(config.model, ClassConditionalConfig)
    settings = _of_the_row(config)
    usual = flatten(Config()) | {"model.an.temperature": None}
    changed = [f"{key}={settings[key]}" for key in settings if key != "model.context" and settings[key] != usual[key]]
    return f"{config.model.context} with " + ", ".join(changed) + ": not in the paper"


def training_configurations(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that may be compared, by a line that says what they share, and what no other recipe here does."""
    groups: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        known = next((members for recipe, members in groups if recipe == run.training_configuration), None)
        if known is None:
            groups.append((run.training_configuration, [run]))
        else:
            known.append(run)
    named: dict[str, list[Run]] = {}
    for recipe, members in groups:
        first = members[0]
        text = (
            ("" if first.config.recipe == "paper" else f"recipe {first.config.recipe}, ")
            + f"{first.model.image_size} pixels, width {first.model.width}, batch {first.config.run.batch_size}, "
            f"on {short(first.data.get('source', ''))}"
        )
        said = ("recipe", "model.image_size", "model.width", "run.batch_size")
        others = [other for other, _ in groups if other is not recipe]
        telling = [key for key in recipe if key not in said and any(other.get(key) != recipe[key] for other in others)]
        details = [f"{key} {str(recipe[key])[:12] if key == 'data' else recipe[key]}" for key in telling]
        text = ", ".join([text, *details])
        taus = sorted({_tau(run.config) for run in members} - {""})
        if len(taus) > 1:  # a table each, with the rows that have no tau in all of them
            named |= {f"{text}, tau {tau}": [r for r in members if _tau(r.config) in ("", tau)] for tau in taus}
        else:
            named[text] = members
    return named


def short(source: str) -> str:
    """The end of a path, which says what the data are; a whole path says where someone keeps them."""
    return "/".join(Path(source).parts[-2:]).lstrip("/") or "unnamed data"


# Columns


def column_of(score: Score) -> Column:
    """The column that a score belongs to."""
    extractor = score.extractor or UsedExtractor()
    return Column(
        score.metric,
        score.name or score.metric,
        score.protocol,
        score.subset,
        score.weights,
        f"{extractor.weights_sha256} {extractor.preprocessing}".strip(),
        score.num_fakes,
        score.num_reals,
        score.data.image_size,
        score.data.split,
        score.data.fingerprint,
    )


def columns(runs: Iterable[Run], metrics: Sequence[str]) -> list[Column]:
    """Every way in which one of `metrics` was measured at the checkpoints that are shown; subsets last."""
    found = {column_of(s) for run in runs for s in run.scores if s.images_seen == run.scored_at}
    chosen = [column for column in found if column.metric in metrics]
    return sorted(chosen, key=lambda column: (column.subset, metrics.index(column.metric), column))


def titles(shown: Sequence[Column]) -> list[str]:
    """What stands above the columns: name and protocol, and what else tells two of them apart."""
    texts = []
    for column in shown:
        twins = [other for other in shown if other[:3] == column[:3] and other != column]
        details = [
            form.format(getattr(column, key))
            for key, form in COLUMN_DETAILS.items()
            if any(getattr(other, key) != getattr(column, key) for other in twins)
            or (key == "weights" and column.weights != "ema")
        ]
        marks = [*details, *(["estimated from a subset"] if column.subset else [])]
        # The protocol says which extractor; in a heading the name need not.
        texts.append(", ".join([column.name.partition(" (")[0], column.protocol, *marks]))
    return texts


def show(score: Score | None) -> str:
    return "-" if score is None else score.text
