"""The inpainting networks: plans, sizes, the swap of the context block, holes, pasting, critics."""

# N batch.

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm import AttentiveNorm2d, SelfAttention2d
from attnorm.config import AttentiveNormConfig, InpaintingConfig
from attnorm.layers.contextual_attention import ContextualAttention
from attnorm.layers.region_norm import RegionNorm2d
from attnorm.layers.resampling import UpConv2d
from attnorm.models.inpainting import Critic, InpaintingGenerator, SameConv2d, crop_around, paste

CONTEXTS = ("an", "an-wide", "contextual", "self_attention", "region", "none")


def small(context: str = "an", **changes: Any) -> InpaintingConfig:
    settings: dict[str, Any] = {"image_size": 32, "width": 4, "context": context, **changes}
    return InpaintingConfig(**{"an": AttentiveNormConfig(num_entities=3, affine=False), **settings})


def build(context: str, dtype: torch.dtype = torch.float64, **changes: Any) -> InpaintingGenerator:
    """A generator in which the context block has an effect: rho and gate not 0, and the entities' t not all equal."""
    torch.manual_seed(0)
    generator = InpaintingGenerator(small(context, **changes)).to(dtype)
    with torch.no_grad():
        for module in generator.modules():
            if isinstance(module, AttentiveNorm2d):
                module.rho.fill_(0.5)
                module.t.copy_(torch.linspace(0.5, 2, module.num_entities))
            elif isinstance(module, SelfAttention2d):
                module.gate.fill_(0.5)
    return generator.eval()


def pictures(num: int = 2, height: int = 32, width: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(num, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2 - 1


def holes(num: int = 2, height: int = 32, width: int = 32) -> Tensor:
    """Another rectangle for each image, at no multiple of anything."""
    mask = torch.zeros(num, 1, height, width, dtype=torch.bool)
    for index in range(num):
        mask[index, :, 3 + 5 * index : 14 + 7 * index, 5 : 13 + 3 * index] = True
    return mask


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def on_meta(kind: type[nn.Module], **settings: Any) -> Any:
    """At the published width, without memory."""
    with torch.device("meta"):
        return kind(InpaintingConfig(**settings))


# Plans

PARAMETERS = {
    "contextual": 3_601_542,  # DeepFill v1
    "none": 3_601_542,
    "an": 3_601_542 + 22_705,
    "an-wide": 3_790_263,  # the authors' released network
    "self_attention": 3_601_542 + 20_481,
    "region": 3_601_542 + 2 * 2 * 128,
}


def test_critics_have_the_published_plan_and_parameters_and_follow_the_image_size() -> None:
    assert num_parameters(on_meta(Critic)) == 7_072_770
    # Only the linear layers know the size: 256 channels of S/16, and 512 of S/32, rounded up, squared.
    of_the_size = 256 * 16**2 + 512 * 8**2
    for image_size, inputs in ((128, 256 * 8**2 + 512 * 4**2), (64, 256 * 4**2 + 512 * 2**2), (72, 256 * 25 + 512 * 9)):
        critic = on_meta(Critic, image_size=image_size)
        assert num_parameters(critic) == 7_072_770 - of_the_size + inputs
        assert plan(critic.whole) == "5/64/2l 5/128/2l 5/256/2l 5/256/2l Flatten Linear"
        assert plan(critic.local) == "5/64/2l 5/128/2l 5/256/2l 5/512/2l Flatten Linear"


def plan(layers: nn.Sequential) -> str:
    """ "5/32, 3/64/2, 3/128d2 ELU": kernel / channels / stride, dilation, and the activation if there is one."""
    words: list[str] = []
    for layer in layers:
        if isinstance(layer, UpConv2d):
            assert layer.upsampling == "nearest"
            words.append("up")
        if isinstance(layer, nn.Conv2d):
            stride = "/2" if layer.stride == (2, 2) else ""
            dilation = f"d{layer.dilation[0]}" if layer.dilation != (1, 1) else ""
            words.append(f"{layer.kernel_size[0]}/{layer.out_channels}{stride}{dilation}")
        elif isinstance(layer, nn.Identity):
            continue  # it stands for a doubling in the weights' names
        elif isinstance(layer, nn.ELU):
            words[-1] += "e"
        elif isinstance(layer, nn.LeakyReLU):
            assert layer.negative_slope == 0.2
            words[-1] += "l"
        else:
            words.append(type(layer).__name__)
    return " ".join(words)


DILATED = "3/128d2e 3/128d4e 3/128d8e 3/128d16e"
DECODER = "3/128e 3/128e up 3/64e 3/64e up 3/32e 3/16e 3/3"
WIDE = "5/32e 3/64/2e 3/64e 3/128/2e 3/128e 3/128"


@pytest.mark.parametrize("context", CONTEXTS)
def test_every_arm_has_the_published_plan_and_parameters(context: str) -> None:
    generator = on_meta(InpaintingGenerator, context=context)
    assert num_parameters(generator) == PARAMETERS[context]
    is_wide = context == "an-wide"
    assert plan(generator.coarse) == f"{WIDE}e {DILATED} {DECODER}"
    narrow = "5/32e 3/32/2e 3/64e 3/64/2e 3/128e 3/128e"
    assert plan(generator.dilated_branch) == f"{f'{WIDE}e' if is_wide else narrow} {DILATED}"
    # The sixth convolution is linear: what follows it is the arm's.
    assert plan(generator.before_context) == (WIDE if is_wide else "5/32e 3/32/2e 3/64e 3/128/2e 3/128e 3/128")
    assert plan(generator.after_context) == "3/128e 3/128e"
    assert plan(generator.decoder) == DECODER and generator.decoder[0].in_channels == 256
    for first in (generator.coarse[0], generator.dilated_branch[0], generator.before_context[0]):
        assert first.in_channels == 5
    kinds = {"contextual": ContextualAttention, "self_attention": SelfAttention2d, "none": nn.Identity}
    kinds["region"] = RegionNorm2d
    assert type(generator.context) is kinds.get(context, AttentiveNorm2d)


def test_options_of_the_layer_come_from_the_config() -> None:
    layer = on_meta(InpaintingGenerator).context
    assert (layer.num_features, layer.num_entities, layer.temperature) == (128, 16, "auto")
    assert layer.weight is None and layer.bias is None  # the authors' inpainting results are without them
    options = AttentiveNormConfig(num_entities=4, statistics="masked", temperature=None)
    layer = on_meta(InpaintingGenerator, width=8, an=options).context
    assert (layer.num_features, layer.num_entities, layer.statistics) == (32, 4, "masked")
    assert layer.temperature == pytest.approx(0.2) and layer.weight is not None


@pytest.mark.parametrize("kind", [InpaintingGenerator, Critic])
def test_initial_values_are_glorot_but_for_the_entities(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = kind(small(width=8, an=AttentiveNormConfig(num_entities=200, affine=False)))
    entities = [module.entities for module in network.modules() if isinstance(module, AttentiveNorm2d)]
    assert len(entities) == (kind is InpaintingGenerator)
    for module in entities:
        assert module.weight.std().item() == pytest.approx(1, abs=0.05)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module not in entities:
            area = module.weight[0, 0].numel()
            limit = (6 / (area * (module.weight.shape[0] + module.weight.shape[1]))) ** 0.5
            assert 0.9 * limit < module.weight.abs().max() <= limit
            assert module.bias is None or not module.bias.any()


# The swap


def test_an_and_self_attention_start_as_no_block_at_all() -> None:
    image, mask = pictures(dtype=torch.float32), holes()
    outputs = {}
    for context in ("an", "self_attention", "none", "contextual"):
        torch.manual_seed(3)
        outputs[context] = InpaintingGenerator(small(context))(image, mask).refined
    assert torch.equal(outputs["an"], outputs["none"]) and torch.equal(outputs["self_attention"], outputs["none"])
    assert not torch.allclose(outputs["contextual"], outputs["none"], atol=1e-4)


@pytest.mark.parametrize("context", CONTEXTS)
@torch.no_grad()
def test_forward_is_the_two_stages_written_out(context: str) -> None:
    """From the description: what each part gets, and the activation beside the block."""
    generator, image, mask = build(context), pictures(), holes()
    m = mask.double()
    ones = torch.ones_like(m)
    coarse = generator.coarse(torch.cat([image * (1 - m), ones, m], 1)).clamp(-1, 1)
    x = torch.cat([coarse * m + image * (1 - m), ones, m], 1)
    h = generator.before_context(x)
    small_mask = m.unflatten(3, (8, 4)).amax(4).unflatten(2, (8, 4)).amax(3)
    if context == "contextual":
        h = ContextualAttention()(h.relu(), small_mask)
    elif context == "region":  # of each image and channel, the hole's features by themselves and the others too
        for n, c, region in ((n, c, region) for n in range(2) for c in range(16) for region in (0, 1)):
            at = small_mask[n, 0] == region
            h[n, c, at] = (h[n, c, at] - h[n, c, at].mean()) / (h[n, c, at].var(correction=0) + 1e-5).sqrt()
        h = F.elu(h)
    else:
        h = F.elu(generator.context(h))
    both = torch.cat([generator.dilated_branch(x), generator.after_context(h)], 1)
    refined = generator.decoder(both).clamp(-1, 1)
    got = generator(image, mask)
    torch.testing.assert_close(got.coarse, coarse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.refined, refined, rtol=1e-12, atol=1e-12)


# Holes and sizes


def test_what_the_hole_holds_has_no_influence_nor_have_other_images() -> None:
    generator, image, mask = build("contextual"), pictures(), holes()
    expected = generator(image, mask)
    for held, missing in ((0.9, mask), (float("nan"), mask.double()), (float("nan"), mask.to(torch.uint8) * 255)):
        got = generator(image.masked_fill(mask, held), missing)  # a mask of any type
        assert torch.equal(got.coarse, expected.coarse) and torch.equal(got.refined, expected.refined)
    moved = generator(image.masked_fill(mask.flip(2), 0.9), mask)  # what is known has
    assert not torch.allclose(moved.refined, expected.refined, atol=1e-4)
    alone = generator(image[1:], mask[1:])
    torch.testing.assert_close(alone.refined[0], expected.refined[1], rtol=1e-10, atol=1e-12)
    expected.refined.square().mean().backward()  # the second stage trains the first
    assert all(parameter.grad.abs().max() > 0 for parameter in generator.coarse.parameters())


@pytest.mark.parametrize(("context", "size"), [("contextual", (8, 8)), ("an", (8, 8)), ("region", (72, 24))])
def test_sides_are_any_multiples_of_8(context: str, size: tuple[int, int]) -> None:
    generator = build(context, torch.float32).train()
    mask = torch.zeros(1, 1, *size, dtype=torch.bool)
    mask[..., 2:5, 3:6] = True
    with torch.no_grad():  # so that the clipping is visible
        generator.coarse[-1].weight.mul_(1e6)
        generator.decoder[-1].weight.mul_(1e6)
    for image in generator(pictures(1, *size, dtype=torch.float32), mask):
        assert image.shape == (1, 3, *size) and image.dtype == torch.float32
        assert (image.min(), image.max()) == (-1, 1)


@pytest.mark.parametrize(
    ("shape", "mask_shape", "message"),
    [
        ((1, 3, 12, 16), (1, 1, 12, 16), "got images of 12x16 pixels; expected multiples of 8"),
        ((1, 1, 16, 16), (1, 1, 16, 16), r"got torch.float32 \(1, 1, 16, 16\) for images; expected floating"),
        ((3, 16, 16), (1, 16, 16), r"got torch.float32 \(3, 16, 16\) for images"),
        ((2, 3, 16, 16), (1, 1, 16, 16), r"got masks \(1, 1, 16, 16\) for images .* one mask each"),
        ((1, 3, 16, 16), (1, 1, 8, 8), r"got masks \(1, 1, 8, 8\) for images"),
        ((1, 3, 16, 16), (1, 3, 16, 16), r"got masks \(1, 3, 16, 16\) for images"),
    ],
    ids=["not-8", "grey", "3-D", "one-mask-for-two", "small-mask", "colour-mask"],
)
def test_wrong_input_is_told_what_was_expected(shape: Any, mask_shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("none", torch.float32)(torch.zeros(shape), torch.zeros(mask_shape))


def test_wrong_crops_are_told_what_was_expected() -> None:
    for places, side, message in (
        (torch.zeros(1, 2, dtype=torch.int64), 8, r"got torch.int64 \(1, 2\) for 2 images; expected int64 \[2, 2\]"),
        (torch.zeros(2, 2), 8, "got torch.float32 "),
        (torch.zeros(2, 2, dtype=torch.int64), 33, "got side=33 for images of 32x32; expected 1 to 32"),
    ):
        with pytest.raises(ValueError, match=message):
            crop_around(pictures(), places, side)
    critic, images, crops = Critic(small()).double(), pictures(), pictures(height=16, width=16)
    message = r"got images \(.*\) and crops \(.*\); expected \[N, 3, 32, 32\] and \[N, 3, 16, 16\]"
    for arguments in ((images, images), (crops, crops), (images, crops[:1]), (images[:, :1], crops)):
        with pytest.raises(ValueError, match=message):
            critic(*arguments)


def test_paste_changes_nothing_outside_the_hole() -> None:
    image, mask = pictures(dtype=torch.float32), holes()
    filled = build("an", torch.float32)(image, mask).refined
    pasted = paste(image, filled, mask)
    where = mask.expand_as(image)
    assert torch.equal(pasted[~where], image[~where]) and torch.equal(pasted[where], filled[where])
    assert not torch.equal(filled[~where], image[~where])
    assert torch.equal(paste(image, filled, mask.float()), pasted)
    # Not even where the filling is no number.
    assert torch.equal(paste(image, torch.full_like(image, torch.nan), mask)[~where], image[~where])


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(7, 10), (1, 2)], ids=str)
def test_strided_convolutions_pad_as_tensorflow_does(kernel: int, size: tuple[int, int]) -> None:
    """SAME: the total padding is as much as ceil(side / 2) outputs need, the larger half of it right and below."""
    torch.manual_seed(0)
    layer = SameConv2d(2, 3, kernel, stride=2).double()
    x = pictures(1, *size)[:, :2]
    out = layer(x)
    assert out.shape[2:] == ((size[0] + 1) // 2, (size[1] + 1) // 2)
    before = [max((out.shape[2 + axis] - 1) * 2 + kernel - size[axis], 0) // 2 for axis in (0, 1)]
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            total = layer.bias.clone()
            for a in range(kernel):
                for b in range(kernel):
                    row, column = 2 * i + a - before[0], 2 * j + b - before[1]
                    if 0 <= row < size[0] and 0 <= column < size[1]:
                        total = total + layer.weight[:, :, a, b] @ x[0, :, row, column]
            torch.testing.assert_close(out[0, :, i, j], total, rtol=1e-12, atol=1e-12)


# Critics and crops


def test_crops_are_slices_and_so_is_their_gradient() -> None:
    images = pictures(3, 20, 30).requires_grad_()
    places = [(0, 0), (12, 22), (5, 7)]
    crops = crop_around(images, torch.tensor(places), 8)
    expected = torch.stack([images[i, :, top : top + 8, left : left + 8] for i, (top, left) in enumerate(places)])
    assert torch.equal(crops, expected)
    weights = pictures(3, 8, 8)
    (gradient,) = torch.autograd.grad(crops, images, weights)
    (expected_gradient,) = torch.autograd.grad(expected, images, weights)
    assert torch.equal(gradient, expected_gradient)
    mask = holes(3, 20, 30)
    assert crop_around(mask, torch.tensor(places), 8)[0].equal(mask[0, :, :8, :8])
