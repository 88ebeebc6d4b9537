"""AttentiveNorm2d inside torch's machinery: hooks on its convolutions, torch.func, forward mode. Processes, where they
are started: tests/training/test_processes.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.utils.prune as prune
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from attnorm import AttentiveNorm2d
from attnorm.ops.attentive_norm import unsupported_reason
from tests.layers.conftest import feature_map, make_layer, seeded

# Torch's own, when forward mode first loads what it needs.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")

CONVOLUTIONS = ("entities", "key", "query", "value")
native_only = pytest.mark.skipif(
    bool(reason := unsupported_reason("native", torch.device("cpu"), torch.float32, 4, 3, False)), reason=str(reason)
)


# Hooks on the convolutions inside

HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "spectral-norm": nn.utils.spectral_norm,
    "weight-norm": nn.utils.weight_norm,
    "pruning": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "parametrized": nn.utils.parametrizations.spectral_norm,
}


def hooked(kind: str, impl: str) -> AttentiveNorm2d:
    layer = make_layer(impl=impl)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm's, of its own retirement
        for name in CONVOLUTIONS:
            HOOKS[kind](getattr(layer, name))
    with torch.no_grad():  # so that the weight of the last call is not that of the next
        for name, parameter in layer.named_parameters():
            if name.endswith(("weight_orig", "weight_g", "original")):
                parameter.mul_(3)
    return layer


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("kind", HOOKS)
def test_what_renews_a_weight_before_each_call_does_so_in_the_layer(kind: str, impl: str) -> None:
    """The layer equals one whose weights are those that calls of the convolutions leave, and all that is under them
    is trained."""
    layer, same = hooked(kind, impl), hooked(kind, impl)
    x = feature_map(2, 4, 6, 6)
    weights = {}
    for name in CONVOLUTIONS:
        convolution = getattr(same, name)
        convolution(x)
        if kind == "parametrized":  # a call renews the weight by one more step of the power iteration than a look
            nn.utils.parametrize.remove_parametrizations(convolution.eval(), "weight")
        weights[name] = convolution.weight.detach()
    plain = make_layer(impl="reference")
    with torch.no_grad():
        for name, weight in weights.items():
            getattr(plain, name).weight.copy_(weight)
    out = layer(x, generator=seeded())
    torch.testing.assert_close(out, plain(x, generator=seeded()), rtol=1e-4, atol=1e-4)
    (out * feature_map(2, 4, 6, 6, seed=3)).sum().backward()
    for name, parameter in layer.named_parameters():
        if name not in ("value.bias", "value.weight_g"):  # zero by mathematics: v(x) is normalized, channel by channel
            assert parameter.grad is not None and parameter.grad.abs().max() > 1e-4, name


def test_the_penalty_is_of_the_weights_as_they_are_used() -> None:
    layer = make_layer()
    prune.l1_unstructured(layer.entities, "weight", 0.5)
    with torch.no_grad():
        layer.entities.weight_orig[:] = 1
    rows = nn.functional.normalize(layer.entities.weight_mask.flatten(1), dim=1)
    expected = (rows @ rows.T - torch.eye(3)).square().sum()
    torch.testing.assert_close(layer.orthogonality_penalty(), expected)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.value.register_forward_hook(lambda module, inputs, out: 2 * out),
        lambda layer: layer.query.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
        lambda layer: layer.key.register_full_backward_hook(lambda module, grads, out: None),
        lambda layer: setattr(layer, "value", Doubled(4, 4, 1)),
    ],
    ids=["output", "input", "gradient", "subclass"],
)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_what_the_layer_cannot_honour_is_refused(impl: str, change: Callable[[AttentiveNorm2d], Any]) -> None:
    layer = make_layer(impl=impl)
    change(layer)
    with pytest.raises(ValueError, match=r"(value|query|key) is \w+ with .* hook .*; expected a plain nn.Conv2d"):
        layer(feature_map(2, 4, 6, 6))


# torch.func, batched gradients, forward mode


def drawn(layer: AttentiveNorm2d, *shape: int, seed: int = 1) -> Tensor:
    return feature_map(*shape, seed=seed, dtype=layer.rho.dtype)


def directional(layer: AttentiveNorm2d) -> Tensor:
    x, v = (drawn(layer, 2, 4, 4, 5, seed=seed) for seed in (1, 2))
    return jvp(layer, (x,), (v,))[1]


def forward_over_reverse(layer: AttentiveNorm2d) -> Tensor:
    """The gradient is linear in what comes from above: its tangent there is the gradient for that tangent."""
    x = drawn(layer, 2, 4, 4, 5).requires_grad_()
    out = layer(x)
    with forward_ad.dual_level():
        above = forward_ad.make_dual(torch.ones_like(out), drawn(layer, 2, 4, 4, 5, seed=2))
        return forward_ad.unpack_dual(torch.autograd.grad(out, x, above)[0]).tangent


def per_sample(layer: AttentiveNorm2d) -> Tensor:
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(layer, parameters, (image[None],)).pow(3).sum()

    found = vmap(grad(loss), (None, 0))(parameters, drawn(layer, 3, 4, 4, 5))
    return torch.cat([part.flatten() for part in found.values()])


def batched(layer: AttentiveNorm2d) -> Tensor:
    x = drawn(layer, 2, 4, 4, 5).requires_grad_()
    several = drawn(layer, 3, 2, 4, 4, 5, seed=2)
    return torch.autograd.grad(layer(x), x, several, is_grads_batched=True)[0]


TRANSFORMS: dict[str, Callable[[AttentiveNorm2d], Tensor]] = {
    "jvp": directional,
    "forward-over-reverse": forward_over_reverse,
    "jacfwd": lambda layer: jacfwd(layer)(drawn(layer, 1, 4, 1, 2)),
    "jacrev": lambda layer: jacrev(layer)(drawn(layer, 1, 4, 1, 2)),
    "hessian": lambda layer: jacfwd(jacrev(lambda x: layer(x).pow(3).sum()))(drawn(layer, 1, 4, 1, 2)),
    "vmap": lambda layer: vmap(layer)(drawn(layer, 3, 2, 4, 4, 5)),
    "vmap-channels-last": lambda layer: vmap(layer)(drawn(layer, 3, 2, 4, 5, 4).permute(0, 1, 4, 2, 3)),
    "per-sample-gradients": per_sample,
    "batched-gradients": batched,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transformation_of_the_default_layer_is_that_of_the_plain_form(name: str) -> None:
    layer, exact = make_layer().eval(), make_layer(impl="reference", dtype=torch.float64).eval()
    expected = TRANSFORMS[name](exact)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(TRANSFORMS[name](layer).double(), expected, rtol=1e-3, atol=1e-4)


def test_transformations_of_a_layer_in_training_see_the_sampled_pixels() -> None:
    x, v = feature_map(2, 4, 4, 5), feature_map(2, 4, 4, 5, seed=2)
    layer = make_layer()

    def function(x: Tensor) -> Tensor:
        return layer(x, generator=seeded(3))

    (gradient,) = torch.autograd.grad(function(x.requires_grad_()), x, v)
    x = x.detach()
    tangent = jvp(function, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close((tangent * v).sum(), gradient.sum(), rtol=1e-3, atol=1e-3)  # <J 1, v> = <1, J^T v>
    several = torch.stack([v, 2 * v])
    (rows,) = torch.autograd.grad(function(x.requires_grad_()), x, several, is_grads_batched=True)
    torch.testing.assert_close(rows, torch.stack([gradient, 2 * gradient]), rtol=1e-4, atol=1e-4)


@native_only
@pytest.mark.parametrize("name", ["jvp", "jacrev", "vmap"])
def test_an_implementation_asked_for_by_name_refuses_what_it_would_get_wrong(name: str) -> None:
    with pytest.raises(ValueError, match=r"impl='native' cannot run: torch.func and forward-mode.*use impl='auto'"):
        TRANSFORMS[name](make_layer(impl="native").eval())


def test_transformations_compile_in_one_graph() -> None:
    torch.compiler.reset()
    layer, x, v = make_layer().eval(), feature_map(2, 4, 4, 5), feature_map(2, 4, 4, 5, seed=2)
    jvp(layer, (x,), (v,))  # torch loads what forward mode needs
    for function in (lambda x: jvp(layer, (x,), (v,))[1], lambda x: vmap(lambda image: layer(image[None]))(x)):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), function(x))
