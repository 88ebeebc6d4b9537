"""Batch normalization whose moments may be those of several processes' images, on any device."""

# N images of this process, C channels.

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over processes, which each of them gets; as is that of its gradients. Of any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return SumOverProcesses.apply(grad.contiguous(), ctx.group), None


class BatchNorm2d(nn.BatchNorm2d):
    """torch's batch norm; after `share_moments`, in training, with the moments of the images of several processes.

    That is torch.nn.SyncBatchNorm, but for the devices (a CPU is one) and for the derivatives (of any order). Weights
    and buffers have the names of nn.BatchNorm2d.
    """

    is_shared = False
    group: dist.ProcessGroup | None = None  # None: all processes

    def forward(self, x: Tensor) -> Tensor:
        """`x` is [N, C, H, W], of as many images in every process."""
        if not (self.is_shared and self.training):
            return super().forward(x)
        values = x if x.dtype == torch.float64 else x.float()
        count = x.numel() / self.num_features * dist.get_world_size(self.group)
        mean = SumOverProcesses.apply(values.sum((0, 2, 3)), self.group) / count
        centred = values - mean[:, None, None]  # twice through the data: E[x^2] - E[x]^2 would lose the digits
        var = SumOverProcesses.apply(centred.square().sum((0, 2, 3)), self.group) / count
        self._track(mean.detach(), var.detach() * (count / max(count - 1, 1)))
        scale = (var + self.eps).rsqrt()
        if self.affine:
            return torch.addcmul(self.bias[:, None, None], centred, (scale * self.weight)[:, None, None]).to(x.dtype)
        return (centred * scale[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)


def share_moments(network: nn.Module, group: dist.ProcessGroup | None) -> None:
    """From now on every BatchNorm2d of `network` normalizes by the moments of all processes of `group`; None: of all
    there are.
    """
    for module in network.modules():
        if isinstance(module, BatchNorm2d):
            module.is_shared, module.group = True, group
