"""The class-conditional networks: sizes, sites, spectral norm, heads and conditions."""

# N batch, Y classes.

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attnorm import AttentiveNorm2d, SelfAttention2d
from attnorm.config import AttentiveNormConfig, ClassConditionalConfig
from attnorm.layers.conditional_norm import ConditionalBatchNorm2d
from attnorm.models.class_conditional import Discriminator, Generator

SIZES = (32, 64, 128, 256)


def small(**changes: Any) -> ClassConditionalConfig:
    """Networks of a few thousand parameters, at 32 pixels."""
    settings = {"image_size": 32, "num_classes": 5, "width": 4, "latent_dim": 6, **changes}
    return ClassConditionalConfig(**{"an": AttentiveNormConfig(num_entities=3), **settings})


def build(kind: type[nn.Module], config: ClassConditionalConfig) -> Any:
    """A network in which the context block, and so the conditions and layouts, have an effect: rho and gates not 0."""
    torch.manual_seed(0)
    network = kind(config)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, AttentiveNorm2d):
                module.rho.fill_(0.5)
            elif isinstance(module, SelfAttention2d):
                module.gate.fill_(0.5)
            elif isinstance(module, ConditionalBatchNorm2d):
                module.gamma.weight.normal_(1, 0.5)
                module.beta.weight.normal_(0, 0.5)
    return network


def on_meta(kind: type[nn.Module], **settings: Any) -> Any:
    """At the paper's width, without memory; and without spectral norm unless it is asked for: it adds no parameter."""
    with torch.device("meta"):
        return kind(ClassConditionalConfig(**{"g_spectral_norm": False, "d_spectral_norm": False, **settings}))


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def latents(num: int = 2, latent_dim: int = 6) -> Tensor:
    return torch.randn(num, latent_dim, generator=torch.Generator().manual_seed(1))


def pictures(num: int = 2, size: int = 32) -> Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1


def maps_seen(network: nn.Module, kind: type[nn.Module], *inputs: Tensor) -> dict[str, tuple[int, ...]]:
    """[C, H, W] of what every module of type `kind` gets in one forward pass, by its name."""
    seen: dict[str, tuple[int, ...]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: tuple(args[0].shape[1:])}))
        for name, module in network.named_modules()
        if isinstance(module, kind)
    ]
    network(*inputs)
    for handle in handles:
        handle.remove()
    return seen


# Sizes


def test_parameter_counts_are_the_published_ones() -> None:
    imagenet: dict[str, Any] = {"image_size": 128, "num_classes": 1000, "width": 64}
    assert num_parameters(on_meta(Generator, **imagenet, context="none")) == 41_996_931
    whole = on_meta(Discriminator, **imagenet, context="none")
    assert num_parameters(whole) == 39_443_137 and [b.downsample for b in whole.blocks] == [True] * 5 + [False]
    shorter = on_meta(Discriminator, **imagenet, context="none", d_last_flat=False)
    assert num_parameters(whole) - num_parameters(shorter) == 2 * (1024 * 1024 * 9 + 1024)
    cifar10: dict[str, Any] = {"image_size": 32, "num_classes": 10, "width": 64, "context": "none"}
    assert num_parameters(on_meta(Generator, **cifar10)) == 4_304_387
    assert num_parameters(on_meta(Discriminator, **cifar10)) == 1_055_105
    # 256 channels, 16 entities: entities, key and query of 32, t, value, affine, rho; without one class table pair.
    layer = 16 * 256 + 2 * (256 * 32 + 32) + 16 + 256 * 256 + 256 + 2 * 16 * 256 + 1
    assert num_parameters(on_meta(Generator, **imagenet)) == 41_996_931 + layer - 2 * 1000 * 256
    assert num_parameters(on_meta(Generator, **imagenet, site="insert")) == 41_996_931 + layer
    for kind in (Generator, Discriminator):
        with pytest.raises(ValueError, match=r"model.num_classes is 0; expected at least 1"):
            kind(ClassConditionalConfig())


# Sites


@pytest.mark.parametrize("image_size", SIZES)
def test_context_of_g_sees_a_32x32_map_at_every_size(image_size: int) -> None:
    inputs = (torch.zeros(2, 128, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta"))
    channels = {32: 256, 64: 128, 128: 256, 256: 512}[image_size]
    for context, kind, name in (("an", AttentiveNorm2d, "an"), ("self_attention", SelfAttention2d, "after")):
        generator = on_meta(Generator, image_size=image_size, num_classes=3, context=context)
        assert maps_seen(generator, kind, *inputs) == {f"blocks.2.{name}": (channels, 32, 32)}
        assert generator.eval()(*inputs).shape == (2, 3, image_size, image_size)


@pytest.mark.parametrize("image_size", SIZES)
def test_context_of_d_sees_the_first_map_or_attends_at_32x32(image_size: int) -> None:
    images = torch.zeros(2, 3, image_size, image_size, device="meta")
    labels = torch.zeros(2, dtype=torch.int64, device="meta")
    discriminator = on_meta(Discriminator, image_size=image_size, num_classes=3, context="an")
    channels = 128 if image_size == 32 else 64
    seen = maps_seen(discriminator, AttentiveNorm2d, images, labels)
    assert seen == {"blocks.0.an": (channels, image_size, image_size)}

    discriminator = on_meta(Discriminator, image_size=image_size, num_classes=3, context="self_attention")
    block, channels, size = {32: (0, 128, 16), 64: (0, 64, 32), 128: (1, 128, 32), 256: (2, 256, 32)}[image_size]
    seen = maps_seen(discriminator, SelfAttention2d, images, labels)
    assert discriminator.eval()(images, labels).score.shape == (2,)
    assert seen == {f"blocks.{block}.after": (channels, size, size)}


def test_sites_and_options_of_the_layer_come_from_the_config() -> None:
    inputs = latents(), torch.tensor([0, 1])
    seen = maps_seen(build(Generator, small(an_blocks=(1, 3))), AttentiveNorm2d, *inputs)
    assert seen == {"blocks.0.an": (16, 8, 8), "blocks.2.an": (16, 32, 32)}
    assert not maps_seen(build(Generator, small(an_blocks=())), AttentiveNorm2d, *inputs)
    options = AttentiveNormConfig(
        num_entities=5, temperature=0.3, affine=False, value_projection=False, reduction=4, statistics="masked",
        moments="batch", orthogonality="raw", shared_sampling=True, clamp_t=True, eps=1e-3, impl="reference",
    )  # fmt: skip
    for network in (build(Generator, small(an=options)), build(Discriminator, small(an=options))):
        (layer,) = (module for module in network.modules() if isinstance(module, AttentiveNorm2d))
        assert layer.extra_repr() == (
            f"{layer.num_features}, num_entities=5, temperature=0.3, affine=False, value_projection=False, "
            "statistics='masked', moments='batch', orthogonality='raw', shared_sampling=True, clamp_t=True, "
            "impl='reference'"
        )
        assert layer.eps == 1e-3
        assert layer.key.out_channels == layer.num_features // 4
    generator = build(Generator, small(an=AttentiveNormConfig(self_sampling=False, temperature=None)))
    assert not generator.blocks[2].an.self_sampling
    assert generator.blocks[2].an.temperature == pytest.approx(0.4)  # 0.1 * sqrt(64 / 4)


# Initial values and spectral norm


def test_initial_values_are_glorot_but_for_entities_and_class_tables() -> None:
    torch.manual_seed(0)
    config = small(width=32, g_spectral_norm=False)
    generator = Generator(config)
    entities = generator.blocks[2].an.entities.weight
    assert entities.std().item() == pytest.approx(1, abs=0.15)
    for name, module in generator.named_modules():
        if isinstance(module, ConditionalBatchNorm2d):
            assert torch.equal(module.gamma.weight, torch.ones_like(module.gamma.weight))
            assert torch.equal(module.beta.weight, torch.zeros_like(module.beta.weight))
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight is not entities:
            bound = (6 / sum(nn.init._calculate_fan_in_and_fan_out(module.weight))) ** 0.5
            assert 0.95 * bound < module.weight.abs().max() <= bound, name
            assert not module.bias.any(), name
    assert generator.blocks[2].an.rho == 0


NORMALIZED_G = {
    *("linear", "to_rgb"),
    *(f"blocks.{i}.{name}" for i in range(3) for name in ("conv1", "conv2", "shortcut")),
    *(f"blocks.2.an.{name}" for name in ("key", "query", "value")),
}
NORMALIZED_D = {
    *("linear", "embedding"),
    *(f"blocks.{i}.{name}" for i in range(4) for name in ("conv1", "conv2")),
    *("blocks.0.shortcut", "blocks.1.shortcut"),
    *(f"blocks.0.an.{name}" for name in ("key", "query", "value")),
}


def normalized(network: nn.Module) -> set[str]:
    return {name for name, module in network.named_modules() if parametrize.is_parametrized(module)}


def test_spectral_norm_is_where_it_is_said_but_not_on_entities_nor_class_tables() -> None:
    assert normalized(build(Generator, small())) == NORMALIZED_G
    assert normalized(build(Discriminator, small())) == NORMALIZED_D
    without_an = [{name for name in names if ".an." not in name} for names in (NORMALIZED_G, NORMALIZED_D)]
    attention = {f"after.{name}" for name in ("query", "key", "value", "project")}
    config = small(context="self_attention", head="auxiliary")
    assert normalized(build(Generator, config)) == without_an[0] | {f"blocks.2.{name}" for name in attention}
    in_d = without_an[1] | {f"blocks.0.{name}" for name in attention}
    assert normalized(build(Discriminator, config)) == in_d - {"embedding"} | {"classifier"}
    sngan = small(context="none", g_spectral_norm=False)
    assert normalized(build(Generator, sngan)) == set() and normalized(build(Discriminator, sngan)) == without_an[1]
    assert normalized(build(Discriminator, small(d_spectral_norm=False))) == set()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_one_power_iteration_a_training_forward(training: bool) -> None:
    """Row 22. A weight that is read twice in a forward would take two; evaluation takes none."""
    for kind, inputs in (
        (Generator, (latents(), torch.tensor([0, 3]))),
        (Discriminator, (pictures(), torch.tensor([1, 1]))),
    ):
        network = build(kind, small()).train(training)
        expected = {}
        for name in normalized(network):
            norm = network.get_submodule(name).parametrizations.weight[0]
            weight = network.get_submodule(name).parametrizations.weight.original.detach().flatten(1)
            with torch.no_grad():  # away from where the iterations at the start have led
                norm._v.copy_(F.normalize(norm._v + 0.3, dim=0))
            expected[name] = F.normalize(weight @ norm._v, dim=0) if training else norm._u.clone()
        network(*inputs)
        for name, u in expected.items():
            got = network.get_submodule(name).parametrizations.weight[0]._u
            torch.testing.assert_close(got, u, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# Heads


def features(discriminator: Any, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Any]:
    """The last block's map, what the heads get, and the verdict."""
    seen: dict[str, Tensor] = {}
    discriminator.blocks[-1].register_forward_hook(lambda *args: seen.update(map=args[2]))
    discriminator.linear.register_forward_pre_hook(lambda _, args: seen.update(h=args[0]))
    verdict = discriminator(images, labels)
    return seen["map"], seen["h"], verdict


def test_projection_head_adds_the_inner_product_with_the_embedding_of_the_label() -> None:
    discriminator = build(Discriminator, small()).eval()
    first, second = torch.tensor([0, 1, 2]), torch.tensor([3, 1, 4])
    images = pictures(3)
    last_map, h, verdict = features(discriminator, images, first)
    torch.testing.assert_close(h, last_map.clamp(min=0).sum((2, 3)))
    embedding, linear = discriminator.embedding.weight, discriminator.linear
    expected = h @ linear.weight[0] + linear.bias + (embedding[first] * h).sum(1)
    torch.testing.assert_close(verdict.score, expected)
    assert verdict.class_logits is None
    difference = ((embedding[first] - embedding[second]) * h).sum(1)
    assert difference[[0, 2]].abs().min() > 1e-3
    torch.testing.assert_close(
        verdict.score - discriminator(images, second).score, difference, rtol=1e-4, atol=1e-5 * h.norm().item()
    )


def test_auxiliary_head_classifies_and_does_not_read_the_label() -> None:
    discriminator = build(Discriminator, small(head="auxiliary")).eval()
    images = pictures(3)
    _, h, verdict = features(discriminator, images, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(verdict.score, h @ discriminator.linear.weight[0] + discriminator.linear.bias)
    torch.testing.assert_close(verdict.class_logits, h @ discriminator.classifier.weight.T)
    assert verdict.class_logits.shape == (3, 5)
    assert torch.equal(verdict.score, discriminator(images, torch.tensor([4, 4, 4])).score)
