"""The verbs that measure: manifest, evaluate, bench."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from attnorm import config as configuration
from attnorm.cli.terminal import (
    Names,
    Overwrite,
    Seed,
    console,
    one_bar,
    one_bar_each,
    progress_bar,
    read_images,
    require_free,
    require_not_of_a_run,
    require_outside,
    require_writable,
    screen,
)
from attnorm.config import Config, ConfigError, printable, require_seed

if TYPE_CHECKING:
    from attnorm.checkpoint import Header
    from attnorm.data.images import ImageSet


def manifest(
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    like: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None,
    data: Annotated[str, tyro.conf.arg(metavar="SRC")] = "",
    size: Annotated[int, tyro.conf.arg(metavar="S")] = 0,
    stored_size: Annotated[int, tyro.conf.arg(metavar="S")] = 0,
    fit: Literal["square", "street-view"] = "square",
    masks: Literal["centre", "rectangle", "free-form"] = "centre",
    seed: Seed = 0,
    every: Annotated[int, tyro.conf.arg(metavar="N")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Freeze a test set for inpainting: images by their hashes, each with a mask drawn once; see evaluate.

    Args:
        out: Where manifest.json and the masks go.
        like: Take data, sizes and the images held out from this run; the options below that are named change them.
        data: A folder of images, or anything else that train takes.
        size: Side in pixels at which models are measured, a multiple of 8.
        stored_size: Height at which images are read, of which the centre is cut; 0: size. As data.stored_size in train.
        fit: square, or street-view for Paris StreetView; the run's, if like is given.
        masks: The centre square of half the side, a rectangle at random, or strokes.
        seed: Of the masks.
        every: Take the Nth, 2Nth, ... image by name (10 unless named or the run's); 1 takes all of a test folder.
        overwrite: Write into a folder that is not empty.
    """
    from dataclasses import replace

    from attnorm.data.sources import find_source
    from attnorm.evaluation.test_set import make_manifest, reading
    from attnorm.run_directory import RunDirectory

    source = configuration.DataConfig(source=data, fit=fit, stored_size=stored_size)
    if like is not None:
        config, _ = RunDirectory(like).read()
        source = replace(config.data, source=data or config.data.source, stored_size=stored_size or _side(config))
        size, every = size or config.model.image_size, every or config.data.held_out_every
    if not source.source:
        raise ConfigError("no data was named; give --data SRC and --size S, or --like RUN for a run's own")
    if not size:
        if source.source != "builtin":
            try:
                find_source(Path(source.source).expanduser())
            except ValueError as error:
                raise ConfigError(str(error)) from None
        raise ConfigError("no size was named; give --size S, or --like RUN for a run's own")
    require_seed("--seed", seed)
    require_outside(out, source.source)
    require_free(out, overwrite)
    images = read_images(reading(source, size))
    made = make_manifest(out, images, source, image_size=size, masks=masks, seed=seed, every=every or 10)
    print(f"{len(made.entries)} images of {len(images):,} at {size} pixels, with {masks} masks, in {out}")


def _side(config: Config) -> int:
    return config.data.stored_size or config.model.image_size


def evaluate(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    data: Annotated[str, tyro.conf.arg(metavar="SRC")] = "",
    metrics: Names = "",
    num: Annotated[int, tyro.conf.arg(metavar="N")] = 0,
    extractor: Annotated[str, tyro.conf.arg(metavar="E")] = "",
    inception_weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    fakes_per_class: Annotated[int, tyro.conf.arg(metavar="N")] = 0,
    classes: Names = "",
    subset: Annotated[int, tyro.conf.arg(metavar="K")] = 0,
    intervals: Overwrite = False,
    checkpoints: Literal["latest", "all"] = "latest",
    manifest: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    cost: Annotated[str, tyro.conf.arg(metavar="SIZE,...")] = "",
    floors: bool = True,
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 0,
    seed: Seed = 0,
    raw_weights: Overwrite = False,
    device: str = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Measure runs: generators by FID and other scores of their images, inpainters by PSNR, SSIM and MAE beside each
    other (Table 3, Figure 9), and by cost. The options from metrics to checkpoints are of generators, those from
    manifest to floors of inpainters.

    Args:
        runs: Run directories (their latest checkpoints), or checkpoint files; all of one task.
        out: Where results go: metrics.jsonl of generators (unless named, RUN/evaluation of each); scores.md,
            scores.json, scores.csv, sheet.png and, with cost, cost.md and cost.json of inpainters.
        data: Of generators, the real images to measure against, if not those trained on; of inpainters, where the
            manifest's images are, if not where it says.
        metrics: Of frechet, intra-frechet, is, kid, precision-recall, layout (fid and intra-fid with inception);
            frechet,is,layout unless named.
        num: Generated images; 0: 50,000, as published scores have.
        extractor: inception unless named, whose Fréchet distance is FID; or efficientnet-lite0, which needs no network.
        inception_weights: The extractor's weights, downloaded once unless named.
        fakes_per_class: Generated images of each class for intra-frechet; 0: 5,000.
        classes: For intra-frechet, by name or number, comma between, or table2; all unless named.
        subset: Measure against so many real images only, for a quick look (for intra-frechet: of each class); 0: all.
        intervals: Add 95% intervals of the Fréchet distance and of the one-split Inception Score.
        checkpoints: all: every checkpoint that each run has kept.
        manifest: The test set of inpainters, as the verb manifest has made it.
        cost: Sides in pixels, comma between: time and memory of a forward pass at each, for example 256,512,1024,2048.
        floors: Measure the mean colour and Telea's method too.
        batch_size: Images at a time; 0: 50 of a generator, 16 of an inpainter.
        seed: Of generated images and of the bootstrap.
        raw_weights: Use the weights as they are, not their average over training.
        device: auto, cpu, cuda or mps.
        overwrite: Of generators, measure again what was measured; of inpainters, write into a folder that is not empty.
    """
    from attnorm.checkpoint import read_checkpoint
    from attnorm.run_directory import find_checkpoint

    if not runs:
        raise ConfigError("no run was named; expected one or several run directories")
    headers = {run: read_checkpoint(find_checkpoint(run), prefix="header alone")[1] for run in runs}
    tasks = {header.config.task: run for run, header in headers.items()}
    if len(tasks) > 1:
        raise ConfigError(
            f"{tasks['inpainting']} is of inpainting, {tasks['class_conditional']} is not; name runs of one task"
        )
    is_inpainting = "inpainting" in tasks
    of_generators = {
        "--metrics": metrics,
        "--num": num,
        "--extractor": extractor,
        "--inception-weights": inception_weights,
        "--fakes-per-class": fakes_per_class,
        "--classes": classes,
        "--subset": subset,
        "--intervals": intervals,
        "--checkpoints": checkpoints == "all",
    }
    of_inpainters = {"--manifest": manifest, "--cost": cost, "--no-floors": not floors}
    for option, value in (of_generators if is_inpainting else of_inpainters).items():
        if value:
            kind = "generators" if is_inpainting else "inpainters"
            raise ConfigError(
                f"{option} is for {kind}, but {runs[0]} was trained for {next(iter(tasks))}; leave it out"
            )
    if batch_size < 0:
        raise ConfigError(f"--batch-size is {batch_size}; expected at least 1 image at a time, or 0 for the usual")
    require_seed("--seed", seed)
    require_outside(out, data)
    if out is not None:
        require_not_of_a_run(out)
    if not is_inpainting:
        _evaluate_generators(
            headers,
            data,
            extractor or "inception",
            inception_weights,
            all_checkpoints=checkpoints == "all",
            device=device,
            out=out,
            metrics=_split(metrics or "frechet,is,layout"),
            num=num or 50_000,
            fakes_per_class=fakes_per_class or 5_000,
            classes=_split(classes),
            subset=subset,
            seed=seed,
            intervals=intervals,
            ema=not raw_weights,
            batch_size=batch_size or 50,
            overwrite=overwrite,
        )
        return
    if out is None:
        raise ConfigError("--out is missing: name the folder for the results of inpainters, for example --out results")
    if manifest is None and not cost:
        raise ConfigError("nothing to measure was named; give --manifest DIR (`attnorm manifest` makes one) or --cost")
    require_free(out, overwrite)
    if manifest is not None:
        _evaluate_inpainting(runs, manifest, data, out, floors, batch_size or 16, seed, not raw_weights, device)
    if cost:
        _measure_latency(runs, cost, out, device)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _evaluate_generators(
    headers: dict[Path, Header],
    data: str,
    extractor_name: str,
    inception_weights: Path | None,
    *,
    all_checkpoints: bool,
    device: str,
    out: Path | None,
    metrics: Sequence[str],
    **settings: Any,
) -> None:
    """One run after the other; `settings` are those of evaluate_generator. Of several processes the first one talks."""
    from attnorm.checkpoint import find_damage
    from attnorm.evaluation.generation import evaluate_generator, find_metrics, require_measurable, scores_file
    from attnorm.metrics.features import EXTRACTORS, load_extractor
    from attnorm.run_directory import RunDirectory
    from attnorm.system.files import read_lines
    from attnorm.system.process_group import find_own_device, process_group

    files = {run: scores_file(run, out) for run in headers}
    for file in files.values():
        require_writable(file)
    if extractor_name in EXTRACTORS:  # before anything is downloaded or decoded
        wanted = find_metrics(metrics, EXTRACTORS[extractor_name])
        counts = ("num", "fakes_per_class", "classes", "subset", "batch_size")
        require_measurable(wanted, **{name: settings[name] for name in counts})
    find_own_device(device)
    with process_group() as group:
        extractor = load_extractor(extractor_name, device=find_own_device(device), inception_weights=inception_weights)
        read: dict[tuple[Any, ...], ImageSet] = {}
        for run, header in headers.items():
            config = configuration.override(header.config, [f"data.source={data}"]) if data else header.config
            key = (config.data.source, _side(config), config.data.fit)
            if key not in read:
                console.quiet = group.rank > 0
                read = {key: read_images(config)}  # those of one data set at a time
                console.quiet = False
            if not data:
                _require_same_data(run, read[key])
            kept = [run]
            if all_checkpoints and run.is_dir():
                kept = [file for file in RunDirectory(run).checkpoints() if not find_damage(file)]
            for checkpoint in map(Path, group.text_of_first("\n".join(map(str, kept))).split("\n")):
                before = read_lines(files[run])
                with progress_bar() as progress:
                    rows = evaluate_generator(
                        checkpoint,
                        read[key],
                        extractor,
                        metrics=metrics,
                        device=device,
                        out=out,
                        progress=one_bar_each(progress),
                        **settings,
                    )
                if group.rank == 0:
                    _print_scores(checkpoint, rows, [row for row in rows if row in before])
                    print(files[run])


def _require_same_data(run: Path, images: ImageSet) -> None:
    from attnorm.run_directory import RunDirectory, find_checkpoint

    directory = RunDirectory(find_checkpoint(run).resolve().parent.parent)
    if directory.exists() and directory.read()[1].get("fingerprint") != images.fingerprint:
        raise ConfigError(
            f"{images.source} is not what {run} was trained on any more; name its data, or others to measure against, "
            "with --data SRC"
        )


def _print_scores(checkpoint: Path, rows: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    if not rows:
        console.print(f"{checkpoint}: nothing to measure: there is no AN layer, so there are no layouts")
        return
    of = f"{rows[0]['run']}, {rows[0]['images_seen']:,} images seen, {rows[0]['weights']} weights"
    table = Table(
        "score", "value", "", "protocol", "", title=printable(of), title_justify="left", box=None, pad_edge=False
    )
    for row in rows:
        about = f"± {row['spread']:.4g}" if "spread" in row else ""
        if "interval" in row:
            about = f"{row['low']:.4g} to {row['high']:.4g}"
        if "site" in row:
            about = f"entropy at {row['site']}; {row['entities_in_use']:.1f} of {len(row['usage'])} entities in use"
        named = {"is1": f"{row['name']}, one split", "is10": f"{row['name']}, ten splits"}
        name = named.get(row["metric"], row["name"])
        table.add_row(name, f"{row['value']:.5g}", about, row["protocol"], "already measured" if row in old else "")
    screen().print(table)
    subsets = {row["num_reals"] for row in rows if row["subset"]}
    for count in sorted(subsets):
        console.print(
            f"measured against a subset of {count:,} real images: a quick look, not to be compared with full scores",
            style="yellow",
        )


def _evaluate_inpainting(
    runs: Sequence[Path],
    folder: Path,
    data: str,
    out: Path,
    floors: bool,
    batch_size: int,
    seed: int,
    ema: bool,
    device: str,
) -> None:
    from attnorm.evaluation.inpainters import evaluate_inpainters, write_scores
    from attnorm.evaluation.test_set import read_examples, read_manifest
    from attnorm.reports.figures import inpainting_figure, save_figure
    from attnorm.reports.inpainting import write_scores_document

    test_set = read_manifest(folder)
    config = test_set.reading
    images = read_images(configuration.override(config, [f"data.source={data}"]) if data else config)
    examples = read_examples(test_set, images)
    with progress_bar() as progress:
        evaluation = evaluate_inpainters(
            runs,
            test_set,
            examples,
            with_baselines=floors,
            ema=ema,
            device=device,
            batch_size=batch_size,
            seed=seed,
            progress=one_bar(progress, "measuring"),
        )
    written = [*write_scores(evaluation, out), *write_scores_document(evaluation.scores, out)]
    for path in [*written, save_figure(inpainting_figure(*evaluation.grid), out / "image-grid.png")]:
        print(path)


def _measure_latency(runs: Sequence[Path], sizes: str, out: Path, device: str) -> None:
    from attnorm.evaluation.inpainters import name_runs
    from attnorm.evaluation.latency import measure_latency
    from attnorm.reports.inpainting import write_latency

    texts = [text.strip() for text in sizes.split(",") if text.strip()]
    if not texts or not all(text.isdecimal() for text in texts):
        raise ConfigError(f"--cost is {sizes!r}; expected sides in pixels with commas between, for example 256,512")
    with progress_bar() as progress:
        cells = measure_latency(
            name_runs(runs), [int(text) for text in texts], device=device, progress=one_bar(progress, "timing")
        )
    for path in write_latency(cells, device, out):
        print(path)


def bench(
    part: Annotated[Literal["layer", "train"], tyro.conf.Positional, tyro.conf.arg(metavar="PART")],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    preset: Annotated[str, tyro.conf.arg(metavar="P")] = "cifar10-an",
    settings: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set", metavar="KEY=VALUE")
    ] = (),
    cases: Names = "",
    implementations: Names = "",
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    tf32: Overwrite = False,
    seconds: Annotated[float, tyro.conf.arg(metavar="S")] = 1.0,
    threads: Annotated[int, tyro.conf.arg(metavar="T")] = 0,
    retain_memory: Overwrite = False,
    overwrite: Overwrite = False,
) -> None:
    """Time the layer, its implementations and what stands beside it, after checking each; Table 5 of the paper.

    Args:
        part: What is timed: layer, or train: a whole step of a training with every context block and switch.
        out: Where bench.json, bench.md and time-against-pixels.png go; of train: train.json and train.md.
        preset: Of train: the training configuration; of its context block, precision and memory format all are tried.
        settings: Of train: change a setting of the preset, for example --set run.batch_size=16.
        cases: Input sizes by name or group ("table5"), comma between; what this device can bear unless named.
        implementations: Of copy, instance_norm, group_norm, region_norm, conv+instance_norm, linear_attention,
            self_attention, an-reference, an-fused, an-inductor, an-native, an-triton ("an": all of these).
        device: auto, cpu or cuda.
        dtype: Of the input; the weights stay in float32, under autocast.
        tf32: Let CUDA round the factors of float32 products.
        seconds: To spend on each implementation, case and mode, after a warm-up.
        threads: For torch on the CPU; 0 leaves them as they are.
        retain_memory: Keep freed pages in the process (glibc, CPU), rather than pay for fresh ones at every step.
        overwrite: Write into a folder that is not empty.
    """
    from rich.table import Table

    from attnorm.benchmark.run import run
    from attnorm.reports import benchmark as reports

    require_free(out, overwrite)
    if part == "train":
        from attnorm.cli.training import bench_training

        bench_training(preset, settings, out, device, seconds, threads)
        return
    with progress_bar() as progress:
        report = run(
            cases=cases,
            implementations=implementations,
            device=device,
            dtype=dtype,
            tf32=tf32,
            seconds=seconds,
            threads=threads,
            retain=retain_memory,
            progress=one_bar(progress, "timing"),
        )
    wide = screen()
    for measured in reports.tables(report):
        table = Table(*measured.header, title=measured.title, title_justify="left", box=None, pad_edge=False)
        for row in measured.rows:
            table.add_row(*row)
        wide.print(table, "")
    for disturbance in reports.disturbances(report):
        console.print(disturbance, style="yellow")
    for path in reports.write_report(report, out):
        print(path)
