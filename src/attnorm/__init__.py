"""Attentive Normalization: long-range structure at the cost of a normalization.

>>> from attnorm import AttentiveNorm2d
>>> layer = AttentiveNorm2d(256, num_entities=16)

Names are imported when first used, so that `import attnorm` costs nothing beyond torch, and torch only when needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "AttentiveNorm2d": "attnorm.layers.attentive_norm",
    "Generator": "attnorm.models.class_conditional",
    "InpaintingGenerator": "attnorm.models.inpainting",
    "RelativisticGenerator": "attnorm.models.relativistic",
    "SelfAttention2d": "attnorm.layers.self_attention",
    "create_model": "attnorm.registry",
    "diagnose": "attnorm.layers.diagnose",
    "entity_usage": "attnorm.ops.soft_layout",
    "insert_after": "attnorm.layers.replace",
    "layout_entropy": "attnorm.ops.soft_layout",
    "list_models": "attnorm.registry",
    "load": "attnorm.registry",
    "observe_layouts": "attnorm.layers.observe",
    "regional_norm": "attnorm.ops.regional_norm",
    "replace": "attnorm.layers.replace",
    "soft_layout": "attnorm.ops.soft_layout",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from attnorm.layers.attentive_norm import AttentiveNorm2d as AttentiveNorm2d
    from attnorm.layers.diagnose import diagnose as diagnose
    from attnorm.layers.observe import observe_layouts as observe_layouts
    from attnorm.layers.replace import insert_after as insert_after
    from attnorm.layers.replace import replace as replace
    from attnorm.layers.self_attention import SelfAttention2d as SelfAttention2d
    from attnorm.models.class_conditional import Generator as Generator
    from attnorm.models.inpainting import InpaintingGenerator as InpaintingGenerator
    from attnorm.models.relativistic import RelativisticGenerator as RelativisticGenerator
    from attnorm.ops.regional_norm import regional_norm as regional_norm
    from attnorm.ops.soft_layout import entity_usage as entity_usage
    from attnorm.ops.soft_layout import layout_entropy as layout_entropy
    from attnorm.ops.soft_layout import soft_layout as soft_layout
    from attnorm.registry import create_model as create_model
    from attnorm.registry import list_models as list_models
    from attnorm.registry import load as load


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'attnorm' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
