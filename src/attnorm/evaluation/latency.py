"""What filling one picture costs at several sizes: time and memory of a forward pass."""

# S side of the picture.

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from attnorm.benchmark.timing import peak_bytes, seconds_of
from attnorm.config import ConfigError
from attnorm.data.masks import centre_mask
from attnorm.inference import Inpainter
from attnorm.layers.contextual_attention import ContextualAttention, score_bytes
from attnorm.models.inpainting import InpaintingGenerator
from attnorm.system.devices import find_device, set_tf32, usable_memory

SECONDS = 1.0  # spent on a cell, after one pass that warms up and measures the memory
FEATURE_STRIDE = 4  # pixels a side that a feature of the context block stands for


@dataclass(frozen=True)
class Cell:
    """One model at one size, batch 1."""

    model: str
    image_size: int  # S
    milliseconds: float | None = None  # median; None where it was not run
    passes: int = 0
    peak_bytes: int | None = None  # held at once beyond weights and input
    score_bytes: int | None = None  # of one contextual score matrix, where the model has them
    skipped: str = ""  # why it was not run


def measure_latency(
    runs: Mapping[str, Path],
    sizes: Sequence[int],
    *,
    device: str = "auto",
    seconds: float = SECONDS,
    allowed_bytes: int | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> list[Cell]:
    """Every model at every size, small ones first; what would not fit, as the size before foretells, is skipped.

    Args:
        runs: By name; run directories or checkpoint files of the inpainting task.
        sizes: Sides in pixels, multiples of 8; the hole is the centre square of half the side.
        allowed_bytes: What a forward pass may hold; by default half of the machine's memory, nine tenths of a GPU's.
    """
    for size in sizes:
        if size < 32 or size % 8:
            raise ConfigError(f"a size is {size}; expected multiples of 8, at least 32")
    found = find_device(device)
    allowed = usable_memory(found) if allowed_bytes is None else allowed_bytes
    cells: list[Cell] = []
    for name, path in runs.items():
        model = Inpainter(path, device=device).model
        set_tf32(False)
        last: Cell | None = None
        for size in sorted(set(sizes)):
            progress(len(cells), len(runs) * len(set(sizes)), f"{name}, {size} pixels")
            last = _cell(name, model, size, last, found, seconds, allowed)
            cells.append(last)
    return cells


def _cell(
    name: str,
    model: InpaintingGenerator,
    size: int,
    last: Cell | None,
    device: torch.device,
    seconds: float,
    allowed: int,
) -> Cell:
    is_contextual = isinstance(model.context, ContextualAttention)
    side = size // FEATURE_STRIDE
    scores = score_bytes(side, side) if is_contextual else None
    if last is not None and last.peak_bytes is None:
        return Cell(name, size, score_bytes=scores, skipped="a smaller size did not fit")
    # At least as much as the scores alone; and the last size's, grown with the pixels, or with their square.
    needed = float(scores or 0)
    if last is not None and last.peak_bytes is not None:
        needed = max(needed, last.peak_bytes * (size / last.image_size) ** (4 if is_contextual else 2))
    if needed > allowed:
        return Cell(
            name, size, score_bytes=scores, skipped=f"would need up to {needed:,.0f} bytes; {allowed:,} are allowed"
        )
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(device)
    mask = centre_mask(size).mask[None].to(device)

    def step() -> None:
        with torch.no_grad():
            model(image, mask)

    try:
        peak = peak_bytes(step, device)
        times: list[float] = []
        while not times or sum(times) < seconds:
            times.append(seconds_of(step, device))
    except RuntimeError as error:  # a GPU's lack of memory has a class of its own, the CPU's has not
        if not isinstance(error, torch.OutOfMemoryError) and "memory" not in str(error):
            raise
        return Cell(name, size, score_bytes=scores, skipped="out of memory")
    return Cell(name, size, 1000 * statistics.median(times), len(times), peak, scores)
