"""The kernels of Attentive Normalization (Eq. 2-6): x is read twice and written once forward, x and grad twice each
backward.

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
"""

# N batch, C channels, K entities (the paper's n), P = H*W pixels; J blocks of pixels an image, each walked in tiles of
# TILE pixels by one program. Tiles are [channels, pixels] or [entities, pixels]. Sums over pixels are kept per block
# and added in a fixed order, so results are the same bit for bit from run to run.

from __future__ import annotations

import os

import triton
import triton.language as tl

SMALLEST_AREA = tl.constexpr(1e-12)
LOG2_E = tl.constexpr(1.4426950408889634)
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
    not, and the gradient of the value projection loses a digit. So what is computed here is rounded to TF32 first.
    """
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
    projection [C, C]: logits keep their digits even where x has 8 bits (row 11).
    """
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
    weights f and w of all of them do not fit beside the tile.
    """
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
def _softmax(raw, filter_offset, k, p, P, K: tl.constexpr, EXACT: tl.constexpr):
    """Eq. 4 down the entities of a tile; pixels beyond the image belong to nothing."""
    logit = raw * LOG2_E + (filter_offset * LOG2_E)[:, None]
    if not EXACT:
        logit = tl.where((k < K)[:, None], logit, float("-inf"))
    power = tl.exp2(logit - tl.max(logit, 0)[None, :])
    s = power * (1.0 / tl.sum(power, 0))[None, :]
    if not EXACT:
        s = tl.where((p < P)[None, :], s, 0.0)
    return s


@triton.jit
def statistics(
    x, filters, filter_offset, value_weight, area_out, total_out, square_out, shift_out, mean_out,
    P, J, tiles, filters_stride,
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
        s = _softmax(raw, o, k, p, P, K, EXACT)
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
def summarize(
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
def apply(
    x, filters, filter_offset, value_weight, centre, scale, offset, out,
    P, J, tiles, filters_stride,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out = x + (v - centre) * (scale S) + offset S."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards: what `statistics` read last is still in the cache
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
        s = _operand(_softmax(raw, o, k, p, P, K, EXACT), INNER, PRECISION)
        v -= middle[:, None]
        y = v * _dot(a, s, None, PRECISION)
        y = _dot(b, s, y, PRECISION)
        y += _tile(x, co, p, P, C, EXACT, CHANNELS_LAST).to(tl.float32)
        _store_tile(out, y, co, p, P, C, EXACT, CHANNELS_LAST)


@triton.jit
def sums(
    x, grad, filters, filter_offset, value_weight, area, mean, plain_out, weighted_out, centre_out,
    P, J, tiles, filters_stride,
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
        s = _operand(_softmax(raw, o, k, p, P, K, EXACT), INNER, PRECISION)
        v = (v - centre[:, None]) * g.to(tl.float32)
        plain = _over_pixels(_operand(g, INNER, PRECISION), s, plain, SPLIT, PRECISION)
        weighted = _over_pixels(_operand(v, INNER, PRECISION), s, weighted, SPLIT, PRECISION)
    at = program * CP * KP + co[:, None] * KP + k[None, :]
    tl.store(plain_out + at, tl.sum(plain, 0))
    tl.store(weighted_out + at, tl.sum(weighted, 0))


@triton.jit
def differentiate(
    plain_in, weighted_in, area, mean, rstd, centre, weight, bias, rho,
    affine_out, scale_out, offset_out, slope_out, level_out, constant_out,
    eps, J,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr,
    JP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """From the blocks' sums: this image's share of the gradients of beta, alpha and rho, and the coefficients of
    dv = grad * (scale S) + (v - centre) * (slope S) + level S and of dS (see `gradients`).
    """
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
def gradients(
    x, grad, filters, filter_offset, value_weight, x_centre, centre, scale, offset, slope, level, constant,
    dx, dv_out, shares_out,
    P, J, tiles, filters_stride,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
    KEEP_DV: tl.constexpr,
):  # fmt: skip
    """dx of one block, and its share of the gradients of filters, their offset and the value projection."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards, as in `apply`
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
        s = _softmax(raw, o, k, p, P, K, EXACT)
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
        draw = s * (ds - tl.sum(s * ds, 0)[None, :])
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
    f, rest, w, f_dot, rest_dot, w_dot, k, co, p, P,
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
    s = _softmax(raw, o, k, p, P, K, EXACT)
    raw_dot += more + o_dot[:, None]
    s_dot = s * (raw_dot - tl.sum(s * raw_dot, 0)[None, :])
    if VALUE_DOT:
        v_dot += v_more - middle_dot[:, None]
    return v - middle[:, None], v_dot, s, s_dot


@triton.jit
def tangents(
    x, u, grad, filters, filter_offset, value_weight, filters_dot, filter_offset_dot, value_weight_dot, middle_dot,
    area, mean, sums_out, area_dot_out, centre_out,
    P, J, tiles, filters_stride, table,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
    VALUE_DOT: tl.constexpr,
):  # fmt: skip
    """Of one block, in six tables: sums of S grad and S grad v, and of the tangents of S with grad held, S grad v, S v
    and S v^2 / 2, with v less its centre; and the sum of the tangent of S.
    """
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
            f, rest, w, f_dot, rest_dot, w_dot, k, co, p, P,
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
def curve(
    sums, area_dot_in, area, mean, rstd, centre, weight, bias, rho, weight_dot, bias_dot, rho_dot,
    affine_out, tables_out, constants_out,
    eps, J, table, of_tables, of_constants,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr,
    JP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """As `differentiate`, with the tangents of all that it finds: tables of scale, offset, slope and level, then of
    their tangents; two of constants.
    """
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
def curvatures(
    x, u, grad, filters, filter_offset, value_weight, filters_dot, filter_offset_dot, value_weight_dot, middle_dot,
    x_centre, centre, tables, constants, dgrad, dx, dv_out, dv_dot_out, shares_out,
    P, J, tiles, filters_stride, of_tables, of_constants,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    EXACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
    VALUE_DOT: tl.constexpr, KEEP_DV: tl.constexpr,
):  # fmt: skip
    """dgrad and dx of one block; its share of the gradients of filters and their offset, of the tangents of both and of
    the value projection.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards, as in `apply`
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
            f, rest, w, f_dot, rest_dot, w_dot, k, co, p, P,
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
        draw = s * ds
        draw_dot = s_dot * ds + s * ds_dot
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
def add(shares, out, J, LENGTH: tl.constexpr, JP: tl.constexpr, BLOCK: tl.constexpr):
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
def outer(
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
