"""What the studio can do, without a browser or a server: models, images, walks, layouts, holes, runs.

The networks are run by `attnorm.inference`, as for the command line. Names of classes and files are text of anyone's,
and are handed on as such. Of the file system, nothing outside the run directories that were given is read.
"""

# N images, K entities, H height and W width of a photograph, h and w of a map.

from __future__ import annotations

import collections
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from attnorm import __version__
from attnorm.checkpoint import CheckpointError
from attnorm.config import ConfigError, UserError
from attnorm.inference import Inpainter, Sampler
from attnorm.inference.inpainter import View
from attnorm.inference.photo_files import Photograph, decode_photograph
from attnorm.inference.photo_pairs import decode_with_mask
from attnorm.layers.diagnose import diagnose
from attnorm.layers.observe import edited_entities, layers_of
from attnorm.reports.figures import most_telling_entity, region_statistics
from attnorm.run_directory import RunDirectory, find_checkpoint, is_saved_model
from attnorm.studio.jobs import Job, let_cancel
from attnorm.studio.models import Model, available_models, run_directories
from attnorm.studio.results import Picture, Repaired, Walk, png, shallow
from attnorm.system.files import hash_file

Named = TypeVar("Named", Sampler, Inpainter)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is refused with a message that names the limit."""

    upload_bytes: int = 32 * 2**20  # a photograph and its mask together
    pixels: int = 50_000_000  # of a photograph, before it is decoded: a telephone's 48 megapixels
    images: int = 64
    steps: int = 121  # images of a walk
    waiting: int = 16  # requests in the queue
    seconds: float = 120.0  # of one request
    models: int = 4  # in memory
    streams: int = 32  # browsers that watch runs


# Methods that need no model, with what the page says of them.
CLASSICAL = {"telea": "Telea, 2004", "mean": "Mean colour"}


class Site(NamedTuple):
    """What one AN layer saw of one image, and what it did."""

    name: str
    layout: Tensor  # [K, h, w]
    facts: dict[str, Any]


class Seen(NamedTuple):
    """An image, the same with its entities edited, and what the layers saw in each of these passes."""

    image: Tensor  # uint8 [3, S, S]
    edited: Tensor | None
    sites: list[Site]
    edited_sites: list[Site]


class Service:
    """The studio's work. Methods that run networks take the job they are run for, and are called by one thread."""

    def __init__(self, places: Sequence[Path] = (), *, device: str = "auto", limits: Limits | None = None) -> None:
        self.places, self.device, self.limits = tuple(places), device, limits or Limits()
        self._loaded: collections.OrderedDict[tuple[type, str], tuple[tuple[Path, int], Any]] = (
            collections.OrderedDict()
        )
        self._hashes: dict[tuple[Path, int], str] = {}
        self._lock = threading.Lock()

    # Models

    def models(self) -> list[Model]:
        return available_models(self.places)

    def model(self, name: str) -> Model:
        """By its id; UserError for an unknown one."""
        models = self.models()
        for model in models:
            if model.id == name:
                return model
        known = ", ".join(model.id for model in models[:20]) or "none: start the studio with a run directory"
        raise NotFound(f"there is no model {name!r}; there are: {known}")

    def sampler(self, name: str) -> Sampler:
        return self._load(Sampler, name)

    def inpainter(self, name: str) -> Inpainter:
        return self._load(Inpainter, name)

    def _load(self, kind: type[Named], name: str) -> Named:
        """Kept until its run has a newer checkpoint or others are used more."""
        model = self.model(name)
        if model.problem:
            raise UserError(f"{name} cannot be used: {model.problem}")
        for attempt in range(3):
            try:
                path = self._within(model.path, find_checkpoint(model.path))
                version = path, path.stat().st_mtime_ns
                with self._lock:
                    if (kept := self._loaded.get((kind, name))) and kept[0] == version:
                        self._loaded.move_to_end((kind, name))
                        loaded: Named = kept[1]
                        return loaded
                loaded = kind(path, device=self.device)
                break
            except (FileNotFoundError, CheckpointError):  # training goes on meanwhile, and keeps the newest alone
                if attempt == 2:
                    raise
        let_cancel(loaded.model)
        with self._lock:
            self._loaded[kind, name] = version, loaded
            self._loaded.move_to_end((kind, name))
            while len(self._loaded) > self.limits.models:
                self._loaded.popitem(last=False)
        return loaded

    def recipe(self, model: str, used: Sampler | Inpainter, request: dict[str, Any]) -> dict[str, Any]:
        """What gives the same result again: the request, and what answered it."""
        version = used.path, used.path.stat().st_mtime_ns if used.path.exists() else 0
        if version not in self._hashes:
            self._hashes[version] = hash_file(used.path) if version[1] else ""
        return {
            "attnorm": __version__,
            "model": model,
            "checkpoint": used.path.name,
            "checkpoint_sha256": self._hashes[version],
            "images_seen": used.header.images_seen,
            "device": used.device.type,
            "threads": torch.get_num_threads(),
            "note": used.header.note,
            "request": request,
        }

    # Class-conditional generators

    def generate(
        self,
        model: str,
        classes: Sequence[str],
        seed: int,
        count: int,
        truncation: float | None,
        job: Job,
    ) -> list[Picture]:
        """`count` images of each class, from the seeds `seed`, `seed` + 1, ...; of every class the same latents.

        They are made one by one, so that each depends on its class and its seed alone, to the last bit.
        """
        sampler = self.sampler(model)
        labels = self._labels(sampler, classes)
        total = len(labels) * count
        if not 1 <= total <= self.limits.images:
            raise ConfigError(
                f"{count} images of {len(labels)} classes are {total}; expected 1 to {self.limits.images} in a request"
            )
        pictures = []
        for label in labels:
            for number in range(seed, seed + count):
                images = sampler.sample([number], [label], truncation=truncation).images
                pictures.append(Picture(sampler.classes[label], number, images[0]))
                job.tell(len(pictures), total)
        return pictures

    def interpolate(
        self, model: str, classes: Sequence[str], seed: int, steps: int, truncation: float | None, job: Job
    ) -> Walk:
        """Figure 8: `steps` images from one class to the next, both ends included, with one latent."""
        sampler = self.sampler(model)
        labels = self._labels(sampler, classes)
        total = (len(labels) - 1) * (steps - 1) + 1
        if len(labels) < 2 or steps < 2 or total > self.limits.steps:
            raise ConfigError(
                f"{steps} steps between {len(labels)} classes are {max(total, 0)} images; expected two classes, two "
                f"steps, or more, and at most {self.limits.steps} images"
            )
        images, layouts = [], []
        for part in sampler.walk(seed, labels, steps, truncation=truncation):
            images.append(part.images)
            if part.layouts:
                layouts.append(next(iter(part.layouts.values())).layout)
            job.tell(len(images), total)
        layout = torch.cat(layouts) if layouts else None
        return Walk(torch.cat(images), layout, 0 if layout is None else most_telling_entity(layout))

    def see(
        self,
        model: str,
        label: str,
        seed: int,
        truncation: float | None,
        off: Sequence[int],
        exchanged: tuple[int, int] | None,
        site: str,
        job: Job,
    ) -> Seen:
        """Figures 4 and 5 of one image; and with entities switched off or exchanged at one site, the image again."""
        sampler = self.sampler(model)
        (number,) = self._labels(sampler, [label])
        layers = layers_of(sampler.model)
        if not layers:
            raise UserError(f"{model} has no AttentiveNorm2d in its generator, so there is no layout to see")
        if site and site not in layers:
            raise UserError(f"{model} has no AN layer {site!r}; it has {', '.join(layers)}")
        image, sites = self._seen(sampler, number, seed, truncation)
        job.check()
        if not off and exchanged is None:
            return Seen(image, None, sites, [])
        try:
            with edited_entities(layers[site or next(iter(layers))], off=off, exchanged=exchanged):
                edited, edited_sites = self._seen(sampler, number, seed, truncation)
        except ValueError as error:
            raise UserError(str(error)) from error
        return Seen(image, edited, sites, edited_sites)

    def _seen(self, sampler: Sampler, label: int, seed: int, truncation: float | None) -> tuple[Tensor, list[Site]]:
        images, layouts = sampler.sample([seed], [label], with_layouts=True, truncation=truncation)
        latents = sampler.latents([seed], truncation=truncation).to(sampler.device)
        diagnoses = diagnose(sampler.model, latents, torch.tensor([label], device=sampler.device))
        sites = []
        for diagnosis in diagnoses:
            observation = layouts[diagnosis.site]
            facts = asdict(diagnosis) | {"is_awake": diagnosis.is_awake, "verdict": diagnosis.verdict}
            (regions,) = region_statistics(observation)
            sites.append(Site(diagnosis.site, observation.layout[0], facts | regions))
        return images[0], sites

    def _labels(self, sampler: Sampler, classes: Sequence[str]) -> list[int]:
        if not classes:
            raise ConfigError("no class was named; expected one or several")
        return [sampler.class_index(name) for name in classes]

    # Photographs

    def photograph(self, name: str, data: bytes) -> Photograph:
        """A photograph that someone sent; UserError where it cannot be read, or is too large."""
        return decode_photograph(Path(name), data, max_pixels=self.limits.pixels)

    def repair(
        self,
        method: str,
        name: str,
        image: bytes,
        mask: bytes,
        job: Job,
        *,
        format: str = "",
        invert: bool = False,
        with_layouts: bool = False,
        with_scores: bool = False,
    ) -> Repaired:
        """Fills the hole of a photograph with a model (by its id), "telea" or "mean".

        Args:
            name, image: The file's name and content.
            mask: A picture of the same size, white where something is missing.
            format: What to write: "", the photograph's own, or "PNG" or "TIFF".
            invert: Black is missing instead.
            with_layouts: Say what AN saw of each window, or what contextual attention took, where the method is such.
            with_scores: What is under the hole is the truth: say how near the result is.
        """
        photograph, hole = decode_with_mask(image, mask, image_name=name, max_pixels=self.limits.pixels, invert=invert)
        job.check()
        format = format or photograph.format
        if format not in (photograph.format, "PNG", "TIFF"):
            raise UserError(f"the format is {format!r}; expected {photograph.format}, which the image has, PNG or TIFF")
        rgb = photograph.rgb()
        views: list[View] = []
        if method in CLASSICAL:
            filled = _classical(method, rgb, hole)
        else:
            inpainter = self.inpainter(method)
            result = inpainter.fill(
                rgb,
                hole,
                with_layouts=with_layouts and inpainter.has_layout,
                with_matches=with_layouts and inpainter.has_matches,
                progress=job.tell,
            )
            filled = result.image
            views = [view for view in result.views if view.layout is not None or view.matches is not None]
        job.check()
        repaired = photograph.with_hole_filled(filled, hole)
        data = repaired.encoded(format)
        note = photograph.note
        if format == "JPEG":
            change = repaired.largest_change(data, hole)
            note = f"JPEG was encoded anew, which changed the other pixels by up to {change} of 255" + (
                f"; {note}" if note else ""
            )
        scores = _scores(rgb, filled, hole) if with_scores else {}
        return Repaired(photograph, hole, data, format, filled, views, scores, note)

    def examples(self) -> dict[str, Callable[[], bytes]]:
        """Photographs to try, as PNG files: those that scikit-image comes with."""
        from attnorm.data.builtin import builtin_photographs

        names = ("astronaut", "cat", "coffee", "rocket")
        return {name: lambda name=name: png(builtin_photographs()[name]) for name in names}  # type: ignore[misc]

    # Runs

    def runs(self) -> dict[str, Path]:
        return {name: path for name, path in run_directories(self.places).items() if not is_saved_model(path)}

    def run(self, name: str) -> RunDirectory:
        """By its name; NotFound for an unknown one."""
        runs = self.runs()
        if name not in runs:
            raise NotFound(f"there is no run {name!r}; there are: {', '.join(runs) or 'none'}")
        return RunDirectory(runs[name])

    def samples(self, run: RunDirectory) -> list[int]:
        """The grids of samples that there are, by images seen."""
        folder = run.path / "samples"
        numbers = [int(file.stem) for file in folder.glob("*.png") if file.stem.isdecimal()] if folder.is_dir() else []
        return sorted(number for number in numbers if run.sample_file(number).is_file())

    def sample_grid(self, run: RunDirectory, images_seen: int) -> bytes:
        """A grid's PNG file."""
        file = run.sample_file(images_seen)
        if not file.is_file():
            raise NotFound(f"{run.path.name} has no samples of {images_seen} images seen")
        return self._within(run.path, file).read_bytes()

    def metrics(self, run: RunDirectory) -> list[dict[str, Any]]:
        """What training logged, numbers that are none left out."""
        self._within(run.path, run.metrics_file)
        return [
            {key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
            for row in run.read_metrics()
        ]

    def status(self, run: RunDirectory) -> dict[str, Any]:
        """Whether it is being trained, and how far it is."""
        config, _ = run.read()
        checkpoints = run.checkpoints()
        changed = run.metrics_file.stat().st_mtime if run.metrics_file.exists() else 0.0
        return {
            "preset": config.preset,
            "task": config.task,
            "duration_images": config.run.duration_images,
            "checkpoint": int(checkpoints[-1].stem) if checkpoints else None,
            "samples": self.samples(run),
            "seconds_since_change": max(time.time() - changed, 0.0) if changed else None,
        }

    def _within(self, folder: Path, file: Path) -> Path:
        """The file itself, if it lies in the folder whatever links lead to it."""
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{file.name} is a link out of the run directory {folder.name}, which is not followed")
        return file


class NotFound(UserError):
    """There is nothing of this name."""


def _classical(method: str, rgb: Tensor, hole: Tensor) -> Tensor:
    """`rgb` with its hole filled by a method without a model; 16 bits become 8 in the hole, and 16 again."""
    from attnorm.evaluation.baselines import mean_fill, telea_fill

    is_deep, seen = rgb.dtype == torch.uint16, shallow(rgb)
    filled = (mean_fill if method == "mean" else telea_fill)(seen[None], hole[None])[0]
    if is_deep:
        filled = (filled.int() * 257).to(torch.uint16)
    return torch.where(hole, filled, rgb)


def _scores(truth: Tensor, filled: Tensor, hole: Tensor) -> dict[str, float]:
    """PSNR in dB and MAE in [0, 1] of the hole, PSNR and SSIM of the whole."""
    from attnorm.metrics.image_quality import mae, psnr, ssim

    truth, filled, hole = shallow(truth)[None], shallow(filled)[None], hole[None]
    everywhere = torch.ones_like(hole)
    scores = {
        "psnr_hole": psnr(truth, filled, hole),
        "mae_hole": mae(truth, filled, hole),
        "psnr_whole": psnr(truth, filled, everywhere),
    }
    if min(truth.shape[2:]) > 10 and truth.shape[2] * truth.shape[3] <= 4_000_000:
        scores["ssim_whole"] = ssim(truth, filled, everywhere)
    return {name: value.item() for name, value in scores.items()}
