"""Signs in a training's log that it goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNIFORM_LAYOUT = 0.98  # normalised entropy above which AN is instance normalization in all but name

# Standard deviation over latents of a pixel in [-1, 1]: six grey levels of 256, and a fifth of what it has been.
FLAT, FALLEN = 0.05, 0.2
WON, ROWS = 0.05, 5  # a hinge loss of the discriminator that leaves the generator nothing, in so many logs in a row


def collapse(rows: Sequence[dict[str, Any]]) -> str:
    """What is to be said of the newest rows of `metrics.jsonl`, or nothing: generated images that are all alike, or a
    discriminator that is never wrong.
    """
    spreads = [row["samples/diversity"] for row in rows if "samples/diversity" in row]
    if spreads and spreads[-1] < min(FLAT, FALLEN * max(spreads)):
        return (
            f"images of different latents differ by {spreads[-1]:.3f} only (by {max(spreads):.3f} once): the generator "
            "makes nearly one image of each class (mode collapse); a lower optim.g_lr or a larger batch in a new run "
            "may prevent it"
        )
    losses = [row["discriminator/loss"] for row in rows if "discriminator/loss" in row][-ROWS:]
    if len(losses) == ROWS and max(losses) < WON:
        return (
            f"the discriminator's loss stays below {WON}: it is never wrong, and the generator learns nothing from it; "
            "try a lower optim.d_lr, or more images, in a new run"
        )
    return ""
