"""diagnose says of each layer whether it takes part."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attnorm import AttentiveNorm2d, diagnose, insert_after
from attnorm.ops.soft_layout import effective_entities


class Network(nn.Module):
    def __init__(self, **options: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = AttentiveNorm2d(8, 4, **options)  # type: ignore[arg-type]
        self.unused = AttentiveNorm2d(8, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.first(x=scale * x)


def test_numbers_are_those_of_the_layer() -> None:
    network = Network(temperature=0.5)
    with torch.no_grad():
        network.first.rho.fill_(-0.2)
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    network.unused.eval()
    before, random = {name: tensor.clone() for name, tensor in network.state_dict().items()}, torch.get_rng_state()
    (site,) = diagnose(network, x, scale=3.0)
    assert network.training and not network.unused.training and torch.equal(torch.get_rng_state(), random)  # as before
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    logits = 0.5 * torch.einsum("kc,nchw->nkhw", network.first.entities.weight[:, :, 0, 0], 3 * x)
    layout = torch.softmax(logits, 1)
    entropy = -(layout * layout.log()).sum(1).mean() / math.log(4)
    shares = torch.stack([(layout.argmax(1) == k).float().mean() for k in range(4)])
    added = network.first.eval()(3 * x) - 3 * x
    assert site.site == "first" and site.rho == pytest.approx(-0.2)
    assert site.entropy == pytest.approx(entropy.item(), rel=1e-4)
    assert site.usage == pytest.approx(tuple(shares.tolist()))
    assert site.spread == pytest.approx((logits.var(1, correction=0).mean() ** 0.5).item(), rel=1e-4)
    assert site.change == pytest.approx((added.norm() / (3 * x).norm()).item(), rel=1e-4)
    used = effective_entities(shares.tolist())
    assert str(site).startswith(f"first: entropy {entropy:.2f}, {used:.1f} of 4 entities in use, rho -0.200 ")
    assert site.is_awake and str(site).endswith(": awake")


def test_a_sleeping_layer_says_why() -> None:
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    network = Network(temperature=1e-3)
    (site,) = diagnose(network, x)
    assert not site.is_awake and site.change == 0
    assert str(site).endswith("asleep: the layout is uniform and rho is next to 0")
    with torch.no_grad():
        network.first.rho.fill_(0.5)
    (site,) = diagnose(network, x)
    assert site.verdict == "asleep: the layout is uniform"
    sharp = Network(temperature=60.0)
    logits = 60 * torch.einsum("kc,nchw->nkhw", sharp.first.entities.weight[:, :, 0, 0], x)
    sharp.first = torch.compile(sharp.first, backend="eager")  # type: ignore[assignment]
    (site,) = diagnose(sharp, x)
    assert site.site == "first" and site.verdict == "asleep: rho is next to 0"
    assert site.spread == pytest.approx((logits.var(1, correction=0).mean() ** 0.5).item(), rel=1e-4)


def test_a_layer_that_is_only_ever_in_evaluation_is_told_so() -> None:
    """As one that follows a frozen batch norm, whose mode it has: its layout's spread comes of training batches."""
    network, x = nn.Sequential(nn.BatchNorm2d(8)), 0.01 * torch.randn(2, 8, 6, 6)
    block = insert_after(network, nn.BatchNorm2d).made[0].new
    with torch.no_grad():
        block.rho.fill_(0.5)
    network.train()
    network[0].eval()
    network(x)
    (site,) = diagnose(network, x)
    assert site.batches == 0 and site.entropy > 0.95
    assert site.verdict == (
        "asleep: the layout is uniform (no training batch was seen: the layer was never in training mode)"
    )
    block.train()
    network(x)
    (site,) = diagnose(network, x)
    assert site.batches == 1 and site.verdict == "awake"


def test_entities_that_an_initialization_of_the_whole_network_made_small_are_told() -> None:
    network, x = Network(), torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        network.first.rho.fill_(0.5)
    network.apply(lambda module: nn.init.normal_(module.weight, 0, 0.02) if isinstance(module, nn.Conv2d) else None)
    network(x)
    (site,) = diagnose(network, x)
    assert site.entities == pytest.approx(0.02, rel=0.5)
    assert site.verdict.startswith("asleep: the layout is uniform (the entities are 0.02 where they start at 1: ")
    network.first.reset_entities()
    assert diagnose(network, x)[0].verdict == "awake"


def test_a_network_without_the_layer_is_told_so() -> None:
    with pytest.raises(ValueError, match="there is no AttentiveNorm2d in ReLU"):
        diagnose(nn.ReLU(), torch.zeros(1, 8, 2, 2))
    network = Network()
    network.first = nn.Identity()  # type: ignore[assignment]
    network.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="this pass went through none"):
        diagnose(network, torch.zeros(1, 8, 2, 2))
