"""The two operations of Attentive Normalization as pure functions of tensors."""

from attnorm.ops.regional_norm import regional_norm
from attnorm.ops.soft_layout import SelfSampling, draw_positions, entity_usage, layout_entropy, soft_layout

__all__ = ["SelfSampling", "draw_positions", "entity_usage", "layout_entropy", "regional_norm", "soft_layout"]
