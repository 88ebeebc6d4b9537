"""Around the GPU kernels: precision, plans, the check against the plain form, and where they cannot run. What they
compute is in test_kernels.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")

from attnorm import AttentiveNorm2d  # noqa: E402
from attnorm.ops.dispatch import Parameters  # noqa: E402
from attnorm.ops.regional_norm import regional_norm  # noqa: E402
from attnorm.ops.soft_layout import soft_layout  # noqa: E402
from attnorm.ops.triton import check, launch, plans, unsupported_reason  # noqa: E402
from tests.ops import conftest  # noqa: E402

DEVICE = conftest.DEVICE["triton"]


def make(n: int, c: int, k: int, h: int, w: int, mean: float = 0.3) -> tuple[Tensor, Any]:
    """x, and the other arguments."""
    random = torch.Generator().manual_seed(c * 1000 + k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    x, scale = draw(n, c, h, w) + mean, 0.1
    parameters = [scale * draw(1, k, c), 3 * scale * draw(1, k), draw(c, c) / c**0.5, draw(c)]
    parameters += [1 + 0.3 * draw(k, c), draw(k, c), torch.tensor(0.7)]
    return x.to(DEVICE), Parameters(*(part.to(DEVICE) for part in parameters))


@pytest.fixture(scope="module", autouse=True)
def _can_run() -> None:
    conftest.implementation("triton")


def plain(leaves: list[Tensor]) -> Tensor:
    x, filters, offset, value_weight, value_bias, weight, bias, rho = leaves
    v = (value_weight @ x.flatten(2) + value_bias[:, None]).view_as(x)
    return rho * regional_norm(v, soft_layout(x, filters, offset), weight, bias) + x


def errors_of(x: Tensor, parameters: Parameters, grad: Tensor) -> list[float]:
    """Relative errors of the output and all gradients but that of the value's bias, which is 0."""
    leaves = [part.double().requires_grad_() for part in (x, *parameters)]
    expected = plain(leaves)
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    out, *moments = launch.forward(x, parameters, 1e-5)
    got = launch.backward(grad, x, parameters, moments, 1e-5)
    pairs = [(out, expected), *zip(got, gradients, strict=True)]
    return [((a.double() - b).norm() / b.norm()).item() for i, (a, b) in enumerate(pairs) if i != 5]


def test_tf32_is_taken_where_torch_takes_it_and_errors_do_not_pile_up() -> None:
    x, parameters = make(1, 32, 16, 16, 32, mean=1.5)
    # Sums over pixels then cancel, and a bias of the rounding would show.
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) + x.abs()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rounded = errors_of(x, parameters, grad)
    finally:
        torch.set_float32_matmul_precision(before)
    exact = errors_of(x, parameters, grad)
    assert max(exact) < 2e-5 < rounded[0] < 1e-3
    assert max(rounded) < 5e-3


@pytest.mark.parametrize(
    "change",
    [{"square": False}, {"chunk": 16, "split": 1, "square": False}],  # two passes for the value projection; chunks
    ids=["square", "chunks"],
)
def test_the_plans_of_many_channels_give_the_same(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x, parameters = make(2, 17, 5, 5, 9)
    moments = launch.forward(x, parameters, 1e-5)[1:]
    tangent, *dots = (torch.ones_like(part) for number, part in enumerate((x, *parameters)) if number != 4)
    given = (tangent, dots, x, x, parameters, moments, 1e-5)
    expected = launch.double_backward(*given)
    changed = {name: plan._replace(**change) for name, plan in plans._plans(32, 32).items()}
    monkeypatch.setattr(plans, "_plans", lambda *_: changed)
    assert max(errors_of(x, parameters, x.abs())) < 2e-5
    for ours, theirs in zip(launch.double_backward(*given), expected, strict=True):
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm()


def test_a_plan_that_does_not_fit_is_replaced_by_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, tried = plans._cut, []

    def small_device(plan: plans.Plan, x: Tensor, num_entities: int) -> Any:
        tried.append(plan)
        if plan.stages > 1 or plan.square:
            raise triton.OutOfResources(300_000, 232_448, "shared memory")
        return cut(plan, x, num_entities)

    monkeypatch.setattr(plans, "_cut", small_device)
    monkeypatch.setattr(plans, "_fits", {})
    x, parameters = make(1, 16, 16, 8, 16)
    assert max(errors_of(x, parameters, x.abs())) < 2e-5
    first = len(tried)
    errors_of(x, parameters, x.abs())
    assert first > 5 and len(tried) == first + 5  # four passes and the outer product, each by the plan that fitted
    monkeypatch.setattr(plans, "_smaller", lambda plan: None)
    monkeypatch.setattr(plans, "_fits", {})
    with pytest.raises(triton.OutOfResources):
        launch.forward(x, parameters, 1e-5)


def test_right_kernels_are_found_right_and_wrong_ones_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (DEVICE, torch.float32, 16, 16, True, "ieee")
    disagreement = check.disagreement.__wrapped__
    cut, exact = plans._cut, set()

    def watched(*arguments: Any) -> Any:
        made = cut(*arguments)
        exact.add(made.options["EXACT"])
        return made

    with monkeypatch.context() as patch, torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16):
        patch.setattr(plans, "_cut", watched)
        assert disagreement(*arguments, side=16) is None  # whoever calls the layer first, in whatever mode
    assert exact == {True, False}  # maps of whole tiles, and others
    assert disagreement(*arguments, side=6, second=True) is None

    def wrong(kernel: Any, place: int) -> Any:
        def function(*inputs: Any) -> tuple[Tensor, ...]:
            return tuple(part * (1.01 if number == place else 1) for number, part in enumerate(kernel(*inputs)))

        return function

    monkeypatch.setattr(launch, "backward", wrong(launch.backward, 1))
    assert "the gradient of the filters is off by 1.0e-02" in str(disagreement(*arguments, side=6))
    monkeypatch.setattr(launch, "double_backward", wrong(launch.double_backward, 1))
    assert "the gradient of x is off by 1.0e-02" in str(disagreement(*arguments, side=6, second=True))


@pytest.mark.slow
def test_rounding_alone_is_no_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """At this size the sum that is rho's gradient cancels to a 500th part for an arbitrary gradient of the output."""
    kept: dict[str, Any] = {}

    def rounded_forward(x: Tensor, parameters: Parameters, eps: float) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = kept["leaves"] = [part.detach().float().requires_grad_() for part in (x, *parameters)]
            x, filters, offset, value_weight, value_bias, weight, bias, rho = leaves
            soft = soft_layout(x, filters, offset)
            soft = soft + (soft.bfloat16() - soft).detach()
            v = (value_weight @ x.flatten(2) + value_bias[:, None]).view_as(x)
            kept["out"] = rho * regional_norm(v, soft, weight, bias) + x
        return kept["out"].detach(), torch.empty(0), torch.empty(0), torch.empty(0)

    def rounded_backward(grad: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(kept["out"], kept["leaves"], grad.float())

    monkeypatch.setattr(launch, "forward", rounded_forward)
    monkeypatch.setattr(launch, "backward", rounded_backward)
    shape = (2, 256, 128, 128)
    assert check._compare(shape, torch.device("cpu"), torch.bfloat16, 16, False, "ieee") is None


@pytest.mark.parametrize(
    ("dtype", "channels", "entities", "reason"),
    [
        (torch.float32, 300, 16, "300 channels and 16 entities of torch.float32"),
        (torch.float32, 8, 33, "8 channels and 33 entities"),
        (torch.float32, 200, 32, "at most 256 and 16"),
        (torch.float64, 8, 16, "x is torch.float64"),
    ],
)
def test_why_it_cannot_run(dtype: torch.dtype, channels: int, entities: int, reason: str) -> None:
    assert reason in str(unsupported_reason(DEVICE, dtype, channels, entities, False))
    assert unsupported_reason(DEVICE, torch.bfloat16, 16, 16, False) is None


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "INTERPRETED", SimpleNamespace(value=False))
    with pytest.raises(ValueError, match="impl='triton' cannot run: x is on cpu; it runs on CUDA devices"):
        AttentiveNorm2d(4, impl="triton")(torch.ones(1, 4, 2, 2))
