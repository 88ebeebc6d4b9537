"""Eq. 1 and 7-10 and AC-GAN's classifier term, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm import AttentiveNorm2d
from attnorm.training.losses import (
    classifier_loss,
    gradient_penalty,
    hinge_discriminator_loss,
    hinge_generator_loss,
    orthogonality_loss,
    reconstruction_loss,
    wasserstein_critic_loss,
    wasserstein_generator_loss,
)


def test_hinge_losses_equal_the_hand_computed_numbers() -> None:
    assert hinge_generator_loss(torch.tensor([1.0, -2.0, 4.0])).item() == -1.0
    real = torch.tensor([2.0, 0.5, -1.0])  # hinges 0, 0.5, 2
    fake = torch.tensor([-3.0, -0.5, 1.0])  # hinges 0, 0.5, 2
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(2.5 / 3 + 2.5 / 3)
    # The signs matter: scores the wrong way round cost, the right way round they do not.
    assert hinge_discriminator_loss(torch.tensor([-2.0]), torch.tensor([3.0])).item() == 7.0
    assert hinge_discriminator_loss(torch.tensor([3.0]), torch.tensor([-2.0])).item() == 0.0


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
    assert orthogonality_loss(nn.Linear(3, 1)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_classifier_loss_is_the_mean_negative_log_probability(dtype: torch.dtype) -> None:
    logits: Tensor = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]], dtype=dtype)
    expected = (math.log(3) + math.log(1 + 2 * math.exp(-2))) / 2
    loss = classifier_loss(logits, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert classifier_loss(logits, torch.tensor([1, 1])).item() == pytest.approx(expected + 1, rel=1e-6)


# Inpainting


def test_reconstruction_is_the_mean_over_the_stages_of_the_mean_difference() -> None:
    truth = torch.zeros(2, 3, 2, 2)
    coarse, refined = torch.full_like(truth, 0.5), torch.zeros_like(truth)
    refined[0, 0, 0, 0] = -2.4  # one of 24 values
    assert reconstruction_loss((coarse, refined), truth).item() == pytest.approx((0.5 + 0.1) / 2)
    assert reconstruction_loss((refined,), truth).item() == pytest.approx(0.1)


def test_a_missing_pixel_counts_as_often_as_it_is_told_and_the_mean_stays_over_all_pixels() -> None:
    truth, filled = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.25)
    filled[:, :, 0, 0] = 0.5
    masks = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert reconstruction_loss((filled,), truth, masks, 6.0).item() == pytest.approx((6 * 0.5 + 3 * 0.25) / 4)
    assert reconstruction_loss((filled,), truth, masks, 0.0).item() == pytest.approx(3 * 0.25 / 4)
    assert reconstruction_loss((filled, truth), truth, masks, 1.0).item() == pytest.approx((0.5 + 3 * 0.25) / 8)


def test_wasserstein_losses_equal_the_hand_computed_numbers() -> None:
    real, fake = torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 0.0])
    assert wasserstein_critic_loss(real, fake).item() == -2.5  # real images high: low loss
    assert wasserstein_critic_loss(fake, real).item() == 2.5
    assert wasserstein_generator_loss(fake).item() == 0.5


def test_gradient_penalty_of_a_linear_critic_is_the_closed_form() -> None:
    """D(x) = w . x has the gradient w everywhere: (|w| - 1)^2, whose derivative is 2 (|w| - 1) w / |w|."""
    w = torch.tensor([0.0, 3.0, 4.0], requires_grad=True)
    images = torch.randn(5, 3, 1, 1, requires_grad=True)
    penalty = gradient_penalty(images.flatten(1) @ w, images)
    assert penalty.item() == pytest.approx(16.0)
    penalty.backward()
    assert w.grad is not None and w.grad.tolist() == pytest.approx([0.0, 8 * 0.6, 8 * 0.8])
    flat = torch.zeros(3, requires_grad=True)  # a critic without slope costs one and gives no NaN
    penalty = gradient_penalty(images.flatten(1) @ flat, images)
    penalty.backward()
    assert penalty.item() == 1.0 and flat.grad.isfinite().all()
    # Inside the mask the gradient is (0, 0, 4) for one image and nothing for the other.
    mask = torch.tensor([[[[0.0, 0.0, 1.0]]], [[[0.0, 0.0, 0.0]]]])
    wide = torch.randn(2, 1, 1, 3, requires_grad=True)
    assert gradient_penalty(wide.flatten(1) @ w, wide, mask).item() == pytest.approx((9 + 1) / 2)


def test_gradient_penalty_trains_a_critic_as_finite_differences_say() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 2, 5, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    first = torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    second = torch.randn(1, 4, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)

    def penalty(first: Tensor, second: Tensor) -> Tensor:
        hidden = F.softplus(F.conv2d(images, first))
        return gradient_penalty(F.conv2d(hidden, second).sum((1, 2, 3)), images)

    assert torch.autograd.gradcheck(penalty, (first, second))
