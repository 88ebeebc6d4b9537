"""Whether the kernels can run on a kind of feature map: what the device lacks, and what its compiler gets wrong."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from attnorm.ops.dispatch import Parameters
from attnorm.ops.regional_norm import regional_norm
from attnorm.ops.triton import launch
from attnorm.ops.triton.kernels import INTERPRETED
from attnorm.ops.triton.plans import FEWEST, precision

MAX_CHANNELS = 256  # of a tile that fits one multiprocessor
MAX_ENTITIES = 32


def unsupported_reason(
    device: torch.device,
    dtype: torch.dtype,
    num_channels: int,
    num_entities: int,
    channels_last: bool,
    *,
    order: int = 1,
) -> str | None:
    """Why the kernels cannot run on such a feature map; None if they can. Of `order` 2 are those of second derivatives.

    The first call for a kind of feature map compiles the kernels and compares them with the plain form.
    """
    if device.type != "cuda" and not INTERPRETED.value:
        return f"x is on {device}; it runs on CUDA devices"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has a compute capability below 8.0"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {dtype}; it takes float32, bfloat16 and float16"
    most = MAX_ENTITIES if dtype != torch.float32 or num_channels <= 128 else FEWEST
    if num_channels > MAX_CHANNELS or num_entities > most:
        return (
            f"{num_channels} channels and {num_entities} entities of {dtype}; a multiprocessor holds the tiles of at "
            f"most {MAX_CHANNELS} and {most}"
        )
    if INTERPRETED.value:  # slow
        return None
    return disagreement(device, dtype, num_channels, num_entities, channels_last, precision(dtype), second=order == 2)


# ||got - expected|| / ||expected|| that is still rounding.
ROUNDING = {"ieee": 1e-4, "tf32": 2e-2, "bfloat16": 5e-2, "float16": 5e-2}


@functools.cache
def disagreement(
    device: torch.device,
    dtype: torch.dtype,
    num_channels: int,
    num_entities: int,
    channels_last: bool,
    precision: str,
    side: int | None = None,
    *,
    second: bool = False,
) -> str | None:
    """What the kernels, or those of the `second` order, get wrong on such feature maps, or None.

    A compiler was seen to turn a right kernel into a wrong one for some tile sizes (docs/performance.md): no plan that
    was right on one machine with one version of triton is trusted on another unseen. Both kinds of maps are tried,
    whose pixels fill whole tiles and whose do not, large enough for every program to walk over several tiles.
    """
    side = side or (256 if num_channels <= 64 and not second else 128)
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        for odd in (0, 1):
            shape = (2, num_channels, side - odd, side - odd)
            found = _compare(shape, device, dtype, num_entities, channels_last, precision, second=second)
            if found:
                return (
                    f"{found} on {device} with triton {triton.__version__} for {num_channels} channels and "
                    f"{num_entities} entities of {dtype}"
                )
    return None


def _compare(
    shape: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    num_entities: int,
    channels_last: bool,
    precision: str,
    *,
    second: bool = False,
) -> str | None:
    generator = torch.Generator().manual_seed(0)
    images, channels = shape[:2]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, noise = (draw(*shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    scale = 1.6 / channels**0.5  # a softmax that is neither flat nor hard
    filters, offset = scale * draw(images, num_entities, channels), scale * draw(images, num_entities)
    value_weight, value_bias = draw(channels, channels) / channels**0.5, draw(channels)
    weight, bias = 1 + 0.1 * draw(num_entities, channels), draw(num_entities, channels)
    rho = torch.tensor(0.7, device=device)
    eps = 1e-5
    parameters = Parameters(filters, offset, value_weight, value_bias, weight, bias, rho)
    out, area, mean, rstd = launch.forward(x, parameters, eps)
    moments = (area, mean, rstd)
    # Of a gradient that has nothing to do with the output, rho's may be all but zero (a sum of millions of products of
    # either sign), and then be rounding alone; this one follows the output.
    grad = noise + (out / 8).to(dtype)
    names = ["x", "the filters", "their offset", "the value projection", "", "beta", "alpha", "rho"]
    got: tuple[Tensor, ...]
    if second:
        names = ["the gradient", *names]
        of_maps = (draw(*filters.shape), draw(*offset.shape), draw(*value_weight.shape))
        dots = (*of_maps, draw(*weight.shape), draw(*bias.shape), draw())
        got = launch.double_backward(noise, dots, grad, x, parameters, moments, eps)
    else:
        got = launch.backward(grad, x, parameters, moments, eps)
    with torch.enable_grad():
        leaves = [part.detach().float().requires_grad_() for part in (x, *parameters)]
        flat = leaves[0].flatten(2)
        soft = torch.softmax(torch.baddbmm(leaves[2][..., None], leaves[1], flat), 1)
        v = (leaves[3] @ flat + leaves[4][:, None]).unflatten(2, shape[2:])
        normalized = regional_norm(v, soft.unflatten(2, shape[2:]), leaves[5], leaves[6], eps=eps)
        expected = leaves[7] * normalized + leaves[0]
        exact_grad = grad.float().requires_grad_(second)
        gradients = torch.autograd.grad(expected, leaves, exact_grad, create_graph=second)
        if second:
            cotangents = [noise.float(), *dots[:3], torch.zeros_like(value_bias), *dots[3:]]
            gradients = torch.autograd.grad(gradients, [exact_grad, *leaves], cotangents)
    pairs = [("the output", out, expected)]
    for name, ours, theirs in zip(names, got[: len(names)], gradients, strict=True):
        pairs += [(f"the gradient of {name}", ours, theirs)] if name else []  # the value's bias has none
    allowed = ROUNDING[precision if dtype == torch.float32 else str(dtype).removeprefix("torch.")]
    for name, ours, theirs in pairs:
        error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
        if not error <= allowed:
            return f"{name} is off by {error:.1e}, more than {allowed:g}"
    return None
