"""Every block returns the memory format that it was given: what follows it runs the kernels it would run without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnorm import AttentiveNorm2d, SelfAttention2d
from attnorm.layers.conditional_norm import ConditionalBatchNorm2d
from attnorm.layers.contextual_attention import ContextualAttention
from attnorm.layers.linear_attention import LinearAttention2d
from attnorm.layers.region_norm import RegionNorm2d
from attnorm.layers.residual import DownBlock, UpBlock
from attnorm.ops import regional_norm, soft_layout

LABELS = torch.tensor([0, 1])


def regional(impl: str) -> Callable[[Tensor], Tensor]:
    return lambda x: regional_norm(x, soft_layout(x, torch.eye(8)[None], torch.zeros(1, 8)), impl=impl)


BLOCKS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    **{f"AN-{impl}": lambda impl=impl: AttentiveNorm2d(8, 4, impl=impl) for impl in ("auto", "reference", "fused")},
    "AN-masked": lambda: AttentiveNorm2d(8, 4, statistics="masked"),
    "AN-batch": lambda: AttentiveNorm2d(8, 4, moments="batch"),
    "AN-value-off": lambda: AttentiveNorm2d(8, 4, value_projection=False),
    **{f"regional-norm-{impl}": lambda impl=impl: regional(impl) for impl in ("reference", "fused")},
    "self-attention": lambda: SelfAttention2d(8),
    "contextual-attention": lambda: lambda x: ContextualAttention()(x, torch.zeros(2, 1, 6, 4)),
    "linear-attention": lambda: LinearAttention2d(8),
    "region-norm-mask": lambda: lambda x: RegionNorm2d(8)(x, torch.eye(6, 4).expand(2, 1, 6, 4)),
    "region-norm-learned": lambda: lambda x: RegionNorm2d(8, regions="learned")(x),
    "conditional-norm": lambda: lambda x: ConditionalBatchNorm2d(8, 3)(x, LABELS),
    "up": lambda: lambda x: UpBlock(8, 8, 3, an=AttentiveNorm2d(8, 4), after=SelfAttention2d(8))(x, LABELS),
    "down": lambda: DownBlock(8, 8, an=AttentiveNorm2d(8, 4), after=SelfAttention2d(8)),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_returns_the_memory_format_that_it_was_given(name: str, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    block = BLOCKS[name]()
    x = torch.randn(2, 8, 6, 4).contiguous(memory_format=memory_format)
    out = block(x)
    assert out.is_contiguous(memory_format=memory_format)
    if isinstance(block, nn.Module) and name != "down":  # new, it is the identity, for all that follows as well
        follower = nn.Conv2d(8, 8, 3, padding=1)
        assert torch.equal(follower(out), follower(x))
