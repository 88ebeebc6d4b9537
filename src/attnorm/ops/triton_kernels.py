"""Attentive Normalization (Eq. 2-6) on a GPU: x is read twice and written once forward, x and grad twice each backward.

    statistics   x        -> area, sums of S v and S v^2 of each block        summarize  -> mean, rstd, coefficients
    apply        x        -> out = x + v * (scale S) + offset S
    sums         x, grad  -> sums of S grad, S grad v of each block           differentiate -> coefficients
    gradients    x, grad  -> dx, and each block's share of the parameters' gradients

and for the backward of the backward, where x and the parameters move along tangents (u that of x; `_dot` marks others):

    tangents     x, u, grad  -> sums of S grad, S grad v and of the tangents of four more    curve -> coefficients
    curvatures   x, u, grad  -> dgrad, dx, and each block's share of the parameters' gradients

The bias of the value projection shifts the mean of every region and drops out of Eq. 5: it has no part in this.
The layout S and the value v are computed anew in each of the four passes: that is cheaper than to store them, since one
pass over x in memory takes as long as some hundred operations a value. docs/performance.md draws it.

Imported on demand: nothing else in the package needs triton.
"""

# N batch, C channels, K entities (the paper's n), P = H*W pixels; J blocks of pixels an image, each walked in tiles of
# TILE pixels by one program. Tiles are [channels, pixels] or [entities, pixels]. Sums over pixels are kept per block
# and added in a fixed order, so results are the same bit for bit from run to run.

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALLEST_AREA = tl.constexpr(1e-12)
LOG2_E = tl.constexpr(1.4426950408889634)
FEWEST = 16  # rows and columns of the smallest matrix product that the matrix units take
MAX_CHANNELS = 256  # of a tile that fits one multiprocessor
MAX_ENTITIES = 32
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a b in float32; None for no sums."""
    if INTERPRETED:  # whose products take bfloat16 for integers, and TF32 for float32
        a, b = a.to(tl.float32), b.to(tl.float32)
        if PRECISION == "tf32":
            a = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            b = (b.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def _operand(a, INNER: tl.constexpr, PRECISION: tl.constexpr):
    """A factor of `_dot`. The units cut float32 to TF32, which makes every factor smaller: what ought to cancel does
    not, and the gradient of the value projection loses a digit. So what is computed here is rounded to TF32 first."""
    if PRECISION == "tf32":
        a = ((a.to(tl.float32).to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return a.to(INNER)


@triton.jit
def _over_pixels(a, b, sums, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """sums + a b^T for a, [M, TILE], and b, [N, TILE]: as SPLIT sums, [SPLIT, M, N], over the pixels of one warp each.

    Where the channels are too few to be divided among the warps, each would otherwise repeat the others' work: at 32
    channels and 4 warps three times the instructions.
    """
    if SPLIT == 1:
        return tl.reshape(_dot(a, tl.trans(b), tl.reshape(sums, [a.shape[0], b.shape[0]]), PRECISION), sums.shape)
    a = tl.permute(tl.reshape(a, [a.shape[0], SPLIT, a.shape[1] // SPLIT]), (1, 0, 2))
    b = tl.permute(tl.reshape(b, [b.shape[0], SPLIT, b.shape[1] // SPLIT]), (1, 2, 0))
    return _dot(a, b, sums, PRECISION)


@triton.jit
def _matrix(pointer, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr):
    """A matrix of ROWS x COLUMNS, row by row in memory, with zeros beyond."""
    at = pointer + row[:, None] * COLUMNS + column[None, :]
    if EXACT:
        return tl.load(at)
    return tl.load(at, mask=(row < ROWS)[:, None] & (column < COLUMNS)[None, :], other=0.0)


@triton.jit
def _vector(pointer, index, LENGTH: tl.constexpr):
    return tl.load(pointer + index, mask=index < LENGTH, other=0.0)


@triton.jit
def _tile(pointer, c, p, P, C: tl.constexpr, EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Channels c of pixels p of one image."""
    at = pointer + (p[None, :] * C + c[:, None] if CHANNELS_LAST else c[:, None] * P + p[None, :])
    if EXACT:
        return tl.load(at)
    return tl.load(at, mask=(c < C)[:, None] & (p < P)[None, :], other=0.0)


@triton.jit
def _store_tile(pointer, tile, c, p, P, C: tl.constexpr, EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    at = pointer + (p[None, :] * C + c[:, None] if CHANNELS_LAST else c[:, None] * P + p[None, :])
    tile = tile.to(pointer.dtype.element_ty)
    if EXACT:
        tl.store(at, tile)
    else:
        tl.store(at, tile, mask=(c < C)[:, None] & (p < P)[None, :])


@triton.jit
def _weights(
    filters, value_weight, k, co, c,
    C: tl.constexpr, K: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The filters [K, C] of input channels c, what rounding them to the precision of x has lost, and the value
    projection [C, C]: logits keep their digits even where x has 8 bits (row 11)."""
    w = _matrix(value_weight, co, c, C, C, EXACT)
    f = _matrix(filters, k, c, K, C, EXACT)
    rounded = _operand(f, w.dtype, PRECISION)
    return rounded, (f - rounded.to(tl.float32)).to(w.dtype), w


@triton.jit
def _raw_and_value(
    x, filters, value_weight, f, rest, w, k, co, p, P,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, VALUE: tl.constexpr = True,
):  # fmt: skip
    """filters x [K, TILE] and, if VALUE, value_weight x [C, TILE] (else zeros); in chunks of input channels where the
    weights f and w of all of them do not fit beside the tile."""
    if CHUNK == CP:
        part = _tile(x, co, p, P, C, EXACT, CHANNELS_LAST)
        raw = _dot(f, part, None, PRECISION)
        if part.dtype != tl.float32:
            raw = _dot(rest, part, raw, PRECISION)
        v = tl.zeros([CP, TILE], tl.float32)
        if VALUE:
            v = _dot(w, part, v, PRECISION)
    else:
        raw = tl.zeros([KP, TILE], tl.float32)
        v = tl.zeros([CP, TILE], tl.float32)
        for start in tl.range(0, CP, CHUNK, num_stages=1):
            c = start + tl.arange(0, CHUNK)
            part = _tile(x, c, p, P, C, EXACT, CHANNELS_LAST)
            f, rest, w = _weights(filters, value_weight, k, co, c, C, K, EXACT, PRECISION)
            raw = _dot(f, part, raw, PRECISION)
            if part.dtype != tl.float32:
                raw = _dot(rest, part, raw, PRECISION)
            if VALUE:
                v = _dot(w, part, v, PRECISION)
    return raw, v


@triton.jit
def _softmax(raw, filter_offset, temperature, k, p, P, K: tl.constexpr, EXACT: tl.constexpr):
    """Eq. 4 down the entities of a tile; pixels beyond the image belong to nothing."""
    scale = temperature * LOG2_E
    logit = raw * scale + (filter_offset * scale)[:, None]
    if not EXACT:
        logit = tl.where((k < K)[:, None], logit, float("-inf"))
    power = tl.exp2(logit - tl.max(logit, 0)[None, :])
    s = power * (1.0 / tl.sum(power, 0))[None, :]
    if not EXACT:
        s = tl.where((p < P)[None, :], s, 0.0)
    return s


@triton.jit
def _statistics(
    x, filters, filter_offset, value_weight, area_out, total_out, square_out, shift_out, mean_out,
    temperature, P, J, tiles, filters_stride,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Of one block: sum S, sum S (v - shift), sum S (v - shift)^2; the shift; the mean of v over the block's pixels."""
    program = tl.program_id(0)
    n = program // J
    first = (program % J) * tiles * TILE
    tiles = tl.minimum(tiles, tl.cdiv(P - first, TILE))
    x += n.to(tl.int64) * C * P
    filters += n * filters_stride * C
    k = tl.arange(0, KP)
    co = tl.arange(0, CP)
    o = _vector(filter_offset + n * filters_stride, k, K)
    f, rest, w = _weights(filters, value_weight, k, co, tl.arange(0, CHUNK), C, K, EXACT, PRECISION)

    # One-pass variance loses all digits where |mean| >> sigma (row 11), so v is shifted by the mean of the block's
    # first pixels. The blocks' moments are merged exactly, whatever the shifts.
    sample = first + tl.arange(0, 16)
    _, sampled = _raw_and_value(
        x, filters, value_weight, f, rest, w, k, co, tl.minimum(sample, P - 1), P,
        C, K, CP, KP, 16, CHUNK, EXACT, CHANNELS_LAST, PRECISION,
    )  # fmt: skip
    shift = tl.sum(sampled, 1) / 16

    area = tl.zeros([KP, TILE], tl.float32)
    total = tl.zeros([SPLIT, CP, KP], tl.float32)
    square = tl.zeros([SPLIT, CP, KP], tl.float32)
    for tile in range(tiles):
        p = first + tile * TILE + tl.arange(0, TILE)
        raw, v = _raw_and_value(
            x, filters, value_weight, f, rest, w, k, co, p, P,
            C, K, CP, KP, TILE, CHUNK, EXACT, CHANNELS_LAST, PRECISION,
        )  # fmt: skip
        s = _softmax(raw, o, temperature, k, p, P, K, EXACT)
        area += s
        v -= shift[:, None]
        s = _operand(s, INNER, PRECISION)
        total = _over_pixels(_operand(v, INNER, PRECISION), s, total, SPLIT, PRECISION)
        square = _over_pixels(_operand(v * v, INNER, PRECISION), s, square, SPLIT, PRECISION)

    total = tl.sum(total, 0)
    square = tl.sum(square, 0)
    count = tl.minimum(tiles * TILE, P - first)
    tl.store(area_out + program * KP + k, tl.sum(area, 1))
    tl.store(total_out + program * CP * KP + co[:, None] * KP + k[None, :], total)
    tl.store(square_out + program * CP * KP + co[:, None] * KP + k[None, :], square)
    tl.store(shift_out + program * CP + co, shift)
    tl.store(mean_out + program * CP + co, tl.sum(total, 1) / count)  # less the shift, since sum_k S = 1


@triton.jit
def _summarize(
    area_in, total_in, square_in, shift_in, mean_in, weight, bias, rho,
    area_out, mean_out, rstd_out, centre_out, scale_out, offset_out,
    eps, P, J, block_pixels,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr,
    JP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Merge the blocks' moments for BC channels; fold Eq. 5 and 6 into a scale and an offset."""
    n = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    k = tl.arange(0, KP)
    first = tl.load(shift_in + n * J * CP + c)  # [C]

    area = tl.zeros([KP], tl.float32)
    mean = tl.zeros([BC, KP], tl.float32)
    centre = tl.zeros([BC], tl.float32)
    for start in range(0, J, JP):
        j = start + tl.arange(0, JP)
        there, block = j < J, n * J + j
        area_j = tl.load(area_in + block[:, None] * KP + k[None, :], mask=there[:, None], other=0.0)  # [J, K]
        shift = tl.load(shift_in + block[:, None] * CP + c[None, :], mask=there[:, None], other=0.0)  # [J, C]
        shift = tl.where(there[:, None], shift - first[None, :], 0.0)
        at = block[:, None, None] * (CP * KP) + c[None, :, None] * KP + k[None, None, :]
        total = tl.load(total_in + at, mask=there[:, None, None], other=0.0)  # [J, C, K]
        area += tl.sum(area_j, 0)
        mean += tl.sum(total + area_j[:, None, :] * shift[:, :, None], 0)
        # The mean of v over the image: what the next pass subtracts before it rounds anything.
        count = tl.minimum(block_pixels, P - j * block_pixels).to(tl.float32)
        block_mean = tl.load(mean_in + block[:, None] * CP + c[None, :], mask=there[:, None], other=0.0) + shift
        centre += tl.sum(tl.where(there[:, None], block_mean * count[:, None], 0.0), 0) / P
    area = tl.maximum(area, SMALLEST_AREA)
    mean /= area[None, :]  # [C, K], less `first`

    var = tl.zeros([BC, KP], tl.float32)
    for start in range(0, J, JP):
        j = start + tl.arange(0, JP)
        there, block = j < J, n * J + j
        area_j = tl.load(area_in + block[:, None] * KP + k[None, :], mask=there[:, None], other=0.0)
        shift = tl.load(shift_in + block[:, None] * CP + c[None, :], mask=there[:, None], other=0.0) - first[None, :]
        at = block[:, None, None] * (CP * KP) + c[None, :, None] * KP + k[None, None, :]
        total = tl.load(total_in + at, mask=there[:, None, None], other=0.0)
        square = tl.load(square_in + at, mask=there[:, None, None], other=0.0)
        away = shift[:, :, None] - mean[None, :, :]
        var += tl.sum(tl.where(there[:, None, None], square + away * (2 * total + away * area_j[:, None, :]), 0.0), 0)
    rstd = tl.rsqrt(tl.maximum(var / area[None, :], 0.0) + eps)

    ok = (k < K)[None, :] & (c < C)[:, None]
    at_kc = k[None, :] * C + c[:, None]
    r = tl.load(rho)
    a = r * tl.load(weight + at_kc, mask=ok, other=0.0) * rstd
    b = r * tl.load(bias + at_kc, mask=ok, other=0.0) - a * (mean - centre[:, None])
    tl.store(mean_out + n * K * C + at_kc, mean + first[:, None], mask=ok)
    tl.store(rstd_out + n * K * C + at_kc, rstd, mask=ok)
    out = n * CP * KP + c[:, None] * KP + k[None, :]
    tl.store(scale_out + out, a.to(scale_out.dtype.element_ty))
    tl.store(offset_out + out, b.to(offset_out.dtype.element_ty))
    tl.store(centre_out + n * CP + c, centre + first)
    if tl.program_id(1) == 0:
        tl.store(area_out + n * K + k, area, mask=k < K)


@triton.jit
def _apply(
    x, filters, filter_offset, value_weight, centre, scale, offset, out,
    temperature, P, J, tiles, filters_stride,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out = x + (v - centre) * (scale S) + offset S."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards: what `_statistics` read last is still in the cache
    n = program // J
    first = (program % J) * tiles * TILE
    tiles = tl.minimum(tiles, tl.cdiv(P - first, TILE))
    x += n.to(tl.int64) * C * P
    out += n.to(tl.int64) * C * P
    filters += n * filters_stride * C
    k = tl.arange(0, KP)
    co = tl.arange(0, CP)
    o = _vector(filter_offset + n * filters_stride, k, K)
    f, rest, w = _weights(filters, value_weight, k, co, tl.arange(0, CHUNK), C, K, EXACT, PRECISION)
    middle = tl.load(centre + n * CP + co)
    at = n * CP * KP + co[:, None] * KP + k[None, :]
    a = _operand(tl.load(scale + at), INNER, PRECISION)
    b = _operand(tl.load(offset + at), INNER, PRECISION)
    for tile in range(tiles):
        p = first + tile * TILE + tl.arange(0, TILE)
        raw, v = _raw_and_value(
            x, filters, value_weight, f, rest, w, k, co, p, P,
            C, K, CP, KP, TILE, CHUNK, EXACT, CHANNELS_LAST, PRECISION,
        )  # fmt: skip
        s = _operand(_softmax(raw, o, temperature, k, p, P, K, EXACT), INNER, PRECISION)
        v -= middle[:, None]
        y = v * _dot(a, s, None, PRECISION)
        y = _dot(b, s, y, PRECISION)
        y += _tile(x, co, p, P, C, EXACT, CHANNELS_LAST).to(tl.float32)
        _store_tile(out, y, co, p, P, C, EXACT, CHANNELS_LAST)


@triton.jit
def _sums(
    x, grad, filters, filter_offset, value_weight, area, mean, plain_out, weighted_out, centre_out,
    temperature, P, J, tiles, filters_stride,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Of one block: sum S grad and sum S grad (v - centre)."""
    program = tl.program_id(0)
    n = program // J
    first = (program % J) * tiles * TILE
    tiles = tl.minimum(tiles, tl.cdiv(P - first, TILE))
    x += n.to(tl.int64) * C * P
    grad += n.to(tl.int64) * C * P
    filters += n * filters_stride * C
    k = tl.arange(0, KP)
    co = tl.arange(0, CP)
    o = _vector(filter_offset + n * filters_stride, k, K)
    f, rest, w = _weights(filters, value_weight, k, co, tl.arange(0, CHUNK), C, K, EXACT, PRECISION)
    areas = _vector(area + n * K, k, K)
    centre = tl.sum(areas[:, None] * _matrix(mean + n * K * C, k, co, K, C, EXACT), 0) / tl.sum(areas)
    tl.store(centre_out + n * CP + co, centre)  # the same from every block of the image
    plain = tl.zeros([SPLIT, CP, KP], tl.float32)
    weighted = tl.zeros([SPLIT, CP, KP], tl.float32)
    for tile in range(tiles):
        p = first + tile * TILE + tl.arange(0, TILE)
        raw, v = _raw_and_value(
            x, filters, value_weight, f, rest, w, k, co, p, P,
            C, K, CP, KP, TILE, CHUNK, EXACT, CHANNELS_LAST, PRECISION,
        )  # fmt: skip
        g = _tile(grad, co, p, P, C, EXACT, CHANNELS_LAST)
        s = _operand(_softmax(raw, o, temperature, k, p, P, K, EXACT), INNER, PRECISION)
        v = (v - centre[:, None]) * g.to(tl.float32)
        plain = _over_pixels(_operand(g, INNER, PRECISION), s, plain, SPLIT, PRECISION)
        weighted = _over_pixels(_operand(v, INNER, PRECISION), s, weighted, SPLIT, PRECISION)
    at = program * CP * KP + co[:, None] * KP + k[None, :]
    tl.store(plain_out + at, tl.sum(plain, 0))
    tl.store(weighted_out + at, tl.sum(weighted, 0))


@triton.jit
def _differentiate(
    plain_in, weighted_in, area, mean, rstd, centre, weight, bias, rho,
    affine_out, scale_out, offset_out, slope_out, level_out, constant_out,
    eps, J,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr,
    JP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """From the blocks' sums: this image's share of the gradients of beta, alpha and rho, and the coefficients of
    dv = grad * (scale S) + (v - centre) * (slope S) + level S and of dS (see `_gradients`)."""
    n = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    k = tl.arange(0, KP)
    plain = tl.zeros([BC, KP], tl.float32)
    weighted = tl.zeros([BC, KP], tl.float32)
    for start in range(0, J, JP):
        j = start + tl.arange(0, JP)
        at = (n * J + j)[:, None, None] * (CP * KP) + c[None, :, None] * KP + k[None, None, :]
        there = (j < J)[:, None, None]
        plain += tl.sum(tl.load(plain_in + at, mask=there, other=0.0), 0)
        weighted += tl.sum(tl.load(weighted_in + at, mask=there, other=0.0), 0)

    ok = (k < K)[None, :] & (c < C)[:, None]
    at_kc = k[None, :] * C + c[:, None]
    r = tl.load(rho)
    beta = tl.load(weight + at_kc, mask=ok, other=0.0)
    alpha = tl.load(bias + at_kc, mask=ok, other=0.0)
    inverse = tl.load(rstd + n * K * C + at_kc, mask=ok, other=1.0)
    m = tl.load(mean + n * K * C + at_kc, mask=ok, other=0.0) - tl.load(centre + n * CP + c)[:, None]
    share = 1.0 / tl.load(area + n * K + k, mask=k < K, other=1.0)[None, :]
    centred = weighted - m * plain  # sum S grad (v - mean)
    a = beta * inverse
    d_rstd = r * beta * centred
    d_var = -0.5 * inverse * inverse * inverse * d_rstd * share
    d_mean = -r * a * plain * share
    level = d_mean - 2 * d_var * m

    affine_out += n * 3 * K * C + at_kc
    tl.store(affine_out, r * inverse * centred, mask=ok)  # of beta
    tl.store(affine_out + K * C, r * plain, mask=ok)  # of alpha
    tl.store(affine_out + 2 * K * C, a * centred + alpha * plain, mask=ok)  # of rho
    out = n * CP * KP + c[:, None] * KP + k[None, :]
    tl.store(scale_out + out, (r * a).to(scale_out.dtype.element_ty))
    tl.store(offset_out + out, (r * (alpha - a * m)).to(offset_out.dtype.element_ty))
    tl.store(slope_out + out, (2 * d_var).to(slope_out.dtype.element_ty))
    tl.store(level_out + out, level.to(level_out.dtype.element_ty))
    var = 1.0 / (inverse * inverse) - eps
    tl.store(constant_out + out, tl.where(ok, d_var * (m * m - var) - d_mean * m, 0.0))


@triton.jit
def _gradients(
    x, grad, filters, filter_offset, value_weight, x_centre, centre, scale, offset, slope, level, constant,
    dx, dv_out, shares_out,
    temperature, P, J, tiles, filters_stride,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
    KEEP_DV: tl.constexpr,
):  # fmt: skip
    """dx of one block, and its share of the gradients of filters, their offset and the value projection."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards, as in `_apply`
    n = program // J
    first = (program % J) * tiles * TILE
    tiles = tl.minimum(tiles, tl.cdiv(P - first, TILE))
    image = n.to(tl.int64) * C * P
    x += image
    grad += image
    dx += image
    dv_out += image
    filters += n * filters_stride * C
    k = tl.arange(0, KP)
    co = tl.arange(0, CP)
    o = _vector(filter_offset + n * filters_stride, k, K)
    f, rest, w = _weights(filters, value_weight, k, co, tl.arange(0, CHUNK), C, K, EXACT, PRECISION)
    x_middle = _vector(x_centre + n * C, co, C)
    middle = tl.load(centre + n * CP + co)
    at = n * CP * KP + co[:, None] * KP + k[None, :]
    a = _operand(tl.load(scale + at), INNER, PRECISION)
    b = _operand(tl.load(offset + at), INNER, PRECISION)
    e = _operand(tl.load(slope + at), INNER, PRECISION)
    l = _operand(tl.load(level + at), INNER, PRECISION)  # noqa: E741
    fixed = tl.sum(tl.load(constant + at), 0)

    d_filters = tl.zeros([SPLIT, KP, CP], tl.float32)
    d_offset = tl.zeros([KP, TILE], tl.float32)
    if not KEEP_DV:
        d_value = tl.zeros([SPLIT, CP, CP], tl.float32)
    for tile in range(tiles):
        p = first + tile * TILE + tl.arange(0, TILE)
        raw, v = _raw_and_value(
            x, filters, value_weight, f, rest, w, k, co, p, P,
            C, K, CP, KP, TILE, CHUNK, EXACT, CHANNELS_LAST, PRECISION,
        )  # fmt: skip
        s = _softmax(raw, o, temperature, k, p, P, K, EXACT)
        inner = _operand(s, INNER, PRECISION)
        v -= middle[:, None]
        g_in = _tile(grad, co, p, P, C, EXACT, CHANNELS_LAST)
        g = g_in.to(tl.float32)

        ds = _dot(tl.trans(a), _operand(g * v, INNER, PRECISION), None, PRECISION)
        ds = _dot(tl.trans(b), _operand(g_in, INNER, PRECISION), ds, PRECISION)
        ds = _dot(tl.trans(l), _operand(v, INNER, PRECISION), ds, PRECISION)
        ds = 2 * ds
        ds = _dot(tl.trans(e), _operand(v * v, INNER, PRECISION), ds, PRECISION)
        ds = 0.5 * ds + fixed[:, None]
        draw = temperature * s * (ds - tl.sum(s * ds, 0)[None, :])
        d_offset += draw

        dv = g * _dot(a, inner, None, PRECISION)
        dv += v * _dot(e, inner, None, PRECISION)
        dv = _dot(l, inner, dv, PRECISION)
        if not EXACT:
            dv = tl.where((p < P)[None, :], dv, 0.0)

        dvi = _operand(dv, INNER, PRECISION)
        drawi = _operand(draw, INNER, PRECISION)
        if KEEP_DV:
            _store_tile(dv_out, dv, co, p, P, C, EXACT, CHANNELS_LAST)
        if CHUNK == CP:
            y = _dot(tl.trans(w.to(INNER)), dvi, g, PRECISION)
            y = _dot(tl.trans(f.to(INNER)), drawi, y, PRECISION)
            _store_tile(dx, y, co, p, P, C, EXACT, CHANNELS_LAST)
        else:
            for start in tl.range(0, CP, CHUNK, num_stages=1):
                c = start + tl.arange(0, CHUNK)
                f, rest, w = _weights(filters, value_weight, k, co, c, C, K, EXACT, PRECISION)
                y = _tile(grad, c, p, P, C, EXACT, CHANNELS_LAST).to(tl.float32)
                y = _dot(tl.trans(w.to(INNER)), dvi, y, PRECISION)
                y = _dot(tl.trans(f.to(INNER)), drawi, y, PRECISION)
                _store_tile(dx, y, c, p, P, C, EXACT, CHANNELS_LAST)
        # Over an image dv sums to 0: x is centred, or its mean would multiply what rounding leaves of that.
        again = _tile(x, co, p, P, C, EXACT, CHANNELS_LAST).to(tl.float32) - x_middle[:, None]
        again = _operand(again, INNER, PRECISION)
        d_filters = _over_pixels(drawi, again, d_filters, SPLIT, PRECISION)
        if not KEEP_DV:
            d_value = _over_pixels(dvi, again, d_value, SPLIT, PRECISION)

    shares_out += program * (KP * CP + KP + (0 if KEEP_DV else CP * CP))  # one row a block; see `backward`
    rows = tl.sum(d_offset, 1)
    tl.store(shares_out + k[:, None] * CP + co[None, :], tl.sum(d_filters, 0) + rows[:, None] * x_middle[None, :])
    shares_out += KP * CP
    tl.store(shares_out + k, rows)
    if not KEEP_DV:
        shares_out += KP
        tl.store(shares_out + co[:, None] * CP + co[None, :], tl.sum(d_value, 0))


@triton.jit
def _value_layout_and_tangents(
    x, u, filters, value_weight, filters_dot, value_weight_dot, o, o_dot, middle, middle_dot,
    f, rest, w, f_dot, rest_dot, w_dot, temperature, k, co, p, P,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, VALUE_DOT: tl.constexpr,
):  # fmt: skip
    """v - middle, the layout S, and the tangents of both."""
    raw, v = _raw_and_value(
        x, filters, value_weight, f, rest, w, k, co, p, P,
        C, K, CP, KP, TILE, CHUNK, EXACT, CHANNELS_LAST, PRECISION,
    )  # fmt: skip
    raw_dot, v_dot = _raw_and_value(
        u, filters, value_weight, f, rest, w, k, co, p, P,
        C, K, CP, KP, TILE, CHUNK, EXACT, CHANNELS_LAST, PRECISION,
    )  # fmt: skip
    more, v_more = _raw_and_value(
        x, filters_dot, value_weight_dot, f_dot, rest_dot, w_dot, k, co, p, P,
        C, K, CP, KP, TILE, CHUNK, EXACT, CHANNELS_LAST, PRECISION, VALUE_DOT,
    )  # fmt: skip
    s = _softmax(raw, o, temperature, k, p, P, K, EXACT)
    raw_dot += more + o_dot[:, None]
    s_dot = temperature * s * (raw_dot - tl.sum(s * raw_dot, 0)[None, :])
    if VALUE_DOT:
        v_dot += v_more - middle_dot[:, None]
    return v - middle[:, None], v_dot, s, s_dot


@triton.jit
def _tangents(
    x, u, grad, filters, filter_offset, value_weight, filters_dot, filter_offset_dot, value_weight_dot, middle_dot,
    area, mean, sums_out, area_dot_out, centre_out,
    temperature, P, J, tiles, filters_stride, table,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
    VALUE_DOT: tl.constexpr,
):  # fmt: skip
    """Of one block, in six tables: sums of S grad and S grad v, and of the tangents of S with grad held, S grad v, S v
    and S v^2 / 2, with v less its centre; and the sum of the tangent of S."""
    program = tl.program_id(0)
    n = program // J
    first = (program % J) * tiles * TILE
    tiles = tl.minimum(tiles, tl.cdiv(P - first, TILE))
    image = n.to(tl.int64) * C * P
    x += image
    u += image
    grad += image
    filters += n * filters_stride * C
    filters_dot += n * filters_stride * C
    k = tl.arange(0, KP)
    co = tl.arange(0, CP)
    o = _vector(filter_offset + n * filters_stride, k, K)
    o_dot = _vector(filter_offset_dot + n * filters_stride, k, K)
    f, rest, w = _weights(filters, value_weight, k, co, tl.arange(0, CHUNK), C, K, EXACT, PRECISION)
    f_dot, rest_dot, w_dot = _weights(
        filters_dot, value_weight_dot, k, co, tl.arange(0, CHUNK), C, K, EXACT, PRECISION
    )  # fmt: skip
    areas = _vector(area + n * K, k, K)
    centre = tl.sum(areas[:, None] * _matrix(mean + n * K * C, k, co, K, C, EXACT), 0) / tl.sum(areas)
    tl.store(centre_out + n * CP + co, centre)  # the same from every block of the image
    centre_dot = _vector(middle_dot + n * C, co, C)
    g_sum = tl.zeros([SPLIT, CP, KP], tl.float32)
    gv_sum = tl.zeros([SPLIT, CP, KP], tl.float32)
    g_dot = tl.zeros([SPLIT, CP, KP], tl.float32)
    gv_dot = tl.zeros([SPLIT, CP, KP], tl.float32)
    total_dot = tl.zeros([SPLIT, CP, KP], tl.float32)
    square_dot = tl.zeros([SPLIT, CP, KP], tl.float32)
    area_dot = tl.zeros([KP, TILE], tl.float32)
    for tile in range(tiles):
        p = first + tile * TILE + tl.arange(0, TILE)
        v, v_dot, s, s_dot = _value_layout_and_tangents(
            x, u, filters, value_weight, filters_dot, value_weight_dot, o, o_dot, centre, centre_dot,
            f, rest, w, f_dot, rest_dot, w_dot, temperature, k, co, p, P,
            C, K, CP, KP, TILE, CHUNK, EXACT, CHANNELS_LAST, PRECISION, VALUE_DOT,
        )  # fmt: skip
        g = _tile(grad, co, p, P, C, EXACT, CHANNELS_LAST).to(tl.float32)
        area_dot += s_dot
        s = _operand(s, INNER, PRECISION)
        s_dot = _operand(s_dot, INNER, PRECISION)
        gv = _operand(g * v, INNER, PRECISION)
        g_in = _operand(g, INNER, PRECISION)
        g_sum = _over_pixels(g_in, s, g_sum, SPLIT, PRECISION)
        gv_sum = _over_pixels(gv, s, gv_sum, SPLIT, PRECISION)
        g_dot = _over_pixels(g_in, s_dot, g_dot, SPLIT, PRECISION)
        gv_dot = _over_pixels(gv, s_dot, gv_dot, SPLIT, PRECISION)
        gv_dot = _over_pixels(_operand(g * v_dot, INNER, PRECISION), s, gv_dot, SPLIT, PRECISION)
        total_dot = _over_pixels(_operand(v, INNER, PRECISION), s_dot, total_dot, SPLIT, PRECISION)
        total_dot = _over_pixels(_operand(v_dot, INNER, PRECISION), s, total_dot, SPLIT, PRECISION)
        square_dot = _over_pixels(_operand(0.5 * v * v, INNER, PRECISION), s_dot, square_dot, SPLIT, PRECISION)
        square_dot = _over_pixels(_operand(v * v_dot, INNER, PRECISION), s, square_dot, SPLIT, PRECISION)
    at = sums_out + program * CP * KP + co[:, None] * KP + k[None, :]
    tl.store(at, tl.sum(g_sum, 0))
    tl.store(at + table, tl.sum(gv_sum, 0))
    tl.store(at + 2 * table, tl.sum(g_dot, 0))
    tl.store(at + 3 * table, tl.sum(gv_dot, 0))
    tl.store(at + 4 * table, tl.sum(total_dot, 0))
    tl.store(at + 5 * table, tl.sum(square_dot, 0))
    tl.store(area_dot_out + program * KP + k, tl.sum(area_dot, 1))


@triton.jit
def _merged(
    sums, n, J, c, k,
    CP: tl.constexpr, KP: tl.constexpr, JP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The sum of a table [BC, KP] over the blocks of image n."""
    merged = tl.zeros([BC, KP], tl.float32)
    for start in range(0, J, JP):
        j = start + tl.arange(0, JP)
        at = (n * J + j)[:, None, None] * (CP * KP) + c[None, :, None] * KP + k[None, None, :]
        merged += tl.sum(tl.load(sums + at, mask=(j < J)[:, None, None], other=0.0), 0)
    return merged


@triton.jit
def _curve(
    sums, area_dot_in, area, mean, rstd, centre, weight, bias, rho, weight_dot, bias_dot, rho_dot,
    affine_out, tables_out, constants_out,
    eps, J, table, of_tables, of_constants,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr,
    JP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """As `_differentiate`, with the tangents of all that it finds: tables of scale, offset, slope and level, then of
    their tangents; two of constants."""
    n = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    k = tl.arange(0, KP)
    g = _merged(sums, n, J, c, k, CP, KP, JP, BC)
    gv = _merged(sums + table, n, J, c, k, CP, KP, JP, BC)
    g_dot = _merged(sums + 2 * table, n, J, c, k, CP, KP, JP, BC)
    gv_dot = _merged(sums + 3 * table, n, J, c, k, CP, KP, JP, BC)
    total_dot = _merged(sums + 4 * table, n, J, c, k, CP, KP, JP, BC)
    square_dot = _merged(sums + 5 * table, n, J, c, k, CP, KP, JP, BC)
    area_dot = tl.zeros([KP], tl.float32)
    for j in range(0, J):
        area_dot += tl.load(area_dot_in + (n * J + j) * KP + k)

    ok = (k < K)[None, :] & (c < C)[:, None]
    at_kc = k[None, :] * C + c[:, None]
    r = tl.load(rho)
    r_dot = tl.load(rho_dot)
    beta = tl.load(weight + at_kc, mask=ok, other=0.0)
    alpha = tl.load(bias + at_kc, mask=ok, other=0.0)
    beta_dot = tl.load(weight_dot + at_kc, mask=ok, other=0.0)
    alpha_dot = tl.load(bias_dot + at_kc, mask=ok, other=0.0)
    inverse = tl.load(rstd + n * K * C + at_kc, mask=ok, other=1.0)
    m = tl.load(mean + n * K * C + at_kc, mask=ok, other=0.0) - tl.load(centre + n * CP + c)[:, None]
    areas = tl.load(area + n * K + k, mask=k < K, other=1.0)
    share = (1.0 / areas)[None, :]
    growth = (area_dot / areas)[None, :]
    var = tl.maximum(1.0 / (inverse * inverse) - eps, 0.0)
    cube = inverse * inverse * inverse

    m_dot = total_dot * share - m * growth
    var_dot = 2 * (square_dot - m * total_dot) * share + (m * m - var) * growth
    inverse_dot = -0.5 * cube * var_dot
    a = beta * inverse
    a_dot = beta_dot * inverse + beta * inverse_dot
    b = alpha - a * m
    b_dot = alpha_dot - a_dot * m - a * m_dot
    centred = gv - m * g
    centred_dot = gv_dot - m_dot * g - m * g_dot
    d_rstd = r * beta * centred
    d_rstd_dot = r_dot * beta * centred + r * (beta_dot * centred + beta * centred_dot)
    d_var = -0.5 * cube * d_rstd * share
    d_var_dot = (-1.5 * inverse * inverse * inverse_dot * d_rstd - 0.5 * cube * d_rstd_dot) * share - d_var * growth
    d_mean = -r * a * g * share
    d_mean_dot = -(r_dot * a * g + r * (a_dot * g + a * g_dot)) * share - d_mean * growth

    affine_out += n * 3 * K * C + at_kc
    tl.store(affine_out, r_dot * inverse * centred + r * (inverse_dot * centred + inverse * centred_dot), mask=ok)
    tl.store(affine_out + K * C, r_dot * g + r * g_dot, mask=ok)
    d_rho = a_dot * centred + a * centred_dot + alpha_dot * g + alpha * g_dot
    tl.store(affine_out + 2 * K * C, d_rho, mask=ok)
    out = tables_out + n * CP * KP + c[:, None] * KP + k[None, :]
    narrow = tables_out.dtype.element_ty
    tl.store(out, (r * a).to(narrow))
    tl.store(out + of_tables, (r * b).to(narrow))
    tl.store(out + 2 * of_tables, (2 * d_var).to(narrow))
    tl.store(out + 3 * of_tables, (d_mean - 2 * d_var * m).to(narrow))
    tl.store(out + 4 * of_tables, (r_dot * a + r * a_dot).to(narrow))
    tl.store(out + 5 * of_tables, (r_dot * b + r * b_dot).to(narrow))
    tl.store(out + 6 * of_tables, (2 * d_var_dot).to(narrow))
    tl.store(out + 7 * of_tables, (d_mean_dot - 2 * (d_var_dot * m + d_var * m_dot)).to(narrow))
    out = constants_out + n * CP * KP + c[:, None] * KP + k[None, :]
    tl.store(out, tl.where(ok, d_var * (m * m - var) - d_mean * m, 0.0))
    constant_dot = d_var_dot * (m * m - var) + d_var * (2 * m * m_dot - var_dot) - d_mean_dot * m - d_mean * m_dot
    tl.store(out + of_constants, tl.where(ok, constant_dot, 0.0))


@triton.jit
def _curvatures(
    x, u, grad, filters, filter_offset, value_weight, filters_dot, filter_offset_dot, value_weight_dot, middle_dot,
    x_centre, centre, tables, constants, dgrad, dx, dv_out, dv_dot_out, shares_out,
    temperature, P, J, tiles, filters_stride, of_tables, of_constants,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
    VALUE_DOT: tl.constexpr, KEEP_DV: tl.constexpr,
):  # fmt: skip
    """dgrad and dx of one block; its share of the gradients of filters and their offset, of the tangents of both and of
    the value projection."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards, as in `_apply`
    n = program // J
    first = (program % J) * tiles * TILE
    tiles = tl.minimum(tiles, tl.cdiv(P - first, TILE))
    image = n.to(tl.int64) * C * P
    x += image
    u += image
    grad += image
    dgrad += image
    dx += image
    dv_out += image
    dv_dot_out += image
    filters += n * filters_stride * C
    filters_dot += n * filters_stride * C
    k = tl.arange(0, KP)
    co = tl.arange(0, CP)
    o = _vector(filter_offset + n * filters_stride, k, K)
    o_dot = _vector(filter_offset_dot + n * filters_stride, k, K)
    f, rest, w = _weights(filters, value_weight, k, co, tl.arange(0, CHUNK), C, K, EXACT, PRECISION)
    f_dot, rest_dot, w_dot = _weights(
        filters_dot, value_weight_dot, k, co, tl.arange(0, CHUNK), C, K, EXACT, PRECISION
    )  # fmt: skip
    x_middle = _vector(x_centre + n * C, co, C)
    middle = tl.load(centre + n * CP + co)
    centre_dot = _vector(middle_dot + n * C, co, C)
    tables += n * CP * KP + co[:, None] * KP + k[None, :]
    at = constants + n * CP * KP + co[:, None] * KP + k[None, :]
    fixed = tl.sum(tl.load(at), 0)
    fixed_dot = tl.sum(tl.load(at + of_constants), 0)

    d_filters = tl.zeros([SPLIT, KP, CP], tl.float32)
    d_filters_dot = tl.zeros([SPLIT, KP, CP], tl.float32)
    d_offset = tl.zeros([KP, TILE], tl.float32)
    d_offset_dot = tl.zeros([KP, TILE], tl.float32)
    if not KEEP_DV:
        d_value = tl.zeros([SPLIT, CP, CP], tl.float32)
    for tile in range(tiles):
        p = first + tile * TILE + tl.arange(0, TILE)
        v, v_dot, s, s_dot = _value_layout_and_tangents(
            x, u, filters, value_weight, filters_dot, value_weight_dot, o, o_dot, middle, centre_dot,
            f, rest, w, f_dot, rest_dot, w_dot, temperature, k, co, p, P,
            C, K, CP, KP, TILE, CHUNK, EXACT, CHANNELS_LAST, PRECISION, VALUE_DOT,
        )  # fmt: skip
        si = _operand(s, INNER, PRECISION)
        si_dot = _operand(s_dot, INNER, PRECISION)
        g = _tile(grad, co, p, P, C, EXACT, CHANNELS_LAST).to(tl.float32)
        u_tile = _tile(u, co, p, P, C, EXACT, CHANNELS_LAST).to(tl.float32)

        # The products of each table in its turn: with S for dv and its tangent, with g and v for that of S.
        table = _operand(tl.load(tables), INNER, PRECISION)  # scale
        moved = _operand(tl.load(tables + 4 * of_tables), INNER, PRECISION)
        mixed = _dot(table, si, None, PRECISION)
        mixed_dot = _dot(moved, si, _dot(table, si_dot, None, PRECISION), PRECISION)
        dv = g * mixed
        dv_dot = g * mixed_dot
        y = u_tile + v * mixed_dot + v_dot * mixed
        gv = _operand(g * v, INNER, PRECISION)
        ds = _dot(tl.trans(table), gv, None, PRECISION)
        ds_dot = _dot(tl.trans(moved), gv, None, PRECISION)
        ds_dot = _dot(tl.trans(table), _operand(g * v_dot, INNER, PRECISION), ds_dot, PRECISION)

        table = _operand(tl.load(tables + of_tables), INNER, PRECISION)  # offset
        moved = _operand(tl.load(tables + 5 * of_tables), INNER, PRECISION)
        y = _dot(moved, si, _dot(table, si_dot, y, PRECISION), PRECISION)
        g_in = _operand(g, INNER, PRECISION)
        ds = _dot(tl.trans(table), g_in, ds, PRECISION)
        ds_dot = _dot(tl.trans(moved), g_in, ds_dot, PRECISION)
        _store_tile(dgrad, y, co, p, P, C, EXACT, CHANNELS_LAST)

        table = _operand(tl.load(tables + 2 * of_tables), INNER, PRECISION)  # slope
        moved = _operand(tl.load(tables + 6 * of_tables), INNER, PRECISION)
        mixed = _dot(table, si, None, PRECISION)
        dv += v * mixed
        dv_dot += v_dot * mixed
        dv_dot += v * _dot(moved, si, _dot(table, si_dot, None, PRECISION), PRECISION)
        half = _operand(0.5 * v * v, INNER, PRECISION)
        ds = _dot(tl.trans(table), half, ds, PRECISION)
        ds_dot = _dot(tl.trans(moved), half, ds_dot, PRECISION)
        ds_dot = _dot(tl.trans(table), _operand(v * v_dot, INNER, PRECISION), ds_dot, PRECISION)

        table = _operand(tl.load(tables + 3 * of_tables), INNER, PRECISION)  # level
        moved = _operand(tl.load(tables + 7 * of_tables), INNER, PRECISION)
        dv = _dot(table, si, dv, PRECISION)
        dv_dot = _dot(moved, si, _dot(table, si_dot, dv_dot, PRECISION), PRECISION)
        vi = _operand(v, INNER, PRECISION)
        ds = _dot(tl.trans(table), vi, ds, PRECISION) + fixed[:, None]
        ds_dot = _dot(tl.trans(moved), vi, ds_dot, PRECISION) + fixed_dot[:, None]
        ds_dot = _dot(tl.trans(table), _operand(v_dot, INNER, PRECISION), ds_dot, PRECISION)

        ds -= tl.sum(s * ds, 0)[None, :]  # what is left out, sum S' sum S dS, is 0: S' sums to 0
        ds_dot -= tl.sum(s_dot * ds + s * ds_dot, 0)[None, :]
        draw = temperature * s * ds
        draw_dot = temperature * (s_dot * ds + s * ds_dot)
        d_offset += draw_dot
        d_offset_dot += draw
        if not EXACT:
            dv = tl.where((p < P)[None, :], dv, 0.0)
            dv_dot = tl.where((p < P)[None, :], dv_dot, 0.0)

        dvi = _operand(dv, INNER, PRECISION)
        dvi_dot = _operand(dv_dot, INNER, PRECISION)
        drawi = _operand(draw, INNER, PRECISION)
        drawi_dot = _operand(draw_dot, INNER, PRECISION)
        if KEEP_DV:
            _store_tile(dv_out, dv, co, p, P, C, EXACT, CHANNELS_LAST)
            _store_tile(dv_dot_out, dv_dot, co, p, P, C, EXACT, CHANNELS_LAST)
        for start in tl.static_range(0, CP, CHUNK):
            c = start + tl.arange(0, CHUNK)
            if CHUNK != CP:
                f, rest, w = _weights(filters, value_weight, k, co, c, C, K, EXACT, PRECISION)
                f_dot, rest_dot, w_dot = _weights(
                    filters_dot, value_weight_dot, k, co, c, C, K, EXACT, PRECISION
                )  # fmt: skip
            y = _dot(tl.trans(w.to(INNER)), dvi_dot, None, PRECISION)
            y = _dot(tl.trans(f.to(INNER)), drawi_dot, y, PRECISION)
            y = _dot(tl.trans(f_dot.to(INNER)), drawi, y, PRECISION)
            if VALUE_DOT:
                y = _dot(tl.trans(w_dot.to(INNER)), dvi, y, PRECISION)
            _store_tile(dx, y, c, p, P, C, EXACT, CHANNELS_LAST)
        again = _tile(x, co, p, P, C, EXACT, CHANNELS_LAST).to(tl.float32) - x_middle[:, None]
        again = _operand(again, INNER, PRECISION)
        ui = _operand(u_tile, INNER, PRECISION)
        d_filters = _over_pixels(drawi_dot, again, d_filters, SPLIT, PRECISION)
        d_filters = _over_pixels(drawi, ui, d_filters, SPLIT, PRECISION)
        d_filters_dot = _over_pixels(drawi, again, d_filters_dot, SPLIT, PRECISION)
        if not KEEP_DV:
            d_value = _over_pixels(dvi_dot, again, d_value, SPLIT, PRECISION)
            d_value = _over_pixels(dvi, ui, d_value, SPLIT, PRECISION)

    shares_out += program * (2 * (KP * CP + KP) + (0 if KEEP_DV else CP * CP))  # see `double_backward`
    at = shares_out + k[:, None] * CP + co[None, :]
    rows = tl.sum(d_offset, 1)
    rows_dot = tl.sum(d_offset_dot, 1)
    tl.store(at, tl.sum(d_filters, 0) + rows[:, None] * x_middle[None, :])
    tl.store(at + KP * CP, tl.sum(d_filters_dot, 0) + rows_dot[:, None] * x_middle[None, :])
    shares_out += 2 * KP * CP
    tl.store(shares_out + k, rows)
    tl.store(shares_out + KP + k, rows_dot)
    if not KEEP_DV:
        shares_out += 2 * KP
        tl.store(shares_out + co[:, None] * CP + co[None, :], tl.sum(d_value, 0))


@triton.jit
def _add(shares, out, J, LENGTH: tl.constexpr, JP: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of J rows of LENGTH numbers for every image."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    shares += tl.program_id(0).to(tl.int64) * J * LENGTH
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, J, JP):
        j = start + tl.arange(0, JP)
        there = (j < J)[:, None] & (at < LENGTH)[None, :]
        sums += tl.sum(tl.load(shares + j[:, None] * LENGTH + at[None, :], mask=there, other=0.0), 0)
    tl.store(out + tl.program_id(0) * LENGTH + at, sums, mask=at < LENGTH)


@triton.jit
def _outer(
    dv, x, x_centre, out, P, tiles_of_image, num_tiles, J,
    C: tl.constexpr, CP: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr,
    EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv (x - x_centre)^T over a share of all pixels, one SIDE x SIDE square of it: a program cannot hold them all."""
    j = tl.program_id(0)
    co = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    ci = tl.program_id(2) * SIDE + tl.arange(0, SIDE)
    sums = tl.zeros([SIDE, SIDE], tl.float32)
    for tile in range(j, num_tiles, J):
        n = tile // tiles_of_image
        image = n.to(tl.int64) * C * P
        p = (tile % tiles_of_image) * TILE + tl.arange(0, TILE)
        left = _tile(dv + image, co, p, P, C, EXACT, CHANNELS_LAST)
        right = _tile(x + image, ci, p, P, C, EXACT, CHANNELS_LAST).to(tl.float32)
        right = _operand(right - _vector(x_centre + n * C, ci, C)[:, None], left.dtype, PRECISION)
        sums = _dot(left, tl.trans(right), sums, PRECISION)
    tl.store(out + j * CP * CP + co[:, None] * CP + ci[None, :], sums)


class Plan(NamedTuple):
    """How one pass is cut up."""

    tile: int  # pixels
    chunk: int  # input channels multiplied at a time
    warps: int
    stages: int  # tiles in flight; 1 with chunks
    programs: int  # aimed at, over all images
    split: int = 1  # of the pixels among the warps where a product sums over pixels
    square: bool = True  # whether the C x C gradient of the value projection stays in registers


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


def obstacle(
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
    return disagreement(device, dtype, num_channels, num_entities, channels_last, _precision(dtype), second=order == 2)


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
    from attnorm.ops.regional_norm import regional_norm

    generator = torch.Generator().manual_seed(0)
    images, channels = shape[:2]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, noise = (draw(*shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    filters, offset = draw(images, num_entities, channels), draw(images, num_entities)
    value_weight, value_bias = draw(channels, channels) / channels**0.5, draw(channels)
    weight, bias = 1 + 0.1 * draw(num_entities, channels), draw(num_entities, channels)
    rho = torch.tensor(0.7, device=device)
    temperature, eps = 1.6 / channels**0.5, 1e-5  # a softmax that is neither flat nor hard
    arguments = (x, filters, offset, value_weight, value_bias, weight, bias, rho)
    out, area, mean, rstd = forward(*arguments, temperature, eps)
    # Of a gradient that has nothing to do with the output, rho's may be all but zero (a sum of millions of products of
    # either sign), and then be rounding alone; this one follows the output.
    grad = noise + (out / 8).to(dtype)
    names = ["x", "the filters", "their offset", "the value projection", "", "beta", "alpha", "rho"]
    got: tuple[Tensor, ...]
    if second:
        names = ["the gradient", *names]
        of_maps = (draw(*filters.shape), draw(*offset.shape), draw(*value_weight.shape))
        dots = (*of_maps, draw(*weight.shape), draw(*bias.shape), draw())
        got = double_backward(noise, *dots, grad, *arguments, area, mean, rstd, temperature, eps)
    else:
        got = backward(grad, *arguments, area, mean, rstd, temperature, eps)
    with torch.enable_grad():
        leaves = [part.detach().float().requires_grad_() for part in arguments]
        flat = leaves[0].flatten(2)
        soft = torch.softmax(temperature * torch.baddbmm(leaves[2][..., None], leaves[1], flat), 1)
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


class _Pass(NamedTuple):
    """One pass over a feature map, cut up by its plan."""

    plan: Plan
    grid: tuple[int]
    blocks: int  # J, of an image
    tiles: int  # of a block
    options: dict[str, object]


def _cut(plan: Plan, x: Tensor, num_entities: int) -> _Pass:
    num_images, channels, height, width = x.shape
    padded, padded_entities = _padded(channels), _padded(num_entities)
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
        "CHANNELS_LAST": _is_channels_last(x),
        "PRECISION": _precision(x.dtype),
        "INNER": tl.float32 if x.dtype == torch.float32 else tl.bfloat16,
        "SPLIT": plan.split,
        "num_warps": plan.warps,
        # Of nested loops none: with loads in flight there, Triton 3.6 was seen to overwrite what was still in use.
        "num_stages": plan.stages if plan.chunk == padded else 1,
    }
    return _Pass(plan, (num_images * blocks,), blocks, tiles, options)


_fits: dict[tuple[object, ...], Plan] = {}  # what was found to fit where the plan did not


def _launch(name: str, x: Tensor, num_entities: int, run: Callable[[_Pass], None]) -> None:
    """Run one pass by its plan, or by the first smaller one that the device has room for."""
    padded = _padded(x.shape[1])
    key = (name, padded, num_entities, x.dtype, _is_channels_last(x), _precision(x.dtype), x.device)
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


def _merge(cut: _Pass) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and sizes of the kernel that merges what the blocks of every image left."""
    sizes: dict[str, Any] = {name: cut.options[name] for name in ("C", "K", "CP", "KP")}
    padded, padded_entities = sizes["CP"], sizes["KP"]
    blocks = min(triton.next_power_of_2(cut.blocks), max(8192 // padded_entities, 1))
    channels = min(padded, 8192 // (blocks * padded_entities))
    return (cut.grid[0] // cut.blocks, padded // channels), sizes | {"JP": blocks, "BC": channels, "num_warps": 8}


def _padded(count: int) -> int:
    return max(int(triton.next_power_of_2(count)), FEWEST)


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _precision(dtype: torch.dtype) -> str:
    """float32 is multiplied as torch multiplies matrices: exactly unless TF32 is allowed there."""
    # torch.get_float32_matmul_precision() raises once a program has used these newer settings.
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":
        setting = getattr(torch.backends, "fp32_precision", "none")
    return "tf32" if dtype == torch.float32 and setting == "tf32" else "ieee"


def _narrow(x: Tensor) -> torch.dtype:
    """Of what is multiplied inside: float16 has not the range for squares and gradients."""
    return torch.float32 if x.dtype == torch.float32 else torch.bfloat16


def _rounded(weight: Tensor, x: Tensor) -> Tensor:
    """As the matrix units take it: once here rather than for every tile."""
    if _precision(x.dtype) == "tf32":
        return ((weight.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return weight.to(x.dtype)


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def forward(
    x: Tensor,
    filters: Tensor,
    offset: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    rho: Tensor,
    temperature: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `attnorm.ops.native.forward`, but that mean is that of v without its bias: (out, area, mean, rstd)."""
    num_images, channels, height, width = x.shape
    pixels, entities = height * width, filters.shape[1]
    per_image = entities if filters.shape[0] > 1 else 0
    padded, padded_entities = _padded(channels), _padded(entities)
    value_weight = _rounded(value_weight, x)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    area, mean = empty(num_images, entities), empty(num_images, entities, channels)
    rstd = torch.empty_like(mean)
    centre = empty(num_images, padded)
    scale, shifted = empty(2, num_images, padded, padded_entities, dtype=_narrow(x))
    out = torch.empty_like(x)

    def statistics(cut: _Pass) -> None:
        areas, (totals, squares) = empty(*cut.grid, padded_entities), empty(2, *cut.grid, padded, padded_entities)
        shifts, means = empty(2, *cut.grid, padded)
        _statistics[cut.grid](
            x, filters, offset, value_weight, areas, totals, squares, shifts, means,
            temperature, pixels, cut.blocks, cut.tiles, per_image, **cut.options,
        )  # fmt: skip
        grid, sizes = _merge(cut)
        _summarize[grid](
            areas, totals, squares, shifts, means, weight, bias, rho, area, mean, rstd, centre, scale, shifted,
            eps, pixels, cut.blocks, cut.tiles * cut.plan.tile, **sizes,
        )  # fmt: skip

    def apply(cut: _Pass) -> None:
        _apply[cut.grid](
            x, filters, offset, value_weight, centre, scale, shifted, out,
            temperature, pixels, cut.blocks, cut.tiles, per_image, **cut.options,
        )  # fmt: skip

    with _on(x):
        _launch("statistics", x, entities, statistics)
        _launch("apply", x, entities, apply)
    return out, area, mean, rstd


def backward(
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
    temperature: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, filters, offset, value_weight, value_bias, weight, bias and rho, as `attnorm.ops.native`."""
    num_images, channels, height, width = x.shape
    pixels, entities = height * width, filters.shape[1]
    per_image = entities if filters.shape[0] > 1 else 0
    padded, padded_entities = _padded(channels), _padded(entities)
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

    def sums(cut: _Pass) -> None:
        plain, weighted = empty(2, *cut.grid, padded, padded_entities)
        _sums[cut.grid](
            x, grad, filters, offset, value_weight, area, mean, plain, weighted, centre,
            temperature, pixels, cut.blocks, cut.tiles, per_image, **cut.options,
        )  # fmt: skip
        grid, sizes = _merge(cut)
        _differentiate[grid](
            plain, weighted, area, mean, rstd, centre, weight, bias, rho,
            affine, scale, shifted, slope, level, constant, eps, cut.blocks, **sizes,
        )  # fmt: skip

    def gradients(cut: _Pass) -> None:
        nonlocal dv
        square = cut.plan.square
        dv = dx if square else torch.empty_like(x, dtype=_narrow(x))
        # One row a block: gradients of the filters, of their offset and, where it fits, of the value projection.
        lengths = [padded_entities * padded, padded_entities, padded * padded if square else 0]
        shares = empty(*cut.grid, sum(lengths))
        _gradients[cut.grid](
            x, grad, filters, offset, value_weight, x_centre, centre, scale, shifted, slope, level, constant,
            dx, dv, shares, temperature, pixels, cut.blocks, cut.tiles, per_image, **cut.options, KEEP_DV=not square,
        )  # fmt: skip
        of_images = _added(shares, num_images)
        of_batch = _added(of_images, 1) if num_images > 1 else of_images
        d_filters, d_offset, _ = (of_images if per_image else of_batch).split(lengths, 1)
        found[:] = [d_filters, d_offset, of_batch[0, lengths[0] + lengths[1] :]]
        if not square:
            _launch("outer", x, entities, outer)

    def outer(cut: _Pass) -> None:
        found[2] = _value_gradient(cut, dv, x, x_centre)

    with _on(x):
        _launch("sums", x, entities, sums)
        _launch("gradients", x, entities, gradients)
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
    temperature: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """As `attnorm.ops.native.double_backward`."""
    num_images, channels, height, width = x.shape
    pixels, entities = height * width, filters.shape[1]
    per_image = entities if filters.shape[0] > 1 else 0
    padded, padded_entities = _padded(channels), _padded(entities)
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    tangent, grad = (part.to(x.dtype).contiguous(memory_format=layout) for part in (tangent, grad))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    def given(dot: Tensor | None, part: Tensor) -> Tensor:
        return torch.zeros_like(part, dtype=torch.float32) if dot is None else dot.float().contiguous()

    x_centre = _centre(x)
    moves = value_weight_dot is not None
    filters_dot, offset_dot = given(filters_dot, filters), given(offset_dot, offset)
    weight_dot, bias_dot, rho_dot = given(weight_dot, weight), given(bias_dot, bias), given(rho_dot, rho)
    value_weight = _rounded(value_weight, x)
    value_weight_dot = value_weight if value_weight_dot is None else _rounded(value_weight_dot.contiguous(), x)
    # The tangent of the shift of v drops out: only that of x - x_centre counts.
    middle_dot = x_centre @ value_weight_dot.float().T

    centre = empty(num_images, padded)
    affine = empty(num_images, 3, entities, channels)
    tables = empty(8, num_images, padded, padded_entities, dtype=_narrow(x))
    constants = empty(2, num_images, padded, padded_entities)
    dgrad, dx = torch.empty_like(x), torch.empty_like(x)
    dv = dv_dot = dx
    found: list[Tensor] = []  # d_filters, d_filters_dot, d_offset, d_offset_dot, d_value
    parameters = (filters, offset, value_weight, filters_dot, offset_dot, value_weight_dot, middle_dot)

    def tangents(cut: _Pass) -> None:
        sums, area_dot = empty(6, *cut.grid, padded, padded_entities), empty(*cut.grid, padded_entities)
        _tangents[cut.grid](
            x, tangent, grad, *parameters, area, mean, sums, area_dot, centre,
            temperature, pixels, cut.blocks, cut.tiles, per_image, sums[0].numel(), **cut.options, VALUE_DOT=moves,
        )  # fmt: skip
        grid, sizes = _merge(cut)
        _curve[grid](
            sums, area_dot, area, mean, rstd, centre, weight, bias, rho, weight_dot, bias_dot, rho_dot,
            affine, tables, constants, eps, cut.blocks, sums[0].numel(), tables[0].numel(), constants[0].numel(),
            **sizes,
        )  # fmt: skip

    def curvatures(cut: _Pass) -> None:
        nonlocal dv, dv_dot
        square = cut.plan.square
        if not square:
            dv, dv_dot = (torch.empty_like(x, dtype=_narrow(x)) for _ in range(2))
        lengths = [padded_entities * padded] * 2 + [padded_entities] * 2 + [padded * padded if square else 0]
        shares = empty(*cut.grid, sum(lengths))
        _curvatures[cut.grid](
            x, tangent, grad, *parameters, x_centre, centre, tables, constants, dgrad, dx, dv, dv_dot, shares,
            temperature, pixels, cut.blocks, cut.tiles, per_image, tables[0].numel(), constants[0].numel(),
            **cut.options, VALUE_DOT=moves, KEEP_DV=not square,
        )  # fmt: skip
        of_images = _added(shares, num_images)
        of_batch = _added(of_images, 1) if num_images > 1 else of_images
        found[:] = (of_images if per_image else of_batch).split(lengths, 1)
        found[4] = of_batch[0, sum(lengths[:4]) :]
        if not square:
            _launch("outer", x, entities, outer)

    def outer(cut: _Pass) -> None:
        found[4] = _value_gradient(cut, dv_dot, x, x_centre)
        found[4] += _value_gradient(cut, dv, tangent, torch.zeros_like(x_centre))

    with _on(x):
        _launch("tangents", x, entities, tangents)
        _launch("curvatures", x, entities, curvatures)
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
    _add[(images, triton.cdiv(length, block))](rows, sums, count, LENGTH=length, JP=blocks, BLOCK=block)
    return sums


def _value_gradient(cut: _Pass, dv: Tensor, x: Tensor, x_centre: Tensor) -> Tensor:
    """dv (x - x_centre)^T over all pixels of the batch, where one program cannot hold it."""
    num_images, pixels, padded = x.shape[0], x.shape[2] * x.shape[3], cut.options["CP"]
    assert isinstance(padded, int)
    side, tiles_of_image = cut.plan.chunk, triton.cdiv(pixels, cut.plan.tile)
    tiles = tiles_of_image * num_images
    blocks = min(max(cut.plan.programs // (padded // side) ** 2, 1), tiles)
    shares = torch.empty(blocks, padded, padded, device=x.device, dtype=torch.float32)
    names = ("C", "CP", "TILE", "EXACT", "CHANNELS_LAST", "PRECISION", "num_warps", "num_stages")
    _outer[(blocks, padded // side, padded // side)](
        dv, x, x_centre, shares, pixels, tiles_of_image, tiles, blocks, SIDE=side,
        **{name: cut.options[name] for name in names},
    )  # fmt: skip
    return _added(shares, 1)[0]
