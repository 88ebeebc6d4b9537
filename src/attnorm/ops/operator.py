"""`torch.ops.attnorm.attentive_norm`: Eq. 4 to 6 as one operator that walks over x and keeps nothing of its size.

Soft layout and regional normalization one after the other keep the layout, the value and half a dozen tensors more.
Two implementations do without: `native` on a CPU (native.py), `triton` on a GPU (triton/). Each has a
`forward`, a `backward` and a `double_backward` of the same contract; here they become an operator which compiles and
differentiates like any of torch. What it computes is written in plain torch in `plain`, through which third derivatives
go.
"""

# N batch, C channels, K entities (the paper's n); M = N, or 1 where the batch shares its filters.

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnorm.ops.dispatch import Parameters, is_transformed, memory_format
from attnorm.ops.regional_norm import regional_norm
from attnorm.ops.soft_layout import soft_layout

MODULES = {"native": "attnorm.ops.native", "triton": "attnorm.ops.triton"}


def plain(
    x: Tensor,
    filters: Tensor,
    offset: Tensor,
    value_weight: Tensor | None,
    value_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rho: Tensor,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Eq. 4 to 6 in plain torch: (output, layout). Differentiable in every way that torch has, at several times the
    memory of the operator. `settings` are those of `regional_norm`.
    """
    layout = soft_layout(x, filters, offset)  # Eq. 4
    v = x
    if value_weight is not None:
        v = x.float() if x.dtype == torch.float16 else x  # whose range a product of large features leaves
        v = F.conv2d(
            v, value_weight.to(v.dtype)[:, :, None, None], None if value_bias is None else value_bias.to(v.dtype)
        )
    x_bar = regional_norm(v, layout, weight, bias, **settings)  # Eq. 5
    return (x + rho * x_bar).to(x.dtype), layout  # Eq. 6; the first term's memory format is the sum's


# The operators are registered by hand, since those of torch.library.custom_op import the compiler, which takes seconds,
# when they first run.


def _forward(
    x: Tensor,
    filters: Tensor,
    offset: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    rho: Tensor,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, area, mean, rstd): what the layer returns, and what its backward needs beside x.

    `impl` is "native" or "triton".
    """
    parameters = Parameters(filters, offset, value_weight, value_bias, weight, bias, rho)
    if not x.numel():
        return _fake_forward(x, *parameters)
    results: tuple[Tensor, Tensor, Tensor, Tensor] = _kernels(impl).forward(_dense(x), parameters, eps)
    return results


def _fake_forward(x: Tensor, *parameters_and_settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = Parameters(*parameters_and_settings[:7]).weight
    images, (entities, channels) = x.shape[0], weight.shape
    mean = weight.new_empty(images, entities, channels)
    return torch.empty_like(_dense(x)), weight.new_empty(images, entities), mean, torch.empty_like(mean)


def _backward(
    grad: Tensor,
    x: Tensor,
    filters: Tensor,
    offset: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    rho: Tensor,
    area: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, filters, offset, value_weight, value_bias, weight, bias and rho."""
    parameters = Parameters(filters, offset, value_weight, value_bias, weight, bias, rho)
    if not x.numel():
        return torch.empty_like(_dense(x)), *(torch.zeros_like(part) for part in parameters)  # type: ignore[return-value]
    grad = grad.to(x.dtype).contiguous(memory_format=memory_format(x))
    dx, *gradients = _kernels(impl).backward(grad, _dense(x), parameters, (area, mean, rstd), eps)
    # Cloned: an operator's results may share no memory.
    return dx, *(gradient.clone() for gradient in gradients)


def _fake_backward(grad: Tensor, x: Tensor, *parameters_and_others: Any) -> tuple[Tensor, ...]:
    gradients = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in parameters_and_others[:7])
    return torch.empty_like(_dense(x)), *gradients


def _double_backward(
    tangent: Tensor,
    filters_dot: Tensor | None,
    offset_dot: Tensor | None,
    value_weight_dot: Tensor | None,
    weight_dot: Tensor | None,
    bias_dot: Tensor | None,
    rho_dot: Tensor | None,
    grad: Tensor,
    x: Tensor,
    filters: Tensor,
    offset: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    rho: Tensor,
    area: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by grad, x, filters, offset, value_weight, value_bias, weight, bias and rho of the sum of the results
    of `_backward`, each times its cotangent: `tangent` is that of dx, and the others end in `_dot`, None for zeros.
    """
    parameters = Parameters(filters, offset, value_weight, value_bias, weight, bias, rho)
    if not x.numel():
        like = _dense(x)
        return torch.empty_like(like), torch.empty_like(like), *(torch.zeros_like(part) for part in parameters)  # type: ignore[return-value]
    dots = (filters_dot, offset_dot, value_weight_dot, weight_dot, bias_dot, rho_dot)
    given = (tangent, dots, grad, _dense(x), parameters, (area, mean, rstd), eps)
    dgrad, dx, *gradients = _kernels(impl).double_backward(*given)
    return dgrad, dx, *(gradient.clone() for gradient in gradients[:7])  # as in `_backward`


def _fake_double_backward(tangent: Tensor, *others: Any) -> tuple[Tensor, ...]:
    x, *parameters = others[7:15]  # after the cotangents and grad
    gradients = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in parameters)
    return torch.empty_like(_dense(x)), torch.empty_like(_dense(x)), *gradients


def _kernels(impl: str) -> Any:
    """The module, imported when it is first needed."""
    return importlib.import_module(MODULES[impl])


def _dense(x: Tensor) -> Tensor:
    """x with its values side by side, channels first or last."""
    return x.contiguous(memory_format=memory_format(x))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.impl = inputs
    _, *moments = output
    ctx.save_for_backward(*tensors, *moments)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, area, mean, rstd = ctx.saved_tensors
    if is_transformed():  # the gradient is batched, or part of a transformation
        with torch.enable_grad():
            parts = [_alone(part) for part in inputs]
            out, _layout = plain(*parts, eps=ctx.eps)
            needed = ctx.needs_input_grad[: len(inputs)]
            wanted = [part for part, need in zip(parts, needed, strict=True) if need]
            found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
        return (*(next(found) if need else None for need in needed), None, None)
    gradients = torch.ops.attnorm.attentive_norm_backward(grad, *inputs, area, mean, rstd, ctx.eps, ctx.impl)
    return (*gradients, None, None)


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.impl = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # zeros that stand for nothing would cost as much as others


def _differentiate_twice(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, *inputs, area, mean, rstd = ctx.saved_tensors
    x, filters = inputs[:2]
    kind = (x.device, x.dtype, x.shape[1], filters.shape[1], memory_format(x) == torch.channels_last)
    create_graph = torch.is_grad_enabled()
    if create_graph or is_transformed() or _kernels(ctx.impl).unsupported_reason(*kind, order=2):
        with torch.enable_grad():
            parts = [_alone(part) for part in (grad, *inputs)]
            out, _layout = plain(*parts[1:], eps=ctx.eps)
            first = torch.autograd.grad(out, parts[1:], parts[0], create_graph=True, materialize_grads=True)
            given = [(part, dot) for part, dot in zip(first, cotangents, strict=True) if dot is not None]
            found = torch.autograd.grad(
                [part for part, _ in given],
                parts,
                [dot for _, dot in given],
                create_graph=create_graph or is_transformed(),
                allow_unused=True,
            )
        return (*found, None, None, None, None, None)
    tangent, filters_dot, offset_dot, value_weight_dot, _, *others = cotangents  # value_bias's gradient is always 0
    tangent = torch.zeros_like(x) if tangent is None else tangent
    found = torch.ops.attnorm.attentive_norm_double_backward(
        tangent, filters_dot, offset_dot, value_weight_dot, *others, grad, *inputs, area, mean, rstd, ctx.eps, ctx.impl
    )
    return (*found, None, None, None, None, None)  # what depends on area, mean and rstd is in the others


def _alone(part: Tensor) -> Tensor:
    """To differentiate by in this use of the layer alone: an x that came out of the same layer leads to the same
    parameters again.
    """
    return part.view_as(part) if part.requires_grad else part.detach().requires_grad_()


for _name, _function, _fake in (
    ("attnorm::attentive_norm", _forward, _fake_forward),
    ("attnorm::attentive_norm_backward", _backward, _fake_backward),
    ("attnorm::attentive_norm_double_backward", _double_backward, _fake_double_backward),
):
    torch.library.define(_name, torch.library.infer_schema(_function, mutates_args=()))
    torch.library.impl(_name, "default", _function)
    torch.library.register_fake(_name, _fake)
torch.library.register_autograd("attnorm::attentive_norm", _differentiate, setup_context=_save)
torch.library.register_autograd(
    "attnorm::attentive_norm_backward", _differentiate_twice, setup_context=_save_for_double_backward
)
