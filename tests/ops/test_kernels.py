"""The two fast implementations of the whole layer against its equations in float64: native (built by the machine's C
compiler) and triton (run by Triton's interpreter where there is no GPU)."""

# N batch, C channels, K entities, P = H*W pixels; M = N, or 1 where the batch shares its filters.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attnorm.ops.dispatch import Parameters
from tests.ops.conftest import DEVICE, implementation

NAMES = ("out", "area", "mean", "rstd", "dx", "dfilters", "doffset", "dvalue_weight", "dvalue_bias")
NAMES += ("dweight", "dbias", "drho")
# Of the backward of the backward: the last two are the gradients of the cotangents of dfilters and doffset.
TWICE = tuple(f"twice {name}" for name in ("dgrad", *NAMES[4:], "dfilters_dot", "doffset_dot"))
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PLAIN, LAST = torch.contiguous_format, torch.channels_last


class Inputs(NamedTuple):
    x: Tensor  # [N, C, H, W]
    filters: Tensor  # [M, K, C]
    offset: Tensor  # [M, K]
    value_weight: Tensor  # [C, C]
    value_bias: Tensor  # [C]
    weight: Tensor  # [K, C]
    bias: Tensor  # [K, C]
    rho: Tensor  # []


def make(
    impl: str,
    images: int,
    channels: int,
    entities: int,
    height: int,
    width: int,
    *,
    shared: bool = True,
    dtype: torch.dtype = F32,
    layout: torch.memory_format = PLAIN,
) -> Inputs:
    """Inputs whose layout is neither uniform nor hard."""
    generator = torch.Generator().manual_seed(channels * 1000 + entities)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    count = 1 if shared else images
    parts = (
        normal(images, channels, height, width).to(dtype).contiguous(memory_format=layout),
        normal(count, entities, channels) / channels**0.5,
        normal(count, entities),
        normal(channels, channels) / channels**0.5,
        normal(channels),
        1 + 0.3 * normal(entities, channels),
        0.5 * normal(entities, channels),
        torch.tensor(0.7),
    )
    return Inputs(*(part.to(DEVICE[impl]) for part in parts))


def equations(inputs: Inputs, eps: float) -> tuple[Tensor, ...]:
    """Eq. 4 to 6 to the letter, with the tensor of K times the size of x: (out, area, mean, rstd)."""
    x = inputs.x.flatten(2)
    s = torch.softmax(inputs.filters @ x + inputs.offset[:, :, None], 1)  # [N, K, P]
    v = inputs.value_weight @ x + inputs.value_bias[:, None]  # [N, C, P]
    area = s.sum(2).clamp_min(1e-12)
    mean = torch.einsum("nkp,ncp->nkc", s, v) / area[:, :, None]
    centred = v[:, None] - mean[..., None]  # [N, K, C, P]
    var = (s[:, :, None] * centred**2).sum(3) / area[:, :, None]
    rstd = 1 / (var + eps).sqrt()
    normalized = centred * (inputs.weight * rstd)[..., None] + inputs.bias[:, :, None]
    out = inputs.rho * (normalized * s[:, :, None]).sum(1) + x
    return out.reshape(inputs.x.shape), area, mean, rstd


def drawn_like(inputs: Inputs, seed: int) -> Inputs:
    """Gradients or cotangents, in the memory format of each."""
    generator = torch.Generator().manual_seed(seed)
    return Inputs(*(torch.empty_like(part).copy_(torch.randn(part.shape, generator=generator)) for part in inputs))


def split(inputs: Inputs) -> tuple[Tensor, Parameters]:
    return inputs.x, Parameters(*inputs[1:])


class Kernels(NamedTuple):
    """An implementation, and what it ought to give."""

    name: str
    module: Any

    def results(self, inputs: Inputs, eps: float = 1e-5) -> dict[str, Tensor]:
        grad, dots = drawn_like(inputs, 1).x, drawn_like(inputs, 2)
        x, parameters = split(inputs)
        out, *moments = self.module.forward(x, parameters, eps)
        values = [out, *moments, *self.module.backward(grad, x, parameters, moments, eps)]
        given = [part for name, part in dots._asdict().items() if name not in ("x", "value_bias")]
        values += self.module.double_backward(dots.x, given, grad, x, parameters, moments, eps)
        return dict(zip(NAMES + TWICE, values, strict=True))

    def expected(self, inputs: Inputs, eps: float = 1e-5) -> dict[str, Tensor]:
        leaves = Inputs(*(part.detach().double().requires_grad_() for part in inputs))
        grad = drawn_like(inputs, 1).x.double().requires_grad_()
        out, area, mean, rstd = equations(leaves, eps)
        gradients = Inputs(*torch.autograd.grad(out, leaves, grad, create_graph=True))
        if self.name == "triton":  # whose mean is that of v without its bias, and anything where there is no pixel
            mean = torch.where(area[:, :, None] > 1e-12, mean - leaves.value_bias, torch.nan)
        cotangents = [part.double() for part in drawn_like(inputs, 2)]
        twice = torch.autograd.grad(gradients, [grad, *leaves], cotangents)
        values = (out, area, mean, rstd, *gradients, *twice, gradients.filters, gradients.offset)
        return {name: value.detach() for name, value in zip(NAMES + TWICE, values, strict=True)}

    def check(self, inputs: Inputs, *, eps: float = 1e-5, rounding: float = 0.0) -> dict[str, Tensor]:
        """Errors are relative to the largest value of each result. `rounding`: what more is allowed where maps have 16
        bits."""
        got, expected = self.results(inputs, eps), self.expected(inputs, eps)
        pixels = inputs.x.numel() / inputs.x.shape[1]
        assert got["out"].dtype == got["dx"].dtype == inputs.x.dtype
        for name, value in expected.items():
            assert got[name].shape == value.shape, name
            # dv sums to almost 0, and to 0 with one entity or pixel: its terms are of size 1, one a pixel. With one
            # pixel every second derivative but dbias's is 0, of terms of size 1 and more.
            least = pixels**0.5 if "dvalue" in name else 1 if "twice" in name else 1e-2
            error = (got[name].double() - value)[~value.isnan()].abs().max().item()
            error /= max(value.nan_to_num().abs().max().item(), least)
            more = 0 if got[name].dtype == F32 and self.name == "native" else rounding  # Triton multiplies in 16 bits
            assert error <= 1e-4 + more, f"{name}: relative error {error:.1e}"  # NaN fails, too
        return got


def load(name: str) -> Kernels:
    return Kernels(name, implementation(name))


@pytest.fixture(scope="module", params=["native", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load(request.param)


@pytest.fixture(scope="module")
def native() -> Kernels:
    return load("native")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# N, C, K, H, W, M = 1, dtype, layout, threads. Each value of each column with the others' extremes; images of more
# than one block (512 pixels), split between threads (1 and 3 images) or not (2), kept between the passes or not.
NATIVE = [
    (1, 1, 1, 1, 1, True, F32, PLAIN, 1),
    (3, 1, 16, 5, 7, False, F32, LAST, 1),
    (1, 3, 5, 1, 2, True, F32, PLAIN, 1),
    (3, 3, 33, 37, 21, False, F32, PLAIN, 2),
    (3, 3, 1, 16, 16, True, BF16, LAST, 1),
    (1, 32, 16, 67, 65, True, F32, LAST, 2),
    (3, 32, 5, 23, 37, False, BF16, PLAIN, 2),
    (2, 32, 16, 32, 32, True, F32, PLAIN, 2),
    (3, 33, 5, 23, 37, False, F32, LAST, 1),
    (1, 33, 33, 9, 13, True, BF16, LAST, 1),
    (1, 64, 16, 33, 33, True, F32, PLAIN, 1),
    (3, 64, 33, 16, 16, False, F32, LAST, 1),
    (3, 256, 16, 8, 16, False, F32, PLAIN, 2),
    (1, 256, 5, 17, 33, True, F32, LAST, 1),
    (3, 256, 33, 7, 9, True, BF16, PLAIN, 1),
]
# For the interpreter, which is slow. Exact tiles and filters of their own; odd everything; a border that is no
# multiple; 1 x 1; many entities; each layout and each precision. Channels in chunks: test_triton.py.
TRITON = [
    (2, 32, 16, 16, 16, False, F32, LAST, 1),
    (2, 5, 3, 7, 9, True, F32, PLAIN, 1),
    (1, 33, 8, 11, 33, True, F32, PLAIN, 1),
    (1, 1, 1, 1, 1, True, F32, LAST, 1),
    (1, 3, 32, 5, 4, True, F32, PLAIN, 1),
    (2, 17, 5, 7, 9, False, BF16, LAST, 1),
    (1, 33, 5, 9, 11, False, F16, PLAIN, 1),
]
CASES = [
    pytest.param(impl, case, id=f"{impl}-N{case[0]}-C{case[1]}-K{case[2]}-{case[3]}x{case[4]}-{number}")
    for impl, cases in (("native", NATIVE), ("triton", TRITON))
    for number, case in enumerate(cases)
]


@pytest.mark.parametrize(("kernels", "case"), CASES, indirect=["kernels"])
def test_output_moments_and_gradients_of_either_order_follow_the_equations(
    kernels: Kernels, case: tuple[Any, ...]
) -> None:
    *sizes, shared, dtype, layout, count = case
    inputs = make(kernels.name, *sizes, shared=shared, dtype=dtype, layout=layout)
    rounding = {F32: 0.0, BF16: 2**-8, F16: 2**-8}[dtype] if kernels.name == "native" else 0.0 if dtype == F32 else 2e-2
    with threads(count):
        out = kernels.module.forward(*split(inputs), 1e-5)[0]
        kernels.check(inputs, rounding=rounding)
    assert out.dtype == dtype and out.stride() == inputs.x.stride()


def test_eps_reaches_the_moments_and_the_gradients(kernels: Kernels) -> None:
    kernels.check(make(kernels.name, 1, 8, 4, 5, 9), eps=0.5)


def test_a_mean_far_from_zero_costs_no_digits(kernels: Kernels) -> None:
    """One-pass variance in float32 would leave nothing of sigma 1 (row 11); nor must it be multiplied by the rounding
    of what sums to 0, the gradient of v."""
    inputs = make(kernels.name, 1, 16, 4, 24, 12, shared=False)
    if kernels.name == "native":  # the logits of some thousand are brought back by the offset
        mean = 1e4
        inputs = inputs._replace(offset=-(inputs.filters.double() * mean).sum(2).float())
    else:  # the layout does not see the mean
        mean = 1e3
        inputs = inputs._replace(filters=inputs.filters - inputs.filters.mean(2, keepdim=True))
    inputs = inputs._replace(x=inputs.x + mean)
    got, expected = kernels.results(inputs), kernels.expected(inputs)
    names = ("rstd", "out", "dvalue_weight", "dweight", "drho", "dx")
    for name in (*names, "twice dgrad", "twice dx", "twice dvalue_weight", "twice drho"):
        size = (expected[name] - (inputs.x if name == "out" else 0)).abs().max().item()
        assert (got[name].double() - expected[name]).abs().max().item() <= 2e-3 * size, name


def test_a_constant_map_has_variance_zero_and_rho_of_zero_changes_no_bit(kernels: Kernels) -> None:
    inputs = make(kernels.name, 1, 4, 3, 8, 16)
    inputs = inputs._replace(x=torch.full_like(inputs.x, 3.0), rho=torch.zeros_like(inputs.rho))
    got = kernels.results(inputs)
    torch.testing.assert_close(got["rstd"], torch.full_like(got["rstd"], 1e-5**-0.5), rtol=1e-4, atol=0)
    assert all(value.isfinite().all() for value in got.values()) and torch.equal(got["out"], inputs.x)


def test_an_entity_without_pixels_has_the_smallest_area_and_no_gradient(kernels: Kernels) -> None:
    inputs = make(kernels.name, 2, 8, 3, 9, 9)
    inputs.offset[:, 1] = -1e4
    got = kernels.check(inputs)
    assert (got["area"][:, 1] == 1e-12).all() and got["mean"].isfinite().all()
    assert (got["dfilters"][:, 1] == 0).all() and (got["doffset"][:, 1] == 0).all()


def test_nothing_is_read_from_fresh_memory_and_all_results_are_written(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make(kernels.name, 2, 17, 5, 9, 7)
    plain = kernels.results(inputs)

    def poisoned(make: Any) -> Any:
        def function(*arguments: Any, **settings: Any) -> Tensor:
            result: Tensor = make(*arguments, **settings)
            return result.fill_(torch.nan) if result.is_floating_point() else result

        return function

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    for name, value in kernels.results(inputs).items():  # and the same bits every time
        assert torch.equal(value, plain[name]), name


def test_cotangents_that_are_left_out_are_zeros(kernels: Kernels) -> None:
    inputs = make(kernels.name, 1, 17, 5, 7, 9, shared=False)
    grad, dots = drawn_like(inputs, 1).x, drawn_like(inputs, 2)
    moments = kernels.module.forward(*split(inputs), 1e-5)[1:]
    zeros = [torch.zeros_like(part) for name, part in dots._asdict().items() if name not in ("x", "value_bias")]
    given = kernels.module.double_backward(dots.x, zeros, grad, *split(inputs), moments, 1e-5)
    absent = kernels.module.double_backward(dots.x, [None] * 6, grad, *split(inputs), moments, 1e-5)
    for ours, theirs in zip(absent[:9], given[:9], strict=True):
        assert torch.equal(ours, theirs)


# Of the native implementation alone: the operator hands Triton's kernels dense maps that are not empty.


def test_any_strides_of_x_and_the_gradient_are_taken(native: Kernels) -> None:
    inputs = make("native", 2, 5, 4, 9, 12)
    native.check(inputs._replace(x=inputs.x.transpose(2, 3)[:, :, ::2]))
    moments = native.module.forward(*split(inputs), 1e-5)[1:]
    ones = torch.ones_like(inputs.x)
    first, second = (
        native.module.backward(grad, *split(inputs), moments) for grad in (ones, torch.ones(()).expand(ones.shape))
    )
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_spoil_their_own_image_only(native: Kernels, bad: float) -> None:
    inputs = make("native", 2, 8, 4, 16, 16)
    inputs.x[1, 3, 7, 7] = bad
    got = native.results(inputs)
    for name in ("out", "area", "dx"):
        assert got[name][0].isfinite().all() and got[name][1].isnan().any(), name
    assert got["out"][1].isnan().all() and got["dvalue_weight"].isnan().any()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_no_pixels_give_empty_maps_and_zero_gradients(native: Kernels, shape: tuple[int, ...]) -> None:
    got = native.results(make("native", 2, 3, 4, 2, 2)._replace(x=torch.empty(shape)))
    assert got["out"].shape == got["dx"].shape == shape
    assert all((got[name] == 0).all() for name in NAMES[5:] + TWICE[2:])


@pytest.mark.parametrize(("images", "count"), [(1, 2), (2, 3), (3, 2)])
def test_results_repeat_to_the_last_bit_with_torchs_threads_and_threads_of_our_own(
    native: Kernels, images: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make("native", images, 32, 16, 40, 41)
    with threads(count):
        first, *others = (native.results(inputs) for _ in range(3))
        monkeypatch.setattr(native.module, "_team", lambda: None)
        others.append(native.results(inputs))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_the_workspace_is_a_small_part_of_a_large_map(native: Kernels) -> None:
    shape = dict(images=1, channels=32, entities=16, pixels=1024 * 1024, filter_images=1, threads=2)
    library = native.module._library()
    for order in native.module._ORDERS.values():
        assert library.attnorm_workspace(native.module._Layer(**shape), order) < 0.05 * 32 * 1024 * 1024
