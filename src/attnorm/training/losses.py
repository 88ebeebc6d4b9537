"""The objectives of the paper as pure functions: Eq. 1, 7 and 8, and AC-GAN's classifier term."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.layers.attentive_norm import AttentiveNorm2d


def hinge_generator_loss(fake_scores: Tensor) -> Tensor:
    """Eq. 7: -mean(D(fake)). Scores are [N], high = real."""
    return -fake_scores.mean()


def hinge_discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Eq. 8 as it must be meant: mean(relu(1 - D(real))) + mean(relu(1 + D(fake))); see docs/paper.md, row 16."""
    return F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()


def orthogonality_loss(network: nn.Module) -> Tensor:
    """Eq. 1 without its weight, summed over the AttentiveNorm2d layers of `network`; 0 where there is none."""
    penalties = [module.orthogonality_penalty() for module in network.modules() if isinstance(module, AttentiveNorm2d)]
    return torch.stack(penalties).sum() if penalties else next(network.parameters()).new_zeros(())


def classifier_loss(class_logits: Tensor, labels: Tensor) -> Tensor:
    """AC-GAN: cross-entropy of the auxiliary classifier; logits [N, Y], labels int64 [N]."""
    return F.cross_entropy(class_logits.float(), labels)
