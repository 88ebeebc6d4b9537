"""Attentive Normalization and its first two derivatives by the kernels, with the contract of `attnorm.ops.native`."""

# N batch, C channels, K entities (the paper's n); M = N, or 1 where the batch shares its filters.

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from attnorm.ops.dispatch import Parameters
from attnorm.ops.triton import kernels
from attnorm.ops.triton.plans import Pass, is_channels_last, merge, padded_size, precision, run_pass


def forward(x: Tensor, parameters: Parameters, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `attnorm.ops.native.forward`, but that mean is that of v without its bias: (out, area, mean, rstd)."""
    filters, offset, value_weight, _, weight, bias, rho = parameters
    num_images, channels, height, width = x.shape
    pixels, entities = height * width, filters.shape[1]
    per_image = entities if filters.shape[0] > 1 else 0
    padded, padded_entities = padded_size(channels), padded_size(entities)
    value_weight = _rounded(value_weight, x)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    area, mean = empty(num_images, entities), empty(num_images, entities, channels)
    rstd = torch.empty_like(mean)
    centre = empty(num_images, padded)
    scale, shifted = empty(2, num_images, padded, padded_entities, dtype=_narrow(x))
    out = torch.empty_like(x)

    def statistics(cut: Pass) -> None:
        areas, (totals, squares) = empty(*cut.grid, padded_entities), empty(2, *cut.grid, padded, padded_entities)
        shifts, means = empty(2, *cut.grid, padded)
        kernels.statistics[cut.grid](
            x, filters, offset, value_weight, areas, totals, squares, shifts, means,
            pixels, cut.blocks, cut.tiles, per_image, **cut.options,
        )  # fmt: skip
        grid, sizes = merge(cut)
        kernels.summarize[grid](
            areas, totals, squares, shifts, means, weight, bias, rho, area, mean, rstd, centre, scale, shifted,
            eps, pixels, cut.blocks, cut.tiles * cut.plan.tile, **sizes,
        )  # fmt: skip

    def apply(cut: Pass) -> None:
        kernels.apply[cut.grid](
            x, filters, offset, value_weight, centre, scale, shifted, out,
            pixels, cut.blocks, cut.tiles, per_image, **cut.options,
        )  # fmt: skip

    with _on(x):
        run_pass("statistics", x, entities, statistics)
        run_pass("apply", x, entities, apply)
    return out, area, mean, rstd


def backward(
    grad: Tensor, x: Tensor, parameters: Parameters, moments: tuple[Tensor, Tensor, Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, filters, offset, value_weight, value_bias, weight, bias and rho, as `attnorm.ops.native`."""
    filters, offset, value_weight, value_bias, weight, bias, rho = parameters
    area, mean, rstd = moments
    num_images, channels, height, width = x.shape
    pixels, entities = height * width, filters.shape[1]
    per_image = entities if filters.shape[0] > 1 else 0
    padded, padded_entities = padded_size(channels), padded_size(entities)
    value_weight = _rounded(value_weight, x)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    x_centre = _centre(x)
    centre = empty(num_images, padded)
    affine = empty(num_images, 3, entities, channels)
    scale, shifted, slope, level = empty(4, num_images, padded, padded_entities, dtype=_narrow(x))
    constant = empty(num_images, padded, padded_entities)
    dx = torch.empty_like(x)
    dv = dx
    found: list[Tensor] = []  # d_filters, d_offset, d_value

    def sums(cut: Pass) -> None:
        plain, weighted = empty(2, *cut.grid, padded, padded_entities)
        kernels.sums[cut.grid](
            x, grad, filters, offset, value_weight, area, mean, plain, weighted, centre,
            pixels, cut.blocks, cut.tiles, per_image, **cut.options,
        )  # fmt: skip
        grid, sizes = merge(cut)
        kernels.differentiate[grid](
            plain, weighted, area, mean, rstd, centre, weight, bias, rho,
            affine, scale, shifted, slope, level, constant, eps, cut.blocks, **sizes,
        )  # fmt: skip

    def gradients(cut: Pass) -> None:
        nonlocal dv
        square = cut.plan.square
        dv = dx if square else torch.empty_like(x, dtype=_narrow(x))
        # One row a block: gradients of the filters, of their offset and, where it fits, of the value projection.
        lengths = [padded_entities * padded, padded_entities, padded * padded if square else 0]
        shares = empty(*cut.grid, sum(lengths))
        kernels.gradients[cut.grid](
            x, grad, filters, offset, value_weight, x_centre, centre, scale, shifted, slope, level, constant,
            dx, dv, shares, pixels, cut.blocks, cut.tiles, per_image, **cut.options, KEEP_DV=not square,
        )  # fmt: skip
        of_images = _added(shares, num_images)
        of_batch = _added(of_images, 1) if num_images > 1 else of_images
        d_filters, d_offset, _ = (of_images if per_image else of_batch).split(lengths, 1)
        found[:] = [d_filters, d_offset, of_batch[0, lengths[0] + lengths[1] :]]
        if not square:
            run_pass("outer", x, entities, outer)

    def outer(cut: Pass) -> None:
        found[2] = _value_gradient(cut, dv, x, x_centre)

    with _on(x):
        run_pass("sums", x, entities, sums)
        run_pass("gradients", x, entities, gradients)
        d_weight, d_bias, d_rho = (_added(affine, 1) if num_images > 1 else affine).view(3, entities, channels)
    d_filters, d_offset, d_value = found
    return (
        dx,
        d_filters.view(-1, padded_entities, padded)[:, :entities, :channels],
        d_offset[:, :entities],
        d_value.view(padded, padded)[:channels, :channels],
        torch.zeros_like(value_bias),
        d_weight,
        d_bias,
        d_rho.sum(),
    )


def double_backward(
    tangent: Tensor,
    dots: tuple[Tensor | None, ...],
    grad: Tensor,
    x: Tensor,
    parameters: Parameters,
    moments: tuple[Tensor, Tensor, Tensor],
    eps: float,
) -> tuple[Tensor, ...]:
    """As `attnorm.ops.native.double_backward`."""
    filters, offset, value_weight, value_bias, weight, bias, rho = parameters
    area, mean, rstd = moments
    num_images, channels, height, width = x.shape
    pixels, entities = height * width, filters.shape[1]
    per_image = entities if filters.shape[0] > 1 else 0
    padded, padded_entities = padded_size(channels), padded_size(entities)
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    tangent, grad = (part.to(x.dtype).contiguous(memory_format=layout) for part in (tangent, grad))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    def given(dot: Tensor | None, part: Tensor) -> Tensor:
        return torch.zeros_like(part, dtype=torch.float32) if dot is None else dot.float().contiguous()

    x_centre = _centre(x)
    filters_dot, offset_dot, moved, *others = dots
    moves = moved is not None
    filters_dot, offset_dot = given(filters_dot, filters), given(offset_dot, offset)
    weight_dot, bias_dot, rho_dot = map(given, others, (weight, bias, rho))
    value_weight = _rounded(value_weight, x)
    value_weight_dot = value_weight if moved is None else _rounded(moved.contiguous(), x)
    # The tangent of the shift of v drops out: only that of x - x_centre counts.
    middle_dot = x_centre @ value_weight_dot.float().T

    centre = empty(num_images, padded)
    affine = empty(num_images, 3, entities, channels)
    tables = empty(8, num_images, padded, padded_entities, dtype=_narrow(x))
    constants = empty(2, num_images, padded, padded_entities)
    dgrad, dx = torch.empty_like(x), torch.empty_like(x)
    dv = dv_dot = dx
    found: list[Tensor] = []  # d_filters, d_filters_dot, d_offset, d_offset_dot, d_value
    maps = (filters, offset, value_weight, filters_dot, offset_dot, value_weight_dot, middle_dot)

    def tangents(cut: Pass) -> None:
        sums, area_dot = empty(6, *cut.grid, padded, padded_entities), empty(*cut.grid, padded_entities)
        kernels.tangents[cut.grid](
            x, tangent, grad, *maps, area, mean, sums, area_dot, centre,
            pixels, cut.blocks, cut.tiles, per_image, sums[0].numel(), **cut.options, VALUE_DOT=moves,
        )  # fmt: skip
        grid, sizes = merge(cut)
        kernels.curve[grid](
            sums, area_dot, area, mean, rstd, centre, weight, bias, rho, weight_dot, bias_dot, rho_dot,
            affine, tables, constants, eps, cut.blocks, sums[0].numel(), tables[0].numel(), constants[0].numel(),
            **sizes,
        )  # fmt: skip

    def curvatures(cut: Pass) -> None:
        nonlocal dv, dv_dot
        square = cut.plan.square
        if not square:
            dv, dv_dot = (torch.empty_like(x, dtype=_narrow(x)) for _ in range(2))
        lengths = [padded_entities * padded] * 2 + [padded_entities] * 2 + [padded * padded if square else 0]
        shares = empty(*cut.grid, sum(lengths))
        kernels.curvatures[cut.grid](
            x, tangent, grad, *maps, x_centre, centre, tables, constants, dgrad, dx, dv, dv_dot, shares,
            pixels, cut.blocks, cut.tiles, per_image, tables[0].numel(), constants[0].numel(),
            **cut.options, VALUE_DOT=moves, KEEP_DV=not square,
        )  # fmt: skip
        of_images = _added(shares, num_images)
        of_batch = _added(of_images, 1) if num_images > 1 else of_images
        found[:] = (of_images if per_image else of_batch).split(lengths, 1)
        found[4] = of_batch[0, sum(lengths[:4]) :]
        if not square:
            run_pass("outer", x, entities, outer)

    def outer(cut: Pass) -> None:
        found[4] = _value_gradient(cut, dv_dot, x, x_centre)
        found[4] += _value_gradient(cut, dv, tangent, torch.zeros_like(x_centre))

    with _on(x):
        run_pass("tangents", x, entities, tangents)
        run_pass("curvatures", x, entities, curvatures)
        d_weight, d_bias, d_rho = (_added(affine, 1) if num_images > 1 else affine).view(3, entities, channels)
    d_filters, d_filters_dot = (part.view(-1, padded_entities, padded)[:, :entities, :channels] for part in found[:2])
    return (
        dgrad,
        dx,
        d_filters,
        found[2][:, :entities],
        found[4].view(padded, padded)[:channels, :channels],
        torch.zeros_like(value_bias),
        d_weight,
        d_bias,
        d_rho.sum(),
        d_filters_dot,
        found[3][:, :entities],
    )


def _centre(x: Tensor) -> Tensor:
    """The mean of a sample of the pixels of every image, [N, C]."""
    flat = x.flatten(2)
    return flat[:, :, :: max(flat.shape[2] // 64, 1)].mean(2, dtype=torch.float32)


def _added(rows: Tensor, images: int) -> Tensor:
    """The sum of the rows of every image."""
    count, length = rows.shape[0] // images, rows[0].numel()
    sums = torch.empty(images, length, device=rows.device, dtype=torch.float32)
    block = 32 if count > 64 else 128
    blocks = min(triton.next_power_of_2(count), 8192 // block)
    kernels.add[(images, triton.cdiv(length, block))](rows, sums, count, LENGTH=length, JP=blocks, BLOCK=block)
    return sums


def _value_gradient(cut: Pass, dv: Tensor, x: Tensor, x_centre: Tensor) -> Tensor:
    """dv (x - x_centre)^T over all pixels of the batch, where one program cannot hold it."""
    num_images, pixels, padded = x.shape[0], x.shape[2] * x.shape[3], cut.options["CP"]
    assert isinstance(padded, int)
    side, tiles_of_image = cut.plan.chunk, triton.cdiv(pixels, cut.plan.tile)
    tiles = tiles_of_image * num_images
    blocks = min(max(cut.plan.programs // (padded // side) ** 2, 1), tiles)
    shares = torch.empty(blocks, padded, padded, device=x.device, dtype=torch.float32)
    names = ("C", "CP", "TILE", "EXACT", "CHANNELS_LAST", "PRECISION", "num_warps", "num_stages")
    kernels.outer[(blocks, padded // side, padded // side)](
        dv, x, x_centre, shares, pixels, tiles_of_image, tiles, blocks, SIDE=side,
        **{name: cut.options[name] for name in names},
    )  # fmt: skip
    return _added(shares, 1)[0]


def _narrow(x: Tensor) -> torch.dtype:
    """Of what is multiplied inside: float16 has not the range for squares and gradients."""
    return torch.float32 if x.dtype == torch.float32 else torch.bfloat16


def _rounded(weight: Tensor, x: Tensor) -> Tensor:
    """As the matrix units take it: once here rather than for every tile."""
    if precision(x.dtype) == "tf32":
        return ((weight.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return weight.to(x.dtype)


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
