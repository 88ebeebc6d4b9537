"""The operator over the fast implementations: the layer's own composition, and torch's machinery around it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnorm import AttentiveNorm2d
from attnorm.benchmark.timing import peak_bytes
from tests.layers import conftest
from tests.ops.conftest import implementation


@pytest.fixture(params=["native", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation that can run here; the kernels by Triton's interpreter where there is no GPU."""
    name: str = request.param
    implementation(name)
    return name


def make_layer(channels: int, entities: int, impl: str, **switches: object) -> AttentiveNorm2d:
    return conftest.make_layer(channels, entities, impl=impl, temperature=0.3, **switches)


def results(layer: nn.Module, x: Tensor, seed: int = 3) -> list[Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(seed)  # of the sampled positions
    out = layer(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    gradients = torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()], allow_unused=True)
    return [out.detach(), *(part for part in gradients if part is not None)]


def assert_close(got: list[Tensor], expected: list[Tensor], limit: float) -> None:
    assert len(got) == len(expected)
    scale = max(part.norm().item() for part in expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.double() - theirs.double()).norm() <= limit * max(theirs.norm().item(), 1e-2 * scale)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the check itself
def test_torch_accepts_the_operators(impl: str) -> None:
    n, c, k = 2, 8, 4
    for m in (n, 1) if impl == "native" else (1,):  # the interpreter is slow
        random = torch.Generator().manual_seed(2)
        shapes = [(n, c, 5, 6), (m, k, c), (m, k), (c, c), (c,), (k, c), (k, c), ()]
        drawn = [torch.randn(shape, generator=random).requires_grad_() for shape in shapes]
        torch.library.opcheck(torch.ops.attnorm.attentive_norm.default, (*drawn, 1e-5, impl), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", ["native"], indirect=True)  # the compiler sees one operator, whoever runs it
def test_it_compiles_in_one_graph_for_maps_of_several_sizes(impl: str) -> None:
    layer = make_layer(8, 4, impl)
    # From the second size on, or with dynamic=True from the first, the size is a variable of the graph.
    for training, dynamic, sides in ((True, None, (6, 9, 12)), (True, True, (6,)), (False, None, (6,))):
        torch._dynamo.reset()
        layer.train(training)
        compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for side in sides:
            x = torch.randn(2, 8, side, side)
            assert_close(results(compiled, x), results(layer, x), 1e-6)


def second_derivatives(layer: AttentiveNorm2d, x: Tensor, *, of_parameters: bool) -> list[Tensor]:
    """Gradients of the squared norm of dx, as a gradient penalty has it, plus a sum over dx or over all gradients."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    leaves = [x, *layer.parameters()]
    torch.manual_seed(5)
    loss = layer(x).pow(3).sum()
    slopes = torch.autograd.grad(loss, leaves if of_parameters else [x], create_graph=True)
    total = sum((slope * torch.linspace(-1, 1, slope.numel()).view(slope.shape)).sum() for slope in slopes)
    return [
        part
        for part in torch.autograd.grad(slopes[0].square().sum() + total, leaves, allow_unused=True)
        if part is not None
    ]


@pytest.mark.parametrize(
    ("shape", "layout", "switches", "training", "of_parameters"),
    [
        ((2, 8, 5, 6), torch.contiguous_format, {}, True, False),
        ((1, 6, 7, 3), torch.channels_last, {"shared_sampling": True}, True, True),
        ((2, 8, 5, 6), torch.channels_last, {"self_sampling": False}, True, True),
        ((1, 6, 7, 3), torch.contiguous_format, {"affine": False}, False, False),
    ],
)
def test_the_layer_and_its_derivatives_of_two_orders_are_the_same_by_every_implementation(
    impl: str,
    shape: tuple[int, ...],
    layout: torch.memory_format,
    switches: dict[str, bool],
    training: bool,
    of_parameters: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)
    plain = make_layer(shape[1], 5, "reference", **switches).double().train(training)
    expected = results(plain, x.double()), second_derivatives(plain, x.double(), of_parameters=of_parameters)
    monkeypatch.delattr("attnorm.ops.operator.plain")  # the second order has kernels of its own
    layer = make_layer(shape[1], 5, impl, **switches).train(training)
    found = results(layer, x)
    assert_close(found, expected[0], 1e-4)
    assert found[0].is_contiguous(memory_format=layout)
    assert_close(second_derivatives(layer, x, of_parameters=of_parameters), expected[1], 1e-4)


def test_third_derivatives_go_through_the_plain_form(impl: str) -> None:
    results = {}
    for name, dtype in ((impl, torch.float32), ("reference", torch.float64)):
        layer = make_layer(4, 3, name).to(dtype)
        x = torch.randn(1, 4, 3, 4, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        torch.manual_seed(5)
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
        results[name] = list(torch.autograd.grad(second.pow(2).sum(), [x, layer.entities.weight, layer.rho]))
    assert_close(results[impl], results["reference"], 1e-4)


def test_a_layer_used_twice_counts_each_use_once_in_a_graph_to_be_differentiated(impl: str) -> None:
    x = torch.randn(2, 8, 6, 6)
    gradients = {}
    for name in (impl, "fused"):
        layer = make_layer(8, 4, name).eval()
        out = layer(0.1 * layer(x))
        gradients[name] = torch.autograd.grad(out.square().sum(), [layer.rho, layer.bias], create_graph=True)  # type: ignore[list-item]
    assert_close(list(gradients[impl]), list(gradients["fused"]), 1e-4)


def test_torchs_default_dtype_changes_nothing(impl: str) -> None:
    layer, x = make_layer(8, 4, impl).eval(), torch.randn(2, 8, 6, 6)  # other positions would be drawn in training
    expected = results(layer, x)
    torch.set_default_dtype(torch.float64)
    try:
        got = results(layer, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


def test_parameters_that_do_not_fit_are_named(impl: str) -> None:
    layer, x = make_layer(8, 4, impl), torch.randn(2, 8, 6, 6)
    layer.value = nn.Conv2d(8, 6, 1)
    with pytest.raises(ValueError, match=r"value_weight is \(6, 8\) on cpu; expected \(8, 8\) on cpu"):
        layer(x)
    with pytest.raises(ValueError, match=r"on meta; expected .* on cpu.*move the layer or x"):
        make_layer(8, 4, impl).eval().to("meta")(x)


@pytest.mark.parametrize("impl", ["native"], indirect=True)
def test_compiling_does_not_run_what_comes_before(impl: str) -> None:
    torch._dynamo.reset()
    norms = []
    for compiled in (True, False):
        network = nn.Sequential(nn.BatchNorm2d(8), make_layer(8, 4, impl))
        x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
        (torch.compile(network, backend="aot_eager") if compiled else network)(x)
        norms.append(network[0].running_mean)
    torch.testing.assert_close(norms[0], norms[1])


def test_no_images_give_no_images(impl: str) -> None:
    layer, x = make_layer(8, 4, impl), torch.zeros(0, 8, 4, 4, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.shape == (0, 8, 4, 4) and x.grad is not None and x.grad.shape == out.shape
    assert not layer.value.weight.grad.any()


def test_under_autocast_the_input_keeps_its_precision(impl: str) -> None:
    layer, exact = make_layer(8, 4, impl).eval(), make_layer(8, 4, "reference").double().eval()
    x = torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close([layer(x)], [exact(x.double())], 1e-5)
        low = layer(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert_close([low], [exact(x.bfloat16().double())], 1e-2)


def test_a_layout_that_is_asked_for_is_the_one_that_was_used(impl: str) -> None:
    layer = make_layer(8, 4, impl)
    x = torch.randn(2, 8, 6, 6)
    torch.manual_seed(7)
    with pytest.raises(ValueError, match=f"impl='{impl}' cannot run: .*return_layout=True.*use impl='auto'"):
        layer(x, return_layout=True)
    layer.impl = "auto"
    torch.manual_seed(7)
    out, layout = layer(x, return_layout=True)
    layer.impl = impl
    assert layout.shape == (2, 4, 6, 6)
    torch.testing.assert_close(layout.sum(1), torch.ones(2, 6, 6))
    torch.manual_seed(7)
    torch.testing.assert_close(layer(x), out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", ["native"], indirect=True)
def test_a_training_step_keeps_next_to_nothing(impl: str) -> None:
    """Beyond output and gradient of the input about half the input, of a small one; four matrix products keep six."""
    x = torch.randn(1, 32, 128, 128, requires_grad=True)
    beyond = {}
    for name in (impl, "fused"):
        layer = make_layer(32, 16, name)

        def step(layer: AttentiveNorm2d = layer) -> None:
            x.grad = None
            layer(x).backward(x.detach())

        step()
        x.grad = None
        beyond[name] = peak_bytes(step) / (4 * x.numel()) - 2
    assert beyond[impl] < 0.6
    assert beyond["fused"] > 4  # the measure itself sees what is kept
