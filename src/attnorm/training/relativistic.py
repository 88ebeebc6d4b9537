"""The recipe "relativistic": R3GAN (Huang et al., NeurIPS 2024)."""

# N batch.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnorm.config import Config
from attnorm.data.stream import Batch
from attnorm.models.relativistic import RelativisticDiscriminator, RelativisticGenerator
from attnorm.system.devices import no_autocast
from attnorm.system.randomness import draw_for_images
from attnorm.training.augmentation import augment
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.losses import (
    orthogonality_loss,
    relativistic_discriminator_loss,
    relativistic_generator_loss,
    zero_centred_penalty,
)
from attnorm.training.task import Phase


class RelativisticTask(ClassConditionalTask):
    """A step is one update of the discriminator, with R1 and R2, and one of the generator.

    Learning rates, Adam's beta2, gamma and the average's half-life go along half a cosine from their first to their
    last values in `relativistic.schedule_images`, and stay there.
    """

    differentiated_once: ClassVar[tuple[str, ...]] = ("generator",)
    discriminator: RelativisticDiscriminator

    def __init__(self, config: Config, device: torch.device) -> None:
        assert config.relativistic is not None
        self.settings = config.relativistic
        super().__init__(config, device)

    def _make_networks(self) -> tuple[nn.Module, nn.Module]:
        discriminator = RelativisticDiscriminator(self.model, has_context=self.settings.context_in_discriminator)
        return RelativisticGenerator(self.model), discriminator

    def position(self, images_seen: int) -> int:
        return images_seen * 2

    def phases(self, images_seen: int) -> Sequence[Phase]:
        settings, optim = self.settings, self.config.optim
        share = min(images_seen / settings.schedule_images, 1.0)

        def at(first: float, last: float) -> float:
            return last + (first - last) * (1 + math.cos(math.pi * share)) / 2

        rates = {"generator": optim.g_lr, "discriminator": optim.d_lr}
        for name, optimiser in self.state.optimisers.items():
            for index, group in enumerate(optimiser.param_groups):  # the second one, if any, is of gates
                group["lr"] = at(1, settings.last_lr) * rates[name] * (optim.gate_lr_scale if index else 1)
                group["betas"] = (optim.beta1, at(optim.beta2, settings.last_beta2))
        self.gamma, self.augmented = at(settings.gamma, settings.last_gamma), at(0, settings.last_augmented)
        half_life = at(0, settings.last_ema_half_life)
        self.average.decay = 0.5 ** (self.config.run.batch_size / half_life) if half_life else 0.0
        return [Phase("discriminator", self._discriminator_loss), Phase("generator", self._generator_loss)]

    def _discriminator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            fake = self.generator(self._latents(batch.labels), batch.labels).float()
        real, fake = (self._seen(images).requires_grad_() for images in (batch.images, fake))
        # The penalties are differentiated twice: in float32, and without the fused attention, which cannot be.
        with no_autocast(real), sdpa_kernel(SDPBackend.MATH):
            real_scores, fake_scores = self.discriminator(real, batch.labels), self.discriminator(fake, batch.labels)
            r1, r2 = zero_centred_penalty(real_scores, real), zero_centred_penalty(fake_scores, fake)
        adversarial = relativistic_discriminator_loss(real_scores, fake_scores)
        orthogonality = orthogonality_loss(self.discriminator)
        loss = adversarial + self.gamma / 2 * (r1 + r2) + self.config.optim.orthogonality_weight * orthogonality
        logged = {
            "discriminator/loss": adversarial,
            "discriminator/real_score": real_scores.mean(),
            "discriminator/fake_score": fake_scores.mean(),
            "discriminator/r1": r1,
            "discriminator/r2": r2,
            "discriminator/orthogonality": orthogonality,
        }
        return loss, logged

    def _generator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        fake = self.generator(self._latents(batch.labels), batch.labels).float()
        with torch.no_grad():
            real_scores = self.discriminator(self._seen(batch.images), batch.labels).float()
        fake_scores = self.discriminator(self._seen(fake), batch.labels).float()
        adversarial = relativistic_generator_loss(real_scores, fake_scores)
        orthogonality = orthogonality_loss(self.generator)
        loss = adversarial + self.config.optim.orthogonality_weight * orthogonality
        return loss, {"generator/loss": adversarial, "generator/orthogonality": orthogonality}

    def _seen(self, images: Tensor) -> Tensor:
        is_changed = draw_for_images(len(images), torch.rand).to(images.device) < self.augmented
        return torch.where(is_changed[:, None, None, None], augment(images, self.settings.augmentations), images)
