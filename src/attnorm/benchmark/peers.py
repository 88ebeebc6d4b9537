"""A step of the class-conditional task as others make it: the same networks, losses and images, without our switches.

Re-stated from what torch-mimicry and StudioGAN do: recipe-equal, so that only how a step is made differs. Both pass
real and generated images through D one after the other, and take torch's Adam as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from attnorm.config import Config
from attnorm.data.stream import Batch
from attnorm.training.class_conditional import ClassConditionalTask
from attnorm.training.losses import hinge_discriminator_loss, hinge_generator_loss, orthogonality_loss

Step = Callable[[Iterator[Batch]], None]
Peer = Callable[[ClassConditionalTask, Config], Step]


def mimicry(task: ClassConditionalTask, config: Config) -> Step:
    """torch-mimicry: the graph of G is kept while D learns, and D's gradients are made while G learns; every loss is
    read at once; no average.
    """
    of_g, of_d = _adams(task, config)

    def step(batches: Iterator[Batch]) -> None:
        for _ in range(config.optim.d_steps):
            batch = next(batches)
            loss = _loss_of_d(task, config, batch, _fakes(task, batch).detach())
            _update(of_d, loss)
            loss.item()
        loss = _loss_of_g(task, config, next(batches))
        _update(of_g, loss)
        loss.item()

    return step


def studiogan(task: ClassConditionalTask, config: Config) -> Step:
    """StudioGAN: gradients are turned off where they are not needed, and G's weights averaged one after another."""
    of_g, of_d = _adams(task, config)

    def step(batches: Iterator[Batch]) -> None:
        task.generator.requires_grad_(False)
        task.discriminator.requires_grad_(True)
        for _ in range(config.optim.d_steps):
            batch = next(batches)
            _update(of_d, _loss_of_d(task, config, batch, _fakes(task, batch)))
        task.generator.requires_grad_(True)
        task.discriminator.requires_grad_(False)
        _update(of_g, _loss_of_g(task, config, next(batches)))
        _average(task.average.network, task.generator, config.optim.ema_decay)

    return step


PEERS: dict[str, Peer] = {"as torch-mimicry": mimicry, "as StudioGAN": studiogan}


def _adams(task: ClassConditionalTask, config: Config) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    betas = (config.optim.beta1, config.optim.beta2)
    of_g = torch.optim.Adam(task.generator.parameters(), config.optim.g_lr, betas)
    return of_g, torch.optim.Adam(task.discriminator.parameters(), config.optim.d_lr, betas)


def _fakes(task: ClassConditionalTask, batch: Batch) -> Tensor:
    latents = torch.randn(len(batch.labels), task.model.latent_dim, device=batch.labels.device)
    fakes: Tensor = task.generator(latents, batch.labels)
    return fakes


def _loss_of_d(task: ClassConditionalTask, config: Config, batch: Batch, fakes: Tensor) -> Tensor:
    real_scores, fake_scores = (task.discriminator(images, batch.labels)[0] for images in (batch.images, fakes))
    orthogonality = config.optim.orthogonality_weight * orthogonality_loss(task.discriminator)
    return hinge_discriminator_loss(real_scores, fake_scores) + orthogonality


def _loss_of_g(task: ClassConditionalTask, config: Config, batch: Batch) -> Tensor:
    scores = task.discriminator(_fakes(task, batch), batch.labels)[0]
    return hinge_generator_loss(scores) + config.optim.orthogonality_weight * orthogonality_loss(task.generator)


def _update(optimiser: torch.optim.Adam, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


@torch.no_grad()
def _average(average: nn.Module, network: nn.Module, decay: float) -> None:
    for ours, theirs in zip(average.parameters(), network.parameters(), strict=True):
        ours.copy_(theirs.lerp(ours, decay))
    for buffer, its_source in zip(average.buffers(), network.buffers(), strict=True):
        buffer.copy_(its_source)
