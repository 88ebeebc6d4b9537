"""Whether an implementation is right: its results beside the reference's in float64. And one step, checked or timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnorm.benchmark.cases import ATTENTION, LINEAR_ATTENTION, MODES, Implementation, Mode, Shape

INPUT = "the input"  # among the names of gradients


LOW = (torch.bfloat16, torch.float16)


# ||got - exact|| / ||exact|| that an output and a gradient may have: a few roundings of the inputs of their sums.
TOLERANCES = {"float32": (1e-5, 1e-4), "tf32": (2e-3, 1e-2), "bfloat16": (2e-2, 5e-2), "float16": (2e-2, 5e-2)}


# Of the largest tensor of the reference in float64: a larger case is checked on its first rows and columns.
LARGEST_CHECKED_BYTES = {"cpu": 128 * 2**20, "cuda": 4 * 2**30}


class Correctness(NamedTuple):
    """Relative errors against the reference in float64."""

    shape: Shape  # what it was compared on
    output: float
    gradient: float
    worst: str  # whose gradient that is
    first_seconds: dict[Mode, float]  # of the first step, which compiles where something is compiled

    def complaint(self, precision: str) -> str:
        """What is wrong, or "" where both are within TOLERANCES; NaN is wrong."""
        allowed = TOLERANCES[precision]
        if not self.output <= allowed[0]:
            return f"the output is off by {self.output:.1e}, more than {allowed[0]:g}"
        if not self.gradient <= allowed[1]:
            return f"the gradient of {self.worst} is off by {self.gradient:.1e}, more than {allowed[1]:g}"
        return ""


class Expected(NamedTuple):
    """What the reference makes of one input."""

    output: Tensor  # in evaluation
    output_gradient: Tensor  # that training was given
    gradients: dict[str, Tensor]  # that it gave


def _expect(implementation: Implementation, shape: Shape, device: torch.device, dtype: torch.dtype) -> Expected:
    x, gradient = (tensor.detach().double() for tensor in make_tensors(shape, device, dtype))
    module = build(implementation.reference, shape[1], device).double()
    _, output = _run(module, x, gradient, "forward", torch.float64)
    # As of a loss that pulls at what the layer does differently from place to place: what rho, gate, query and key get
    # is then no small difference of large sums either.
    added = output - x
    added = added - added.mean((2, 3), keepdim=True)
    gradient = (gradient + added / added.square().mean().sqrt().clamp_min(1e-6)).to(dtype)
    gradients, _ = _run(module, x, gradient.double(), "training", torch.float64)
    return Expected(output, gradient, gradients)


def check(
    implementation: Implementation,
    shape: Shape,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    known: dict[Any, Expected] | None = None,
) -> Correctness:
    """Compares an implementation with its reference in float64 on one input of `shape`, or on the crop of it that
    LARGEST_CHECKED_BYTES allows: the output in evaluation, all gradients in training with the same sampled positions
    (of self-attention and linear attention in low precision the input's alone).

    `known` keeps the reference's results for the next implementation, on the same device and dtype. Raises what an
    implementation that cannot run here raises.
    """
    device, known = device or torch.device("cpu"), {} if known is None else known
    n, c, h, w = shape
    while 8 * implementation.largest((n, c, h, w)) > LARGEST_CHECKED_BYTES[device.type] and max(h, w) > 1:
        h, w = math.ceil(h / 2), math.ceil(w / 2)
    key = implementation.reference, (n, c, h, w)
    if key not in known:
        known[key] = _expect(implementation, (n, c, h, w), device, dtype)
    expected, gradient, wanted = known[key]
    x, _ = make_tensors((n, c, h, w), device, dtype)
    module = build(implementation.build, c, device)
    start = time.perf_counter()
    _, output = _run(module, x, gradient, "forward", dtype)
    between = time.perf_counter()
    got, _ = _run(module, x, gradient, "training", dtype)
    seconds = dict(zip(MODES, (between - start, time.perf_counter() - between), strict=True))

    # A gradient that is zero by mathematics (of a bias before a normalization) is rounding alone, and its own norm says
    # nothing: the measure is then the size of what is summed there, a number for each position.
    # In low precision every summand is rounded to 8 bits, and what is left of sums that cancel to less than a hundredth
    # (the query's bias: the entities' logits gain and lose the same in sum) is largely rounding too.
    summed = torch.linalg.vector_norm(wanted[INPUT].abs().sum((0, 2, 3))).item() if wanted else 0.0
    errors: dict[str, float] = {}
    for name, right in wanted.items():
        if implementation.name in (ATTENTION, LINEAR_ATTENTION) and dtype in LOW and name != INPUT:
            # torch's kernels subtract rounded sums there, and the ReLU of linear attention passes or stops what a
            # rounded query says: a tenth of the query's gradient can be lost.
            continue
        is_zero = torch.linalg.vector_norm(right).item() < 1e-9 * summed
        at_least = summed if is_zero else 0.01 * summed if dtype in LOW else 0.0
        errors[name] = _relative(got.get(name, torch.zeros_like(right)), right, at_least)
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name], default="")
    return Correctness((n, c, h, w), _relative(output, expected), errors.get(worst, 0.0), worst, seconds)


def _relative(got: Tensor, expected: Tensor, at_least: float = 0.0) -> float:
    scale = max(torch.linalg.vector_norm(expected).item(), at_least)
    error = torch.linalg.vector_norm(got.double() - expected).item()
    return error / scale if scale else error


def make_tensors(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An input whose channels have means of their own, and a gradient of the output that depends on the input, as real
    ones do: sums over positions then do not cancel, which would leave their rounding alone.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=random) + torch.randn(shape[1], 1, 1, generator=random)
    gradient = torch.randn(shape, generator=random) + x.abs()
    return x.to(device, dtype).requires_grad_(), gradient.to(device, dtype)


def build(make: Callable[[int], nn.Module], channels: int, device: torch.device) -> nn.Module:
    """The same parameters every time, but none where the branch that it opens (rho, gate, t) has next to no say."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make(channels)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in ("rho", "gate"):
                    parameter.fill_(0.5)
                elif name == "t":
                    parameter.copy_(3 * torch.randn(parameter.shape))
                elif parameter.ndim <= 2:  # affine parameters and biases
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return module.to(device)


def _run(
    module: nn.Module, x: Tensor, gradient: Tensor, mode: Mode, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """(gradients, output) of one step, positions drawn from one seed."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(0)
        output = step(module.train(mode == "training"), x, gradient, mode, dtype)
    named = {INPUT: x, **dict(module.named_parameters())}
    gradients = {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}
    return gradients, output.detach()


def step(module: nn.Module, x: Tensor, gradient: Tensor, mode: Mode, dtype: torch.dtype) -> Tensor:
    """What is checked and timed. Low precision is as in training: weights in float32, under autocast."""
    is_low = dtype in LOW
    with torch.autocast(x.device.type, dtype if is_low else torch.bfloat16, enabled=is_low):
        if mode == "forward":
            with torch.no_grad():
                output = module(x)
        else:
            output = module(x)
    if output.requires_grad:
        output.backward(gradient.to(output.dtype))
    return output
