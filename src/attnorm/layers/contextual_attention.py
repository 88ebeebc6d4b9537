"""Contextual attention (Yu et al., 2018, "DeepFill v1"): the baseline that AN is measured against in inpainting."""

# N batch, C channels, P = (H/2) * (W/2) patches.

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.ops.dispatch import memory_format
from attnorm.system.devices import no_autocast


class ContextualAttention(nn.Module):
    """Rebuilds every pixel of a feature map from patches of its known region. No parameters.

    1. Patches of 3x3 are compared at half resolution (even rows and columns), every one with every one:
       score[q, p] = f_q . f_p / max(|f_p|, 1e-4), zeros beyond the border. Only the source p is normalized.
    2. Neighbours are fused: a match counts more if the next patch matches the next source. Along the diagonal of the
       score matrix, score'[q, p] = score[q-1, p-1] + score[q, p] + score[q+1, p+1], with patches numbered row by row,
       then the same again with patches numbered column by column. The numbering runs on from one row into the next.
    3. Weights are the softmax over p of 10 * score'[q, p] * known[p], times known[p], where a source is known if no
       pixel of it is missing. So sources that are not known add nothing, though they share in the softmax.
    4. Sources are pasted with these weights as patches of 4x4 at full resolution with stride 2, and the sum is divided
       by 4, the number of patches on a pixel.

    DeepFill's own code applies the first image's mask to the whole batch; here every image has its own. And where it
    may reduce the mask by nearest neighbour, here a pixel at half resolution is missing if one of its four is: then no
    pixel that is missing is ever pasted.

    Time and memory grow with (H*W)^2: see `score_bytes`.

    Args:
        release: "tensorflow" or "pytorch" for the details of the published DeepFill v1 or of its port, whose weights
            can be converted (docs/migration.md): masks are reduced by nearest neighbour, which overlooks thin strokes;
            the release reduces masks and features with their corners aligned, so not to every second pixel; the port
            adds 1e-4 to every square under the norm's root. "none": as above.
    """

    matched_size, pasted_size, softmax_scale, norm_floor = 3, 4, 10.0, 1e-4

    def __init__(self, release: Literal["none", "tensorflow", "pytorch"] = "none") -> None:
        super().__init__()
        self.release = release

    def reduce_mask(self, mask: Tensor) -> Tensor:
        """The mask [N, 1, 4H, 4W] of an image as that of its features, [N, 1, H, W]; 0 = known."""
        if self.release == "none":
            # A feature stands for 4x4 pixels; it is missing if one of them is, lest thin strokes vanish.
            return F.max_pool2d(mask, 4)
        return self._nearest(mask, 4)

    def _nearest(self, x: Tensor, factor: int) -> Tensor:
        if self.release == "tensorflow":
            rows, columns = (_aligned(side, side // factor) for side in x.shape[2:])
            return x[:, :, rows.to(x.device)][..., columns.to(x.device)]
        return x[:, :, ::factor, ::factor]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` is [N, C, H, W], floating, H and W even; `mask` [N, 1, H, W], 0 = known. Returns `x`'s shape
        and memory format.

        Zeros come back for an image without a known patch. Scores and weights are float32 at least.
        """
        weights = self.weights(x, mask)
        with no_autocast(x):
            sources = F.unfold(_float(x), self.pasted_size, stride=2, padding=1)  # [N, 16C, P]
            pasted = F.fold(sources @ weights.mT, x.shape[2:], self.pasted_size, stride=2, padding=1)
            return (pasted / 4).to(x.dtype).contiguous(memory_format=memory_format(x))

    def weights(self, x: Tensor, mask: Tensor) -> Tensor:
        """How much of each patch comes from each source (steps 1 to 3), [N, P, P]: the patches row by row, then the
        sources. A row's sum is 1 at most; what is not known gives nothing. `x` and `mask` as in `forward`.
        """
        _check(x, mask)
        half = x.shape[2] // 2, x.shape[3] // 2
        with no_autocast(x):
            features = _float(x)
            matched = F.unfold(self._nearest(features, 2), self.matched_size, padding=1)  # [N, 9C, P]
            if self.release == "pytorch":
                norms = (matched.square() + self.norm_floor).sum(1, keepdim=True).sqrt()
            else:
                norms = torch.linalg.vector_norm(matched, dim=1, keepdim=True).clamp_min(self.norm_floor)
            scores = matched.mT @ (matched / norms)  # [N, P, P]: query, source
            scores = _fuse(scores)
            scores = _renumber(_fuse(_renumber(scores, *half)), *half[::-1])

            missing = (mask != 0).to(features.dtype)
            missing = F.max_pool2d(missing, 2) if self.release == "none" else self._nearest(missing, 2)
            # Padding is not missing: it is part of what is compared and pasted at the border.
            missing = F.max_pool2d(missing, self.matched_size, stride=1, padding=1).flatten(2)  # [N, 1, P]
            known = 1 - missing
            return torch.softmax(self.softmax_scale * scores * known, dim=2) * known


def score_bytes(height: int, width: int) -> int:
    """Bytes of one image's score matrix in float32, for a feature map of `height` x `width` (of the layer's input).

    In the inpainting generator that map has a quarter of the image's sides: 4 MiB for 256 pixels, 16 GiB for 2048. The
    layer holds several such matrices at once.
    """
    return 4 * (height // 2 * (width // 2)) ** 2


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _aligned(side: int, reduced: int) -> Tensor:
    """Which of `side` pixels stand for `reduced`, the first and the last among them; int64."""
    last, least = side - 1, max(reduced - 1, 1)
    return (2 * last * torch.arange(reduced) + least) // (2 * least)  # i * last / least, rounded


def _fuse(scores: Tensor) -> Tensor:
    """Sums of three along the diagonal; beyond the matrix are zeros. [N, P, P]."""
    padded = F.pad(scores, (1, 1, 1, 1))
    return padded[:, :-2, :-2] + scores + padded[:, 2:, 2:]


def _renumber(scores: Tensor, height: int, width: int) -> Tensor:
    """From patches numbered row by row to column by column, for both queries and sources. [N, P, P]."""
    scores = scores.unflatten(2, (height, width)).unflatten(1, (height, width))
    return scores.permute(0, 2, 1, 4, 3).flatten(3, 4).flatten(1, 2)


def _check(x: Tensor, mask: Tensor) -> None:
    is_map = x.ndim == 4 and x.is_floating_point() and all(side > 0 and side % 2 == 0 for side in x.shape[2:])
    if not is_map or mask.shape != (x.shape[0], 1, *x.shape[2:]):
        raise ValueError(
            f"got {x.dtype} {tuple(x.shape)} and a mask {tuple(mask.shape)}; "
            "expected a floating feature map [N, C, H, W] with even H and W, at least 2, and a mask [N, 1, H, W]"
        )
