"""Conditional batch normalization: one scale and shift per class (de Vries et al., 2017; Miyato and Koyama, 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.layers.batch_norm import BatchNorm2d


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm without affine, then gamma_y * x + beta_y, from tables that start at 1 and 0.

    The condition is a class label per image, or a mixture of classes: its gamma and beta are then the linear
    combination, which is how the paper interpolates between categories (section 5.2, Figure 8).

    With a `latent_dim` Z, a linear map of the latent is added to gamma_y and beta_y, as in BigGAN (Brock et al., 2019).
    """

    def __init__(self, num_features: int, num_classes: int, *, latent_dim: int = 0) -> None:
        super().__init__()
        self.norm = BatchNorm2d(num_features, affine=False)
        self.gamma = nn.Embedding(num_classes, num_features)
        self.beta = nn.Embedding(num_classes, num_features)
        nn.init.ones_(self.gamma.weight)
        nn.init.zeros_(self.beta.weight)
        self.of_latent = nn.Linear(latent_dim, 2 * num_features, bias=False) if latent_dim else None
        if self.of_latent is not None:
            nn.init.normal_(self.of_latent.weight, std=0.25 / latent_dim**0.5)  # gamma then varies by a quarter

    def forward(self, x: Tensor, condition: Tensor, z: Tensor | None = None) -> Tensor:
        """`x` is [N, C, H, W]; `condition` int64 labels [N], or float mixtures [N, num_classes] (rows sum to 1).

        `z`, the latents [N, Z], is read only with a `latent_dim`.
        """
        if condition.is_floating_point():
            gamma, beta = condition @ self.gamma.weight, condition @ self.beta.weight
        else:
            gamma, beta = F.embedding(condition, self.gamma.weight), F.embedding(condition, self.beta.weight)
        if self.of_latent is not None:
            more_gamma, more_beta = self.of_latent(z).chunk(2, 1)
            gamma, beta = gamma + more_gamma, beta + more_beta
        gamma, beta = (table.to(x.dtype)[:, :, None, None] for table in (gamma, beta))
        return torch.addcmul(beta, gamma, self.norm(x))
