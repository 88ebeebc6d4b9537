"""Weights of other people's networks, as ours: torch-mimicry's, BigGAN-PyTorch's and DeepFill v1's generators.

What a file holds is told by the names in it. The result computes what their network does in evaluation mode (held by
tests on random weights); spectral norm is worked into the weights. What ours cannot represent is refused.
"""

# Y classes, C channels, Z latent dimension.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm.config import ClassConditionalConfig, InpaintingConfig, UserError
from attnorm.hub import header_of
from attnorm.models.class_conditional import Generator
from attnorm.models.inpainting import InpaintingGenerator
from attnorm.registry import build_generator
from attnorm.system.published_weights import read_weights

Model = ClassConditionalConfig | InpaintingConfig
SIZES = {3: 32, 4: 64, 5: 128, 6: 256}  # pixels, by the number of up-blocks from 4x4

# DeepFill v1's convolutions in the order in which ours compute them: up to the last dilated one, then the decoder.
ENCODER = ["conv1", "conv2_downsample", "conv3", "conv4_downsample", "conv5", "conv6"]
DILATED = [f"conv{number}_atrous" for number in (7, 8, 9, 10)]
DECODER = [f"conv{number}" for number in range(11, 18)]


class MigrationError(UserError):
    """Weights that are none of the known ones, or of a network that ours cannot represent."""


class Source:
    """Tensors by their names; each is taken once, and what is left over is an error."""

    def __init__(self, tensors: Mapping[str, Tensor], what: str) -> None:
        self.tensors, self.what = {name: tensor.float() for name, tensor in tensors.items()}, what

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise MigrationError(f"there is no tensor {name}, which {self.what} has; expected all of its generator")
        return self.tensors.pop(name)

    def weight(self, layer: str) -> Tensor:
        """That of a convolution or linear layer, divided by its spectral norm in any of the forms that this has:
        torch's (weight_orig, _u, _v), or one more power iteration in evaluation too, from u0 or sn_u.
        """
        if f"{layer}.weight_orig" in self:
            weight, u, v = (self.take(f"{layer}.weight_{part}") for part in ("orig", "u", "v"))
        else:
            weight = self.take(f"{layer}.weight")
            start = next((name for name in (f"{layer}.u0", f"{layer}.sn_u") if name in self), "")
            if not start:
                return weight
            matrix = weight.flatten(1)
            v = F.normalize(self.take(start)[0] @ matrix, dim=0)
            u = F.normalize(matrix @ v, dim=0)
        return weight / (u @ weight.flatten(1) @ v)

    def width(self, layer: str) -> int:
        """Channels that go in; 0 without such a layer."""
        return self.tensors[f"{layer}.weight"].shape[1] if f"{layer}.weight" in self else 0

    def layer(self, layer: str, ours: str) -> dict[str, Tensor]:
        """Weight and, where there is one, bias."""
        bias = {f"{ours}.bias": self.take(f"{layer}.bias")} if f"{layer}.bias" in self else {}
        return {f"{ours}.weight": self.weight(layer), **bias}

    def moments(self, norm: str, ours: str) -> dict[str, Tensor]:
        """Running mean and variance, by any of the names that these have."""
        found = {f"{ours}.num_batches_tracked": torch.zeros((), dtype=torch.int64)}
        for kind in ("mean", "var"):
            names = [f"{norm}.{middle}_{kind}" for middle in ("running", "stored", "bn.running", "bn.stored")]
            found[f"{ours}.running_{kind}"] = self.take(next((name for name in names if name in self), names[0]))
        return found

    def attention(self, block: str, ours: str) -> dict[str, Tensor]:
        """SAGAN's block, as BigGAN-PyTorch and torch-mimicry name its parts."""
        names = {"theta": "query", "phi": "key", "g": "value", "o": "project"}
        tensors = {f"{ours}.{name}.weight": self.weight(f"{block}.{theirs}") for theirs, name in names.items()}
        return {**tensors, f"{ours}.gate": self.take(f"{block}.gamma").reshape(1)}

    def require_empty(self) -> None:
        """What only training used may be left."""
        logs = ("num_batches_tracked", "accumulation_counter", "sn_sigma", ".sv0")
        left = [name for name in self.tensors if not name.endswith(logs)]
        if left:
            raise MigrationError(
                f"{len(left)} tensors are none of {self.what}'s generator, {left[0]} for one; expected a generator of "
                "it alone, as its authors have it"
            )


def convert(file: Path, classes: tuple[str, ...] = ()) -> Generator | InpaintingGenerator:
    """The network in `file`, in evaluation mode, ready for `save_pretrained`.

    Args:
        file: safetensors, or torch's, which is read by its restricted reader: it makes tensors and calls nothing.
        classes: Their names, in the order of the labels; none: their numbers.

    Raises:
        MigrationError: it is none of the known networks, or one that ours cannot represent; the message says why.
    """
    tensors = read_weights(file, part="model_state_dict")
    # The prefixes of a network within another one: of torch's data parallelism, of DeepFill's graph.
    tensors = {name.removeprefix("module.").removeprefix("inpaint_net/"): part for name, part in tensors.items()}
    what, read = next(((what, read) for sign, what, read in READERS if sign in tensors), ("", None))
    if read is None:
        raise MigrationError(
            f"{file} holds none of the known networks: it begins with {', '.join(list(tensors)[:3]) or 'nothing'}; "
            f"expected a generator of {', '.join(dict.fromkeys(what for _, what, _ in READERS))}"
        )
    source = Source(tensors, what)
    settings, ours = read(source)
    source.require_empty()
    network = build_generator(settings)
    try:
        network.load_state_dict(ours)
    except RuntimeError as error:
        raise MigrationError(f"{file} is not of the shapes of {what}'s generator: {error}") from error
    if isinstance(settings, ClassConditionalConfig) and classes and len(classes) != settings.num_classes:
        raise MigrationError(f"{len(classes)} names of classes for a network of {settings.num_classes}; name each once")
    note = f"weights converted from {what}'s; the file says nothing of the data"
    network.header = header_of(settings, classes, note)
    return network.eval()


def _settings(channels: list[int], first: Tensor, what: str, attention: list[int], **more: Any) -> Model:
    """Of a generator whose maps have these channels, from its 4x4 one, made by the linear layer's weight `first`."""
    if len(channels) - 1 not in SIZES or first.shape[0] != 16 * channels[0]:
        side = math.isqrt(first.shape[0] // channels[0])
        raise MigrationError(
            f"this generator of {what} makes {side << (len(channels) - 1)} pixels from a map of {side}x{side}; "
            f"expected {', '.join(map(str, SIZES.values()))} pixels from 4x4: ours have no others"
        )
    width = math.gcd(*channels)
    return ClassConditionalConfig(
        image_size=SIZES[len(channels) - 1],
        width=width,
        g_channels=tuple(channel // width for channel in channels),
        context="self_attention" if attention else "none",
        an_blocks=tuple(attention),
        g_spectral_norm=False,
        **more,
    )


def read_torch_mimicry(source: Source) -> tuple[Model, dict[str, Tensor]]:
    """SNGAN, SAGAN, cGAN-PD and the others with their residual generator (DCGAN, SSGAN, InfoMax-GAN, WGAN-GP): bilinear
    doubling; of those without classes, the norms' affine parameters are the row of a single class.
    """
    blocks = [f"block{number}" for number in range(2, 9) if f"block{number}.c1.bias" in source]
    last = len(blocks) + 2
    first = source.weight("l1")
    ours = {"linear.weight": first, "linear.bias": source.take("l1.bias")}
    channels = []
    for index, block in enumerate(blocks):
        into = f"blocks.{index}"
        ours |= source.layer(f"{block}.c1", f"{into}.conv1") | source.layer(f"{block}.c2", f"{into}.conv2")
        ours |= source.layer(f"{block}.c_sc", f"{into}.shortcut")
        for number in (1, 2):
            norm, to = f"{block}.b{number}", f"{into}.norm{number}"
            if f"{norm}.embed.weight" in source:
                gamma, beta = source.take(f"{norm}.embed.weight").chunk(2, 1)
            else:
                gamma, beta = (source.take(f"{norm}.{kind}")[None] for kind in ("weight", "bias"))
            ours |= {f"{to}.gamma.weight": gamma, f"{to}.beta.weight": beta} | source.moments(norm, f"{to}.norm")
        channels += [ours[f"{into}.conv1.weight"].shape[1]] if not index else []
        channels.append(ours[f"{into}.conv2.weight"].shape[0])
    # Its SAGANs have the block behind the second up-block of three, or the third of five.
    attention = [(len(blocks) + 1) // 2] if "attn_block.gamma" in source else []
    if attention:
        ours |= source.attention("attn_block", f"blocks.{attention[0] - 1}.after")
    ours |= {f"norm.{kind}": source.take(f"b{last}.{kind}") for kind in ("weight", "bias")}
    ours |= source.moments(f"b{last}", "norm") | source.layer(f"c{last}", "to_rgb")
    num_classes = len(ours["blocks.0.norm1.gamma.weight"])
    more = {"num_classes": num_classes, "latent_dim": first.shape[1], "upsampling": "bilinear"}
    return _settings(channels, first, source.what, attention, **more), ours


def read_biggan(source: Source) -> tuple[Model, dict[str, Tensor]]:
    """BigGAN, SAGAN and SNGAN of BigGAN-PyTorch, with a shared embedding of the classes or without, with a hierarchical
    latent or without.

    Our norms have a row a class and a linear map of the whole latent. So the shared embedding is multiplied out, and a
    linear map of a part of the latent gets zeros for the others, as does the first layer.
    """
    if "blocks.0.0.conv3.weight" in source:
        raise MigrationError("this is a BigGAN-deep, of bottleneck blocks, which ours has not; expected a BigGAN")
    count = sum(f"blocks.{index}.0.conv1.bias" in source for index in range(8))
    shared = source.take("shared.weight") if "shared.weight" in source else None
    ours = source.layer("linear", "linear")
    first = ours["linear.weight"]
    # Of a hierarchical latent the first part goes into the first layer, each of the others into the norms of a block.
    latent_dim = part = first.shape[1]
    is_hierarchical = shared is not None and source.width("blocks.0.0.bn1.gain") > shared.shape[1]
    if is_hierarchical:
        latent_dim = part * (count + 1)
        ours["linear.weight"] = F.pad(first, (0, latent_dim - part))
    channels, attention = [], []
    for index in range(count):
        block, into = f"blocks.{index}.0", f"blocks.{index}"
        for theirs, name in {"conv1": "conv1", "conv2": "conv2", "conv_sc": "shortcut"}.items():
            ours |= source.layer(f"{block}.{theirs}", f"{into}.{name}")
        for number in (1, 2):
            norm, to = f"{block}.bn{number}", f"{into}.norm{number}"
            gain, bias = source.weight(f"{norm}.gain"), source.weight(f"{norm}.bias")
            if shared is not None:
                of_latent = torch.cat([gain, bias])[:, shared.shape[1] :]
                gain, bias = (shared @ table[:, : shared.shape[1]].T for table in (gain, bias))
                if is_hierarchical:
                    before = part * (index + 1)
                    ours[f"{to}.of_latent.weight"] = F.pad(of_latent, (before, latent_dim - before - part))
            ours |= {f"{to}.gamma.weight": 1 + gain, f"{to}.beta.weight": bias} | source.moments(norm, f"{to}.norm")
        if f"blocks.{index}.1.gamma" in source:
            attention.append(index + 1)
            ours |= source.attention(f"blocks.{index}.1", f"{into}.after")
        channels += [ours[f"{into}.conv1.weight"].shape[1]] if not index else []
        channels.append(ours[f"{into}.conv2.weight"].shape[0])
    ours |= {"norm.weight": source.take("output_layer.0.gain"), "norm.bias": source.take("output_layer.0.bias")}
    ours |= source.moments("output_layer.0", "norm") | source.layer("output_layer.2", "to_rgb")
    num_classes = len(ours["blocks.0.norm1.gamma.weight"])
    more = {"num_classes": num_classes, "latent_dim": latent_dim, "latent_in_norms": is_hierarchical}
    return _settings(channels, first, source.what, attention, **more), ours


def read_deepfill_tensorflow(source: Source) -> tuple[Model, dict[str, Tensor]]:
    """DeepFill v1 as released for TensorFlow; kernels are [k, k, in, out]."""
    if source.tensors.get("xconv1/kernel", torch.empty(1, 1, 5, 1)).shape[2] != 5:
        raise MigrationError("this is DeepFill v2, of gated convolutions, which ours has not; expected DeepFill v1")

    def take(stage: str, name: str) -> tuple[Tensor, Tensor]:
        prefix = {"coarse": "", "dilated_branch": "x", "decoder": "all"}.get(stage, "pm")
        layer = f"{prefix}{name}"
        if name in ("conv13", "conv15"):
            layer = f"{layer}_upsample/{layer}_upsample_conv"
        return source.take(f"{layer}/kernel").permute(3, 2, 0, 1).contiguous(), source.take(f"{layer}/bias")

    return _deepfill(take, "tensorflow")


def read_deepfill_pytorch(source: Source) -> tuple[Model, dict[str, Tensor]]:
    """DeepFill v1 as generative-inpainting-pytorch has it, whose details are others than the release's."""

    def take(stage: str, name: str) -> tuple[Tensor, Tensor]:
        prefix = {"coarse": "", "dilated_branch": "", "decoder": "all"}.get(stage, "pm")
        layer = f"{'coarse' if stage == 'coarse' else 'fine'}_generator.{prefix}{name}.conv"
        return source.take(f"{layer}.weight"), source.take(f"{layer}.bias")

    return _deepfill(take, "pytorch")


def _deepfill(
    take: Callable[[str, str], tuple[Tensor, Tensor]], release: Literal["tensorflow", "pytorch"]
) -> tuple[Model, dict[str, Tensor]]:
    """`take` gives a convolution's weight [out, in, k, k] and bias by our part of the network and its name there."""
    parts = {
        "coarse": [*ENCODER, *DILATED, *DECODER],
        "dilated_branch": [*ENCODER, *DILATED],
        "before_context": ENCODER,
        "after_context": ["conv9", "conv10"],
        "decoder": DECODER,
    }
    layers = {part: [take(part, name) for name in names] for part, names in parts.items()}
    width = len(layers["coarse"][0][1])
    settings = InpaintingConfig(image_size=256, width=width, context="contextual", contextual_release=release)
    with torch.device("meta"):
        network = InpaintingGenerator(settings)
    ours: dict[str, Tensor] = {}
    for part, found in layers.items():
        places = [name for name, layer in getattr(network, part).named_children() if isinstance(layer, nn.Conv2d)]
        for place, (weight, bias) in zip(places, found, strict=True):
            ours |= {f"{part}.{place}.weight": weight, f"{part}.{place}.bias": bias}
    return settings, ours


# A name by which a file is known, whose it is, and what reads it.
READERS = (
    ("block2.c1.bias", "torch-mimicry", read_torch_mimicry),
    ("blocks.0.0.conv1.bias", "BigGAN-PyTorch", read_biggan),
    ("conv1/kernel", "DeepFill v1", read_deepfill_tensorflow),
    ("coarse_generator.conv1.conv.weight", "generative-inpainting-pytorch", read_deepfill_pytorch),
)
