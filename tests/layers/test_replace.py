"""AN in networks that are not ours: torchvision's, timm's, diffusers', and small ones with each kind of norm."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import attnorm
from attnorm import AttentiveNorm2d, SelfAttention2d, insert_after, replace


def small(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(8, 2, 1))


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.fixture(scope="module")
def segmenter() -> nn.Module:
    torch.manual_seed(0)
    make = torchvision.models.segmentation.lraspp_mobilenet_v3_large
    return make(weights=None, weights_backbone=None, num_classes=5).eval()


def test_insertion_changes_no_bit_of_the_result_and_undo_no_name(segmenter: nn.Module) -> None:
    x = torch.randn(1, 3, 32, 32)
    names, before = list(segmenter.state_dict()), segmenter(x)["out"]
    changes = insert_after(segmenter, "backbone.1[0-5].block.3", num_entities=4)
    assert len(changes) == 5
    torch.testing.assert_close(segmenter(x)["out"], before, rtol=0, atol=0)
    assert set(names) < set(segmenter.state_dict())
    site = attnorm.diagnose(segmenter, x)[0].site
    assert site == f"{changes.made[0].name}.inserted"
    changes.undo()
    assert list(segmenter.state_dict()) == names
    torch.testing.assert_close(segmenter(x)["out"], before, rtol=0, atol=0)


def test_what_was_inserted_takes_part_in_the_gradients_of_a_copy_as_of_the_network() -> None:
    network = small(nn.GroupNorm(2, 8))
    block = insert_after(network, nn.GroupNorm, num_entities=3).made[0].new
    twin = copy.deepcopy(network)
    torch.manual_seed(2)
    expected = network[3](network[2](block(nn.GroupNorm.forward(network[1], network[0](images())))))
    torch.manual_seed(2)
    torch.testing.assert_close(twin(images()), expected)
    twin(images()).square().sum().backward()
    assert twin[1].inserted.rho.grad.abs() > 0
    assert block.rho.grad is None  # a copy calls its own block


def test_replaced_norms_hand_on_what_they_get_and_scale_each_region_as_before() -> None:
    norm = nn.InstanceNorm2d(8, affine=True)
    nn.init.uniform_(norm.weight, 1, 2), nn.init.normal_(norm.bias)
    network = small(norm).double()
    without = nn.Sequential(*(module for module in network if module is not norm))
    expected = without(images(torch.float64))
    changes = replace(network, nn.InstanceNorm2d, num_entities=3, self_sampling=False)
    torch.testing.assert_close(network(images(torch.float64)), expected)
    block = network[1]
    assert isinstance(block, AttentiveNorm2d) and block.rho.dtype == torch.float64
    # One entity, v(X) = X, rho = 1: AN adds the very norm that it took the place of.
    replaced = replace(small(norm).double(), nn.InstanceNorm2d, num_entities=1, value_projection=False).made[0].new
    nn.init.ones_(replaced.rho)
    features = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(replaced.eval()(features), norm.double()(features) + features)
    changes.undo()
    assert network[1] is norm


def test_a_norm_in_two_places_gives_way_to_one_block_and_comes_back_to_both() -> None:
    norm = nn.BatchNorm2d(8)
    network = nn.ModuleDict({"a": nn.Sequential(norm), "b": nn.Sequential(norm)})
    changes = replace(network, "*.0")
    assert network["a"][0] is network["b"][0] is changes.made[0].new
    assert str(changes).splitlines()[-1] == "2 places, 491 parameters in what is new"
    # W, key and query, t, value, alpha and beta, rho: counted once
    assert 16 * 8 + 2 * (8 + 1) + 16 + 8 * (8 + 1) + 2 * 16 * 8 + 1 == 491
    changes.undo()
    changes.undo()
    assert network["a"][0] is norm and network["b"][0] is norm
    inserted = insert_after(network, nn.BatchNorm2d)
    assert len(inserted) == 1 and list(norm.children()) == inserted.blocks
    inserted.undo()
    assert type(norm) is nn.BatchNorm2d and not list(norm.children())


def test_any_block_may_follow() -> None:
    network = small(nn.BatchNorm2d(8)).eval()
    before = network(images())
    change = insert_after(network, lambda name, _: name == "1", SelfAttention2d).made[0]
    assert isinstance(change.new, SelfAttention2d)
    torch.testing.assert_close(network(images()), before)  # its gate starts at 0 too
    assert not change.new.training


@pytest.mark.parametrize("is_before", [True, False])
def test_torch_compile_runs_a_block_wherever_there_is_one_and_nowhere_else(is_before: bool) -> None:
    """Compiled code is shared by modules of one class; hooks are no part of what it looks at."""
    torch._dynamo.reset()
    compile_ = lambda module: torch.compile(module, backend="eager")  # noqa: E731
    without, network = small(nn.BatchNorm2d(8)).eval(), small(nn.BatchNorm2d(8)).eval()
    plain = compile_(without)(images())
    compiled = compile_(network)
    if is_before:
        torch.testing.assert_close(compiled(images()), plain)
    changes = insert_after(compiled if is_before else network, "1", num_entities=3)
    assert changes.made[0].name == "1"
    nn.init.ones_(changes.made[0].new.rho)
    expected = network(images())
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(compiled(images()), expected)
    torch.testing.assert_close(compile_(without)(images()), plain)
    changes.undo()
    torch.testing.assert_close(compiled(images()), plain)
    assert type(network[1]) is nn.BatchNorm2d
    changes = replace(compiled, "1", num_entities=3)
    torch.testing.assert_close(compiled(images()), network(images()))
    assert changes.made[0].name == "1" and isinstance(network[1], AttentiveNorm2d)


def test_what_was_inserted_is_pickled_traced_and_parametrized_as_what_it_follows() -> None:
    network = small(nn.BatchNorm2d(8)).eval()
    changes = insert_after(network, "[01]", num_entities=3)
    for block in changes.blocks:
        nn.init.ones_(block.rho)
    expected = network(images())
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    torch.testing.assert_close(again(images()), expected, rtol=0, atol=0)
    assert isinstance(again[0], nn.Conv2d) and type(again[0]).__name__ == "Conv2d"
    twin = small(nn.BatchNorm2d(8)).eval()
    insert_after(twin, "[01]", num_entities=3)
    twin.load_state_dict(network.state_dict())
    torch.testing.assert_close(twin(images()), expected, rtol=0, atol=0)
    for nodes in (create_feature_extractor(network, ["2"]), create_feature_extractor(copy.deepcopy(network), ["2"])):
        torch.testing.assert_close(network[3](nodes(images())["2"]), expected)
    nn.utils.parametrizations.weight_norm(network[0])
    torch.testing.assert_close(network(images()), expected)
    changes.undo()
    assert not list(network[1].children())
    torch.testing.assert_close(network(images()), small(nn.BatchNorm2d(8)).eval()(images()))


def test_a_block_after_a_sequential_runs_once_and_other_containers_are_refused() -> None:
    network = nn.Sequential(small(nn.BatchNorm2d(8))[:3], nn.Conv2d(8, 2, 1)).eval()
    before = network[0](images())
    changes = insert_after(network, "0", num_entities=3)
    nn.init.ones_(changes.blocks[0].rho)
    torch.testing.assert_close(network[0](images()), changes.blocks[0](before))
    changes.undo()
    torch.testing.assert_close(network[0](images()), before)
    network = torchvision.models.densenet121(num_classes=2)
    with pytest.raises(ValueError, match=r"^features\.denseblock1 is _DenseBlock, whose modules are gone through"):
        insert_after(network, "features.denseblock1")


def test_a_block_stays_where_torch_makes_another_class_of_what_it_follows() -> None:
    network = small(nn.BatchNorm2d(8)).eval()
    block = insert_after(network, "1", num_entities=3).blocks[0]
    nn.init.ones_(block.rho)
    expected = network(images())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert isinstance(converted[1], nn.SyncBatchNorm) and converted[1].inserted is block
    torch.testing.assert_close(converted(images()), expected)

    lazy = nn.Sequential(nn.LazyConv2d(8, 1)).eval()
    changes = insert_after(lazy, "0", num_entities=3)
    nn.init.ones_(changes.blocks[0].rho)
    first = lazy(images())  # makes a Conv2d of it
    torch.testing.assert_close(lazy(images()), first, rtol=0, atol=0)
    nn.utils.parametrizations.weight_norm(lazy[0])
    changes.undo()
    nn.utils.parametrize.remove_parametrizations(lazy[0], "weight")
    without = lazy(images())
    block = insert_after(lazy, "0", num_entities=3).blocks[0]
    nn.init.ones_(block.rho)
    torch.testing.assert_close(lazy(images()), block.eval()(without))  # once


def test_a_network_with_a_block_is_exported_whole() -> None:
    network = small(nn.BatchNorm2d(8)).eval()
    nn.init.ones_(insert_after(network, "1", num_entities=3).made[0].new.rho)
    free = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    program = torch.export.export(network, (images(),), dynamic_shapes=free).module()
    other = torch.randn(1, 3, 5, 9)
    torch.testing.assert_close(program(other), network(other))


@pytest.mark.parametrize("change", [replace, insert_after])
def test_a_block_is_where_the_network_is_though_the_norm_has_no_tensor_to_tell(change: Any) -> None:
    network = small(nn.InstanceNorm2d(8)).double()
    block = change(network, nn.InstanceNorm2d).made[0].new
    assert {tensor.dtype for tensor in block.parameters()} == {torch.float64}
    elsewhere = nn.ModuleDict({"a": small(nn.InstanceNorm2d(8)).to("meta"), "b": nn.ModuleList([nn.InstanceNorm2d(8)])})
    blocks = change(elsewhere, nn.InstanceNorm2d).blocks
    assert [block.rho.device.type for block in blocks] == ["meta", "meta"]


@pytest.mark.parametrize(("channels", "entities", "side"), [(3, 4, 5), (7, 16, 1), (1, 2, 2), (10, 3, 7)])
def test_no_number_of_channels_entities_or_pixels_needs_to_divide_another(
    channels: int, entities: int, side: int
) -> None:
    network = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    x = torch.randn(3, channels, side, side).contiguous(memory_format=torch.channels_last)
    expected = network(x)
    block = insert_after(network, "0", num_entities=entities).made[0].new
    assert torch.equal(network(x), expected)
    y = network[0](x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    network(x).square().sum().backward()  # the activation writes over what the block returned
    assert block.rho.grad.isfinite()


class Modulated(nn.GroupNorm):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale


def test_a_norm_that_does_more_than_normalize_is_not_replaced_in_silence() -> None:
    network = timm.create_model("efficientnet_b0", num_classes=2)
    with pytest.raises(ValueError, match=r"bn1 is BatchNormAct2d, which applies act \(SiLU\) too"):
        replace(network, nn.BatchNorm2d)
    assert len(replace(network, "blocks.*.bn3")) == 15  # where the activation is none
    with pytest.raises(ValueError, match=r"0 is Modulated, which is called with \(x, scale\)"):
        replace(nn.Sequential(Modulated(2, 8)), nn.GroupNorm)
    with pytest.raises(ValueError, match="0 is LayerNorm; expected a norm of feature maps"):
        replace(nn.Sequential(nn.LayerNorm(8)), nn.LayerNorm)  # of the last dimension
    network = timm.create_model("convnext_atto", num_classes=2)
    assert str(replace(network, "stem.1").made[0]).startswith("stem.1: LayerNorm2d -> AttentiveNorm2d(40")


def test_what_is_named_by_nothing_is_told_with_the_norms_as_patterns(segmenter: nn.Module) -> None:
    with pytest.raises(ValueError) as caught:
        insert_after(segmenter, "InvertedResidual")
    assert str(caught.value) == (
        "'InvertedResidual' is taken for a pattern of names; a class is given as the class itself, without quotes. It "
        "names no module of LRASPP; its norms: 2 x backbone.*.* (BatchNorm2d), 44 x backbone.*.block.*.* "
        "(BatchNorm2d), classifier.cbr.1 (BatchNorm2d)"
    )
    many = nn.ModuleDict({letter: nn.BatchNorm2d(2) for letter in "abcdefghijklmnopqrs"})
    with pytest.raises(ValueError, match=r"the pattern 'x' names no .* p \(BatchNorm2d\), and 3 others$"):
        replace(many, "x")


def test_an_error_of_a_pass_says_at_which_place(segmenter: nn.Module) -> None:
    network = copy.deepcopy(segmenter)
    insert_after(network, "")
    with pytest.raises(ValueError, match=r"^the module \(LRASPP\) returned OrderedDict; expected a feature map"):
        network(images())
    network = nn.Sequential(nn.ModuleDict({"norm": nn.GroupNorm(2, 8)})["norm"], nn.Flatten(2), nn.GroupNorm(2, 8))
    replace(network, nn.GroupNorm)
    with pytest.raises(ValueError, match=r"^2: got 3 dimensions, \(2, 8, 16\); expected a floating feature map \[N, 8"):
        network(torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (nn.InstanceNorm2d, {}, "names no module of Sequential; its norms: 1 (BatchNorm2d)"),
        ("0", {}, "expected a norm of feature maps"),
        (3, {}, "expected a class, classes, a pattern"),
        ("1", {"entities": 3}, "entities"),
    ],
)
def test_a_mistake_is_said_and_changes_nothing(target: object, options: dict[str, int], message: str) -> None:
    network = small(nn.BatchNorm2d(8))
    modules = list(network)
    with pytest.raises((ValueError, TypeError)) as caught:
        replace(network, target, **options)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert list(network) == modules


def test_modules_that_cannot_be_followed_are_refused() -> None:
    with pytest.raises(ValueError, match="does not say how many channels"):
        insert_after(small(nn.BatchNorm2d(8)), nn.ReLU)
    network = small(nn.BatchNorm2d(8))
    insert_after(network, "1")
    with pytest.raises(ValueError, match="is followed by a block already"):
        insert_after(network, "1")
    with pytest.raises(ValueError, match="itself is named"):
        replace(nn.BatchNorm2d(8), nn.BatchNorm2d)
    with pytest.raises(ValueError, match="AttentiveNorm2d already"):
        replace(nn.Sequential(AttentiveNorm2d(8)), AttentiveNorm2d)
    network = small(nn.BatchNorm2d(8))
    network[1].forward = network[1].forward
    with pytest.raises(ValueError, match=r"^1 has another forward than its class's"):
        insert_after(network, "1")
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    with pytest.raises(ValueError, match="change the network before it is wrapped"):
        insert_after(wrapped, "1")


def test_a_change_is_told_in_a_line() -> None:
    network = small(nn.BatchNorm2d(8))
    lines = str(replace(network, nn.BatchNorm2d, num_entities=4)).splitlines()
    assert lines[0] == (
        "1: BatchNorm2d -> AttentiveNorm2d(8, num_entities=4, temperature=auto), the identity at the start, "
        "scale and shift carried over, running moments dropped"
    )
    assert str(insert_after(network, "0")).splitlines()[0].startswith("0: Conv2d + AttentiveNorm2d(8, num_entities=16")


@pytest.mark.filterwarnings("ignore")
def test_the_residual_blocks_of_a_unet_of_diffusers_are_followed_and_its_norms_of_maps_replaced() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; the rest does not need it")
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ).eval()
    x, time = torch.randn(2, 3, 16, 16), torch.tensor([3, 400])
    before = network(x, time).sample
    changes = insert_after(network, diffusers.models.resnet.ResnetBlock2D, num_entities=4)
    assert len(changes) == 8
    torch.testing.assert_close(network(x, time).sample, before, rtol=0, atol=0)
    gradients = []
    for checkpointing in (network.disable_gradient_checkpointing, network.enable_gradient_checkpointing):
        checkpointing()
        for block in changes.blocks:
            nn.init.ones_(block.rho)
        network.train().zero_grad()
        torch.manual_seed(1)
        network(x, time).sample.square().mean().backward()
        gradients.append([block.rho.grad.clone() for block in changes.blocks])
    torch.testing.assert_close(*gradients)
    changes.undo()
    torch.testing.assert_close(network.eval()(x, time).sample, before, rtol=0, atol=0)

    changes = replace(network, nn.GroupNorm)
    with pytest.raises(ValueError, match=r"^down_blocks.1.attentions.0.group_norm: got 3 dimensions"):
        network(x, time)
    changes.undo()
    of_maps = lambda name, module: isinstance(module, nn.GroupNorm) and "attentions" not in name  # noqa: E731
    assert len(replace(network, of_maps)) == 17
    assert network(x, time).sample.isfinite().all()
