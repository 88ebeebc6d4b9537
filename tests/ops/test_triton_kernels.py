"""The GPU kernels, run by Triton's interpreter where there is no GPU, against the equations in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")

from attnorm.ops import triton_kernels  # noqa: E402
from attnorm.ops.regional_norm import regional_norm  # noqa: E402
from attnorm.ops.triton_kernels import Plan, backward, disagreement, double_backward, forward, obstacle  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TEMPERATURE, EPS = 0.3, 1e-5
NAMES = ("x", "filters", "offset", "value_weight", "value_bias", "weight", "bias", "rho")


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> None:
    """Triton 3.6's interpreter cannot index with numpy 2.4 or newer: that says nothing about the kernels."""
    if DEVICE.type == "cpu":
        x, parameters, _ = make(1, 16, 16, 4, 4, 1)
        try:
            forward(x, *parameters, TEMPERATURE, EPS)
        except triton.runtime.errors.InterpreterError as error:
            pytest.skip(f"Triton {triton.__version__}'s interpreter does not work beside this numpy: {error}")


class Exact(NamedTuple):
    out: Tensor
    area: Tensor
    mean: Tensor  # of v without its bias
    rstd: Tensor


def make(
    n: int, c: int, k: int, h: int, w: int, m: int, dtype: torch.dtype = torch.float32, mean: float = 0.3
) -> tuple[Tensor, list[Tensor], Tensor]:
    """(x, the other arguments, a gradient of the output)."""
    random = torch.Generator().manual_seed(c * 1000 + k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    x, grad = (draw(n, c, h, w) + mean).to(dtype), draw(n, c, h, w).to(dtype)
    parameters = [draw(m, k, c), 3 * draw(m, k), draw(c, c) / c**0.5, draw(c), 1 + 0.3 * draw(k, c), draw(k, c)]
    return x.to(DEVICE), [part.to(DEVICE) for part in (*parameters, torch.tensor(0.7))], grad.to(DEVICE)


def literal(x: Tensor, parameters: list[Tensor], temperature: float = TEMPERATURE) -> Exact:
    """Eq. 4 to 6 as they are written, with the tensor of n times the size of x."""
    filters, offset, value_weight, value_bias, weight, bias, rho = parameters
    flat = x.flatten(2)
    s = torch.softmax(temperature * (filters @ flat + offset[..., None]), 1)[:, :, None]  # [N, K, 1, P]
    v = (value_weight @ flat)[:, None]  # [N, 1, C, P]
    area = s.sum(3).clamp_min(1e-12)
    mean = (s * v).sum(3) / area
    var = (s * (v - mean[..., None]) ** 2).sum(3) / area
    rstd = (var + EPS).rsqrt()
    normalized = (v - mean[..., None]) * rstd[..., None] * weight[..., None] + bias[..., None]
    out = (rho * (normalized * s).sum(1) + flat).view_as(x) + 0 * value_bias.sum()
    return Exact(out, area[..., 0], mean, rstd)


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def errors_of(x: Tensor, parameters: list[Tensor], grad: Tensor, temperature: float = TEMPERATURE) -> dict[str, float]:
    """Relative errors of every result of both functions."""
    leaves = [part.double().requires_grad_() for part in (x, *parameters)]
    exact = literal(leaves[0], leaves[1:], temperature)
    gradients = torch.autograd.grad(exact.out, leaves, grad.double())
    out, *moments = forward(x, *parameters, temperature, EPS)
    got = backward(grad, x, *parameters, *moments, temperature, EPS)
    found = {
        name: error(ours, theirs) for name, ours, theirs in zip(exact._fields, (out, *moments), exact, strict=True)
    }
    found |= {f"d {name}": error(ours, theirs) for name, ours, theirs in zip(NAMES, got, gradients, strict=True)}
    assert out.stride() == got[0].stride() == x.stride() and out.dtype == got[0].dtype == x.dtype
    return found


# A size each for: exact tiles; several images; odd everything; filters of their own; a border that is no multiple;
# 1 x 1; many entities; channels that are no power of two, in chunks.
CASES = [
    (1, 16, 16, 8, 16, 1),
    (2, 32, 16, 16, 32, 2),
    (2, 5, 3, 7, 9, 1),
    (2, 33, 5, 9, 11, 2),
    (1, 32, 8, 33, 37, 1),
    (1, 1, 1, 1, 1, 1),
    (1, 3, 32, 5, 4, 1),
    (1, 130, 13, 5, 9, 1),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
def test_everything_agrees_with_the_equations(case: tuple[int, ...], channels_last: bool) -> None:
    x, parameters, grad = make(*case)
    if channels_last:
        x, grad = (part.contiguous(memory_format=torch.channels_last) for part in (x, grad))
    found = errors_of(x, parameters, grad)
    # With one pixel v is its own mean, and what is left of 0 / sqrt(eps) is rounding.
    single = {"d value_weight", "d weight", "d filters", "d offset", "d rho"} if case[3] * case[4] == 1 else set()
    single |= {"d filters", "d offset"} if case[2] == 1 else set()  # one entity has no rival
    assert {name: value for name, value in found.items() if value > 2e-5 and name not in single} == {}


def cotangents_of(x: Tensor, parameters: list[Tensor]) -> list[Tensor | None]:
    """Of all gradients but that of the value's bias."""
    random = torch.Generator().manual_seed(9)
    parts = [torch.randn(part.shape, generator=random).to(DEVICE, part.dtype) for part in (x, *parameters)]
    return [*parts[:4], *parts[5:]]


def second_errors_of(
    x: Tensor, parameters: list[Tensor], grad: Tensor, cotangents: list[Tensor | None]
) -> dict[str, float]:
    """Relative errors of the gradients of <cotangents, gradients>; None for a cotangent of zeros."""
    leaves = [part.double().requires_grad_() for part in (x, *parameters)]
    exact_grad = grad.double().requires_grad_()
    gradients = torch.autograd.grad(literal(leaves[0], leaves[1:]).out, leaves, exact_grad, create_graph=True)
    zeros = [torch.zeros_like(part) for part in (x, *parameters)]
    given = [*cotangents[:4], None, *cotangents[4:]]
    dots = [zero.double() if part is None else part.double() for part, zero in zip(given, zeros, strict=True)]
    expected = torch.autograd.grad(gradients, [exact_grad, *leaves], dots, allow_unused=True, materialize_grads=True)
    moments = forward(x, *parameters, TEMPERATURE, EPS)[1:]
    got = double_backward(*cotangents, grad, x, *parameters, *moments, TEMPERATURE, EPS)
    assert got[0].stride() == got[1].stride() == x.stride() and got[0].dtype == got[1].dtype == x.dtype
    names = ("grad", *NAMES, "filters_dot", "offset_dot")
    pairs = zip(names, got, (*expected, *gradients[1:3]), strict=True)
    return {name: error(ours, theirs) for name, ours, theirs in pairs}


@pytest.mark.parametrize(
    ("case", "channels_last", "change"),
    [
        ((2, 5, 3, 7, 9, 1), False, {}),
        ((1, 16, 16, 8, 8, 1), True, {}),
        ((2, 17, 5, 5, 9, 2), True, {"chunk": 16, "split": 1, "square": False}),  # as with many channels
    ],
)
def test_second_derivatives_agree_with_those_of_the_equations(
    case: tuple[int, ...], channels_last: bool, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = {name: plan._replace(**change) for name, plan in triton_kernels._plans(16, 32).items()}
    monkeypatch.setattr(triton_kernels, "_plans", lambda *_: plans)
    x, parameters, grad = make(*case)
    if channels_last:
        x, grad = (part.contiguous(memory_format=torch.channels_last) for part in (x, grad))
    cotangents = cotangents_of(x, parameters)
    found = second_errors_of(x, parameters, grad, cotangents)
    assert {name: value for name, value in found.items() if value > 2e-5} == {}


def test_second_derivatives_of_a_gradient_penalty_in_low_precision() -> None:
    x, parameters, grad = make(2, 5, 3, 7, 9, 2, torch.bfloat16)
    found = second_errors_of(x, parameters, grad, [*cotangents_of(x, parameters)[:3], None, None, None, None])
    assert max(found.values()) < 2e-2


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
def test_low_precision(dtype: torch.dtype, limit: float) -> None:
    found = errors_of(*make(2, 33, 5, 9, 11, 2, dtype))
    assert max(found.values()) < limit
    assert found["area"] < 1e-4  # the layout's logits keep what their filters lose in rounding


def test_tf32_is_taken_where_torch_takes_it_and_errors_do_not_pile_up() -> None:
    x, parameters, grad = make(1, 32, 16, 32, 32, 1, mean=1.5)
    grad = grad + x.abs()  # sums over pixels then cancel, and a bias of the rounding would show
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        rounded = errors_of(x, parameters, grad, 0.1)
    finally:
        torch.set_float32_matmul_precision(before)
    exact = errors_of(x, parameters, grad, 0.1)
    assert max(exact.values()) < 2e-5 < rounded["out"] < 1e-3
    assert max(rounded.values()) < 5e-3


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    """Row 11: one-pass variance in float32 would leave nothing of sigma 1 at a mean of 1e4."""
    x, parameters, grad = make(1, 32, 8, 24, 24, 1, mean=1e4)
    leaves = [part.double() for part in (x, *parameters)]
    exact = literal(leaves[0], leaves[1:], 1e-5)
    out, _, mean, rstd = forward(x, *parameters, 1e-5, EPS)
    assert error(mean, exact.mean) < 1e-6 and error(rstd, exact.rstd) < 1e-3
    assert error(out.double() - x.double(), exact.out - leaves[0]) < 5e-3  # x itself has a rounding of 1e-3
    assert torch.isfinite(backward(grad, x, *parameters, *forward(x, *parameters, 1e-5, EPS)[1:], 1e-5, EPS)[0]).all()


@pytest.mark.parametrize("square", [True, False])  # the gradient of the value projection in one pass, or in two
def test_an_offset_of_the_features_costs_the_value_projections_gradient_no_digits(
    square: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = {name: plan._replace(square=square) for name, plan in triton_kernels._plans(16, 32).items()}
    monkeypatch.setattr(triton_kernels, "_plans", lambda *_: plans)
    x, parameters, grad = make(2, 16, 4, 12, 12, 2, mean=1e3)
    parameters[0] -= parameters[0].mean(2, keepdim=True)  # the layout does not see the offset
    assert errors_of(x, parameters, grad)["d value_weight"] < 1e-3  # v has a rounding of 1e-4 here


def test_an_entity_without_pixels_and_a_constant_region_stay_finite() -> None:
    x, parameters, grad = make(1, 16, 4, 8, 8, 1)
    x = torch.ones_like(x)
    parameters[1] = torch.tensor([[0.0, 0.0, 0.0, -4000.0]], device=DEVICE)  # exp underflows
    out, *moments = forward(x, *parameters, TEMPERATURE, EPS)
    assert moments[0][0, 3].item() == pytest.approx(1e-12)
    for result in (out, *moments, *backward(grad, x, *parameters, *moments, TEMPERATURE, EPS)):
        assert torch.isfinite(result).all()


def test_every_value_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote would show as NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make: Any) -> Any:
        def function(*arguments: Any, **settings: Any) -> Tensor:
            result: Tensor = make(*arguments, **settings)
            return result.fill_(torch.nan) if result.is_floating_point() else result

        return function

    x, parameters, grad = make(2, 17, 5, 5, 9, 2)
    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    out, *moments = forward(x, *parameters, TEMPERATURE, EPS)
    gradients = backward(grad, x, *parameters, *moments, TEMPERATURE, EPS)
    cotangents = cotangents_of(x, parameters)
    second = double_backward(*cotangents, grad, x, *parameters, *moments, TEMPERATURE, EPS)
    for result in (out, *moments, *gradients, *second):
        assert torch.isfinite(result).all()


def test_the_same_bits_every_time() -> None:
    x, parameters, grad = make(2, 32, 16, 16, 32, 2)
    runs = []
    for _ in range(2):
        out, *moments = forward(x, *parameters, TEMPERATURE, EPS)
        runs.append([out, *moments, *backward(grad, x, *parameters, *moments, TEMPERATURE, EPS)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_a_plan_that_does_not_fit_is_replaced_by_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, tried = triton_kernels._cut, []

    def small_device(plan: Plan, x: Tensor, num_entities: int) -> Any:
        tried.append(plan)
        if plan.stages > 1 or plan.square:
            raise triton.OutOfResources(300_000, 232_448, "shared memory")
        return cut(plan, x, num_entities)

    monkeypatch.setattr(triton_kernels, "_cut", small_device)
    monkeypatch.setattr(triton_kernels, "_fits", {})
    assert max(errors_of(*make(1, 16, 16, 8, 16, 1)).values()) < 2e-5
    first = len(tried)
    errors_of(*make(1, 16, 16, 8, 16, 1))
    assert first > 5 and len(tried) == first + 5  # four passes and the outer product, each by the plan that fitted
    monkeypatch.setattr(triton_kernels, "_smaller", lambda plan: None)
    monkeypatch.setattr(triton_kernels, "_fits", {})
    with pytest.raises(triton.OutOfResources):
        forward(*make(1, 16, 16, 8, 16, 1)[:1], *make(1, 16, 16, 8, 16, 1)[1], TEMPERATURE, EPS)


@pytest.mark.parametrize("channels_last", [True, False])
def test_right_kernels_are_found_right_and_wrong_ones_wrong(
    channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (DEVICE, torch.float32, 16, 4, channels_last, "ieee")
    disagreement.cache_clear()
    with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16):  # of whoever calls the layer first
        assert disagreement(*arguments, side=12) is None
    kernel = triton_kernels.backward

    def wrong(*inputs: Any) -> tuple[Tensor, ...]:
        dx, d_filters, *others = kernel(*inputs)
        return (dx, d_filters * 1.01, *others)

    monkeypatch.setattr(triton_kernels, "backward", wrong)
    disagreement.cache_clear()
    assert "the gradient of the filters is off by 1.0e-02" in str(disagreement(*arguments, side=12))
    second_kernel = triton_kernels.double_backward

    def wrong_second(*inputs: Any) -> tuple[Tensor, ...]:
        dgrad, dx, *others = second_kernel(*inputs)
        return (dgrad, dx * 1.01, *others)

    assert disagreement(*arguments, side=6, second=True) is None
    monkeypatch.setattr(triton_kernels, "double_backward", wrong_second)
    disagreement.cache_clear()
    assert "the gradient of x is off by 1.0e-02" in str(disagreement(*arguments, side=6, second=True))
    disagreement.cache_clear()


def test_both_kinds_of_maps_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, exact = triton_kernels._cut, set()

    def watched(*arguments: Any) -> Any:
        made = cut(*arguments)
        exact.add(made.options["EXACT"])
        return made

    monkeypatch.setattr(triton_kernels, "_cut", watched)
    disagreement.cache_clear()
    assert disagreement(DEVICE, torch.float32, 16, 16, False, "ieee", side=16) is None
    assert exact == {True, False}


@pytest.mark.slow
def test_rounding_alone_is_no_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """At this size the sum that is rho's gradient cancels to a 500th part for an arbitrary gradient of the output."""
    kept: dict[str, Any] = {}

    def rounded_forward(*inputs: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = kept["leaves"] = [part.detach().float().requires_grad_() for part in inputs[:8]]
            x, filters, offset, value_weight, value_bias, weight, bias, rho = leaves
            flat = x.flatten(2)
            soft = torch.softmax(inputs[8] * torch.baddbmm(offset[..., None], filters, flat), 1)
            soft = soft + (soft.bfloat16() - soft).detach()
            v = (value_weight @ flat + value_bias[:, None]).view_as(x)
            kept["out"] = rho * regional_norm(v, soft.unflatten(2, x.shape[2:]), weight, bias, eps=inputs[9]) + x
        return kept["out"].detach(), torch.empty(0), torch.empty(0), torch.empty(0)

    def rounded_backward(grad: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(kept["out"], kept["leaves"], grad.float())

    monkeypatch.setattr(triton_kernels, "forward", rounded_forward)
    monkeypatch.setattr(triton_kernels, "backward", rounded_backward)
    shape = (2, 256, 128, 128)
    assert triton_kernels._compare(shape, torch.device("cpu"), torch.bfloat16, 16, False, "ieee") is None


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
    assert reason in str(obstacle(DEVICE, dtype, channels, entities, False))
    assert obstacle(DEVICE, torch.bfloat16, 16, 16, False) is None


def test_without_a_gpu_it_says_so() -> None:
    code = (
        "import torch, attnorm\n"
        "layer = attnorm.AttentiveNorm2d(4, impl='triton')\n"
        "try: layer(torch.ones(1, 4, 2, 2))\n"
        "except ValueError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"}
    )
    assert "impl='triton' cannot run: x is on cpu; it runs on CUDA devices" in run.stdout, run.stderr
