"""observe_layouts: what it returns, of networks compiled or not, called by position or by keyword."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnorm import AttentiveNorm2d, observe_layouts
from attnorm.layers.observe import edited_entities
from attnorm.ops.regional_norm import regional_norm
from tests.layers import conftest


def make_layer(num_entities: int = 3) -> AttentiveNorm2d:
    return conftest.make_layer(4, num_entities).eval()


def feature_map() -> Tensor:
    return conftest.feature_map(2, 4, 3, 3)


def test_inputs_and_layouts_are_returned_by_name() -> None:
    first, second = make_layer(), make_layer(5)
    model = nn.Sequential(first, nn.ReLU(), nn.ModuleDict({"an": second})["an"])
    x = feature_map()
    with observe_layouts(model) as seen:
        out = model(x)
    assert list(seen) == ["0", "2"]
    middle = F.relu(first(x))
    assert torch.equal(seen["0"].features, x)
    torch.testing.assert_close(seen["0"].layout, torch.softmax(0.5 * first.entities(x), 1))
    assert torch.equal(seen["2"].features, middle)
    torch.testing.assert_close(seen["2"].layout, torch.softmax(0.5 * second.entities(middle), 1))
    assert not seen["2"].layout.requires_grad and not seen["2"].features.requires_grad
    assert torch.equal(out, model(x))


def test_the_last_pass_is_kept_and_after_the_block_nothing_is_seen() -> None:
    layer = make_layer()
    x = feature_map()
    with observe_layouts(layer) as seen:
        layer(x)
        layer(x=2 * x)
    layer(3 * x)
    assert torch.equal(seen[""].features, 2 * x)
    with pytest.raises(RuntimeError, match="inside"), observe_layouts(layer):
        raise RuntimeError("inside")
    assert not layer._forward_hooks


def test_a_network_that_was_compiled_is_seen_under_its_own_names() -> None:
    torch.compiler.reset()
    x = feature_map()
    in_place, inner = nn.Sequential(make_layer()), nn.Sequential(nn.Identity(), make_layer())
    in_place.compile(backend="eager")
    inner[1] = torch.compile(inner[1], backend="eager")
    whole = torch.compile(nn.Sequential(make_layer()), backend="eager")
    for model, name in ((in_place, "0"), (inner, "1"), (whole, "0")):
        model(x)  # compiled here, before anybody looks
        with observe_layouts(model) as seen:
            model(x)
        assert list(seen) == [name]
        torch.testing.assert_close(seen[name].layout, make_layer().layout(x))


@pytest.mark.parametrize("impl", ["reference", "fused", "native"])
def test_entities_that_are_off_win_nothing_and_exchanged_ones_stand_in_for_each_other(impl: str) -> None:
    layer = make_layer(4)
    layer.impl = impl
    x = feature_map()
    before = layer(x), layer.layout(x)
    with torch.no_grad(), edited_entities(layer, off=[1], exchanged=(0, 3)):
        out, layout = layer(x), layer.layout(x)
    kept = torch.softmax(0.5 * layer.entities(x)[:, [0, 2, 3]], 1)  # Eq. 4 over the entities that are left
    expected = torch.stack([kept[:, 2], torch.zeros_like(kept[:, 0]), kept[:, 1], kept[:, 0]], 1)
    torch.testing.assert_close(layout, expected)
    bar = regional_norm(layer.value(x), expected, layer.weight, layer.bias, impl="reference")
    torch.testing.assert_close(out, 0.7 * bar + x)
    assert torch.equal(layer(x), before[0]) and torch.equal(layer.layout(x), before[1])


def test_an_edit_that_cannot_be_made_is_refused() -> None:
    layer = make_layer()
    with (
        pytest.raises(ValueError, match=r"got entities \[-1, 3\]; expected 0 to 2"),
        edited_entities(layer, off=[3, -1]),
    ):
        pass
    with pytest.raises(ValueError, match="all entities are off"), edited_entities(layer, off=[0, 1, 2]):
        pass
    assert "_logits" not in vars(layer)
