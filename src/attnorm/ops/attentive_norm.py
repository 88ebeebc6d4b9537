"""The whole of Attentive Normalization, Eq. 2-6, as one operator that walks over x and keeps nothing of its size.

Soft layout and regional normalization one after the other keep the layout, the value and half a dozen tensors more.
Two implementations do without: `native` on a CPU (native.py), `triton` on a GPU (triton_kernels.py). Each has a
`forward` and a `backward` of the same contract; here they become `torch.ops.attnorm.attentive_norm`, which compiles,
differentiates and runs under autocast like any operator of torch. What it computes is written in plain torch in
`plain`, through which second derivatives go.
"""

# N batch, C channels, K entities (the paper's n), D channels of key and query.

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnorm.ops.regional_norm import regional_norm
from attnorm.ops.soft_layout import SelfSampling, pixels_under, sampled_filters, soft_layout

_MODULES = {"native": "attnorm.ops.native", "triton": "attnorm.ops.triton_kernels"}


def attentive_norm(
    x: Tensor,
    entities: Tensor,
    sampling: SelfSampling | None,
    value_weight: Tensor,
    value_bias: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rho: Tensor,
    *,
    temperature: float,
    eps: float,
    impl: str,
) -> Tensor:
    """Eq. 6: rho * regional_norm(v(x), layout(x)) + x, with the weighted moments of each image's soft regions.

    Args:
        x: Feature map, [N, C, H, W], of a type that `impl` takes; see `obstacle`.
        entities: W of Eq. 3, [K, C].
        sampling: The self-sampling branch of Eq. 2; None in evaluation.
        value_weight, value_bias: The 1x1 convolution v, [C, C] and [C].
        weight, bias: beta and alpha of Eq. 5, [K, C]; None for 1 and 0.
        rho: A scalar.
        temperature, eps: tau of Eq. 4; what is added to the variance.
        impl: "native" or "triton".

    Raises:
        ValueError: parameters of other shapes or on another device than x.

    Returns:
        [N, C, H, W], dtype of x. Products are taken in the precision of x, in float32 as torch multiplies matrices
        (exactly, unless TF32 is allowed); sums are in float32.
    """
    channels, count = x.shape[1], entities.shape[0]
    given = {
        "entities": (entities, (count, channels)),
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
    weight = torch.ones_like(entities) if weight is None else weight
    bias = torch.zeros_like(entities) if bias is None else bias
    parameters = [part.float() for part in (entities, value_weight, value_bias, weight, bias, rho)]
    branch = [None] * 6 if sampling is None else [*(part.float() for part in sampling[:5]), sampling.positions]
    out: Tensor = torch.ops.attnorm.attentive_norm(x, *parameters, *branch, temperature, eps, impl)[0]
    return out


def obstacle(
    impl: str, device: torch.device, dtype: torch.dtype, num_channels: int, num_entities: int, channels_last: bool
) -> str | None:
    """Why `impl`, "native" or "triton", cannot run on such a feature map; None if it can.

    It takes no tensor: torch.compile would run all that comes before the layer to find out its values.
    """
    try:
        module = importlib.import_module(_MODULES[impl])
    except ImportError as error:
        return f"{error.name or error} is not installed"
    said: str | None = module.obstacle(device, dtype, num_channels, num_entities, channels_last)
    return said


# What torch.compiler.assume_constant_result sets; the decorator itself imports the compiler, which takes seconds.
obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def plain(
    x: Tensor,
    entities: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    rho: Tensor,
    *branch: Any,
    temperature: float,
    eps: float,
) -> Tensor:
    """The same in plain torch: differentiable as often as one likes, at several times the memory."""
    sampling = None if branch[0] is None else SelfSampling(*branch)
    layout = soft_layout(x, entities, sampling, temperature=temperature)
    v = F.conv2d(x, value_weight.to(x.dtype)[:, :, None, None], value_bias.to(x.dtype))
    return (rho * regional_norm(v, layout, weight, bias, eps=eps) + x).to(x.dtype)


def _dense(x: Tensor) -> Tensor:
    """x with its values side by side, channels first or last."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


# The operators. Their arguments cannot be NamedTuples, so the branch's parts stand side by side. They are registered by
# hand, since those of torch.library.custom_op import the compiler, which takes seconds, when they first run.


def _forward(
    x: Tensor,
    entities: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    rho: Tensor,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    t: Tensor | None,
    positions: Tensor | None,
    temperature: float,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, filters, offset, area, mean, rstd): what the layer returns, and what its backward needs beside x."""
    x = _dense(x)
    if positions is None:
        filters, offset = entities[None].clone(), entities.new_zeros(1, entities.shape[0])
    else:
        branch = (key_weight, key_bias, query_weight, query_bias, t)
        filters, offset = sampled_filters(_at(x, positions).float(), entities, *branch)  # type: ignore[arg-type]
    kernels = importlib.import_module(_MODULES[impl])
    parameters = (filters, offset, value_weight, value_bias, weight, bias, rho)
    out, area, mean, rstd = kernels.forward(x, *parameters, temperature, eps)
    return out, filters, offset, area, mean, rstd


def _fake_forward(x: Tensor, entities: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    images, (count, channels) = x.shape[0], entities.shape
    sets = 1 if arguments[10] is None else images
    moments = entities.new_empty(images, count, channels)
    filters, offset = entities.new_empty(sets, count, channels), entities.new_empty(sets, count)
    return torch.empty_like(_dense(x)), filters, offset, entities.new_empty(images, count), moments, moments.clone()


def _backward(
    grad: Tensor,
    x: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    rho: Tensor,
    filters: Tensor,
    offset: Tensor,
    area: Tensor,
    mean: Tensor,
    rstd: Tensor,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    t: Tensor | None,
    positions: Tensor | None,
    temperature: float,
    eps: float,
    impl: str,
) -> list[Tensor]:
    """Gradients of x, entities, value_weight, value_bias, weight, bias, rho, and of the branch's five parts."""
    x = _dense(x)
    is_last = not x.is_contiguous()
    grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
    kernels = importlib.import_module(_MODULES[impl])
    parameters = (filters, offset, value_weight, value_bias, weight, bias, rho)
    gradients = kernels.backward(grad, x, *parameters, area, mean, rstd, temperature, eps)
    dx, d_filters, d_offset, *d_parameters = gradients  # cloned below: an operator's results may share no memory
    if positions is None:
        return [dx, d_filters[0].clone(), *(g.clone() for g in d_parameters)]

    # The chain rule through `sampled_filters`, [N, K, ...] at most: x takes part with 4 K pixels only.
    assert key_weight is not None and key_bias is not None
    assert query_weight is not None and query_bias is not None and t is not None
    at_samples = _at(x, positions).float()  # [N, C, K*4]
    key = (key_weight @ at_samples + key_bias[:, None]).unflatten(2, (-1, 4))  # [N, D, K, 4]
    sampled, corner = key.max(3)
    sampled = sampled.transpose(1, 2)  # [N, K, D]
    d_t = (d_filters * (sampled @ query_weight)).sum((0, 2)) + (d_offset * (sampled @ query_bias)).sum(0)
    d_sampled = t[:, None] * (d_filters @ query_weight.T + d_offset[..., None] * query_bias)
    scaled = t[:, None] * sampled
    d_query_weight = scaled.flatten(0, 1).T @ d_filters.flatten(0, 1)
    d_query_bias = (scaled * d_offset[..., None]).sum((0, 1))
    d_key = torch.zeros_like(key).scatter_(3, corner[..., None], d_sampled.transpose(1, 2)[..., None]).flatten(2)
    d_key_weight = (d_key @ at_samples.transpose(1, 2)).sum(0)
    pixels = pixels_under(positions, *x.shape[2:])[:, None].expand(-1, x.shape[1], -1)
    dx.flatten(2).scatter_add_(2, pixels, (key_weight.T @ d_key).to(dx.dtype))  # flatten is a view of a dense tensor
    d_branch = [d_key_weight, d_key.sum((0, 2)), d_query_weight, d_query_bias, d_t]
    return [dx, d_filters.sum(0), *(g.clone() for g in d_parameters), *d_branch]


def _fake_backward(grad: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    filters, branch = arguments[5], arguments[10:15]
    like = [filters[0], *arguments[:5], *(part for part in branch if part is not None)]
    return [torch.empty_like(_dense(x)), *(torch.empty_like(part).contiguous() for part in like)]


def _at(x: Tensor, positions: Tensor) -> Tensor:
    """x at the pixels under the sampled positions, [N, C, K*4]."""
    pixels = pixels_under(positions, *x.shape[2:])
    return x.flatten(2).gather(2, pixels[:, None].expand(-1, x.shape[1], -1))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, ctx.eps, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, filters, offset, area, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: the gradient is to be differentiated in its turn
        # Of this use of the layer alone: an x that came out of the same layer leads back to the same parameters.
        inputs = [
            part.view_as(part) if needed else part for part, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        wanted = [part for part, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
        out = plain(*inputs, temperature=ctx.temperature, eps=ctx.eps)
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
        return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:13]), None, None, None)
    x, _entities, *parameters = inputs[:7]
    moments = (filters, offset, area, mean, rstd)
    found = iter(
        torch.ops.attnorm.attentive_norm_backward(
            grad, x, *parameters, *moments, *inputs[7:], ctx.temperature, ctx.eps, ctx.impl
        )
    )
    gradients = [next(found, None) for _ in range(12)]
    return (*gradients, None, None, None, None)


for _name, _function, _fake in (
    ("attnorm::attentive_norm", _forward, _fake_forward),
    ("attnorm::attentive_norm_backward", _backward, _fake_backward),
):
    torch.library.define(_name, torch.library.infer_schema(_function, mutates_args=()))
    torch.library.impl(_name, "default", _function)
    torch.library.register_fake(_name, _fake)
torch.library.register_autograd("attnorm::attentive_norm", _differentiate, setup_context=_save)
