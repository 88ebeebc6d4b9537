"""LPIPS (Zhang et al., 2018; version 0.1 on AlexNet): how unlike two images look to a network, calibrated on people.

Its weights are two published files, given by the user: torchvision's AlexNet (alexnet-owt-7be5be79.pth) and LPIPS's own
(weights/v0.1/alex.pth), as they are or as safetensors.
"""

# N images, H height and W width.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import alexnet

from attnorm.config import ConfigError, UserError
from attnorm.system.devices import find_device, temporary_tf32
from attnorm.system.files import hash_file
from attnorm.system.published_weights import read_weights

LAYERS = (1, 4, 7, 9, 11)  # the rectified maps of AlexNet's five convolutions, among its features
CHANNELS = (64, 192, 384, 256, 256)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]


class Lpips(nn.Module):
    """sum over layers l of mean over positions of w_l . (u_l(x) - u_l(y))^2, with u_l = h_l / (|h_l| + 1e-10) the
    features of the l-th layer of unit length at each position.

    Args:
        alexnet_weights: State dict of torchvision's AlexNet, or of its `features`.
        weights: w_l, [1, C_l, 1, 1] each, in the order of LAYERS.
    """

    def __init__(self, alexnet_weights: dict[str, Tensor], weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.features = alexnet().features
        self.features.load_state_dict(
            {name.removeprefix("features."): w for name, w in alexnet_weights.items() if "classifier" not in name}
        )
        shapes = [tuple(weight.shape) for weight in weights]
        if shapes != [(1, channels, 1, 1) for channels in CHANNELS]:
            raise ValueError(f"got weights of {shapes}; expected [1, C, 1, 1] with C of {CHANNELS}")
        self.weights = nn.ParameterList(weights)
        self.protocol = "LPIPS 0.1, AlexNet"
        self.eval().requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """uint8 [N, 3, H, W], twice -> float64 [N] on the CPU; at least 32 pixels a side."""
        device = self.weights[0].device
        with torch.no_grad(), temporary_tf32(False), torch.autocast(device.type, enabled=False):
            maps = zip(*(self._maps(images.to(device)) for images in (first, second)), strict=True)
            total = torch.zeros(len(first), dtype=torch.float64, device=device)
            for weight, (x, y) in zip(self.weights, maps, strict=True):
                total += F.conv2d((x - y).square(), weight).double().mean((1, 2, 3))
        return total.cpu()

    def _maps(self, images: Tensor) -> list[Tensor]:
        shift, scale = (images.new_tensor(values, dtype=torch.float32)[:, None, None] for values in (SHIFT, SCALE))
        h, maps = (images.float() / 127.5 - 1 - shift) / scale, []
        for index, layer in enumerate(self.features[: LAYERS[-1] + 1]):
            # In place, ReLU would change what was kept of the layer before it.
            h = F.relu(h) if isinstance(layer, nn.ReLU) else layer(h)
            if index in LAYERS:
                maps.append(h / (h.norm(dim=1, keepdim=True) + 1e-10))
        return maps


def load_lpips(files: Sequence[Path], *, device: str = "auto") -> Lpips:
    """From its two files, in either order.

    Raises:
        ConfigError: there are not two.
        UserError: they cannot be read without running what is in them, or hold other weights.
    """
    if len(files) != 2:
        raise ConfigError(
            f"--lpips-weights names {len(files)} files; expected two: torchvision's AlexNet (alexnet-owt-7be5be79.pth) "
            "and LPIPS's own (v0.1/alex.pth)"
        )
    states = sorted((read_weights(file) for file in files), key=len)  # LPIPS's own has five tensors, AlexNet sixteen
    own = [states[0].get(f"lin{layer}.model.1.weight") for layer in range(len(LAYERS))]
    try:
        if any(weight is None for weight in own):
            raise ValueError(f"{', '.join(states[0])} are no weights of LPIPS")
        model = Lpips(states[1], [weight for weight in own if weight is not None])
    except (ValueError, RuntimeError) as error:
        named = " and ".join(map(str, files))
        raise UserError(
            f"{named} are not AlexNet's weights and LPIPS's for it ({str(error).splitlines()[0]}); get "
            "alexnet-owt-7be5be79.pth from torchvision and v0.1/alex.pth from LPIPS"
        ) from error
    hashes = ", ".join(sorted(hash_file(file)[:12] for file in files))
    model.protocol = f"{model.protocol}, weights {hashes}"
    return model.to(find_device(device))
