"""What an experiment begins with: names that there are, and a folder that holds results of no other protocol."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from attnorm.config import ConfigError
from attnorm.system.files import write_json

EXPERIMENT = "experiment.json"  # in the folder of an experiment: its protocol, and where it began
TRAININGS = "trainings.jsonl"  # in the folder of an experiment: what each training said of itself, a line each


def require_known(scale: str, arms: Iterable[str], *, scales: Collection[str], all_arms: Collection[str]) -> None:
    unknown = [name for name in arms if name not in all_arms]
    if scale not in scales or unknown:
        raise ConfigError(
            f"got scale {scale!r}, arms {', '.join(unknown) or 'all'}; "
            f"expected one of {', '.join(scales)}, and arms of {', '.join(all_arms)}"
        )


def require_own_place(out: Path) -> None:
    """ConfigError where `out` holds something that is no experiment: its report would replace what is called alike."""
    if out.is_dir() and any(out.iterdir()) and not (out / EXPERIMENT).exists():
        raise ConfigError(f"{out} is not empty, and no folder of an experiment; choose another --out")


def kept_protocol(out: Path) -> dict[str, Any]:
    """By which the results in `out` were made; {} where there are none."""
    file = out / EXPERIMENT
    return json.loads(file.read_text(encoding="utf-8"))["protocol"] if file.exists() else {}


def keep_protocol(out: Path, about: Mapping[str, Any]) -> None:
    """Writes what is known of an experiment to experiment.json, or checks that `out` was made by the same protocol.

    Raises:
        ConfigError: what differs in `about["protocol"]`.
    """
    there, protocol = kept_protocol(out), about["protocol"]
    if not there:
        write_json(out / EXPERIMENT, about)
        return
    other = sorted(key for key in protocol.keys() | there.keys() if protocol.get(key) != there.get(key))
    if other:
        raise ConfigError(f"{out} holds results of another {', '.join(other)}; choose another --out")
