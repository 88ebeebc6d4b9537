"""Attentive Normalization of given logits, Eq. 4 to 6, and the choice of how to compute it."""

# N batch, C channels, K entities (the paper's n); M = N, or 1 where the batch shares its filters.

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from attnorm.ops.dispatch import is_exporting, is_transformed, memory_format, resolve
from attnorm.ops.operator import MODULES, plain
from attnorm.ops.regional_norm import Moments, Statistics


def attentive_norm(
    x: Tensor,
    filters: Tensor,
    offset: Tensor,
    value_weight: Tensor | None,
    value_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rho: Tensor,
    *,
    statistics: Statistics = "weighted",
    moments: Moments = "instance",
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    eps: float = 1e-5,
    impl: str = "auto",
    return_layout: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x + rho * regional_norm(v(x), S) with the layout S = softmax(filters x + offset).

    Args:
        x: Feature map, [N, C, H, W], any floating dtype.
        filters, offset: The logits of Eq. 4, tau and all, as a 1x1 convolution of x: [M, K, C] and [M, K].
        value_weight, value_bias: The 1x1 convolution v, [C, C] and [C]; None for v(x) = x and for 0.
        weight, bias: beta and alpha of Eq. 5, [K, C]; None for 1 and 0.
        rho: Eq. 6, a scalar.
        statistics, moments, running_mean, running_var, training, eps: As in `regional_norm`.
        impl: "auto", or one of "reference" (Eq. 5 to the letter), "fused" (matrix products), "native" (compiled for the
            CPU) and "triton" (GPU kernels). "auto" takes the last two where they can run.
        return_layout: Return (output, layout), the layout being [N, K, H, W] and at least float32.

    Raises:
        ValueError: parameters of other shapes or on another device than x, or an explicit `impl` that cannot run.

    Returns:
        [N, C, H, W], dtype and memory format of x. Logits, moments and all sums are in float32 at least; native and
        triton take products in the precision of x (float32 as torch multiplies matrices: exactly, unless TF32 is
        allowed).
    """
    count, channels = filters.shape[1:]  # of the parameters, which stay numbers where torch.compile makes none of x's
    given = {
        "filters": (filters, (filters.shape[0], count, x.shape[1])),
        "offset": (offset, (filters.shape[0], count)),
        "value_weight": (value_weight, (channels, channels)),
        "value_bias": (value_bias, (channels,)),
        "weight": (weight, (count, channels)),
        "bias": (bias, (count, channels)),
        "rho": (rho, ()),
    }
    for name, (part, shape) in given.items():
        if part is not None and (part.shape != shape or part.device != x.device):
            raise ValueError(
                f"{name} is {tuple(part.shape)} on {part.device}; expected {shape} on {x.device}, as x is "
                f"{tuple(x.shape)} there; move the layer or x with .to(device)"
            )

    limits = None  # of native and triton
    if statistics != "weighted" or moments != "instance":
        limits = f"statistics={statistics!r} with moments={moments!r} is computed by the plain implementations only"
    elif value_weight is None:
        limits = "value_projection=False is computed by the plain implementations only"
    elif return_layout:
        limits = "it never holds the layout that return_layout=True asks for"
    elif is_transformed():
        limits = "torch.func and forward-mode derivatives go through the plain implementations only"
    elif is_exporting():
        limits = "an exported program is made of torch's own operations, which other runtimes know"
    elif channels * x.shape[2] * x.shape[3] >= 2**31:
        limits = f"an image has {channels * x.shape[2] * x.shape[3]} values; expected fewer than 2^31"
    best = {"cuda": "triton", "cpu": "native"}.get(x.device.type)
    kind = (x.device, x.dtype, channels, count, memory_format(x) == torch.channels_last)
    candidates = {name: limits or unsupported_reason(name, *kind) for name in MODULES if name in (best, impl)}
    candidates["fused"] = None if statistics == "weighted" else f"statistics={statistics!r} has the reference form only"
    candidates["reference"] = None
    impl = resolve("AttentiveNorm2d", impl, candidates)

    if impl in MODULES:
        assert value_weight is not None
        value_bias = value_weight.new_zeros(channels) if value_bias is None else value_bias
        weight = filters.new_ones(count, channels) if weight is None else weight
        bias = filters.new_zeros(count, channels) if bias is None else bias
        parameters = (filters, offset, value_weight, value_bias, weight, bias, rho)
        fast: Tensor = torch.ops.attnorm.attentive_norm(x, *(part.float() for part in parameters), eps, impl)[0]
        return fast
    out, layout = plain(
        x,
        filters,
        offset,
        value_weight,
        value_bias,
        weight,
        bias,
        rho,
        statistics=statistics,
        moments=moments,
        running_mean=running_mean,
        running_var=running_var,
        training=training,
        eps=eps,
        impl=impl,
    )
    return (out, layout) if return_layout else out


def unsupported_reason(
    impl: str, device: torch.device, dtype: torch.dtype, num_channels: int, num_entities: int, channels_last: bool
) -> str | None:
    """Why `impl`, "native" or "triton", cannot run on such a feature map; None if it can.

    It takes no tensor: torch.compile would run all that comes before the layer to find out its values.
    """
    try:
        module = importlib.import_module(MODULES[impl])
    except ImportError as error:
        return f"{error.name or error} is not installed"
    said: str | None = module.unsupported_reason(device, dtype, num_channels, num_entities, channels_last)
    return said


# What torch.compiler.assume_constant_result sets; the decorator itself imports the compiler, which takes seconds.
unsupported_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
