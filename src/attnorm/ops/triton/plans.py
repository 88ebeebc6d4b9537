"""How a pass over a feature map is cut up among the multiprocessors: by measured plans, or smaller ones that fit."""

# N batch, C channels, K entities (the paper's n), P = H*W pixels; J blocks of pixels an image.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FEWEST = 16  # rows and columns of the smallest matrix product that the matrix units take


class Plan(NamedTuple):
    """How one pass is cut up."""

    tile: int  # pixels
    chunk: int  # input channels multiplied at a time
    warps: int
    stages: int  # tiles in flight; 1 with chunks
    programs: int  # aimed at, over all images
    split: int = 1  # of the pixels among the warps where a product sums over pixels
    square: bool = True  # whether the C x C gradient of the value projection stays in registers


class Pass(NamedTuple):
    """One pass over a feature map, cut up by its plan."""

    plan: Plan
    grid: tuple[int]
    blocks: int  # J, of an image
    tiles: int  # of a block
    options: dict[str, object]


def _plans(channels: int, bits: int) -> dict[str, Plan]:
    """How each pass is cut up, for a power of two of channels and the bits of a value of x."""
    plans = _measured_plans(channels, bits)
    # Not measured. Twice the tiles of the backward's passes are held at once.
    for name, like in (("tangents", "sums"), ("curvatures", "gradients")):
        plan = plans[like]
        plans[name] = plan._replace(tile=max(plan.tile // 2, 32, 16 * plan.split), stages=1)
    return plans


def _measured_plans(channels: int, bits: int) -> dict[str, Plan]:
    """What was fastest on an H100 at 32, 128 and 256 channels."""
    outer = Plan(64, min(channels, 128), 4, 3, 264) if bits == 16 else Plan(32, min(channels, 128), 8, 3, 264)
    if channels <= 32 and bits == 16:
        return {
            "statistics": Plan(128, channels, 4, 3, 264, split=4),
            "apply": Plan(128, channels, 4, 3, 792),
            "sums": Plan(128, channels, 4, 3, 264, split=4),
            "gradients": Plan(64, channels, 4, 3, 264, split=4),
            "outer": outer,
        }
    if channels <= 32:
        return {
            "statistics": Plan(128, channels, 4, 2, 396, split=4),
            "apply": Plan(128, channels, 4, 2, 8192),
            "sums": Plan(64, channels, 4, 3, 396, split=4),
            "gradients": Plan(64, channels, 4, 3, 264, split=4),
            "outer": outer,
        }
    if channels <= 128 and bits == 16:
        first = Plan(64, channels, 4, 3, 264)
        return {
            "statistics": first,
            "apply": first,
            "sums": first,
            "gradients": Plan(64, channels, 8, 1, 132),
            "outer": outer,
        }
    if channels <= 128:
        return {
            "statistics": Plan(64, channels, 4, 2, 264),
            "apply": Plan(128, channels, 8, 2, 132),
            "sums": Plan(128, channels, 8, 2, 132),
            "gradients": Plan(64, min(channels, 64), 8, 1, 132),
            "outer": outer,
        }
    if bits == 16:
        first = Plan(64, 256, 8, 2, 128)
        return {
            "statistics": first,
            "apply": first,
            "sums": first,
            "gradients": Plan(64, 32, 8, 1, 128, square=False),
            "outer": outer,
        }
    return {
        "statistics": Plan(64, 64, 8, 1, 128),
        "apply": Plan(64, 64, 8, 1, 128),
        "sums": Plan(64, 64, 8, 1, 128),
        "gradients": Plan(32, 64, 8, 1, 128, square=False),
        "outer": outer,
    }


def _smaller(plan: Plan) -> Plan | None:
    """The next plan that needs less of a multiprocessor."""
    if plan.stages > 1:
        return plan._replace(stages=1)
    if plan.tile > 32 * max(plan.split // 2, 1):
        return plan._replace(tile=plan.tile // 2)
    if plan.square:
        return plan._replace(square=False)
    if plan.chunk > 16:
        return plan._replace(chunk=plan.chunk // 2)
    return None


def _cut(plan: Plan, x: Tensor, num_entities: int) -> Pass:
    num_images, channels, height, width = x.shape
    padded, padded_entities = padded_size(channels), padded_size(num_entities)
    tiles_of_image = triton.cdiv(height * width, plan.tile)
    tiles = triton.cdiv(tiles_of_image, min(max(plan.programs // num_images, 1), tiles_of_image))
    blocks = triton.cdiv(tiles_of_image, tiles)
    options: dict[str, object] = {
        "C": channels,
        "K": num_entities,
        "CP": padded,
        "KP": padded_entities,
        "TILE": plan.tile,
        "CHUNK": plan.chunk,
        "EXACT": channels == padded and num_entities == padded_entities and height * width % plan.tile == 0,
        "CHANNELS_LAST": is_channels_last(x),
        "PRECISION": precision(x.dtype),
        "INNER": tl.float32 if x.dtype == torch.float32 else tl.bfloat16,
        "SPLIT": plan.split,
        "num_warps": plan.warps,
        # Of nested loops none: with loads in flight there, Triton 3.6 was seen to overwrite what was still in use.
        "num_stages": plan.stages if plan.chunk == padded else 1,
    }
    return Pass(plan, (num_images * blocks,), blocks, tiles, options)


_fits: dict[tuple[object, ...], Plan] = {}  # what was found to fit where the plan did not


def run_pass(name: str, x: Tensor, num_entities: int, run: Callable[[Pass], None]) -> None:
    """Run one pass by its plan, or by the first smaller one that the device has room for."""
    padded = padded_size(x.shape[1])
    key = (name, padded, num_entities, x.dtype, is_channels_last(x), precision(x.dtype), x.device)
    plan: Plan | None = _fits.get(key) or _plans(padded, 8 * x.element_size())[name]
    while True:
        assert plan is not None
        try:
            run(_cut(plan, x, num_entities))
        except triton.OutOfResources:
            plan = _smaller(plan)
            if plan is None:
                raise
            _fits[key] = plan
        else:
            return


def merge(cut: Pass) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and sizes of the kernel that merges what the blocks of every image left."""
    sizes: dict[str, Any] = {name: cut.options[name] for name in ("C", "K", "CP", "KP")}
    padded, padded_entities = sizes["CP"], sizes["KP"]
    blocks = min(triton.next_power_of_2(cut.blocks), max(8192 // padded_entities, 1))
    channels = min(padded, 8192 // (blocks * padded_entities))
    return (cut.grid[0] // cut.blocks, padded // channels), sizes | {"JP": blocks, "BC": channels, "num_warps": 8}


def padded_size(count: int) -> int:
    return max(int(triton.next_power_of_2(count)), FEWEST)


def is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def precision(dtype: torch.dtype) -> str:
    """float32 is multiplied as torch multiplies matrices: exactly unless TF32 is allowed there."""
    # torch.get_float32_matmul_precision() raises once a program has used these newer settings.
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":
        setting = getattr(torch.backends, "fp32_precision", "none")
    return "tf32" if dtype == torch.float32 and setting == "tf32" else "ieee"
