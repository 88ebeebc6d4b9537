"""The recipe "projected": a generator against discriminators on features of a fixed network (Sauer et al., 2021)."""

# N batch, S image size, C channels of a mixed map.

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnorm.config import Config
from attnorm.data.stream import Batch
from attnorm.models.class_conditional import Generator
from attnorm.models.projected import ProjectedDiscriminator
from attnorm.training.augmentation import augment
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.losses import hinge_discriminator_loss, hinge_generator_loss, orthogonality_loss
from attnorm.training.task import Phase


class ProjectedTask(ClassConditionalTask):
    """Hinge GAN in a fixed network's features. A step is one update of the generator, then one of the discriminators.

    The discriminators judge the images that the generator was updated with (before that update), so that these are made
    and looked at by the fixed network once a step.
    """

    discriminator: ProjectedDiscriminator

    def __init__(self, config: Config, device: torch.device) -> None:
        assert config.projected is not None
        self.settings = config.projected
        super().__init__(config, device)
        # Of each part of the batch that the generator was updated with: mixed maps, and labels.
        self._judged: deque[tuple[list[Tensor], Tensor]] = deque()

    def _make_networks(self) -> tuple[nn.Module, nn.Module]:
        return Generator(self.model), ProjectedDiscriminator(self.settings, self.model.num_classes)

    def position(self, images_seen: int) -> int:
        return images_seen * 2

    def phases(self, images_seen: int) -> Sequence[Phase]:
        return [Phase("generator", self._generator_loss), Phase("discriminator", self._discriminator_loss)]

    def _generator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        fake = self.generator(self._latents(batch.labels), batch.labels).float()  # only the labels are used
        maps = self._mixed_maps(fake)
        self._judged.append(([part.detach() for part in maps], batch.labels))
        adversarial = hinge_generator_loss(self.discriminator(maps, batch.labels).float())
        orthogonality = orthogonality_loss(self.generator)
        loss = adversarial + self.config.optim.orthogonality_weight * orthogonality
        return loss, {"generator/loss": adversarial, "generator/orthogonality": orthogonality}

    def _mixed_maps(self, images: Tensor) -> list[Tensor]:
        """Of the augmented images; the fixed network's weights have the precision of the step that asks first."""
        projector, kind = self.discriminator.projector, images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        projector.features.to(dtype)
        return projector(augment(images, self.settings.augmentations))

    def _discriminator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        fake_maps, fake_labels = self._judged.popleft()
        with torch.no_grad():
            real_maps = self._mixed_maps(batch.images)
        # Real and fake in one pass: one power iteration of spectral norm an update (docs/paper.md, row 22).
        both = [torch.cat(pair) for pair in zip(real_maps, fake_maps, strict=True)]
        real, fake = self.discriminator(both, torch.cat([batch.labels, fake_labels])).float().chunk(2)
        loss = hinge_discriminator_loss(real, fake)
        logged = {
            "discriminator/loss": loss,
            "discriminator/real_score": real.mean(),
            "discriminator/fake_score": fake.mean(),
        }
        return loss, logged

    @torch.no_grad()
    def layout_statistics(self, batch: Batch) -> dict[str, float | list[float]]:
        """Of the averaged generator's AttentiveNorm2d, on fixed latents with the batch's labels."""
        return self._generator_layouts(batch)
