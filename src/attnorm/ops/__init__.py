"""The operations of Attentive Normalization as pure functions of tensors."""

from attnorm.ops.regional_norm import regional_norm
from attnorm.ops.soft_layout import draw_positions, entity_usage, layout_entropy, sample, soft_layout

__all__ = [
    "draw_positions",
    "entity_usage",
    "layout_entropy",
    "regional_norm",
    "sample",
    "soft_layout",
]
