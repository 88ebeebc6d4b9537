"""Eq. 1, 7 and 8 and AC-GAN's classifier term, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attnorm import AttentiveNorm2d
from attnorm.training.losses import (
    classifier_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    orthogonality_loss,
)


def test_generator_loss_is_minus_the_mean_score() -> None:
    assert hinge_generator_loss(torch.tensor([1.0, -2.0, 4.0])).item() == -1.0


def test_discriminator_loss_equals_the_hand_computed_number() -> None:
    real = torch.tensor([2.0, 0.5, -1.0])  # hinges 0, 0.5, 2
    fake = torch.tensor([-3.0, -0.5, 1.0])  # hinges 0, 0.5, 2
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(2.5 / 3 + 2.5 / 3)
    assert hinge_discriminator_loss(torch.zeros(4), torch.zeros(4)).item() == 2.0
    # The signs matter: scores the wrong way round cost, the right way round they do not.
    assert hinge_discriminator_loss(torch.tensor([-2.0]), torch.tensor([3.0])).item() == 7.0
    assert hinge_discriminator_loss(torch.tensor([3.0]), torch.tensor([-2.0])).item() == 0.0


def test_hinge_has_no_gradient_beyond_the_margin() -> None:
    real = torch.tensor([1.5, 0.5], requires_grad=True)
    fake = torch.tensor([-1.5, -0.5], requires_grad=True)
    hinge_discriminator_loss(real, fake).backward()
    assert real.grad is not None and fake.grad is not None
    assert real.grad.tolist() == [0.0, -0.5]
    assert fake.grad.tolist() == [0.0, 0.5]


def test_orthogonality_loss_sums_over_the_layers() -> None:
    network = nn.Sequential(AttentiveNorm2d(2, 2), nn.ReLU(), nn.Sequential(AttentiveNorm2d(2, 3)))
    first, second = (module for module in network.modules() if isinstance(module, AttentiveNorm2d))
    with torch.no_grad():
        # Rows scaled to length 1: (1, 0) and (0.6, 0.8) meet at cosine 0.6, which stands twice in W W^T.
        first.entities.weight.copy_(torch.tensor([[2.0, 0.0], [3.0, 4.0]])[:, :, None, None])
        # Three equal rows: six ones off the diagonal.
        second.entities.weight.copy_(torch.tensor([[0.0, 5.0]] * 3)[:, :, None, None])
    assert orthogonality_loss(network).item() == pytest.approx(2 * 0.36 + 6, rel=1e-6)
    assert orthogonality_loss(first).item() == pytest.approx(2 * 0.36, rel=1e-6)


def test_orthogonality_loss_is_zero_without_attentive_norm() -> None:
    loss = orthogonality_loss(nn.Linear(3, 1))
    assert loss.shape == () and loss.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_classifier_loss_is_the_mean_negative_log_probability(dtype: torch.dtype) -> None:
    logits: Tensor = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]], dtype=dtype)
    expected = (math.log(3) + math.log(1 + 2 * math.exp(-2))) / 2
    loss = classifier_loss(logits, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert classifier_loss(logits, torch.tensor([1, 1])).item() == pytest.approx(expected + 1, rel=1e-6)
