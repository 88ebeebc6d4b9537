"""The CPU implementation of the whole layer against the equations in float64, and how it is built."""

# N batch, C channels, K entities, P = H*W pixels; M = N, or 1 where the batch shares its filters.

from __future__ import annotations

import logging
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attnorm.ops import native

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")), reason="no C compiler on this machine"
)
NAMES = ("out", "area", "mean", "rstd", "dx", "dfilters", "doffset", "dvalue_weight", "dvalue_bias")
NAMES += ("dweight", "dbias", "drho")
# Of the backward of the backward: the last two are the gradients of the cotangents of dfilters and doffset.
TWICE = tuple(f"twice {name}" for name in ("dgrad", *NAMES[4:], "dfilters_dot", "doffset_dot"))


def why(device: str = "cpu", dtype: torch.dtype = torch.float32) -> str | None:
    """The reason why it cannot run."""
    return native.obstacle(torch.device(device), dtype, 1, 1, False)


class Inputs(NamedTuple):
    x: Tensor  # [N, C, H, W]
    filters: Tensor  # [M, K, C]
    offset: Tensor  # [M, K]
    value_weight: Tensor  # [C, C]
    value_bias: Tensor  # [C]
    weight: Tensor  # [K, C]
    bias: Tensor  # [K, C]
    rho: Tensor  # []


def make_inputs(
    images: int, channels: int, entities: int, height: int, width: int, *, shared: bool = True
) -> tuple[Inputs, float]:
    """Inputs whose layout is neither uniform nor hard, and the temperature that makes it so."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    filters = normal(1 if shared else images, entities, channels)
    inputs = Inputs(
        normal(images, channels, height, width),
        filters,
        normal(*filters.shape[:2]),
        normal(channels, channels) / channels**0.5,
        normal(channels),
        1 + 0.3 * normal(entities, channels),
        0.5 * normal(entities, channels),
        torch.tensor(0.7),
    )
    return inputs, channels**-0.5


def layer(inputs: Inputs, temperature: float, eps: float) -> tuple[Tensor, ...]:
    """Eq. 4 to 6 to the letter: (out, area, mean, rstd)."""
    x = inputs.x.flatten(2)
    s = torch.softmax(temperature * (inputs.filters @ x + inputs.offset[:, :, None]), 1)  # [N, K, P]
    v = inputs.value_weight @ x + inputs.value_bias[:, None]  # [N, C, P]
    area = s.sum(2).clamp_min(1e-12)
    mean = torch.einsum("nkp,ncp->nkc", s, v) / area[:, :, None]
    centred = v[:, None] - mean[..., None]  # [N, K, C, P]
    var = (s[:, :, None] * centred**2).sum(3) / area[:, :, None]
    rstd = 1 / (var + eps).sqrt()
    normalized = centred * (inputs.weight * rstd)[..., None] + inputs.bias[:, :, None]
    out = inputs.rho * (normalized * s[:, :, None]).sum(1) + x
    return out.reshape(inputs.x.shape), area, mean, rstd


def gradient_of(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)


def cotangents_of(inputs: Inputs) -> Inputs:
    """Of the gradients of all inputs."""
    generator = torch.Generator().manual_seed(2)
    return Inputs(*(torch.randn(part.shape, generator=generator).to(part.dtype) for part in inputs))


def expected_results(inputs: Inputs, temperature: float, eps: float = 1e-5) -> dict[str, Tensor]:
    leaves = Inputs(*(part.detach().double().requires_grad_() for part in inputs))
    grad = gradient_of(inputs.x).double().requires_grad_()
    results = layer(leaves, temperature, eps)
    gradients = Inputs(*torch.autograd.grad(results[0], leaves, grad, create_graph=True))
    cotangents = [part.double() for part in cotangents_of(inputs)]
    twice = torch.autograd.grad(gradients, [grad, *leaves], cotangents)
    values = (*results, *gradients, *twice, gradients.filters, gradients.offset)
    return {name: value.detach() for name, value in zip(NAMES + TWICE, values, strict=True)}


def native_results(inputs: Inputs, temperature: float, eps: float = 1e-5) -> dict[str, Tensor]:
    grad, dots = gradient_of(inputs.x), cotangents_of(inputs)
    results = native.forward(*inputs, temperature, eps)
    gradients = native.backward(grad, *inputs, *results[1:], temperature, eps)
    taken = (part for name, part in dots._asdict().items() if name != "value_bias")
    twice = native.double_backward(*taken, grad, *inputs, *results[1:], temperature, eps)
    return dict(zip(NAMES + TWICE, (*results, *gradients, *twice), strict=True))


def check(inputs: Inputs, temperature: float, *, eps: float = 1e-5, tolerance: float = 1e-4) -> None:
    """Errors relative to the largest value of each result; outputs in bfloat16 are rounded to 8 bits besides."""
    got, expected = native_results(inputs, temperature, eps), expected_results(inputs, temperature, eps)
    pixels = inputs.x.numel() / inputs.x.shape[1]
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        rounding = 2**-8 if inputs.x.dtype == torch.bfloat16 and got[name].dtype == torch.bfloat16 else 0
        # dv sums to almost 0, and to 0 with one entity or pixel: its terms are of size 1, one a pixel. With one pixel
        # every second derivative but dbias's is 0, of terms of size 1 and more.
        least = pixels**0.5 if "dvalue" in name else 1 if "twice" in name else 1e-2
        size = max(value.abs().max().item(), least)
        error = (got[name].double() - value).abs().max().item() / size
        assert error <= tolerance + rounding, f"{name}: relative error {error:.1e}"  # NaN fails, too


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


LAST, PLAIN = torch.channels_last, torch.contiguous_format
# N, C, K, H, W, M = 1, dtype, layout, threads. Each value of each column with the others' extremes; images of more
# than one block (512 pixels), split between threads (1 and 3 images) or not (2), kept between the passes or not.
CASES = [
    (1, 1, 1, 1, 1, True, torch.float32, PLAIN, 1),
    (3, 1, 16, 5, 7, False, torch.float32, LAST, 2),
    (1, 3, 5, 1, 2, True, torch.float32, PLAIN, 1),
    (3, 3, 33, 37, 21, False, torch.float32, PLAIN, 2),
    (3, 3, 1, 16, 16, True, torch.bfloat16, LAST, 1),
    (1, 32, 16, 67, 65, True, torch.float32, PLAIN, 1),
    (1, 32, 16, 67, 65, True, torch.float32, LAST, 2),
    (1, 32, 16, 64, 64, False, torch.float32, PLAIN, 2),
    (3, 32, 5, 23, 37, False, torch.bfloat16, PLAIN, 2),
    (2, 32, 16, 32, 32, True, torch.float32, PLAIN, 2),
    (3, 33, 16, 23, 37, True, torch.float32, PLAIN, 2),
    (3, 33, 5, 23, 37, False, torch.float32, LAST, 1),
    (1, 33, 33, 9, 13, True, torch.bfloat16, LAST, 2),
    (1, 64, 16, 33, 33, True, torch.float32, PLAIN, 2),
    (3, 64, 33, 16, 16, False, torch.float32, LAST, 2),
    (1, 64, 16, 32, 48, False, torch.bfloat16, LAST, 2),
    (3, 256, 16, 8, 16, False, torch.float32, PLAIN, 2),
    (1, 256, 5, 17, 33, True, torch.float32, LAST, 2),
    (2, 256, 16, 12, 16, False, torch.float32, PLAIN, 2),
    (3, 256, 33, 7, 9, True, torch.bfloat16, PLAIN, 1),
]


@needs_compiler
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"N{c[0]}-C{c[1]}-K{c[2]}-{c[3]}x{c[4]}-M{1 if c[5] else c[0]}-{c[6]}-{c[7]}-T{c[8]}"
)
def test_output_moments_and_gradients_of_either_order_follow_the_equations(case: tuple[Any, ...]) -> None:
    images, channels, entities, height, width, shared, dtype, layout, count = case
    inputs, temperature = make_inputs(images, channels, entities, height, width, shared=shared)
    inputs = inputs._replace(x=inputs.x.to(dtype, memory_format=layout))
    with threads(count):
        out = native.forward(*inputs, temperature, 1e-5)[0]
        check(inputs, temperature)
    assert out.dtype == dtype and out.stride() == inputs.x.stride()


@needs_compiler
def test_any_strides_of_x_and_the_gradient_are_taken() -> None:
    inputs, temperature = make_inputs(2, 5, 4, 9, 12)
    strided = inputs._replace(x=inputs.x.transpose(2, 3)[:, :, ::2])
    check(strided, temperature)
    dense = inputs._replace(x=inputs.x.contiguous(memory_format=torch.channels_last))
    results = native.forward(*dense, temperature, 1e-5)
    one = native.backward(torch.ones(()).expand(dense.x.shape), *dense, *results[1:], temperature)
    assert torch.equal(one[0], native.backward(torch.ones_like(dense.x), *dense, *results[1:], temperature)[0])


@needs_compiler
@pytest.mark.parametrize("count", [1, 2])
def test_a_large_mean_costs_no_digits(count: int) -> None:
    inputs, temperature = make_inputs(1, 8, 4, 64, 65)
    inputs = inputs._replace(x=inputs.x + 1e4)  # offsets of the logits of some thousand, and moments of v about 1e4
    inputs = inputs._replace(offset=-(inputs.filters.double() * 1e4).sum(2).float())
    expected = expected_results(inputs, temperature)
    with threads(count):
        got = native_results(inputs, temperature)
    names = ("rstd", "out", "dvalue_weight", "dweight", "drho", "dx")
    for name in (*names, "twice dgrad", "twice dx", "twice dvalue_weight", "twice drho"):
        size = (expected[name] - (inputs.x if name == "out" else 0)).abs().max().item()
        assert (got[name].double() - expected[name]).abs().max().item() <= 2e-3 * size, name


@needs_compiler
def test_a_constant_map_has_variance_zero_and_stays_finite() -> None:
    inputs, temperature = make_inputs(1, 4, 3, 16, 16)
    inputs = inputs._replace(x=torch.full((1, 4, 16, 16), 3.0))
    got = native_results(inputs, temperature)
    torch.testing.assert_close(got["rstd"], torch.full((1, 3, 4), 1e-5**-0.5), rtol=1e-5, atol=0)
    assert all(value.isfinite().all() for value in got.values())


@needs_compiler
def test_an_entity_without_pixels_has_the_smallest_area_and_no_gradient() -> None:
    inputs, temperature = make_inputs(2, 8, 3, 9, 9)
    inputs.offset[:, 1] = -1e4
    check(inputs, temperature)
    got = native_results(inputs, temperature)
    assert (got["area"][:, 1] == 1e-12).all() and (got["mean"][:, 1] == 0).all()
    assert (got["dfilters"][:, 1] == 0).all() and (got["doffset"][:, 1] == 0).all()


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_spoil_their_own_image_only(bad: float) -> None:
    inputs, temperature = make_inputs(2, 8, 4, 16, 16)
    inputs.x[1, 3, 7, 7] = bad
    got = native_results(inputs, temperature)
    for name in ("out", "area", "dx"):
        assert got[name][0].isfinite().all() and got[name][1].isnan().any(), name
    assert got["out"][1].isnan().all() and got["dvalue_weight"].isnan().any()


@needs_compiler
def test_rho_of_zero_is_the_identity_to_the_bit() -> None:
    inputs, temperature = make_inputs(1, 33, 5, 19, 23)
    inputs = inputs._replace(rho=torch.zeros(()))
    assert torch.equal(native.forward(*inputs, temperature, 1e-5)[0], inputs.x)


@needs_compiler
def test_eps_reaches_the_moments_and_the_gradients() -> None:
    inputs, temperature = make_inputs(1, 8, 4, 9, 9)
    check(inputs, temperature, eps=0.5)


@needs_compiler
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_no_pixels_give_empty_maps_and_zero_gradients(shape: tuple[int, ...]) -> None:
    inputs, temperature = make_inputs(2, 3, 4, 2, 2)
    inputs = inputs._replace(x=torch.empty(shape))
    got = native_results(inputs, temperature)
    assert got["out"].shape == got["dx"].shape == shape
    assert all((got[name] == 0).all() for name in NAMES[5:] + TWICE[2:])


@needs_compiler
def test_nothing_is_read_from_fresh_memory_and_all_results_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, temperature = make_inputs(3, 33, 5, 23, 37)
    plain = native_results(inputs, temperature)

    def poisoned(make: Any) -> Any:
        return lambda *args, **options: make(*args, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    for name, value in native_results(inputs, temperature).items():
        assert torch.equal(value, plain[name]), name


@needs_compiler
def test_cotangents_that_are_left_out_are_zeros() -> None:
    inputs, temperature = make_inputs(2, 17, 5, 9, 11, shared=False)
    grad, dots = gradient_of(inputs.x), cotangents_of(inputs)
    results = native.forward(*inputs, temperature, 1e-5)
    zeros = [torch.zeros_like(part) for name, part in dots._asdict().items() if name not in ("x", "value_bias")]
    given = native.double_backward(dots.x, *zeros, grad, *inputs, *results[1:], temperature)
    absent = native.double_backward(dots.x, *[None] * 6, grad, *inputs, *results[1:], temperature)
    for ours, theirs in zip(absent[:9], given[:9], strict=True):
        assert torch.equal(ours, theirs)


@needs_compiler
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_results_repeat_to_the_last_bit(images: int, count: int) -> None:
    inputs, temperature = make_inputs(images, 32, 16, 40, 41)
    with threads(count):
        first = native_results(inputs, temperature)
        for _ in range(5):
            again = native_results(inputs, temperature)
            assert all(torch.equal(first[name], again[name]) for name in first)


@needs_compiler
def test_threads_of_our_own_give_what_those_of_torch_give(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, temperature = make_inputs(1, 32, 16, 40, 41)
    with threads(2):
        with_team = native_results(inputs, temperature)
        monkeypatch.setattr(native, "_team", lambda: None)
        without = native_results(inputs, temperature)
    assert all(torch.equal(with_team[name], without[name]) for name in with_team)


@needs_compiler
def test_the_workspace_is_a_small_part_of_a_large_map() -> None:
    shape = dict(images=1, channels=32, entities=16, pixels=1024 * 1024, filter_images=1, threads=2)
    library = native._library()
    assert not isinstance(library, str)
    for order in native._ORDERS.values():
        assert library.attnorm_workspace(native._Layer(**shape), order) < 0.05 * 32 * 1024 * 1024


# ---- Building


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNORM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_it_cannot_run_on_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "float64" in (why(dtype=torch.float64) or "")
    assert "meta" in (why("meta") or "")
    monkeypatch.setenv("ATTNORM_NATIVE", "0")
    assert "ATTNORM_NATIVE=0" in (why() or "")


def test_without_a_compiler_the_reason_names_cc(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(cache))
    assert "name one with CC" in (why() or "")
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert "'no-such-compiler' is not found" in (why() or "")


def test_a_failed_build_gives_the_first_line_of_the_compilers_message(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text('#!/bin/sh\necho "native.c:1: error: no vectors here" >&2\necho "more" >&2\nexit 1\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(compiler))
    reason = why()
    assert reason and reason.endswith("error: no vectors here")
    assert not list(cache.iterdir())
    inputs, temperature = make_inputs(1, 3, 2, 2, 2)
    with pytest.raises(RuntimeError, match="no vectors here"):
        native.forward(*inputs, temperature, 1e-5)


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CC", sys.executable)  # any program: the folder fails first
    monkeypatch.setenv("ATTNORM_CACHE", str(tmp_path / "file" / "cache"))
    assert "name another cache folder with ATTNORM_CACHE" in (why() or "")


PROBE = "import logging, torch; logging.basicConfig(level='INFO'); from attnorm.ops import native; "
PROBE += "print(native.obstacle(torch.device('cpu'), torch.float32, 1, 1, False))"


@needs_compiler
def test_it_is_built_once_by_any_number_of_processes(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", PROBE], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in processes] == ["None", "None"]
    (built,) = cache.iterdir()  # no temporary file is left
    with caplog.at_level(logging.INFO, "attnorm"):
        assert why() is None
    assert not caplog.records and list(cache.iterdir()) == [built]


@needs_compiler
def test_a_damaged_library_is_built_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "attnorm"):
        assert why() is None
    (built,) = cache.iterdir()
    assert [record.message.startswith(f"built {built}") for record in caplog.records] == [True]
    built.unlink()  # this process has it mapped, so a new file, for a new process
    built.write_bytes(b"damaged")
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "None" and f"built {built}" in result.stderr


@needs_compiler
def test_importing_builds_nothing(cache: Path) -> None:
    code = "import attnorm.ops.native, sys; sys.exit(attnorm.ops.native._build_and_load.cache_info().misses)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not cache.exists()
