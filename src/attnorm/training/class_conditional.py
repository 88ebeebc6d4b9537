"""The class-conditional task: a hinge GAN with spectral norm (paper, section 4; Eq. 7 and 8)."""

# N batch, S image size.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from attnorm.config import ClassConditionalConfig, Config, ConfigError
from attnorm.data.images import ImageSet
from attnorm.data.stream import Batch
from attnorm.layers.observe import observe_layouts
from attnorm.models.class_conditional import Discriminator, Generator
from attnorm.ops.dispatch import widened
from attnorm.system.process_group import ProcessGroup
from attnorm.system.randomness import draw_for_images
from attnorm.training.losses import (
    classifier_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    orthogonality_loss,
)
from attnorm.training.state import ExponentialAverage, TrainingState, singular_vectors_at_rest
from attnorm.training.task import Phase, adam, describe_layouts


class ClassConditionalTask:
    """Hinge GAN with spectral norm (section 4): `d_steps` discriminator updates, then one of the generator.

    Other recipes of the task are subclasses with other networks and phases.
    """

    differentiated_once: ClassVar[tuple[str, ...]] = ("generator", "discriminator")
    generator: nn.Module
    discriminator: nn.Module

    def __init__(self, config: Config, device: torch.device) -> None:
        assert isinstance(config.model, ClassConditionalConfig)
        self.config, self.model = config, config.model
        # Built on the CPU, so that a seed gives the same start on every device.
        self.generator, self.discriminator = (network.to(device) for network in self._make_networks())
        if config.run.channels_last:
            self.generator.to(memory_format=torch.channels_last)
            self.discriminator.to(memory_format=torch.channels_last)
        self.average = ExponentialAverage(self.generator, config.optim.ema_decay, foreach=config.run.foreach_ema)
        self.state = TrainingState(
            networks={"generator": self.generator, "discriminator": self.discriminator},
            optimisers={
                "generator": adam(self.generator, config.optim.g_lr, config),
                "discriminator": adam(self.discriminator, config.optim.d_lr, config),
            },
            averages={"ema": self.average},
        )

    def _make_networks(self) -> tuple[nn.Module, nn.Module]:
        """Generator and discriminator, on the CPU."""
        return Generator(self.model), Discriminator(self.model)

    @classmethod
    def resolve(cls, config: Config, images: ImageSet) -> Config:
        """The number of classes is the data's."""
        assert isinstance(config.model, ClassConditionalConfig)
        num_classes = len(images.classes)
        if config.model.num_classes not in (0, num_classes):
            raise ConfigError(
                f"model.num_classes is {config.model.num_classes}, but {images.source} has {num_classes} classes; "
                "leave it at 0 to take the data's"
            )
        return replace(config, model=replace(config.model, num_classes=num_classes))

    @classmethod
    def for_images(cls, config: Config, images: ImageSet, device: torch.device) -> Self:
        return cls(config, device)

    def position(self, images_seen: int) -> int:
        return images_seen * (self.config.optim.d_steps + 1)

    def phases(self, images_seen: int) -> Sequence[Phase]:
        discriminate = Phase("discriminator", self._discriminator_loss)
        return [*[discriminate] * self.config.optim.d_steps, Phase("generator", self._generator_loss)]

    def _latents(self, labels: Tensor) -> Tensor:
        return draw_for_images(
            len(labels), lambda count: torch.randn(count, self.model.latent_dim, device=labels.device)
        )

    def _fixed_latents(self, count: int) -> Tensor:
        return torch.randn(count, self.model.latent_dim, generator=torch.Generator().manual_seed(0))

    def _discriminator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            fake = self.generator(self._latents(batch.labels), batch.labels)
        real_score, fake_score, class_logits = self._scores(batch, fake.to(batch.images.dtype))
        adversarial = hinge_discriminator_loss(widened(real_score), widened(fake_score))
        orthogonality = orthogonality_loss(self.discriminator)
        loss = adversarial + self.config.optim.orthogonality_weight * orthogonality
        logged = {
            "discriminator/loss": adversarial,
            "discriminator/real_score": real_score.mean(),
            "discriminator/fake_score": fake_score.mean(),
            "discriminator/orthogonality": orthogonality,
        }
        if class_logits is not None:
            logged["discriminator/classifier"] = classifier_loss(class_logits, batch.labels)
            loss = loss + self.config.optim.classifier_weight * logged["discriminator/classifier"]
        return loss, logged

    def _scores(self, batch: Batch, fake: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """D's scores of real and generated images, and the classifier's logits of the real ones.

        In one pass or in two: one power iteration of spectral norm an update (docs/paper.md, row 22).
        """
        if self.config.run.joint_pass:
            score, class_logits = self.discriminator(torch.cat([batch.images, fake]), batch.labels.repeat(2))
            real_score, fake_score = score.chunk(2)
            return real_score, fake_score, None if class_logits is None else class_logits.chunk(2)[0]
        real_score, class_logits = self.discriminator(batch.images, batch.labels)
        with singular_vectors_at_rest([self.discriminator]):
            fake_score, _ = self.discriminator(fake, batch.labels)
        return real_score, fake_score, class_logits

    def _generator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        fake = self.generator(self._latents(batch.labels), batch.labels)  # only the labels of the batch are used
        score, class_logits = self.discriminator(fake, batch.labels)
        adversarial = hinge_generator_loss(widened(score))
        orthogonality = orthogonality_loss(self.generator)
        loss = adversarial + self.config.optim.orthogonality_weight * orthogonality
        logged = {"generator/loss": adversarial, "generator/orthogonality": orthogonality}
        if class_logits is not None:
            logged["generator/classifier"] = classifier_loss(class_logits, batch.labels)
            loss = loss + self.config.optim.classifier_weight * logged["generator/classifier"]
        return loss, logged

    @torch.no_grad()
    def sample_grid(self, *, columns: int = 8) -> Tensor:
        """Images of the averaged generator, float [rows * columns, 3, S, S]: a class a row, ten at most, a fixed latent
        a column.
        """
        device = next(self.generator.parameters()).device
        rows = min(10, self.model.num_classes)
        latents = self._fixed_latents(columns)
        labels = torch.arange(rows).repeat_interleave(columns).to(device)
        return self.average.network(latents.repeat(rows, 1).to(device), labels).float()

    @torch.no_grad()
    def layout_statistics(self, batch: Batch) -> dict[str, float | list[float]]:
        """Of every layer as evaluation sees it (t = 0, no random numbers).

        The averaged generator is observed on fixed latents with the batch's labels, the discriminator on its images.
        """
        statistics = self._generator_layouts(batch)
        self.discriminator.eval()
        with observe_layouts(self.discriminator) as seen:
            self.discriminator(batch.images, batch.labels)
        self.discriminator.train()
        return statistics | describe_layouts("discriminator", self.discriminator, seen)

    def _generator_layouts(self, batch: Batch) -> dict[str, float | list[float]]:
        with observe_layouts(self.average.network) as seen:
            self.average.network(self._fixed_latents(len(batch.labels)).to(batch.labels.device), batch.labels)
        return describe_layouts("generator", self.average.network, seen)

    def validate(self, images_seen: int, group: ProcessGroup) -> dict[str, float]:
        """Nothing: samples are judged by scores, which take far more images."""
        return {}
