"""What one training step of each task does, phase by phase."""

# N batch, Z latent dimension, S image size.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnorm.config import Config
from attnorm.layers.attentive_norm import AttentiveNorm2d, observe_layouts
from attnorm.models.class_conditional import Discriminator, Generator
from attnorm.ops.soft_layout import entity_usage, layout_entropy
from attnorm.training.losses import (
    classifier_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    orthogonality_loss,
)
from attnorm.training.state import ExponentialAverage, TrainingState


class Batch(NamedTuple):
    images: Tensor  # float32 [N, 3, S, S] in [-1, 1]
    labels: Tensor  # int64 [N]


@dataclass(frozen=True)
class Phase:
    """One optimiser update: `loss` of a fresh batch is minimized over the network called `network`."""

    network: str
    loss: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]  # what to minimize, and named values to log


class ClassConditionalTask:
    """Hinge GAN with spectral norm (section 4): `d_steps` discriminator updates, then one of the generator."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        # Built on the CPU, so that a seed gives the same start on every device.
        self.generator = Generator(config.model).to(device)
        self.discriminator = Discriminator(config.model).to(device)
        if config.run.channels_last:
            self.generator.to(memory_format=torch.channels_last)
            self.discriminator.to(memory_format=torch.channels_last)
        self.average = ExponentialAverage(self.generator, config.optim.ema_decay)
        self.state = TrainingState(
            networks={"generator": self.generator, "discriminator": self.discriminator},
            optimisers={
                "generator": _adam(self.generator, config.optim.g_lr, config),
                "discriminator": _adam(self.discriminator, config.optim.d_lr, config),
            },
            averages={"ema": self.average},
        )
        self.batches_per_step = config.optim.d_steps + 1

    def phases(self, images_seen: int) -> Sequence[Phase]:
        """The updates of the step that begins at `images_seen`, each of which gets a batch of its own."""
        discriminate = Phase("discriminator", self._discriminator_loss)
        return [*[discriminate] * self.config.optim.d_steps, Phase("generator", self._generator_loss)]

    def finish_step(self, step: int) -> None:
        """After all phases of step number `step`, counted from 1."""
        self.average.update(self.generator, step)

    def _latents(self, labels: Tensor) -> Tensor:
        return torch.randn(len(labels), self.config.model.latent_dim, device=labels.device)

    def _discriminator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            fake = self.generator(self._latents(batch.labels), batch.labels)
        # Real and fake in one pass: one power iteration of spectral norm an update (docs/paper.md, row 22).
        both = torch.cat([batch.images, fake.to(batch.images.dtype)])
        score, class_logits = self.discriminator(both, batch.labels.repeat(2))
        real_score, fake_score = score.float().chunk(2)
        adversarial = hinge_discriminator_loss(real_score, fake_score)
        orthogonality = orthogonality_loss(self.discriminator)
        loss = adversarial + self.config.optim.orthogonality_weight * orthogonality
        logged = {
            "discriminator/loss": adversarial,
            "discriminator/real_score": real_score.mean(),
            "discriminator/fake_score": fake_score.mean(),
            "discriminator/orthogonality": orthogonality,
        }
        if class_logits is not None:
            logged["discriminator/classifier"] = classifier_loss(class_logits.chunk(2)[0], batch.labels)
            loss = loss + self.config.optim.classifier_weight * logged["discriminator/classifier"]
        return loss, logged

    def _generator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        fake = self.generator(self._latents(batch.labels), batch.labels)  # only the labels of the batch are used
        score, class_logits = self.discriminator(fake, batch.labels)
        adversarial = hinge_generator_loss(score.float())
        orthogonality = orthogonality_loss(self.generator)
        loss = adversarial + self.config.optim.orthogonality_weight * orthogonality
        logged = {"generator/loss": adversarial, "generator/orthogonality": orthogonality}
        if class_logits is not None:
            logged["generator/classifier"] = classifier_loss(class_logits, batch.labels)
            loss = loss + self.config.optim.classifier_weight * logged["generator/classifier"]
        return loss, logged

    @torch.no_grad()
    def grid(self, *, rows: int = 10, columns: int = 8) -> Tensor:
        """Images of the averaged generator, float [rows * columns, 3, S, S]: a class a row, a fixed latent a column."""
        device = next(self.generator.parameters()).device
        rows = min(rows, self.config.model.num_classes)
        latents = torch.randn(columns, self.config.model.latent_dim, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(rows).repeat_interleave(columns).to(device)
        return self.average.network(latents.repeat(rows, 1).to(device), labels).float()

    @torch.no_grad()
    def layout_statistics(self, batch: Batch) -> dict[str, float | list[float]]:
        """Entropy, usage, t and rho of every AttentiveNorm2d, as evaluation sees them (t = 0, no random numbers).

        The averaged generator is observed on fixed latents with the batch's labels, the discriminator on its images.
        """
        latents = torch.randn(
            len(batch.labels), self.config.model.latent_dim, generator=torch.Generator().manual_seed(0)
        )
        statistics: dict[str, float | list[float]] = {}
        self.discriminator.eval()
        with observe_layouts(self.average.network) as seen_by_g:
            self.average.network(latents.to(batch.labels.device), batch.labels)
        with observe_layouts(self.discriminator) as seen_by_d:
            self.discriminator(batch.images, batch.labels)
        self.discriminator.train()
        for name, network, seen in (
            ("generator", self.average.network, seen_by_g),
            ("discriminator", self.discriminator, seen_by_d),
        ):
            for site, observation in seen.items():
                layer = network.get_submodule(site)
                assert isinstance(layer, AttentiveNorm2d)
                key = f"layout/{name}.{site}"
                statistics[f"{key}/entropy"] = layout_entropy(observation.layout).item()
                statistics[f"{key}/usage"] = entity_usage(observation.layout).tolist()
                statistics[f"{key}/rho"] = layer.rho.item()
                if layer.self_sampling:
                    statistics[f"{key}/t"] = layer.t.tolist()
        return statistics


def _adam(network: nn.Module, learning_rate: float, config: Config) -> torch.optim.Adam:
    betas = (config.optim.beta1, config.optim.beta2)
    return torch.optim.Adam(network.parameters(), learning_rate, betas=betas, fused=True)
