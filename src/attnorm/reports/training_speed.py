"""The document of `attnorm bench train`: images a second of a whole step, by context block and switch."""

from __future__ import annotations

import dataclasses
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attnorm.benchmark.training_step import SWITCHES, Speed
from attnorm.config import Config
from attnorm.reports.render import Document, Section, Table, write_document
from attnorm.settings import to_dict
from attnorm.system.devices import device_name
from attnorm.system.files import write_json
from attnorm.system.provenance import commit, processor

PLAIN = next(iter(SWITCHES))


def write_speeds(speeds: Sequence[Speed], config: Config, device: torch.device, out: Path) -> list[Path]:
    """Writes train.json and train.md into `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    environment = {
        "preset": config.preset,
        "config": to_dict(config),
        "device": device_name(device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    rows: list[dict[str, Any]] = [dataclasses.asdict(speed) for speed in speeds]
    write_json(out / "train.json", {"environment": environment, "speeds": rows})
    where = environment["processor"] if device.type == "cpu" else environment["device"]
    text = (
        f"A whole step of the preset {config.preset or 'given'} at batch {config.run.batch_size}: every update of all "
        f"networks, data and average included, on random images. {where}, {environment['threads']} thread(s), torch "
        f"{environment['torch']}, commit {environment['commit'] or 'unknown'}. Medians of "
        f"{len(speeds[0].seconds)} rounds, in each of which all take a turn."
    )
    document = Document("What a step of training costs", (Section(paragraphs=(text,), tables=(table(speeds),)),))
    return [out / "train.json", *write_document(document, out, "train")]


def table(speeds: Sequence[Speed]) -> Table:
    """Images a second; in brackets the ratio to the same block in plain float32, and the time beside no block's."""
    found = {(speed.context, speed.switch): speed for speed in speeds}
    contexts = dict.fromkeys(speed.context for speed in speeds)

    def cell(context: str, switch: str) -> str:
        speed = found[context, switch]
        gain = speed.images_per_second / found[context, PLAIN].images_per_second
        # Round by round, so that what disturbed one of them disturbs neither median.
        pairs = zip(speed.seconds, found["none", switch].seconds, strict=True)
        more = statistics.median(ours / theirs for ours, theirs in pairs) - 1
        return f"{speed.images_per_second:.2f} ({gain:.2f}x, {more:+.1%})"

    return Table(
        "images a second (times plain float32, a step's time beside no block's)",
        ("context block", *SWITCHES),
        tuple((context, *(cell(context, switch) for switch in SWITCHES)) for context in contexts),
    )
