"""AN in networks that are not ours: torchvision's segmentation network, and small ones with each kind of norm."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

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
    assert len(inserted) == 1 and len(norm._forward_hooks) == 1
    inserted.undo()
    assert not norm._forward_hooks and not list(norm.children())


def test_any_block_may_follow() -> None:
    network = small(nn.BatchNorm2d(8)).eval()
    before = network(images())
    change = insert_after(network, lambda name, _: name == "1", SelfAttention2d).made[0]
    assert isinstance(change.new, SelfAttention2d)
    torch.testing.assert_close(network(images()), before)  # its gate starts at 0 too
    assert not change.new.training


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


def test_a_change_is_told_in_a_line() -> None:
    network = small(nn.BatchNorm2d(8))
    lines = str(replace(network, nn.BatchNorm2d, num_entities=4)).splitlines()
    assert lines[0] == (
        "1: BatchNorm2d -> AttentiveNorm2d(8, num_entities=4, temperature=auto), the identity at the start, "
        "scale and shift carried over, running moments dropped"
    )
    assert str(insert_after(network, "0")).splitlines()[0].startswith("0: Conv2d + AttentiveNorm2d(8, num_entities=16")
