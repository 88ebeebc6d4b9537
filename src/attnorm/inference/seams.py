"""No seam around a hole: what a network made of it is shifted to meet the known pixels beside it."""

# C channels, H height and W width of a picture.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SWEEPS = 16  # at each size; within a grey level or two of where ever more of them would end
SWEEPS_OF_LARGE, LARGE = (
    4,
    2**18,
)  # of so many pixels, where each sweep takes long and the sizes below have done the most
RELAXATION = 1.75  # of successive over-relaxation, between 1 and 2


def without_seam(made: Tensor, known: Tensor, hole: Tensor) -> Tensor:
    """`made`, changed in the hole so that it meets `known` at its edge.

    A network makes the whole picture, so by how much it errs is known right beside the hole. That error is continued
    into the hole as smoothly as can be (the solution of Laplace's equation, the membrane of Perez et al., "Poisson
    image editing", 2003) and taken off: colours then run on across the edge, and detail is left alone.

    Args:
        made: float [C, H, W], the network's, outside the hole too.
        known: float [C, H, W], the picture; what it holds in the hole has no influence.
        hole: bool [1, H, W], True = missing.
    """
    rows, columns = (hole[0].any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    if not rows:
        return made
    box = (slice(None), *(slice(max(ends[0] - 1, 0), ends[-1] + 2) for ends in (rows, columns)))
    inside = hole[box]
    beside = (_sum_of_neighbours(inside.float()) > 0) & ~inside
    error = torch.where(beside, known[box] - made[box], 0)
    result = made.clone()
    result[box] += torch.where(inside, _harmonic(error, beside, inside), 0)
    return result


def _harmonic(values: Tensor, fixed: Tensor, free: Tensor) -> Tensor:
    """[C, H, W]: `values` where they are fixed; where free, the mean of the (up to four) neighbours that are either.

    By successive over-relaxation, from the solution at half the size: its cells have the mean of their fixed values,
    and are free where they have none. Fixed and free are bool [1, H, W]; elsewhere there is nothing.
    """
    height, width = free.shape[1:]
    guess = torch.zeros_like(values)
    if max(height, width) > 2:
        share = _halved(fixed.float())
        coarse = _halved(values * fixed) / share.clamp_min(1e-12)
        solved = _harmonic(coarse, share > 0, (_halved(free.float()) > 0) & (share == 0))
        guess = solved.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width]
    solution = torch.where(fixed, values, torch.where(free, guess, 0))
    count = _sum_of_neighbours((fixed | free).float()).clamp_min(1)
    is_even = (torch.arange(height)[:, None] + torch.arange(width)).to(free.device) % 2 == 0
    for _ in range(SWEEPS if height * width < LARGE else SWEEPS_OF_LARGE):
        for part in (free & is_even, free & ~is_even):  # of which none is another's neighbour
            change = _sum_of_neighbours(solution) / count - solution
            solution = torch.where(part, solution + RELAXATION * change, solution)
    return solution


def _halved(x: Tensor) -> Tensor:
    """[C, ceil(H / 2), ceil(W / 2)]: means over cells of 2x2, beyond the picture of zeros."""
    return F.avg_pool2d(F.pad(x, (0, x.shape[2] % 2, 0, x.shape[1] % 2)), 2)


def _sum_of_neighbours(x: Tensor) -> Tensor:
    """Above, below, to the left and to the right; beyond the picture there are zeros. [C, H, W]."""
    around = F.pad(x, (1, 1, 1, 1))
    return around[:, :-2, 1:-1] + around[:, 2:, 1:-1] + around[:, 1:-1, :-2] + around[:, 1:-1, 2:]
