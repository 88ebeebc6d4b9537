"""The objectives of the paper as pure functions: Eq. 1 and 7-10, and AC-GAN's classifier term."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.ops.dispatch import widened


def hinge_generator_loss(fake_scores: Tensor) -> Tensor:
    """Eq. 7: -mean(D(fake)). Scores are [N], high = real."""
    return -fake_scores.mean()


def hinge_discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Eq. 8 as it must be meant: mean(relu(1 - D(real))) + mean(relu(1 + D(fake))); see docs/paper.md, row 16."""
    return F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()


def reconstruction_loss(
    stages: Sequence[Tensor], truth: Tensor, masks: Tensor | None = None, hole_weight: float = 1.0
) -> Tensor:
    """First term of Eq. 9 without its weight: mean |x - truth| over the whole image, averaged over the outputs x of the
    stages; all [N, 3, H, W]. With masks ([N, 1, H, W], 1 = missing) a missing pixel's error counts `hole_weight` times;
    the mean stays over all pixels, so that shares of a batch add up.
    """
    if masks is None or hole_weight == 1:
        return torch.stack([F.l1_loss(widened(stage), truth) for stage in stages]).mean()
    weights = 1 + (hole_weight - 1) * masks
    return torch.stack([((widened(stage) - truth).abs() * weights).mean() for stage in stages]).mean()


def wasserstein_generator_loss(fake_scores: Tensor) -> Tensor:
    """Second term of Eq. 9 without its weight: -mean(D(fake)). Scores are [N], high = real."""
    return -fake_scores.mean()


def wasserstein_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """The first two terms of Eq. 10: mean(D(fake)) - mean(D(real)), minus the estimated distance."""
    return fake_scores.mean() - real_scores.mean()


def gradient_penalty(scores: Tensor, images: Tensor, mask: Tensor | None = None) -> Tensor:
    """Third term of Eq. 10 without its weight: mean((|dD(x) / dx| - 1)^2), to be differentiated once more.

    Args:
        scores: D(x), [N], one for each image, computed from `images` in float32.
        images: x, the interpolates, [N, 3, H, W], a leaf that requires its gradient (docs/paper.md, row 17).
        mask: [N, 1, H, W]; only the gradient where it is 1 counts, as in DeepFill's code. None: all of it.
    """
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    if mask is not None:
        gradient = gradient * mask
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def orthogonality_loss(network: nn.Module) -> Tensor:
    """Eq. 1 without its weight, summed over the AttentiveNorm2d layers of `network`; 0 where there is none."""
    penalties = [module.orthogonality_penalty() for module in network.modules() if isinstance(module, AttentiveNorm2d)]
    return torch.stack(penalties).sum() if penalties else next(network.parameters()).new_zeros(())


def classifier_loss(class_logits: Tensor, labels: Tensor) -> Tensor:
    """AC-GAN: cross-entropy of the auxiliary classifier; logits [N, Y], labels int64 [N]."""
    return F.cross_entropy(widened(class_logits), labels)


def relativistic_generator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """mean softplus(D(real) - D(fake)) over pairs of one class (Huang et al., 2024). Scores are [N], high = real."""
    return F.softplus(real_scores - fake_scores).mean()


def relativistic_discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """mean softplus(D(fake) - D(real)) over pairs, without its gradient penalties."""
    return F.softplus(fake_scores - real_scores).mean()


def zero_centred_penalty(scores: Tensor, images: Tensor) -> Tensor:
    """R1 of real images, R2 of generated ones (Mescheder et al., 2018), without gamma / 2: mean |dD(x) / dx|^2, to be
    differentiated once more. `images`, [N, 3, H, W], are those that `scores`, [N], were computed from, in float32.
    """
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()
