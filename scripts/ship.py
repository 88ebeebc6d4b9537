"""Make a model that comes with the package from a run: averaged weights in half precision, and its card.

    python scripts/ship.py RUN NAME --card card.json --docs docs/models

card.json holds what only a person knows, by the names of `attnorm.pretrained.Card`; preset, images, hours are the
run's. `attnorm models` lists the result.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from attnorm.checkpoint import read_header
from attnorm.pretrained import Card, card_text, ship
from attnorm.run_directory import find_checkpoint
from attnorm.settings import from_dict
from attnorm.system.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--card", type=Path, required=True)
    parser.add_argument("--docs", type=Path, required=True)
    arguments = parser.parse_args()
    checkpoint = find_checkpoint(arguments.run)
    header = read_header(checkpoint)
    of_the_run = {
        "recipe": f"preset {header.config.preset}, seed {header.config.run.seed}",
        "images_seen": header.images_seen,
        "hours": header.seconds / 3600,
    }
    card = from_dict(Card, of_the_run | json.loads(arguments.card.read_text(encoding="utf-8")))
    file = ship(checkpoint, arguments.name, card)
    arguments.docs.mkdir(parents=True, exist_ok=True)
    write_text(arguments.docs / f"{arguments.name}.md", card_text(arguments.name, card))
    print(f"{file}, {file.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
