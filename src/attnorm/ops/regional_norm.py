"""Regional normalization (paper, section 3.3, Eq. 5): every pixel by the statistics of the soft regions it is in."""

# N batch, C channels, K entities (the paper's n), P = H*W pixels; M = N, or 1 where moments are over the batch.

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attnorm.ops.dispatch import at_least_float32, is_exporting, memory_format, resolve

Statistics = Literal["weighted", "masked", "released"]
Moments = Literal["instance", "batch"]

# An entity that wins no pixel at all may underflow to an area of 0; its region then counts for nothing.
SMALLEST_AREA = 1e-12


def regional_norm(
    x: Tensor,
    layout: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    statistics: Statistics = "weighted",
    moments: Moments = "instance",
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """Eq. 5: sum_i ((x - mu_i) / sigma_i * beta_i + alpha_i) * S_i, with the moments of each soft region S_i.

    Args:
        x: Feature map, [N, C, H, W], any floating dtype; all sums are taken in float32, or float64 for float64.
        layout: Soft regions S, [N, K, H, W], each in [0, 1], summing to 1 over K.
        weight, bias: beta and alpha, [K, C]; None for 1 and 0.
        statistics: What mu_i and sigma_i are (docs/paper.md, row 1).
            "weighted": mu = sum(S x) / sum(S), sigma^2 = sum(S (x - mu)^2) / sum(S) + eps.
            "masked": plain mean and standard deviation of x * S over all positions, as the text reads, plus eps.
            "released": what the authors' inpainting code computes: the mean divided twice, S squared in the variance.
        moments: "instance", or "batch": the regions of all images of the batch together.
        running_mean, running_var: [K, C], for batch moments: updated in place in training, used instead in evaluation.
        training: Only read with batch moments.
        momentum: Share of the new moments in the running ones.
        impl: "auto", "reference" (literal: K times the memory of x) or "fused" (never builds that tensor).

    Returns:
        [N, C, H, W], dtype and memory format of `x`.

    Raises:
        ValueError: shapes that do not fit, or an explicit `impl` that cannot run.
    """
    _check(x, layout, weight, bias)
    only_weighted = None if statistics == "weighted" else f"statistics={statistics!r} has the reference form only"
    name = resolve("regional_norm", impl, {"fused": only_weighted, "reference": None})
    dtype = at_least_float32(x, layout)
    x_wide, layout = x.to(dtype), layout.to(dtype)

    given = None
    if moments == "batch" and not training:
        if running_mean is None or running_var is None:
            raise ValueError("batch moments in evaluation need running_mean and running_var, [K, C] each; got None")
        given = (running_mean.to(dtype)[None], running_var.to(dtype)[None])

    function = _fused if name == "fused" else _reference
    out, (mean, var) = function(x_wide, layout, weight, bias, statistics, moments, given, eps)

    if moments == "batch" and training and running_mean is not None and running_var is not None and x.numel():
        with torch.no_grad():
            running_mean.lerp_(mean[0].to(running_mean.dtype), momentum)
            running_var.lerp_(var[0].to(running_var.dtype), momentum)
    return out.to(x.dtype).contiguous(memory_format=memory_format(x))


def _reference(
    x: Tensor,
    layout: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics,
    moments: Moments,
    given: tuple[Tensor, Tensor] | None,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Eq. 5 to the letter, with the [N, K, C, H, W] tensor that it implies. Moments are returned as [M, K, C]."""
    x, s = x[:, None], layout[:, :, None]  # [N, 1, C, H, W], [N, K, 1, H, W]
    over = (3, 4) if moments == "instance" else (0, 3, 4)
    area = s.sum(over, keepdim=True).clamp_min(SMALLEST_AREA)
    if given is not None:
        mean, var = (moment[..., None, None] for moment in given)
    elif statistics == "weighted":
        mean = (x * s).sum(over, keepdim=True) / area
        var = (s * (x - mean) ** 2).sum(over, keepdim=True) / area
    elif statistics == "masked":
        mean = (x * s).mean(over, keepdim=True)
        var = ((x * s - mean) ** 2).mean(over, keepdim=True)
    else:
        mean = (x * s).mean(over, keepdim=True) / area
        var = ((x * s - mean) ** 2).sum(over, keepdim=True) / area

    # Row 10: sigma + eps has a NaN gradient on a constant region; the two literal readings keep it all the same.
    sigma = (var + eps).sqrt() if statistics == "weighted" else var.sqrt() + eps
    normalized = (x - mean) / sigma
    if weight is not None:
        normalized = normalized * weight.to(x.dtype)[None, :, :, None, None]
    if bias is not None:
        normalized = normalized + bias.to(x.dtype)[None, :, :, None, None]
    return (normalized * s).sum(1), (mean[..., 0, 0], var[..., 0, 0])


def _fused(
    x: Tensor,
    layout: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics,
    moments: Moments,
    given: tuple[Tensor, Tensor] | None,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Eq. 5 as four matrix products: with a_i = beta_i / sigma_i and b_i = alpha_i - a_i mu_i it is
    x * (sum_i a_i S_i) + sum_i b_i S_i.
    """
    shape = x.shape
    x, s = x.flatten(2), layout.flatten(2)  # [N, C, P], [N, K, P]

    # Centre first: E[x^2] - mu^2 loses all digits in float32 once |mean| >> sigma. Regional normalization does not
    # depend on the shift, so no gradient goes through it.
    over_images = moments == "batch"
    shift = x.detach().mean((0, 2) if over_images else 2, keepdim=True) if x.numel() else x.new_zeros(1, x.shape[1], 1)
    x = x - shift  # [N, C, P]
    shift = shift.transpose(1, 2)  # [M, 1, C]

    if given is not None:
        mean, var = given[0] - shift, given[1]
    else:
        area, total, total_squared = _sums(x, s, shape)
        if over_images:
            area, total, total_squared = (sums.sum(0, keepdim=True) for sums in (area, total, total_squared))
        area = area.clamp_min(SMALLEST_AREA)
        mean = total / area  # [M, K, C]
        var = (total_squared / area - mean.square()).clamp_min(0)

    a = (var + eps).rsqrt()
    if weight is not None:
        a = a * weight.to(x.dtype)
    b = -a * mean
    if bias is not None:
        b = b + bias.to(x.dtype)
    a, b = (m.transpose(1, 2).expand(shape[0], -1, -1) for m in (a, b))  # [N, C, K]
    return (x * (a @ s) + b @ s).reshape(shape), (mean + shift, var)


def _sums(x: Tensor, s: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over all pixels of S [N, K, 1], of S x and of S x^2 [N, K, C]."""
    if not is_exporting():
        return s.sum(2, keepdim=True), s @ x.transpose(1, 2), s @ x.square().transpose(1, 2)
    # Row by row first: other runtimes add up a million products one after another, and 2e-4 of the result is lost.
    rows = s.unflatten(2, shape[2:]).transpose(1, 2)  # [N, H, K, W]
    columns = x.unflatten(2, shape[2:]).permute(0, 2, 3, 1)  # [N, H, W, C]
    area = rows.sum(3).sum(1)[..., None]
    return area, (rows @ columns).sum(1), (rows @ columns.square()).sum(1)


def _check(x: Tensor, layout: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; expected a floating [N, C, H, W]")
    if layout.ndim != 4 or layout.shape[0] != x.shape[0] or layout.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"layout has shape {tuple(layout.shape)}; expected [{x.shape[0]}, K, {x.shape[2]}, {x.shape[3]}] "
            f"for x of shape {tuple(x.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (layout.shape[1], x.shape[1]):
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}; expected [K, C] = [{layout.shape[1]}, {x.shape[1]}]"
            )
