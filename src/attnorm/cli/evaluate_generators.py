"""The subcommand that scores class-conditional generators: evaluate generators."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from attnorm.cli.terminal import (
    Flag,
    Names,
    Seed,
    console,
    one_bar_each,
    print_table,
    progress_bar,
    read_images,
    require_not_of_a_run,
    require_outside,
    require_writable,
    split_names,
)
from attnorm.config import Config, ConfigError, require_seed
from attnorm.settings import override

if TYPE_CHECKING:
    from attnorm.data.images import ImageSet
    from attnorm.evaluation.scores import Score


def evaluate_generators(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    data: Annotated[str, tyro.conf.arg(metavar="SRC")] = "",
    metrics: Names = "frechet,is,layout",
    num: Annotated[int, tyro.conf.arg(metavar="N")] = 50_000,
    extractor: Annotated[str, tyro.conf.arg(metavar="E")] = "inception",
    inception_weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    fakes_per_class: Annotated[int, tyro.conf.arg(metavar="N")] = 5_000,
    classes: Names = "",
    subset: Annotated[int, tyro.conf.arg(metavar="K")] = 0,
    intervals: Flag = False,
    checkpoints: Literal["latest", "all"] = "latest",
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 50,
    seed: Seed = 0,
    raw_weights: Flag = False,
    device: str = "auto",
    overwrite: Flag = False,
) -> None:
    """Measure class-conditional generators by FID and other scores of their images.

    Args:
        runs: Run directories (their latest checkpoints), or checkpoint files.
        out: Where metrics.jsonl goes; RUN/evaluation of each unless named.
        data: The real images to measure against, if not those trained on.
        metrics: Of frechet, intra-frechet, is, kid, precision-recall, layout (fid and intra-fid with inception).
        num: Generated images; published scores have 50,000.
        extractor: inception, whose Fréchet distance is FID; or efficientnet-lite0, which needs no network.
        inception_weights: The extractor's weights, downloaded once unless named.
        fakes_per_class: Generated images of each class for intra-frechet.
        classes: For intra-frechet, by name or number, comma between, or table2; all unless named.
        subset: Estimate from so many real images only (for intra-frechet: of each class); 0: all.
        intervals: Add 95% intervals of the Fréchet distance and of the one-split Inception Score.
        checkpoints: all: every checkpoint that each run has kept.
        batch_size: Images at a time.
        seed: Of generated images and of the bootstrap.
        raw_weights: Use the weights as they are, not their average over training.
        device: auto, cpu, cuda or mps.
        overwrite: Measure again what was measured.
    """
    from attnorm.evaluation.generators import evaluate_generator
    from attnorm.evaluation.protocol import require_measurable, scores_file
    from attnorm.evaluation.scores import read_scores
    from attnorm.metrics.features import load_extractor
    from attnorm.run_directory import RunDirectory
    from attnorm.system.process_group import find_own_device, process_group

    headers = _headers(runs)
    require_seed("--seed", seed)
    require_outside(out, data)
    if out is not None:
        require_not_of_a_run(out)
    files = {run: scores_file(run, out) for run in headers}
    for file in files.values():
        require_writable(file)
    asked, of_classes = split_names(metrics), split_names(classes)
    require_measurable(_known_metrics(asked, extractor), num, fakes_per_class, of_classes, subset, batch_size)
    find_own_device(device)
    with process_group() as group:
        loaded = load_extractor(extractor, device=find_own_device(device), inception_weights=inception_weights)
        read: dict[tuple[Any, ...], ImageSet] = {}
        for run, of_run in headers.items():
            config = override(of_run, [f"data.source={data}"]) if data else of_run
            key = (config.data.source, config.data.stored_size or config.model.image_size, config.data.fit)
            if key not in read:
                console.quiet = group.rank > 0  # the first process talks
                try:
                    read = {key: read_images(config)}  # those of one data set at a time
                except ConfigError as error:
                    if data:
                        raise
                    raise ConfigError(f"{error}; where {run}'s data are now, --data SRC says") from error
                console.quiet = False
            if not data:
                _require_same_data(run, read[key])
            kept = RunDirectory(run).sound_checkpoints() if checkpoints == "all" and run.is_dir() else [run]
            for checkpoint in map(Path, group.text_of_first("\n".join(map(str, kept))).split("\n")):
                before = read_scores(files[run])
                with progress_bar() as progress:
                    scores = evaluate_generator(
                        checkpoint,
                        read[key],
                        loaded,
                        metrics=asked,
                        num=num,
                        fakes_per_class=fakes_per_class,
                        classes=of_classes,
                        subset=subset,
                        seed=seed,
                        intervals=intervals,
                        ema=not raw_weights,
                        device=device,
                        batch_size=batch_size,
                        out=out,
                        overwrite=overwrite,
                        progress=one_bar_each(progress),
                    )
                if group.rank == 0:
                    _print_scores(checkpoint, scores, [score for score in scores if score in before])
                    print(files[run])


def _headers(runs: Sequence[Path]) -> dict[Path, Config]:
    """The configuration of each run, all of them generators."""
    from attnorm.checkpoint import read_header
    from attnorm.run_directory import find_checkpoint

    if not runs:
        raise ConfigError("no run was named; expected one or several run directories")
    configs = {run: read_header(find_checkpoint(run)).config for run in runs}
    for run, config in configs.items():
        if config.task != "class_conditional":
            raise ConfigError(
                f"{run} was trained for {config.task}; `attnorm evaluate inpainters` measures it, with --manifest DIR"
            )
    return configs


def _known_metrics(names: Sequence[str], extractor: str) -> Sequence[str]:
    """Before anything is downloaded or decoded; an unknown extractor is told of later."""
    from attnorm.evaluation.feature_stats import find_metrics
    from attnorm.metrics.features import EXTRACTORS

    return find_metrics(names, EXTRACTORS[extractor]) if extractor in EXTRACTORS else names


def _require_same_data(run: Path, images: ImageSet) -> None:
    from attnorm.run_directory import RunDirectory, find_checkpoint

    directory = RunDirectory(find_checkpoint(run).resolve().parent.parent)
    if directory.exists() and directory.read()[1].get("fingerprint") != images.fingerprint:
        raise ConfigError(
            f"{images.source} is not what {run} was trained on any more; name its data, or others to measure against, "
            "with --data SRC"
        )


def _print_scores(checkpoint: Path, scores: Sequence[Score], old: Sequence[Score]) -> None:
    if not scores:
        console.print(f"{checkpoint}: nothing to measure: there is no AN layer, so there are no layouts")
        return
    of = f"{scores[0].run}, {scores[0].images_seen:,} images seen, {scores[0].weights} weights"
    print_scores(of, scores, ["already measured" if score in old else "" for score in scores])
    for count in sorted({score.num_reals for score in scores if score.subset}):
        console.print(
            f"estimated from a subset of {count:,} real images: not to be compared with full scores", style="yellow"
        )


def print_scores(title: str, scores: Sequence[Score], notes: Sequence[str] = ()) -> None:
    """A line a score, each with a note where there are any."""
    from attnorm.evaluation.scores import METRICS
    from attnorm.reports.render import Table

    rows = []
    for number, score in enumerate(scores):
        about = "" if score.spread is None else f"± {score.spread:.4g}"
        if score.low is not None and score.high is not None:
            about = f"{score.low:.4g} to {score.high:.4g}"
        if score.site:
            about = f"entropy at {score.site}; {score.entities_in_use:.1f} of {len(score.usage)} entities in use"
        splits = METRICS[score.metric].title.partition(", ")[2]
        name = f"{score.name}, {splits}" if splits else score.name
        rows.append((name, f"{score.value:.5g}", about, score.protocol, notes[number] if notes else ""))
    print_table(Table(title, ("score", "value", "", "protocol", ""), tuple(rows)))
