"""The document of `attnorm bench train`: images a second of a whole step, by context block and switch."""

from __future__ import annotations

import dataclasses
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attnorm.benchmark.training_speed import Speed, last_step
from attnorm.config import Config
from attnorm.reports.render import Document, Section, Table, write_document
from attnorm.settings import to_dict
from attnorm.system.devices import device_name
from attnorm.system.files import write_json
from attnorm.system.provenance import commit, processor


def write_speeds(
    speeds: Sequence[Speed], config: Config, device: torch.device, out: Path, *, processes: int = 1
) -> list[Path]:
    """Writes train.json and train.md into `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    environment = {
        "preset": config.preset,
        "config": to_dict(config),
        "device": device_name(device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    rows: list[dict[str, Any]] = [dataclasses.asdict(speed) for speed in speeds]
    write_json(out / "train.json", {"environment": environment, "speeds": rows})
    where = environment["processor"] if device.type == "cpu" else environment["device"]
    made_by = f"{processes} process(es) of {environment['threads']} thread(s)"
    task = config.inpainting
    is_alone = task is not None and (task.switch_images == 0 or last_step(config) < task.switch_images)
    networks = "the generator, which learns alone in the phase that was timed" if is_alone else "all networks"
    text = (
        f"A whole step of the preset {config.preset or 'given'} at batch {config.run.batch_size}: every update of "
        f"{networks}, data and average included, on noise. {where}, {made_by}, torch {environment['torch']}, "
        f"commit {environment['commit'] or 'unknown'}. Medians of {len(speeds[0].seconds)} rounds, in each of which "
        "all take a turn."
    )
    document = Document("What a step of training costs", (Section(paragraphs=(text,), tables=(table(speeds),)),))
    return [out / "train.json", *write_document(document, out, "train")]


def table(speeds: Sequence[Speed]) -> Table:
    """A row a switch: images a second by context block; in brackets the ratio to the first row, and by how much a step
    takes longer than without a block. Medians over rounds, ratios within each, so that what disturbs one disturbs none.
    """
    found = {(speed.context, speed.switch): speed for speed in speeds}
    contexts, switches = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))

    def cell(context: str, switch: str) -> str:
        speed = found[context, switch]
        gain = _ratio(found[context, switches[0]], speed)
        return f"{speed.images_per_second:.2f} ({gain:.2f}x, {_ratio(speed, found['none', switch]) - 1:+.1%})"

    return Table(
        f"images a second (times {switches[0]}, a step's time beside no block's)",
        ("", *contexts),
        tuple((switch, *(cell(context, switch) for context in contexts)) for switch in switches),
    )


def _ratio(ours: Speed, theirs: Speed) -> float:
    """How many times as long ours takes."""
    return statistics.median(a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True))
