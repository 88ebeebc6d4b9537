"""The paper's figures, drawn for a report from runs, inpainters' image grids and benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from attnorm.benchmark.results import BenchReport
from attnorm.inference import Sampler
from attnorm.reports.benchmark import pixels_figure
from attnorm.reports.figures import curves_figure, samples_figure, save_figure, write_layouts, write_walk
from attnorm.reports.paper import FIGURE_7_CLASSES, FIGURE_8_CLASSES, NUM_IMAGENET_CLASSES
from attnorm.reports.render import Picture, Section
from attnorm.reports.runs import Run
from attnorm.run_directory import RunDirectory
from attnorm.system.files import write_atomically

PICTURES = "pictures"  # their folder, in the report's
IMAGE_GRIDS = ("image-grid.png", "sheet.png")  # of inpainters; the latter is an earlier version's
MOST_CLASSES, COLUMNS, INTERPOLATION_STEPS = 10, 8, 5


class Drawn(NamedTuple):
    section: str
    picture: Picture


class Job(NamedTuple):
    """What draws one or several figures into a folder and says what they are."""

    what: str
    draw: Callable[[Path], list[Drawn]]


def draw_pictures(
    runs: Sequence[Run],
    inpainting: Mapping[str, Path],
    benches: Mapping[str, BenchReport],
    out: Path,
    *,
    device: str,
    progress: Callable[[int, int, str], None],
) -> list[Section]:
    """Sections in the order of the paper's figures, whose files lie in OUT/pictures.

    Args:
        inpainting: Folders that `attnorm evaluate inpainters` has written, by name.
    """
    jobs = _jobs(runs, inpainting, benches, device)
    drawn: list[Drawn] = []
    for number, job in enumerate(jobs):
        progress(number, len(jobs), job.what)
        drawn += job.draw(out / PICTURES)
    progress(len(jobs), len(jobs), "pictures")
    drawn.sort(key=lambda item: item.section)  # which keeps the order within a section
    groups = itertools.groupby(drawn, key=lambda item: item.section)
    return [Section(title, pictures=tuple(item.picture for item in group)) for title, group in groups]


def _jobs(
    runs: Sequence[Run], inpainting: Mapping[str, Path], benches: Mapping[str, BenchReport], device: str
) -> list[Job]:
    jobs: list[Job] = []
    trained = [run for run in runs if RunDirectory(run.path).checkpoints()]
    with_an = next((r for r in sorted(trained, key=lambda r: r.row != "an") if r.model.context == "an"), None)
    # Of each row, its first run.
    firsts = {(run.label, run.tau, str(run.training_configuration)): run for run in reversed(trained)}
    shown = [run for run in trained if run in firsts.values()]
    if with_an is not None:
        jobs.append(Job(f"what {with_an.name} sees", partial(_draw_an, with_an, device)))
    jobs += [Job(f"samples of {run.name}", partial(_draw_samples, run, device, i)) for i, run in enumerate(shown, 1)]
    jobs += [
        Job(f"inpainting of {name}", partial(_copy_grid, name, file, number))
        for number, (name, folder) in enumerate(inpainting.items(), 1)
        for file in [folder / grid for grid in IMAGE_GRIDS if (folder / grid).is_file()][:1]
    ]
    for number, (name, bench) in enumerate(benches.items(), 1):
        caption = f"{name}: time against pixels, both logarithmic; the paper's Table 5 in grey."
        drawn = _drawn("Table 5, drawn", f"table-5-{number}.png", caption)
        jobs.append(Job(f"times of {name}", partial(_draw, drawn, partial(pixels_figure, bench))))
    logged = {run.name: run.path for run in runs if RunDirectory(run.path).metrics_file.is_file()}
    if logged:
        caption = (
            "What training logged, against images seen. Fréchet distances, as evaluate measured them, against images "
            "seen and hours of training; estimates from subsets are left out."
        )
        drawn = _drawn("Training", "curves.png", caption)
        jobs.append(Job("curves", partial(_draw, drawn, partial(curves_figure, logged))))
    return jobs


def _drawn(section: str, file: str, caption: str) -> Drawn:
    return Drawn(section, Picture(f"{PICTURES}/{file}", caption))


def _draw(drawn: Drawn, make: Callable[[], Figure], folder: Path) -> list[Drawn]:
    save_figure(make(), folder.parent / drawn.picture.file)
    return [drawn]


def _classes_of(sampler: Sampler) -> list[int]:
    if len(sampler.classes) == NUM_IMAGENET_CLASSES:
        return list(FIGURE_7_CLASSES)
    return list(range(min(len(sampler.classes), MOST_CLASSES)))


def _draw_samples(run: Run, device: str, number: int, folder: Path) -> list[Drawn]:
    sampler = Sampler(run.path, device=device)
    caption = (
        f"{run.label}, {run.name}, after {sampler.header.images_seen:,} images: a class a row, a latent a column, by "
        "the averaged generator."
    )
    drawn = _drawn("Figure 7. Samples", f"figure-7-{number}.png", caption)
    return _draw(drawn, partial(samples_figure, sampler, _classes_of(sampler), columns=COLUMNS), folder)


def _draw_an(run: Run, device: str, folder: Path) -> list[Drawn]:
    """Figures 4, 5 and 8."""
    sampler = Sampler(run.path, device=device)
    who = f"{run.label}, {run.name}"
    drawn = []
    for path in write_layouts(sampler, _classes_of(sampler), 0, folder):
        if path.stem.startswith("layouts") and path.suffix == ".png":
            caption = f"{who}: image, the entity that wins each pixel, and the map of every entity."
            drawn.append(_drawn("Figure 5. Layouts", path.name, caption))
        elif path.stem.startswith("statistics"):
            caption = (
                f"{who}: mean and standard deviation of the feature map that enters AN, on the whole and on the pixels "
                "that an entity wins; the largest regions."
            )
            drawn.append(_drawn("Figure 4. Statistics of the regions", path.name, caption))
    is_imagenet = len(sampler.classes) == NUM_IMAGENET_CLASSES
    walk = FIGURE_8_CLASSES if is_imagenet else [i % len(sampler.classes) for i in range(3)]
    file = "figure-8.png"
    entity = write_walk(sampler, 0, walk, INTERPOLATION_STEPS, folder / file)
    caption = (
        f"{who}: one latent; the statistics of conditional normalization are mixed linearly from class to class. "
        f"Below, the map of entity {entity}."
    )
    return [*drawn, _drawn("Figure 8. From class to class", file, caption)]


def _copy_grid(name: str, file: Path, number: int, folder: Path) -> list[Drawn]:
    caption = f"{name}: the input with its hole in white, as each model and baseline fills it, and as it was."
    drawn, data = _drawn("Figure 9. Inpainting", f"figure-9-{number}.png", caption), file.read_bytes()
    write_atomically(folder.parent / drawn.picture.file, lambda path: path.write_bytes(data))
    return [drawn]
