"""Where training says how it goes: metrics.jsonl, sample grids, TensorBoard, Weights & Biases, one progress line."""

from __future__ import annotations

import colorsys
import contextlib
import json
import secrets
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from attnorm.config import Config
from attnorm.data.images import to_uint8
from attnorm.run_directory import RunDirectory
from attnorm.settings import flatten
from attnorm.system.files import read_lines, write_atomically, write_lines
from attnorm.system.progress import clock, progress_bar


@contextlib.contextmanager
def without_tensorboards_traceback() -> Iterator[None]:
    """TensorBoard writes in a thread of its own. What fails there, on a full disk, say, its next call raises here."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not (failed.thread and type(failed.thread).__module__.startswith("tensorboard.")):
            before(failed)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


class Logger:
    """Metrics and pictures of one run. A resumed run first drops what lies after its checkpoint: those steps are
    made again.

    Args:
        resumed_at: Images seen at the checkpoint that training goes on from; None at a start.
    """

    def __init__(self, run: RunDirectory, config: Config, *, resumed_at: int | None, console: Console) -> None:
        self.run, self.settings = run, config.run
        _drop_rows_after(run.metrics_file, -1 if resumed_at is None else resumed_at)
        # What lies at the checkpoint itself stays, as in the rows: it is not logged again.
        purge = None if resumed_at is None else resumed_at + 1
        self.board = SummaryWriter(str(run.path / "tensorboard"), purge_step=purge)
        self.metrics = run.metrics_file.open("a", encoding="utf-8")
        self.wandb = _begin_wandb(run, config) if config.run.wandb else None
        self.speed = 0.0  # images a second
        self._losses = ""
        columns = (BarColumn(), TextColumn("{task.description}"))
        self.progress = progress_bar(console, *columns, line=lambda task: task.description, at_once=True)
        self.bar = self.progress.add_task("training", total=config.run.duration_images, completed=resumed_at or 0)

    def __enter__(self) -> Logger:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        self.metrics.close()
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()

    def advance(self, images_seen: int, seconds: float, total_seconds: float) -> None:
        """After a step that took `seconds`, `total_seconds` into training: the progress line."""
        now = self.settings.batch_size / max(seconds, 1e-9)
        self.speed = now if self.speed == 0 else 0.95 * self.speed + 0.05 * now
        left = (self.settings.duration_images - images_seen) / self.speed
        if self.settings.max_minutes:
            left = min(left, max(self.settings.max_minutes * 60 - total_seconds, 0))
        text = (
            f"{images_seen:,} of {self.settings.duration_images:,} images, {self.speed:.0f}/s, "
            f"{clock(left)} left  {self._losses}"
        )
        self.progress.update(self.bar, completed=images_seen, description=text)

    def log(self, images_seen: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl; what is a number goes to TensorBoard too, and all of it to Weights & Biases."""
        self.metrics.write(json.dumps({"images_seen": images_seen, **values}) + "\n")
        self.metrics.flush()
        for name, value in values.items():
            if isinstance(value, float | int):
                self.board.add_scalar(name, value, images_seen)
        if self.wandb is not None:
            self.wandb.log({"images_seen": images_seen, **values})
        losses = {name.split("/")[0]: value for name, value in values.items() if name.endswith("/loss")}
        if losses:
            self._losses = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())

    def save_grid(self, images_seen: int, images: Tensor, columns: int) -> Path:
        """Writes float images [N, 3, S, S] in [-1, 1] as one picture."""
        picture = torchvision.utils.make_grid(to_uint8(images).cpu(), nrow=columns, padding=2).numpy()
        path = self.run.sample_file(images_seen)
        image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
        write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))
        self._show("samples", picture, images_seen)
        return path

    def show_layouts(self, images_seen: int, layouts: Mapping[str, Tensor], columns: int) -> None:
        """The entity that wins each pixel, a colour each, as a picture a site: layouts are [N, K, H, W] by its name."""
        for site, layout in layouts.items():
            hues = [colorsys.hsv_to_rgb(k / layout.shape[1], 0.6, 0.9) for k in range(layout.shape[1])]
            winners = torch.tensor(hues)[layout.argmax(1).cpu()].movedim(3, 1)
            picture = torchvision.utils.make_grid(to_uint8(2 * winners - 1), nrow=columns, padding=1).numpy()
            self._show(f"layouts/{site}", picture, images_seen)

    def _show(self, name: str, picture: np.ndarray, images_seen: int) -> None:
        """uint8 [3, H, W], in TensorBoard and Weights & Biases."""
        self.board.add_image(name, picture, images_seen)
        if self.wandb is not None:
            import wandb

            self.wandb.log({"images_seen": images_seen, name: wandb.Image(picture.transpose(1, 2, 0))})

    def warn(self, text: str, images_seen: int) -> None:
        """Says it, and shows it where the curves are."""
        self.say(f"warning: {text}")
        self.board.add_text("warnings", text, images_seen)
        if self.wandb is not None:
            self.wandb.alert(title="attnorm", text=text)

    def say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, soft_wrap=True)


def _begin_wandb(run: RunDirectory, config: Config) -> Any:
    """The project's run that this run directory has been before: its name is kept in RUN/wandb."""
    import wandb

    folder = run.path / "wandb"
    folder.mkdir(exist_ok=True)
    kept = folder / "run-id"
    if not kept.exists():
        write_atomically(kept, lambda temporary: temporary.write_text(secrets.token_hex(8), encoding="ascii"))
    found = wandb.init(
        project=config.run.wandb,
        name=run.path.resolve().name,
        id=kept.read_text(encoding="ascii"),
        resume="allow",
        dir=str(run.path),
        config=flatten(config),
    )
    found.define_metric("*", step_metric="images_seen")
    return found


def _drop_rows_after(path: Path, images_seen: int) -> None:
    """Also drops a last line that a kill cut short."""
    if not path.exists():
        return
    rows = [row for row in read_lines(path) if isinstance(row.get("images_seen"), int)]
    write_lines(path, [row for row in rows if row["images_seen"] <= images_seen], allow_nan=True)
