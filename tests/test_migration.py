"""Other people's weights make with our networks what theirs make: their forward passes, stated anew here from the facts
(names of tensors, order of operations), on random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from attnorm import cli, load
from attnorm.inference import Inpainter
from attnorm.migration import MigrationError, convert

State = dict[str, Tensor]


def random(generator: torch.Generator) -> Callable[..., Tensor]:
    return lambda *shape, around=0.0, by=1.0: around + by * torch.randn(*shape, generator=generator)


def spectral(state: State, name: str, form: str) -> None:
    """A layer's weight with the vectors of its spectral norm, as torch keeps them or as BigGAN-PyTorch does."""
    if form == "none":
        return
    weight = state[f"{name}.weight"]
    u, _, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    if form == "own":
        state[f"{name}.u0"], state[f"{name}.sv0"] = u[:, 0][None] + 0.1, torch.ones(1)
    else:
        state[f"{name}.weight_orig"] = state.pop(f"{name}.weight")
        state[f"{name}.weight_u"], state[f"{name}.weight_v"] = u[:, 0], vh[0]


def effective(state: State, name: str) -> Tensor:
    if f"{name}.weight_orig" in state:
        weight, u, v = (state[f"{name}.weight_{part}"].double() for part in ("orig", "u", "v"))
        return weight / (u @ weight.flatten(1) @ v)
    weight = state[f"{name}.weight"].double()
    if f"{name}.u0" not in state:
        return weight
    v = F.normalize(state[f"{name}.u0"].double() @ weight.flatten(1))
    u = F.normalize(v @ weight.flatten(1).T)
    return weight / (v @ weight.flatten(1).T @ u.T)[0, 0]


def conv(state: State, name: str, x: Tensor) -> Tensor:
    bias = state[f"{name}.bias"].double() if f"{name}.bias" in state else None
    weight = effective(state, name)
    return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)


def attend(state: State, name: str, x: Tensor) -> Tensor:
    query, key, value = (conv(state, f"{name}.{part}", x) for part in ("theta", "phi", "g"))
    key, value = (F.max_pool2d(map, 2).flatten(2) for map in (key, value))
    weights = torch.softmax(query.flatten(2).mT @ key, 2)
    attended = (value @ weights.mT).unflatten(2, x.shape[2:])
    return x + state[f"{name}.gamma"].double() * conv(state, f"{name}.o", attended)


def attention_state(state: State, name: str, channels: int, form: str, draw: Callable[..., Tensor]) -> None:
    shapes = {"theta": (channels // 8, channels), "phi": (channels // 8, channels)}
    shapes |= {"g": (channels // 2, channels), "o": (channels, channels // 2)}
    for part, shape in shapes.items():
        state[f"{name}.{part}.weight"] = draw(*shape, 1, 1, by=0.3)
        spectral(state, f"{name}.{part}", form)
    state[f"{name}.gamma"] = torch.tensor(0.7)


# torch-mimicry


def mimicry_state(channels: list[int], classes: int, form: str, attention: int) -> State:
    draw = random(torch.Generator().manual_seed(len(channels)))
    state: State = {"l1.weight": draw(16 * channels[0], 6, by=0.4), "l1.bias": draw(16 * channels[0])}
    spectral(state, "l1", form)
    for number, (before, after) in enumerate(pairwise(channels), 2):
        block = f"block{number}"
        for name, wide, kernel in (("c1", before, 3), ("c2", after, 3), ("c_sc", before, 1)):
            state[f"{block}.{name}.weight"] = draw(after, wide, kernel, kernel, by=0.2)
            state[f"{block}.{name}.bias"] = draw(after)
            spectral(state, f"{block}.{name}", form)
        for name, width in (("b1", before), ("b2", after)):
            norm = f"{block}.{name}.bn" if classes else f"{block}.{name}"
            state |= {f"{norm}.running_mean": draw(width), f"{norm}.running_var": draw(width).square() + 0.5}
            state[f"{norm}.num_batches_tracked"] = torch.tensor(7)
            if classes:
                state[f"{block}.{name}.embed.weight"] = draw(classes, 2 * width, around=0.5)
            else:
                state |= {f"{norm}.weight": draw(width, around=1.0), f"{norm}.bias": draw(width)}
    last = len(channels) + 1
    if attention:
        attention_state(state, "attn_block", channels[attention], form, draw)
    for kind in ("weight", "bias", "running_mean", "running_var"):
        state[f"b{last}.{kind}"] = draw(channels[-1]).abs() + 0.3
    state |= {f"c{last}.weight": draw(3, channels[-1], 3, 3, by=0.2), f"c{last}.bias": draw(3, by=0.1)}
    spectral(state, f"c{last}", form)
    return state


def mimicry(state: State, z: Tensor, y: Tensor, attention: int) -> Tensor:
    def norm(name: str, x: Tensor) -> Tensor:
        inner = f"{name}.bn" if f"{name}.embed.weight" in state else name
        mean, var = (state[f"{inner}.running_{kind}"].double()[:, None, None] for kind in ("mean", "var"))
        x = (x - mean) / (var + 1e-5).sqrt()
        if inner != name:
            gamma, beta = state[f"{name}.embed.weight"].double()[y].chunk(2, 1)
            return gamma[:, :, None, None] * x + beta[:, :, None, None]
        return x * state[f"{name}.weight"].double()[:, None, None] + state[f"{name}.bias"].double()[:, None, None]

    h = F.linear(z, effective(state, "l1"), state["l1.bias"].double()).view(len(z), -1, 4, 4)
    number = 2
    while f"block{number}.c1.bias" in state:
        block = f"block{number}"
        up = F.interpolate(norm(f"{block}.b1", h).relu(), scale_factor=2, mode="bilinear", align_corners=False)
        r = conv(state, f"{block}.c2", norm(f"{block}.b2", conv(state, f"{block}.c1", up)).relu())
        h = r + conv(state, f"{block}.c_sc", F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False))
        if number - 1 == attention:
            h = attend(state, "attn_block", h)
        number += 1
    return conv(state, f"c{number}", norm(f"b{number}", h).relu()).tanh()


@pytest.mark.parametrize(
    ("channels", "classes", "form", "attention"),
    [
        ([8, 8, 8, 8], 0, "none", 0),
        ([16, 8, 4, 2, 1], 3, "none", 0),
        ([8, 8, 8, 8], 3, "torch", 2),
        ([32, 32, 16, 16, 4, 2], 3, "torch", 3),
    ],
    ids=["SNGAN, 32 pixels", "cGAN-PD, 64 pixels", "SAGAN, 32 pixels", "SAGAN, 128 pixels"],
)
def test_torch_mimicrys_generators(
    channels: list[int], classes: int, form: str, attention: int, tmp_path: Path
) -> None:
    state = mimicry_state(channels, classes, form, attention)
    torch.save({"model_state_dict": state, "optimizer_state_dict": None, "global_step": 5}, tmp_path / "netG.pth")
    z, y = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 2, 1]).clamp_max(max(classes - 1, 0))
    made = convert(tmp_path / "netG.pth").double()(z, y)
    torch.testing.assert_close(made, mimicry(state, z, y, attention), rtol=0, atol=1e-5)
    assert made.std() > 0.1


# BigGAN-PyTorch


def biggan_state(channels: list[int], *, shared: int, part: int, form: str, attention: int) -> State:
    """`part` channels of the latent a norm: 0 without hierarchy; `shared` channels of the embedding: 0 without one."""
    draw = random(torch.Generator().manual_seed(part))
    state: State = {"linear.weight": draw(16 * channels[0], part or 6), "linear.bias": draw(16 * channels[0])}
    spectral(state, "linear", form)
    if shared:
        state["shared.weight"] = draw(3, shared)
    for index, (before, after) in enumerate(pairwise(channels)):
        block = f"blocks.{index}.0"
        for name, wide, kernel in (("conv1", before, 3), ("conv2", after, 3), ("conv_sc", before, 1)):
            state[f"{block}.{name}.weight"] = draw(after, wide, kernel, kernel, by=0.2)
            state[f"{block}.{name}.bias"] = draw(after)
            spectral(state, f"{block}.{name}", form)
        for name, width in (("bn1", before), ("bn2", after)):
            for table in ("gain", "bias"):
                shape = (width, shared + part) if shared else (3, width)
                state[f"{block}.{name}.{table}.weight"] = draw(*shape)
                if shared:
                    spectral(state, f"{block}.{name}.{table}", form)
            inner = f"{block}.{name}.bn" if part else f"{block}.{name}"  # its own batch norm, or torch's
            state |= {f"{inner}.stored_mean": draw(width), f"{inner}.stored_var": draw(width).square() + 0.5}
        if index + 1 == attention:
            attention_state(state, f"blocks.{index}.1", after, form, draw)
    for kind in ("gain", "bias", "stored_mean", "stored_var"):
        state[f"output_layer.0.{kind}"] = draw(channels[-1]).abs() + 0.3
    state |= {"output_layer.2.weight": draw(3, channels[-1], 3, 3, by=0.2), "output_layer.2.bias": draw(3, by=0.1)}
    spectral(state, "output_layer.2", form)
    return state


def biggan(state: State, z: Tensor, y: Tensor) -> Tensor:
    part = state["linear.weight"].shape[1]
    parts = z.split(part, 1)

    def norm(name: str, x: Tensor, index: int) -> Tensor:
        inner = f"{name}.bn" if f"{name}.bn.stored_mean" in state else name
        mean, var = (state[f"{inner}.stored_{kind}"].double()[:, None, None] for kind in ("mean", "var"))
        if "shared.weight" in state:
            embedded = state["shared.weight"].double()[y]
            told = torch.cat([embedded, parts[index + 1]], 1) if len(parts) > 1 else embedded
            gain, bias = (F.linear(told, effective(state, f"{name}.{table}")) for table in ("gain", "bias"))
        else:
            gain, bias = (state[f"{name}.{table}.weight"].double()[y] for table in ("gain", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * (1 + gain)[:, :, None, None] + bias[:, :, None, None]

    h = F.linear(parts[0], effective(state, "linear"), state["linear.bias"].double()).view(len(z), -1, 4, 4)
    index = 0
    while f"blocks.{index}.0.conv1.bias" in state:
        block = f"blocks.{index}.0"
        up = F.interpolate(norm(f"{block}.bn1", h, index).relu(), scale_factor=2)
        r = conv(state, f"{block}.conv2", norm(f"{block}.bn2", conv(state, f"{block}.conv1", up), index).relu())
        h = r + conv(state, f"{block}.conv_sc", F.interpolate(h, scale_factor=2))
        if f"blocks.{index}.1.gamma" in state:
            h = attend(state, f"blocks.{index}.1", h)
        index += 1
    mean, var, gain, bias = (
        state[f"output_layer.0.{kind}"].double()[:, None, None]
        for kind in ("stored_mean", "stored_var", "gain", "bias")
    )
    return conv(state, "output_layer.2", ((h - mean) / (var + 1e-5).sqrt() * gain + bias).relu()).tanh()


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        ([16, 16, 8, 8, 8, 1], {"shared": 5, "part": 2, "form": "own", "attention": 4}),
        ([8, 8, 8, 8], {"shared": 5, "part": 0, "form": "own", "attention": 0}),
        ([16, 8, 4, 4, 4], {"shared": 0, "part": 0, "form": "none", "attention": 0}),
    ],
    ids=["BigGAN, 128 pixels", "SAGAN's embedding, 32 pixels", "SNGAN, 64 pixels"],
)
def test_biggan_pytorchs_generators(channels: list[int], options: dict[str, int | str], tmp_path: Path) -> None:
    state = biggan_state(channels, **options)
    safetensors.torch.save_file(state, tmp_path / "G_ema.safetensors")
    network = convert(tmp_path / "G_ema.safetensors").double()
    z, y = torch.randn(3, network.latent_dim, dtype=torch.float64), torch.tensor([0, 2, 1])
    made = network(z, y)
    torch.testing.assert_close(made, biggan(state, z, y), rtol=0, atol=1e-5)
    assert made.std() > 0.1 and network.latent_dim == (2 * 6 if options["part"] else 6)


# DeepFill v1


LAYERS = [("1", 5, 1, 1), ("2_downsample", 3, 2, 1), ("3", 3, 1, 1), ("4_downsample", 3, 2, 1), ("5", 3, 1, 1)]
LAYERS += [("6", 3, 1, 1)]
DILATED = [(f"{number}_atrous", 3, 1, 2 ** (number - 6)) for number in (7, 8, 9, 10)]
DECODER = [(str(number), 3, 1, 1) for number in range(11, 18)]
WIDTHS = {"": (1, 2, 2, 4, 4, 4), "x": (1, 1, 2, 2, 4, 4), "pm": (1, 1, 2, 4, 4, 4)}
DECODED = (4, 4, 2, 2, 1, 0.5)


def deepfill_state(width: int, *, is_tensorflow: bool) -> State:
    draw = random(torch.Generator().manual_seed(width))
    state: State = {}

    def add(stage: str, prefix: str, name: str, before: int, after: int, kernel: int) -> None:
        weight, bias = draw(after, before, kernel, kernel, by=1.2 / (before * kernel**2) ** 0.5), draw(after, by=0.1)
        if is_tensorflow:
            layer = f"{prefix}conv{name}"
            layer = f"{layer}_upsample/{layer}_upsample_conv" if name in ("13", "15") else layer
            state[f"inpaint_net/{layer}/kernel"] = weight.permute(2, 3, 1, 0).contiguous()
            state[f"inpaint_net/{layer}/bias"] = bias
        else:
            layer = f"{stage}_generator.{prefix.removeprefix('x')}conv{name}.conv"
            state.update({f"{layer}.weight": weight, f"{layer}.bias": bias})

    for prefix, widths in WIDTHS.items():
        stage, before = "fine" if prefix else "coarse", 5
        for (name, kernel, _, _), after in zip(LAYERS, widths, strict=True):
            add(stage, prefix, name, before, after * width, kernel)
            before = after * width
        for name, *_ in DILATED if prefix != "pm" else [("9",), ("10",)]:
            add(stage, prefix, name, 4 * width, 4 * width, 3)
    for stage, prefix, before in (("coarse", "", 4 * width), ("fine", "all", 8 * width)):
        for (name, *_), after in zip(DECODER, (*(int(part * width) for part in DECODED), 3), strict=True):
            add(stage, prefix, name, before, after, 3)
            before = after
    return state


def deepfill(state: State, image: Tensor, mask: Tensor, *, is_tensorflow: bool) -> tuple[Tensor, Tensor]:
    def layer(stage: str, prefix: str, spec: tuple[str, int, int, int], x: Tensor) -> Tensor:
        name, kernel, stride, dilation = spec
        if is_tensorflow:
            place = f"{prefix}conv{name}"
            place = f"{place}_upsample/{place}_upsample_conv" if name in ("13", "15") else place
            weight, bias = (state[f"inpaint_net/{place}/{kind}"].double() for kind in ("kernel", "bias"))
            weight = weight.permute(3, 2, 0, 1)
        else:
            place = f"{stage}_generator.{prefix.removeprefix('x')}conv{name}.conv"
            weight, bias = (state[f"{place}.{kind}"].double() for kind in ("weight", "bias"))
        around = dilation * (kernel // 2)
        if is_tensorflow and stride == 2:  # of even sides
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, 2)
        return F.conv2d(x, weight, bias, stride, around, dilation)

    def decode(stage: str, prefix: str, x: Tensor) -> Tensor:
        for spec in DECODER:
            if spec[0] in ("13", "15"):
                x = F.interpolate(x, scale_factor=2)
            x = layer(stage, prefix, spec, x)
            x = F.elu(x) if spec[0] != "17" else x.clamp(-1, 1)
        return x

    hole = mask.double()
    told = torch.cat([torch.ones_like(hole), hole], 1)
    x = torch.cat([image * (1 - hole), told], 1)
    for spec in (*LAYERS, *DILATED):
        x = F.elu(layer("coarse", "", spec, x))
    coarse = decode("coarse", "", x)
    start = torch.cat([coarse * hole + image * (1 - hole), told], 1)
    dilated = start
    for spec in (*LAYERS, *DILATED):
        dilated = F.elu(layer("fine", "x", spec, dilated))
    x = start
    for spec in LAYERS:
        x = layer("fine", "pm", spec, x)
        x = x.relu() if spec[0] == "6" else F.elu(x)
    x = contextual(x, hole, is_tensorflow=is_tensorflow)
    for name in ("9", "10"):
        x = F.elu(layer("fine", "pm", (name, 3, 1, 1), x))
    return coarse, decode("fine", "all", torch.cat([dilated, x], 1))


def nearest(x: Tensor, factor: int, *, is_tensorflow: bool) -> Tensor:
    """Reduced by a factor; TensorFlow's with its corners aligned."""
    for axis in (2, 3):
        side, small = x.shape[axis], x.shape[axis] // factor
        kept = torch.arange(small) * ((side - 1) / (small - 1)) + 0.5 if is_tensorflow else torch.arange(small) * factor
        x = x.index_select(axis, kept.floor().long())
    return x


def contextual(x: Tensor, hole: Tensor, *, is_tensorflow: bool) -> Tensor:
    """Of one image, by convolutions whose kernels are its patches."""
    small = nearest(x, 2, is_tensorflow=is_tensorflow)
    sides = small.shape[2:]
    if is_tensorflow:
        missing = nearest(nearest(hole, 4, is_tensorflow=True), 2, is_tensorflow=True)
    else:
        missing = nearest(hole, 8, is_tensorflow=False)
    known = (F.conv2d(missing, torch.ones(1, 1, 3, 3, dtype=x.dtype), padding=1) == 0).double().reshape(1, -1, 1, 1)
    patches = F.unfold(small, 3, padding=1)[0].T.reshape(-1, x.shape[1], 3, 3)
    if is_tensorflow:
        norms = patches.square().sum((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-4)
    else:
        norms = (patches.square() + 1e-4).sum((1, 2, 3), keepdim=True).sqrt()
    scores = F.conv2d(small, patches / norms, padding=1)  # [1, sources, H/2, W/2]
    for _ in range(2):
        count = scores.shape[1]
        scores = F.conv2d(scores.reshape(1, 1, count, count), torch.eye(3, dtype=x.dtype)[None, None], padding=1)
        scores = scores.reshape(*sides, *sides).permute(1, 0, 3, 2)
        sides = sides[::-1]
        scores = scores.reshape(1, count, *sides)
    weights = torch.softmax(scores * known * 10, 1) * known
    pasted = F.unfold(x, 4, stride=2, padding=1)[0].T.reshape(-1, x.shape[1], 4, 4)
    return F.conv_transpose2d(weights, pasted, stride=2, padding=1) / 4


@pytest.mark.parametrize("is_tensorflow", [True, False], ids=["the release", "generative-inpainting-pytorch"])
def test_deepfills_generator(is_tensorflow: bool, tmp_path: Path) -> None:
    state = deepfill_state(4, is_tensorflow=is_tensorflow)
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    network = convert(tmp_path / "weights.safetensors").double()
    image = 2 * torch.rand(1, 3, 64, 80, dtype=torch.float64) - 1
    mask = torch.zeros(1, 1, 64, 80, dtype=torch.float64)
    mask[:, :, 13:37, 22:51], mask[:, :, 5, :60] = 1, 1  # across the grid of eight, and a line that nearest may miss
    expected = deepfill(state, image, mask, is_tensorflow=is_tensorflow)
    for made, wanted in zip(network(image, mask), expected, strict=True):
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-5)
    assert expected[1].abs().lt(1).double().mean() > 0.5 and expected[1].std() > 0.1


# The command


def test_the_command_writes_a_folder_that_stands_where_a_run_does(tmp_path: Path, refused: Callable[..., str]) -> None:
    torch.save(mimicry_state([8, 8, 8, 8], 3, "none", 0), tmp_path / "G.pth")
    (tmp_path / "classes.txt").write_text("ape\nbee\ncow\n")
    arguments = ["convert", tmp_path / "G.pth", "--out", tmp_path / "mimicry", "--classes", tmp_path / "classes.txt"]
    cli.main([*map(str, arguments)])
    assert load(tmp_path / "mimicry").classes == ("ape", "bee", "cow")
    assert "converted from torch-mimicry" in (tmp_path / "mimicry/README.md").read_text()
    assert "already there" in refused(arguments)

    safetensors.torch.save_file(deepfill_state(2, is_tensorflow=True), tmp_path / "deepfill.safetensors")
    cli.main([*map(str, ["convert", tmp_path / "deepfill.safetensors", "--out", tmp_path / "deepfill"])])
    assert Inpainter(tmp_path / "deepfill").header.config.model.contextual_release == "tensorflow"


def test_what_cannot_be_represented_is_refused_with_the_reason(tmp_path: Path) -> None:
    biggan = biggan_state([8, 8, 8, 8], shared=0, part=0, form="none", attention=0)
    sngan48 = mimicry_state([8, 4, 2, 1], 0, "none", 0)
    sngan48["l1.weight"], sngan48["l1.bias"] = torch.zeros(36 * 8, 6), torch.zeros(36 * 8)
    deepfill2 = deepfill_state(2, is_tensorflow=True)
    deepfill2["inpaint_net/xconv1/kernel"] = torch.zeros(5, 5, 3, 2)
    for state, message in (
        (biggan | {"blocks.0.0.conv3.weight": torch.zeros(1)}, "this is a BigGAN-deep, of bottleneck blocks"),
        (sngan48, "makes 48 pixels from a map of 6x6; expected 32, 64, 128, 256 pixels from 4x4"),
        (deepfill2, "this is DeepFill v2, of gated convolutions"),
        (biggan | {"extra.weight": torch.zeros(1)}, "1 tensors are none of BigGAN-PyTorch's generator, extra.weight"),
        ({name: biggan[name] for name in biggan if "bn1" not in name}, r"no tensor blocks\.0\.0\.bn1\.gain\.weight"),
        ({"a": torch.zeros(1)}, "none of the known networks: it begins with a; expected a generator of torch-mimicry"),
    ):
        safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
        with pytest.raises(MigrationError, match=message):
            convert(tmp_path / "weights.safetensors")
