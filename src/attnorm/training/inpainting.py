"""The inpainting task: a two-stage generator, a local and a global critic, two phases (section 4, Eq. 9 and 10)."""

# N batch, S image size.

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from attnorm.config import Config, ConfigError, InpaintingConfig, InpaintingTaskConfig
from attnorm.data.images import ImageSet, cut_centres, held_out_indices, spread, to_float
from attnorm.data.masks import DrawnMask, free_form_mask, rectangle_mask
from attnorm.data.stream import Batch
from attnorm.layers.observe import observe_layouts
from attnorm.models.inpainting import Critic, InpaintingGenerator, crop_around, paste
from attnorm.ops.dispatch import widened
from attnorm.system.devices import no_autocast
from attnorm.system.process_group import ProcessGroup
from attnorm.system.randomness import draw_for_images
from attnorm.training.losses import (
    gradient_penalty,
    orthogonality_loss,
    reconstruction_loss,
    wasserstein_critic_loss,
    wasserstein_generator_loss,
)
from attnorm.training.state import ExponentialAverage, TrainingState
from attnorm.training.task import Phase, adam, describe_layouts


class PhaseSwitch:
    """When the second phase of inpainting begins: after a fixed number of images, or once the validation L1 is flat
    (docs/paper.md, row 18). All that it remembers is in `numbers`, which go into the checkpoint.
    """

    def __init__(self, settings: InpaintingTaskConfig) -> None:
        self.settings = settings
        self.numbers = {  # 0: not known yet, or none yet
            "second_phase_at": torch.tensor(float(settings.switch_images), dtype=torch.float64),
            "best_l1": torch.zeros((), dtype=torch.float64),
            "without_improvement": torch.zeros((), dtype=torch.float64),
        }

    @property
    def second_phase_at(self) -> int | None:
        """In images seen; None as long as the validation L1 has not been found flat."""
        return int(self.numbers["second_phase_at"].item()) or None

    def observe(self, l1: float, images_seen: int) -> None:
        """Takes a validation L1 into account. The best one must fall by the share `min_improvement` to count."""
        if self.second_phase_at is not None:
            return
        best = self.numbers["best_l1"].item()
        if best == 0 or l1 < best * (1 - self.settings.min_improvement):
            self.numbers["best_l1"].fill_(l1)
            self.numbers["without_improvement"].zero_()
            return
        self.numbers["without_improvement"].add_(1)
        if self.numbers["without_improvement"].item() >= self.settings.patience:
            self.numbers["second_phase_at"].fill_(images_seen)


class Holes(NamedTuple):
    """Which part of each image of a batch is missing."""

    masks: Tensor  # float32 [N, 1, S, S], 1 = missing
    corners: Tensor  # int64 [N, 2], top and left of the squares of S // 2 pixels that the local critic sees


class InpaintingTask:
    """The two-stage generator with a local and a global critic (section 4, Eq. 9 and 10).

    First phase: the reconstruction alone, for both stages. Second phase, once `PhaseSwitch` says so: `d_steps` updates
    of the critic, then one of the generator with the adversarial term.

    Args:
        held_out: uint8 [V, 3, S, S] on the CPU, never trained on: for validation and the grid of samples.
    """

    differentiated_once: ClassVar[tuple[str, ...]] = ("generator",)
    _VALIDATION_SEED = 2020  # of the masks of the held-out images, the same for every run

    def __init__(self, config: Config, device: torch.device, held_out: Tensor | None = None) -> None:
        assert isinstance(config.model, InpaintingConfig) and config.inpainting is not None
        self.config, self.settings, self.image_size = config, config.inpainting, config.model.image_size
        self.held_out = torch.empty(0, 3, self.image_size, self.image_size) if held_out is None else held_out
        # The critic first, so that its start does not depend on the generator's context block.
        self.critic = Critic(config.model).to(device)
        self.generator = InpaintingGenerator(config.model).to(device)
        if config.run.channels_last:
            self.generator.to(memory_format=torch.channels_last)
            self.critic.to(memory_format=torch.channels_last)
        self.average = ExponentialAverage(self.generator, config.optim.ema_decay, foreach=config.run.foreach_ema)
        self.switch = PhaseSwitch(self.settings)
        self.state = TrainingState(
            networks={"generator": self.generator, "critic": self.critic},
            optimisers={
                "generator": adam(self.generator, config.optim.g_lr, config),
                "critic": adam(self.critic, config.optim.d_lr, config),
            },
            averages={"ema": self.average},
            numbers=self.switch.numbers,
        )

    @classmethod
    def resolve(cls, config: Config, images: ImageSet) -> Config:
        """Nothing is left to the data."""
        return config

    @classmethod
    def for_images(cls, config: Config, images: ImageSet, device: torch.device) -> Self:
        """With the centre squares of the images that validate; ConfigError where none is held out."""
        assert config.inpainting is not None
        indices = held_out_indices(len(images), config.data.held_out_every)
        if not len(indices):
            raise ConfigError(
                f"data.held_out_every is {config.data.held_out_every}: of the {len(images)} images of {images.source} "
                "none is held out to validate on; give more images, or a smaller number from 2 on"
            )
        chosen = spread(indices, config.inpainting.validation_images)
        squares = cut_centres(images.batch(chosen)[0], config.model.image_size)
        return cls(config, device, squares.clone())

    def _is_adversarial(self, images_seen: int) -> bool:
        begin = self.switch.second_phase_at
        return begin is not None and images_seen >= begin

    def position(self, images_seen: int) -> int:
        begin = self.switch.second_phase_at
        if begin is None or images_seen < begin:
            return images_seen
        return begin + (images_seen - begin) * (self.config.optim.d_steps + 1)

    def phases(self, images_seen: int) -> Sequence[Phase]:
        if not self._is_adversarial(images_seen):
            return [Phase("generator", self._reconstruction_loss)]
        criticise = Phase("critic", self._critic_loss)
        return [*[criticise] * self.config.optim.d_steps, Phase("generator", self._generator_loss)]

    def _holes(self, seed: int, position: int, count: int, device: torch.device) -> Holes:
        """The masks of `count` images from `position` on: a function of these and the seed alone."""
        drawn = [self._mask(seed, position + index) for index in range(count)]
        masks = torch.stack([mask for mask, _ in drawn])
        corners = torch.tensor([box for _, box in drawn])
        if device.type == "cuda":  # so that the copy need not wait for the work that is queued
            masks, corners = masks.pin_memory(), corners.pin_memory()
        return Holes(masks.to(device, non_blocking=True).float(), corners.to(device, non_blocking=True))

    def _mask(self, seed: int, index: int) -> DrawnMask:
        kind = self.settings.masks
        if kind == "free-form" or (kind == "mixed" and index % 2):
            return free_form_mask(self.image_size, seed=seed, index=index)
        return rectangle_mask(self.image_size, seed=seed, index=index)

    def _holes_of(self, batch: Batch) -> Holes:
        return self._holes(self.config.run.seed, batch.position, len(batch.images), batch.images.device)

    def _reconstruction_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        masks = self._holes_of(batch).masks
        filled = self.generator(batch.images, masks)
        return self._weighted(reconstruction_loss(filled, batch.images, masks, self.settings.hole_weight))

    def _generator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        masks, corners = self._holes_of(batch)
        filled = self.generator(batch.images, masks)
        fake = paste(batch.images, filled.refined, masks)
        scores = self.critic(fake, crop_around(fake, corners, self.image_size // 2))
        adversarial = torch.stack([wasserstein_generator_loss(widened(score)) for score in scores]).sum()
        reconstruction = reconstruction_loss(filled, batch.images, masks, self.settings.hole_weight)
        return self._weighted(reconstruction, adversarial)

    def _weighted(self, reconstruction: Tensor, adversarial: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 9, plus Eq. 1 with its weight; `adversarial` only in the second phase."""
        loss = self.settings.reconstruction_weight * reconstruction
        logged = {"generator/reconstruction": reconstruction}
        if adversarial is not None:
            loss = loss + self.settings.adversarial_weight * adversarial
            logged["generator/adversarial"] = adversarial
        orthogonality = orthogonality_loss(self.generator)
        logged |= {"generator/loss": loss, "generator/orthogonality": orthogonality}
        return loss + self.config.optim.orthogonality_weight * orthogonality, logged

    def _critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 10 for the whole image plus Eq. 10 for the local crop."""
        (masks, corners), side = self._holes_of(batch), self.image_size // 2
        with torch.no_grad():
            fake = paste(batch.images, self.generator(batch.images, masks).refined, masks)
        both = torch.cat([batch.images, fake.to(batch.images.dtype)])
        scores = self.critic(both, crop_around(both, corners.repeat(2, 1), side))
        distance = -torch.stack([wasserstein_critic_loss(*widened(score).chunk(2)) for score in scores]).sum()

        with no_autocast(both):  # the gradient of a gradient keeps its precision
            real, fake = both.chunk(2)
            shares = draw_for_images(len(real), lambda count: torch.rand(count, 1, 1, 1, device=real.device))
            mixed = shares * fake + (1 - shares) * real
            # Leaves of their own, so that each critic answers for what it was shown.
            crops = crop_around(mixed, corners, side).requires_grad_()
            mixed.requires_grad_()
            whole, local = self.critic(mixed, crops)
            inside = (masks, crop_around(masks, corners, side)) if self.settings.gp_mask else (None, None)
            penalty = gradient_penalty(whole, mixed, inside[0]) + gradient_penalty(local, crops, inside[1])
        loss = -distance + self.settings.gradient_penalty_weight * penalty
        return loss, {"critic/loss": loss, "critic/distance": distance, "critic/gradient_penalty": penalty}

    def _held_out_batches(self, count: int) -> Iterator[tuple[Tensor, Holes]]:
        """The first `count` held-out images with their masks, as many at a time as in training."""
        device = next(self.generator.parameters()).device
        size = max(1, self.config.run.batch_size // self.config.run.accumulate)
        for start in range(0, min(count, len(self.held_out)), size):
            pixels = self.held_out[start : min(start + size, count)]
            images = to_float(pixels.to(device))
            yield images, self._holes(self._VALIDATION_SEED, start, len(images), device)

    @torch.no_grad()
    def validate(self, images_seen: int, group: ProcessGroup) -> dict[str, float]:
        """Mean L1 in [-1, 1] of the averaged generator on the held-out images, which may end the first phase.

        Each process takes its share of the images, and all of them know the result. l1: the refined image as it is,
        the whole of it; coarse_l1: the same of the first stage; hole_l1: the refined one, inside the holes.
        """
        if not len(self.held_out):
            return {}
        sums = group.together(lambda: self._errors_on_held_out(group))
        group.average([sums])
        l1, coarse_l1, hole_l1 = (sums * group.count / len(self.held_out)).tolist()
        self.switch.observe(l1, images_seen)
        phase = 2 if self._is_adversarial(images_seen) else 1
        return {
            "validation/l1": l1,
            "validation/coarse_l1": coarse_l1,
            "validation/hole_l1": hole_l1,
            "validation/phase": phase,
        }

    def _errors_on_held_out(self, group: ProcessGroup) -> Tensor:
        """Sums of the three errors over this process's share of the held-out images, [3]."""
        sums = torch.zeros(3, dtype=torch.float64)
        batches = self._held_out_batches(len(self.held_out))
        for images, (masks, _) in itertools.islice(batches, group.rank, None, group.count):
            coarse, refined = self.average.network(images, masks)
            coarse_error, error = ((stage.float() - images).abs().mean(1, keepdim=True) for stage in (coarse, refined))
            hole = (error * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3))
            means = (error.mean((1, 2, 3)), coarse_error.mean((1, 2, 3)), hole)
            sums += torch.stack([mean.sum() for mean in means]).cpu()
        return sums

    @torch.no_grad()
    def sample_grid(self, *, columns: int = 8) -> Tensor:
        """A held-out image a column: with its hole, coarse, refined, pasted, and the truth; [5 * columns, 3, S, S].

        Columns for which there is no image are grey.
        """
        rows: list[list[Tensor]] = [[] for _ in range(5)]
        for images, (masks, _) in self._held_out_batches(columns):
            coarse, refined = (stage.float() for stage in self.average.network(images, masks))
            shown = (images * (1 - masks) + masks, coarse, refined, paste(images, refined, masks), images)
            for row, part in zip(rows, shown, strict=True):
                row += part
        missing = [torch.zeros(3, self.image_size, self.image_size)] * (columns - len(rows[0]))
        return torch.stack([image.cpu() for row in rows for image in [*row, *missing]])

    @torch.no_grad()
    def layout_statistics(self, batch: Batch) -> dict[str, float | list[float]]:
        """Of the averaged generator on the batch with its masks."""
        with observe_layouts(self.average.network) as seen:
            self.average.network(batch.images, self._holes_of(batch).masks)
        return describe_layouts("generator", self.average.network, seen)
