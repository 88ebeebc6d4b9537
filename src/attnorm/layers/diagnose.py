"""Is AN awake? What each AttentiveNorm2d of a network does to the features that it gets."""

# N batch, C channels, K entities (the paper's n).

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.layers.observe import layers_of, observe_layouts
from attnorm.ops.soft_layout import effective_entities, entity_usage, layout_entropy

SMALL = 0.3  # RMS of the entities below which temperature="auto" has a layout that is next to uniform
UNIFORM = 0.95  # entropy from which on a layout tells pixels so little apart that AN is instance normalization
NEXT_TO_NOTHING = 0.01  # change below which AN hands on its input


@dataclass(frozen=True)
class Diagnosis:
    """What one AttentiveNorm2d does; as text, a line."""

    site: str  # the layer's name in the network
    entropy: float  # of the layout, normalised: 0 hard, 1 uniform
    usage: tuple[float, ...]  # the share of pixels that each entity wins, K of them
    rho: float  # Eq. 6
    spread: float  # standard deviation of the logits over the entities (1.6 with the paper's widths and tau)
    change: float  # RMS of what the layer adds to its input, as a share of the input's: rho counts only beside it
    batches: int | None = None  # training batches that the features' moments come of; None without moments
    entities: float = 1.0  # RMS of the numbers of W, which start at 1

    @property
    def is_awake(self) -> bool:
        """Whether the layout is not uniform and what AN adds not next to nothing."""
        return self.entropy < UNIFORM and self.change >= NEXT_TO_NOTHING

    @property
    def verdict(self) -> str:
        """ "awake", or why it is asleep."""
        reasons = []
        if self.entropy >= UNIFORM:
            why = ""
            if self.batches == 0:
                why = " (no training batch was seen: the layer was never in training mode)"
            elif self.entities < SMALL:
                why = f" (the entities are {self.entities:.2f} where they start at 1: an initialization or spectral"
                why += " norm of all convolutions, or weight decay; reset_entities() makes them anew)"
            reasons.append(f"the layout is uniform{why}")
        if self.change < NEXT_TO_NOTHING:
            reasons.append("rho is next to 0")
        return f"asleep: {' and '.join(reasons)}" if reasons else "awake"

    def __str__(self) -> str:
        used = effective_entities(self.usage)
        return (
            f"{self.site}: entropy {self.entropy:.2f}, {used:.1f} of {len(self.usage)} entities in use, "
            f"rho {self.rho:+.3f} (changes its input by {self.change:.1%}), spread of the logits {self.spread:.2f}: "
            f"{self.verdict}"
        )


def diagnose(model: nn.Module, *inputs: Any, **keywords: Any) -> list[Diagnosis]:
    """Runs `model(*inputs, **keywords)` once in evaluation mode and says of each AN layer whether it takes part::

        for line in diagnose(generator, z, labels):
            print(line)  # blocks.2.an: entropy 0.71, 12.3 of 16 entities in use, rho -0.123 (...): awake

    The network's mode is as before afterwards, and nothing in it has changed.

    Raises:
        ValueError: there is no AttentiveNorm2d in `model`, or the pass went through none.
    """
    layers = layers_of(model)
    if not layers:
        raise ValueError(f"there is no AttentiveNorm2d in {type(model).__name__}")
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), observe_layouts(model.eval()) as seen:
            model(*inputs, **keywords)
        found = [_diagnosis(site, layers[site], *observation) for site, observation in seen.items()]
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not found:
        raise ValueError(f"{type(model).__name__} has AttentiveNorm2d layers, but this pass went through none")
    return found


@torch.no_grad()
def _diagnosis(site: str, layer: AttentiveNorm2d, features: Tensor, layout: Tensor) -> Diagnosis:
    added = layer(features).float() - features.float()
    return Diagnosis(
        site,
        layout_entropy(layout).item(),
        tuple(entity_usage(layout).tolist()),
        layer.rho.item(),
        layer.logits(features).var(1, correction=0).mean().sqrt().item(),
        (added.square().mean() / features.float().square().mean().clamp_min(1e-30)).sqrt().item(),
        None if layer.num_batches_tracked is None else int(layer.num_batches_tracked.item()),
        layer.entities.weight.square().mean().sqrt().item(),
    )
