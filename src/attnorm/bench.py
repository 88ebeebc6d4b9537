"""How long the layer takes and how much memory it needs, beside what stands next to it: `attnorm bench layer`.

A time is reported only where the result was first compared with the same layer's literal form in float64.
"""

# N batch, C channels, H, W; P = H*W pixels; K entities.

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import difflib
import functools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attnorm import __version__
from attnorm.checkpoint import CheckpointError, find_device, write_atomically, write_json
from attnorm.config import ConfigError
from attnorm.layers.attentive_norm import AttentiveNorm2d
from attnorm.layers.self_attention import SelfAttention2d
from attnorm.ops.dispatch import IMPLEMENTATIONS

Shape = tuple[int, int, int, int]  # N, C, H, W
Mode = Literal["forward", "training"]  # evaluation without gradients; forward and backward in training mode
Status = Literal["measured", "failed", "missing"]

NUM_ENTITIES = 16  # Table 5's n
FORMAT_VERSION = 1

INPUT = "the input"  # among the names of gradients
MODES: tuple[Mode, ...] = get_args(Mode)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOW = (torch.bfloat16, torch.float16)
# ||got - exact|| / ||exact|| that an output and a gradient may have: a few roundings of the inputs of their sums.
TOLERANCES = {"float32": (1e-5, 1e-4), "tf32": (2e-3, 1e-2), "bfloat16": (2e-2, 5e-2), "float16": (2e-2, 5e-2)}
# Of the largest tensor of the literal form in float64: a larger case is checked on its first rows and columns.
LARGEST_CHECKED_BYTES = {"cpu": 128 * 2**20, "cuda": 4 * 2**30}
# Of self-attention's two products, forward: some 10 seconds on one CPU, one second on a GPU.
MOST_ATTENTION_OPERATIONS = {"cpu": 2e11, "cuda": 1e14}
FEWEST_REPEATS, MOST_REPEATS = 3, 2000
SECONDS_BETWEEN_LINES = 15.0  # of progress, without a terminal

# Table 5: milliseconds at batch 1, 32 channels; PyTorch 1.1.0, "1 TiTAN 2080 GPU"; None where its memory ran out.
PAPER_TABLE_5: dict[str, dict[int, float | None]] = {
    "AN": {128: 0.73, 256: 2.24, 512: 9.46, 1024: 37.68},
    "Self-attention": {128: 5.21, 256: 79.42, 512: None, 1024: None},
}


@dataclass(frozen=True)
class Case:
    """One input size; `why` says what it stands for."""

    name: str
    shape: Shape
    why: str


CASES = (
    Case("smoke", (2, 8, 16, 16), "tiny: is everything there?"),
    Case("table5-128", (1, 32, 128, 128), "Table 5 of the paper"),
    Case("table5-256", (1, 32, 256, 256), "Table 5 of the paper"),
    Case("table5-512", (1, 32, 512, 512), "Table 5 of the paper"),
    Case("table5-1024", (1, 32, 1024, 1024), "Table 5 of the paper"),
    Case("gan-16", (16, 256, 32, 32), "the generator's site at 128 pixels, a small batch"),
    Case("gan-64", (64, 256, 32, 32), "the generator's site at 128 pixels, a large batch"),
    Case("wide", (8, 128, 256, 256), "more than any cache holds"),
)
ON_CPU = ("table5-128", "table5-256", "table5-512", "table5-1024", "gan-16")  # the others take minutes each there


@dataclass(frozen=True)
class Subject:
    """What is timed.

    Args:
        build: The layer for inputs of C channels; ValueError where it cannot exist here.
        exact: The layer whose result in float64 is right, with parameters of the same names.
        largest: Elements of the largest tensor that the exact form builds for a shape.
    """

    name: str
    build: Callable[[int], nn.Module]
    exact: Callable[[int], nn.Module]
    largest: Callable[[Shape], int]


class _Copy(nn.Module):
    """Into a tensor that is there already: one read and one write of the input, the unit of all that follows."""

    target: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.target is None or self.target.shape != x.shape:
            self.target = torch.empty_like(x, requires_grad=False)
        return self.target.copy_(x.detach())


def _pair(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 1), nn.InstanceNorm2d(channels, affine=True))


def _attention_scores(shape: Shape) -> int:
    n, _, h, w = shape
    return n * h * w * math.ceil(h / 2) * math.ceil(w / 2)


def _plain(name: str, build: Callable[[int], nn.Module], largest: Callable[[Shape], int] = math.prod) -> Subject:
    return Subject(name, build, build, largest)


@functools.cache  # one object each: what is exact is computed once for all implementations
def _builder(impl: str, self_sampling: bool) -> Callable[[int], nn.Module]:
    return lambda channels: AttentiveNorm2d(channels, NUM_ENTITIES, impl=impl, self_sampling=self_sampling)


def _attentive_norm(impl: str, *, self_sampling: bool = True) -> Subject:
    name = f"an-{impl}" if self_sampling else f"an-{impl}-no-sampling"
    exact = _builder("reference", self_sampling)
    return Subject(name, _builder(impl, self_sampling), exact, lambda shape: NUM_ENTITIES * math.prod(shape))


COPY, PAIR, ATTENTION = "copy", "conv1x1+instance_norm", "self_attention"
SUBJECTS = (
    _plain(COPY, lambda channels: _Copy()),
    _plain("instance_norm", lambda channels: nn.InstanceNorm2d(channels, affine=True)),
    _plain(PAIR, _pair),
    _plain(ATTENTION, SelfAttention2d, _attention_scores),
    *(_attentive_norm(impl) for impl in IMPLEMENTATIONS),
    *(_attentive_norm(impl, self_sampling=False) for impl in ("native", "triton")),
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One subject on one case in one mode."""

    case: str
    subject: str
    mode: Mode
    status: Status
    reason: str = ""  # why there is no time
    checked_shape: Shape | None = None  # the case's own, or a crop of it
    output_error: float | None = None  # relative, in evaluation
    gradient_error: float | None = None  # relative, the worst of the input's and the parameters', in training
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    repeats: int = 0
    ratio_to_copy: float | None = None  # of the medians
    ratio_to_pair: float | None = None
    peak_bytes: int | None = None  # what one step adds at its highest to input, parameters and the output's gradient
    beyond_bytes: int | None = None  # of these, what is neither output nor the input's gradient
    of_roofline: float | None = None  # AN: the least time that the machine allows / the median


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """All that was measured, where, and how."""

    format_version: int = FORMAT_VERSION
    environment: dict[str, Any]
    cases: tuple[Case, ...]
    cells: tuple[Cell, ...]

    def find(self, case: str, subject: str, mode: Mode) -> Cell | None:
        return next(
            (cell for cell in self.cells if (cell.case, cell.subject, cell.mode) == (case, subject, mode)), None
        )

    def subjects(self) -> list[str]:
        return list(dict.fromkeys(cell.subject for cell in self.cells))


# Memory and operations


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that `function` held at once on the CPU through torch's allocator, beyond what was there before.

    Exact and the same every time: bytes are counted as asked for, event by event. Scratch memory that a library takes
    by itself (oneDNN, a kernel's own malloc) is not seen, and neither is what other threads allocate.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to the standard error when it starts
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
        function()
    assert profile.kineto_results is not None
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(np.cumsum([event.nbytes() for event in events], dtype=np.int64).tolist(), default=0, key=int)


def operations(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions that `function` asks of torch, two for a
    multiplication and an addition. An operator without a registered formula counts nothing: element-wise ones,
    attention on the CPU, and every custom one (`torch.utils.flop_counter.register_flop_formula`).
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def least_bytes(shape: Shape, mode: Mode, element: int) -> int:
    """What AN must move: the input twice and the output once; with the backward pass 8 passes over the tensor."""
    return {"forward": 3, "training": 8}[mode] * math.prod(shape) * element


def least_operations(shape: Shape, mode: Mode, num_entities: int = NUM_ENTITIES) -> int:
    """What AN must compute, a pixel: in each of the two forward passes v(X) and the layout, 2 C^2 + 6 K C; backward
    2 C^2 + 6 K C in the first pass and 6 C^2 + 20 K C in the second.
    """
    n, c, h, w = shape
    squares, products = {"forward": (4, 12), "training": (4 + 8, 12 + 26)}[mode]
    return n * h * w * (squares * c * c + products * num_entities * c)


def retain_memory() -> None:
    """Keeps freed pages in the process: otherwise the C library hands large blocks back, and every step pays for fresh
    pages. glibc only; the whole process, for good.
    """
    trim_threshold, top_pad, mmap_threshold, mmap_max = -1, -2, -3, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        raise ConfigError("--retain-memory needs the GNU C library's mallopt; leave it out here") from None
    # The threshold may be 32 MiB at most; no mapping at all is what keeps larger blocks.
    settings = {mmap_threshold: 32 * 2**20, trim_threshold: 2**31 - 1, top_pad: 64 * 2**20, mmap_max: 0}
    for name, value in settings.items():
        if not mallopt(name, value):
            raise ConfigError(f"--retain-memory: mallopt({name}, {value}) was refused; leave it out here")


# Correctness


class Correctness(NamedTuple):
    """Relative errors against the exact form in float64."""

    shape: Shape  # what it was compared on
    output: float
    gradient: float
    worst: str  # whose gradient that is

    def complaint(self, precision: str) -> str:
        """What is wrong, or "" where both are within TOLERANCES; NaN is wrong."""
        allowed = TOLERANCES[precision]
        if not self.output <= allowed[0]:
            return f"the output is off by {self.output:.1e}, more than {allowed[0]:g}"
        if not self.gradient <= allowed[1]:
            return f"the gradient of {self.worst} is off by {self.gradient:.1e}, more than {allowed[1]:g}"
        return ""


class Exact(NamedTuple):
    """What a subject's exact form makes of one input."""

    output: Tensor  # in evaluation
    output_gradient: Tensor  # that training was given
    gradients: dict[str, Tensor]  # that it gave


def _exact(subject: Subject, shape: Shape, device: torch.device, dtype: torch.dtype) -> Exact:
    x, gradient = (tensor.detach().double() for tensor in _tensors(shape, device, dtype))
    module = _build(subject.exact, shape[1], device).double()
    _, output = _run(module, x, gradient, "forward", torch.float64)
    # As of a loss that pulls at what the layer does differently from place to place: what rho, gate, query and key get
    # is then no small difference of large sums either.
    added = output - x
    added = added - added.mean((2, 3), keepdim=True)
    gradient = (gradient + added / added.square().mean().sqrt().clamp_min(1e-6)).to(dtype)
    gradients, _ = _run(module, x, gradient.double(), "training", torch.float64)
    return Exact(output, gradient, gradients)


def check(
    subject: Subject,
    shape: Shape,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    known: dict[Any, Exact] | None = None,
) -> Correctness:
    """Compares a subject with its exact form in float64 on one input of `shape`, or on the crop of it that
    LARGEST_CHECKED_BYTES allows: the output in evaluation, all gradients in training with the same sampled positions
    (of self-attention in low precision the input's alone).

    `known` keeps the exact results for the next subject, on the same device and dtype. Raises what an implementation
    that cannot run here raises.
    """
    device, known = device or torch.device("cpu"), {} if known is None else known
    n, c, h, w = shape
    while 8 * subject.largest((n, c, h, w)) > LARGEST_CHECKED_BYTES[device.type] and max(h, w) > 1:
        h, w = math.ceil(h / 2), math.ceil(w / 2)
    key = subject.exact, (n, c, h, w)
    if key not in known:
        known[key] = _exact(subject, (n, c, h, w), device, dtype)
    expected, gradient, wanted = known[key]
    x, _ = _tensors((n, c, h, w), device, dtype)
    module = _build(subject.build, c, device)
    _, output = _run(module, x, gradient, "forward", dtype)
    got, _ = _run(module, x, gradient, "training", dtype)

    # A gradient that is zero by mathematics (of a bias before a normalization) is rounding alone, and its own norm says
    # nothing: the measure is then the size of what is summed there, a number for each position.
    # In low precision every summand is rounded to 8 bits, and what is left of sums that cancel to less than a hundredth
    # (the query's bias: the entities' logits gain and lose the same in sum) is largely rounding too.
    summed = torch.linalg.vector_norm(wanted[INPUT].abs().sum((0, 2, 3))).item() if wanted else 0.0
    errors: dict[str, float] = {}
    for name, right in wanted.items():
        if subject.name == ATTENTION and dtype in LOW and name != INPUT:
            continue  # torch's kernels subtract rounded sums there: a tenth of the query's gradient can be lost
        is_zero = torch.linalg.vector_norm(right).item() < 1e-9 * summed
        at_least = summed if is_zero else 0.01 * summed if dtype in LOW else 0.0
        errors[name] = _relative(got.get(name, torch.zeros_like(right)), right, at_least)
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name], default="")
    return Correctness((n, c, h, w), _relative(output, expected), errors.get(worst, 0.0), worst)


def _relative(got: Tensor, expected: Tensor, at_least: float = 0.0) -> float:
    scale = max(torch.linalg.vector_norm(expected).item(), at_least)
    error = torch.linalg.vector_norm(got.double() - expected).item()
    return error / scale if scale else error


def _tensors(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An input whose channels have means of their own, and a gradient of the output that depends on the input, as real
    ones do: sums over positions then do not cancel, which would leave their rounding alone.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=random) + torch.randn(shape[1], 1, 1, generator=random)
    gradient = torch.randn(shape, generator=random) + x.abs()
    return x.to(device, dtype).requires_grad_(), gradient.to(device, dtype)


def _build(make: Callable[[int], nn.Module], channels: int, device: torch.device) -> nn.Module:
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
        output = _step(module.train(mode == "training"), x, gradient, mode, dtype)
    named = {INPUT: x, **dict(module.named_parameters())}
    gradients = {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}
    return gradients, output.detach()


def _step(module: nn.Module, x: Tensor, gradient: Tensor, mode: Mode, dtype: torch.dtype) -> Tensor:
    """What is timed. Low precision is as in training: weights in float32, under autocast."""
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


# Timing


class _Runner:
    """Repeats one cell's step, with its gradients cleared before each, outside the time."""

    def __init__(
        self, module: nn.Module, inputs: Sequence[Tensor], gradient: Tensor, mode: Mode, dtype: torch.dtype
    ) -> None:
        self.module, self.inputs, self.gradient = module.train(mode == "training"), inputs, gradient
        self.mode, self.dtype = mode, dtype
        self.turn, self.chunk = 0, 1
        self.graphs: list[torch.cuda.CUDAGraph] = []  # one an input; none on a CPU, or where a step cannot be captured
        self.times: list[float] = []  # seconds
        self.spent = 0.0

    def prepare(self) -> int:
        """Warms up; returns the peak bytes of a step."""
        device = self.gradient.device
        for _ in range(3 if device.type == "cuda" else 1):
            self.clear()
            self.step()
        self.clear()
        if device.type != "cuda":
            peak = peak_bytes(self.step)
            self.clear()
            return peak
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.step()
        peak = torch.cuda.max_memory_allocated(device) - before
        self.graphs = self.capture()
        # Many steps between two waits, so that the queue never runs dry; few enough for others to have their turn.
        seconds = self.on_cuda(1)[0]
        self.chunk = max(1, min(50, int(0.05 / max(seconds, 1e-6))))
        return peak

    def capture(self) -> list[torch.cuda.CUDAGraph]:
        """CUDA graphs of the step: what is timed is then the work, not how fast Python asks for it."""
        graphs = []
        stream = torch.cuda.Stream(self.gradient.device)
        stream.wait_stream(torch.cuda.current_stream(self.gradient.device))
        try:
            with torch.cuda.stream(stream):
                for _ in self.inputs:
                    self.clear()
                    self.step()
                    self.clear()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=stream):
                        self.step()
                    graphs.append(graph)
        except RuntimeError:
            graphs = []
        torch.cuda.synchronize(self.gradient.device)
        return graphs

    def clear(self) -> None:
        for x in self.inputs:
            x.grad = None
        self.module.zero_grad(set_to_none=True)

    def step(self) -> None:
        x = self.inputs[self.turn % len(self.inputs)]
        self.turn += 1
        _step(self.module, x, self.gradient, self.mode, self.dtype)

    def repeat(self) -> None:
        start = time.perf_counter()
        self.times += self.on_cuda(self.chunk) if self.gradient.device.type == "cuda" else self.on_cpu()
        self.spent += time.perf_counter() - start

    def on_cpu(self) -> list[float]:
        self.clear()
        start = time.perf_counter()
        self.step()
        return [time.perf_counter() - start]

    def on_cuda(self, repeats: int) -> list[float]:
        pairs = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if self.graphs:
                self.turn += 1
                start.record()
                self.graphs[self.turn % len(self.graphs)].replay()
            else:
                self.clear()
                start.record()
                self.step()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self.gradient.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _time_in_turn(runners: Sequence[_Runner], seconds: float, advance: Callable[[], None]) -> None:
    """One turn each, round and round, so that a machine that grows slower or faster does so for all alike; a runner
    leaves when it has had its seconds."""
    left = list(runners)
    while left:
        for runner in list(left):
            runner.repeat()
            enough = runner.spent >= seconds and len(runner.times) >= FEWEST_REPEATS
            if enough or len(runner.times) >= MOST_REPEATS:
                left.remove(runner)
                runner.graphs.clear()
                runner.clear()
                advance()


def with_ratios(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """The cells with the ratios of their medians to those of the copy and of the pair, where these were measured."""
    medians = {(cell.case, cell.mode, cell.subject): cell.median_ms for cell in cells}

    def ratio(cell: Cell, other: str) -> float | None:
        unit = medians.get((cell.case, cell.mode, other))
        return cell.median_ms / unit if cell.median_ms is not None and unit else None

    return tuple(
        dataclasses.replace(cell, ratio_to_copy=ratio(cell, COPY), ratio_to_pair=ratio(cell, PAIR)) for cell in cells
    )


def _roofline(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second (read and written) of a large copy, and operations a second of a large square matrix product."""
    is_cuda = device.type == "cuda"
    source = torch.ones((2**30 if is_cuda else 2**28) // 4, device=device)
    target = torch.empty_like(source)
    size = 1024 if not is_cuda else 4096 if dtype == torch.float32 else 8192
    matrix = torch.randn(size, size, device=device).to(dtype)

    def fastest(function: Callable[[], object]) -> float:
        times = []
        for _ in range(10):
            if is_cuda:
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            function()
            if is_cuda:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times)

    return {
        "bytes_per_second": 2 * source.nbytes / fastest(lambda: target.copy_(source)),
        "operations_per_second": 2 * size**3 / fastest(lambda: matrix @ matrix),
        "matrix_size": size,
        "copied_bytes": source.nbytes,
    }


# The whole


def run(
    *,
    cases: str = "",
    subjects: str = "",
    device: str = "auto",
    dtype: str = "float32",
    tf32: bool = False,
    seconds: float = 1.0,
    threads: int = 0,
    retain: bool = False,
    console: Console | None = None,
) -> BenchReport:
    """Checks and times every subject on every case, forward and training.

    Args:
        cases: Names, or groups of names ("table5"), comma between; "" for those that this device can bear.
        subjects: The same of SUBJECTS; "an" means every implementation.
        device: auto, cpu or cuda.
        dtype: float32, bfloat16 or float16: of the input; the weights stay in float32, under autocast.
        tf32: Let CUDA round the factors of float32 products to 10 bits.
        seconds: To spend on each cell, after its warm-up.
        threads: For torch on the CPU; 0 leaves them as they are.
        retain: `retain_memory` first.

    Raises:
        ConfigError: a name, device or number that cannot be meant.
    """
    found = find_device(device)
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"the device is {found}; the benchmark knows cpu and cuda: take --device cpu")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if not 0 < seconds < math.inf or threads < 0:
        raise ConfigError(f"--seconds is {seconds:g}, --threads {threads}; expected more than 0, and 0 or more")
    if retain and found.type != "cpu":
        raise ConfigError(f"--retain-memory is for the CPU; the device is {found}")
    if tf32 and (found.type != "cuda" or dtype != "float32"):
        raise ConfigError(f"--tf32 is for float32 on CUDA; got {dtype} on {found}")
    chosen = _named("case", cases or (",".join(ON_CPU) if found.type == "cpu" else "table5,gan,wide"), CASES)
    competitors = _named("subject", subjects or ",".join(subject.name for subject in SUBJECTS), SUBJECTS)
    if retain:
        retain_memory()
    threads_before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    console = console or Console(stderr=True, quiet=True)
    try:
        # Events are recorded on the current device.
        with torch.cuda.device(found) if found.type == "cuda" else contextlib.nullcontext():
            roofline = _roofline(found, DTYPES[dtype])
            environment = _environment(found, dtype, tf32, seconds, retain) | {"roofline": roofline}
            cells: list[Cell] = []
            with _Clock(console, 3 * len(chosen) * len(competitors)) as clock:
                for case in chosen:
                    cells += _bench_case(case, competitors, found, DTYPES[dtype], environment, seconds, clock)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        torch.set_num_threads(threads_before)
    return BenchReport(environment=environment, cases=chosen, cells=with_ratios(cells))


def _bench_case(
    case: Case,
    subjects: Sequence[Subject],
    device: torch.device,
    dtype: torch.dtype,
    environment: Mapping[str, Any],
    seconds: float,
    clock: _Clock,
) -> list[Cell]:
    cells: list[Cell] = []
    ready: dict[str, tuple[Subject, Correctness]] = {}
    known: dict[Any, Exact] = {}
    for subject in subjects:
        clock.say(f"{case.name} {subject.name}: checking")
        status, reason, correctness = _gate(case, subject, device, dtype, environment["precision"], known)
        errors = {} if correctness is None else _errors(correctness)
        if status == "measured" and correctness is not None:
            ready[subject.name] = subject, correctness
        else:
            for mode in MODES:
                cells.append(
                    Cell(case=case.name, subject=subject.name, mode=mode, status=status, reason=reason, **errors)
                )
                clock.advance()
        clock.advance()
    known.clear()

    x, gradient = _tensors(case.shape, device, dtype)
    inputs = [x, *(x.detach().clone().requires_grad_() for _ in range(_copies(x) - 1))]
    for mode in MODES:
        runners: dict[str, _Runner] = {}
        peaks: dict[str, int] = {}
        for name, (subject, correctness) in ready.items():
            clock.say(f"{case.name} {name} {mode}")
            runner = _Runner(_build(subject.build, case.shape[1], device), inputs, gradient, mode, dtype)
            try:
                reason = _lack_of_memory(case, subject, mode, device, dtype)
                if not reason:
                    peaks[name], runners[name] = runner.prepare(), runner
            except torch.OutOfMemoryError as error:
                reason = f"out of memory: {str(error).splitlines()[0]}"
            runner.clear()
            if reason:
                missing = Cell(case=case.name, subject=name, mode=mode, status="missing", reason=reason)
                cells.append(dataclasses.replace(missing, **_errors(correctness)))
                clock.advance()
        clock.say(f"{case.name} {mode}: {len(runners)} in turn")
        _time_in_turn(list(runners.values()), seconds, clock.advance)
        for name, runner in runners.items():
            p20, median, p80 = (1e3 * np.quantile(runner.times, (0.2, 0.5, 0.8))).tolist()
            least = max(
                least_bytes(case.shape, mode, x.element_size()) / environment["roofline"]["bytes_per_second"],
                least_operations(case.shape, mode) / environment["roofline"]["operations_per_second"],
            )
            kept = x.nbytes * (1 if mode == "forward" else 2)  # output, and the input's gradient
            cells.append(
                Cell(
                    case=case.name,
                    subject=name,
                    mode=mode,
                    status="measured",
                    **_errors(ready[name][1]),
                    median_ms=median,
                    p20_ms=p20,
                    p80_ms=p80,
                    repeats=len(runner.times),
                    peak_bytes=peaks[name],
                    beyond_bytes=max(peaks[name] - kept, 0),
                    of_roofline=1e3 * least / median if name.startswith("an-") else None,
                )
            )
    order = [subject.name for subject in subjects]
    return sorted(cells, key=lambda cell: (MODES.index(cell.mode), order.index(cell.subject)))


def _errors(correctness: Correctness) -> dict[str, Any]:
    return {
        "checked_shape": correctness.shape,
        "output_error": correctness.output if math.isfinite(correctness.output) else None,  # JSON has no NaN
        "gradient_error": correctness.gradient if math.isfinite(correctness.gradient) else None,
    }


def _gate(
    case: Case, subject: Subject, device: torch.device, dtype: torch.dtype, precision: str, known: dict[Any, Exact]
) -> tuple[Status, str, Correctness | None]:
    """Whether a cell may be timed, or the reason why not."""
    if subject.name == ATTENTION:
        scores = _attention_scores(case.shape)
        cost = 4 * scores * (case.shape[1] // 2)
        if cost > MOST_ATTENTION_OPERATIONS[device.type]:
            reason = (
                f"{cost:.1e} operations forward, more than the {MOST_ATTENTION_OPERATIONS[device.type]:.0e} that are "
                f"borne here; its score matrix would have {_size(scores * torch.finfo(dtype).bits // 8)}"
            )
            return "missing", reason, None
    try:
        correctness = check(subject, case.shape, device=device, dtype=dtype, known=known)
    except torch.OutOfMemoryError as error:
        return "missing", f"out of memory in its check: {str(error).splitlines()[0]}", None
    except ValueError as error:  # an implementation that cannot run here, with its reason
        return "missing", str(error), None
    except RuntimeError as error:
        return "failed", f"{type(error).__name__}: {str(error).splitlines()[0]}", None
    complaint = correctness.complaint(precision)
    if complaint:
        return "failed", complaint, correctness
    return "measured", "", correctness


def _lack_of_memory(case: Case, subject: Subject, mode: Mode, device: torch.device, dtype: torch.dtype) -> str:
    """Why a cell cannot run, or "": its peak from that of a crop, as every subject's memory is linear in pixels
    (attention's too, in the kernels that never build the score matrix).
    """
    n, c, h, w = case.shape
    crop = (n, c, min(h, 64), min(w, 64))
    x, gradient = _tensors(crop, device, dtype)
    peak = _Runner(_build(subject.build, c, device), [x], gradient, mode, dtype).prepare()
    needed, there = peak * h * w // (crop[2] * crop[3]), _memory(device)
    return f"needs about {_size(needed)}, more than the {_size(there)} allowed here" if needed > there else ""


def _memory(device: torch.device) -> int:
    """Bytes that one cell may take: half of the machine's memory, nine tenths of a GPU's."""
    if device.type == "cuda":
        return int(0.9 * torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _copies(x: Tensor) -> int:
    """As many inputs as it takes for each to have left the GPU's cache before its next turn."""
    if x.device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    return max(1, min(256, math.ceil(2 * cache / x.nbytes)))


class _Clock:
    """One line of progress, with the time left."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done = console, total, 0
        self.start = self.last_line = time.monotonic()
        columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.bar = self.progress.add_task("", total=total)

    def __enter__(self) -> _Clock:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        self.progress.update(self.bar, description=text)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.last_line > SECONDS_BETWEEN_LINES and self.done:
            self.last_line = now
            left = (now - self.start) / self.done * (self.total - self.done)
            self.console.print(f"{self.done} of {self.total}, about {left:.0f} s left: {text}")

    def advance(self) -> None:
        self.done += 1
        self.progress.advance(self.bar)


def _named(kind: str, names: str, known: Sequence[Any]) -> tuple[Any, ...]:
    """The entries that `names` means, in the list's order; "table5" stands for every "table5-..."."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if not any(_stands_for(name, entry.name) for entry in known):
            all_names = [entry.name for entry in known]
            near = difflib.get_close_matches(name, all_names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"there is no {kind} {name!r}; {hint}expected some of {', '.join(all_names)}")
    if not wanted:
        raise ConfigError(f"no {kind} was named in {names!r}; expected names with commas between")
    return tuple(entry for entry in known if any(_stands_for(name, entry.name) for name in wanted))


def _stands_for(name: str, full: str) -> bool:
    return full == name or full.startswith(f"{name}-")


def _environment(device: torch.device, dtype: str, tf32: bool, seconds: float, retain: bool) -> dict[str, Any]:
    kept = ("MALLOC_", "PYTORCH_", "OMP_", "MKL_", "KMP_", "GOMP_")
    values: dict[str, Any] = {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "precision": "tf32" if tf32 else dtype,
        "tolerances": TOLERANCES["tf32" if tf32 else dtype],
        "seconds_a_cell": seconds,
        "attnorm": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "retain_memory": retain,
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(kept)},
        "preloaded": [Path(library).name for library in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()],
        "cache": "one input: what the processor's caches hold of it is read from there",
    }
    if device.type == "cuda":
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        values["cache"] = (
            f"inputs rotate over as many copies as fill the L2 cache of {_size(l2)} twice (256 at most), so the input "
            "comes from memory; outputs and temporaries may find their old places in the cache"
        )
    return values


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB" if count < 1024 else f"{count / 1024:.3g} TiB"


# What is written


def write_report(report: BenchReport, out: Path) -> list[Path]:
    """Writes bench.json, bench.md and time-against-pixels.png into `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "bench.json", dataclasses.asdict(report))
    text = markdown(report)
    write_atomically(out / "bench.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    figure = pixels_figure(report)
    FigureCanvasAgg(figure)
    write_atomically(
        out / "time-against-pixels.png",
        lambda temporary: figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight"),
    )
    return [out / name for name in ("bench.json", "bench.md", "time-against-pixels.png")]


def read_report(path: Path) -> BenchReport:
    """A bench.json, as it was written."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise CheckpointError(f"{path} has format {values['format_version']}; this version reads {FORMAT_VERSION}")
        return BenchReport(
            environment=values["environment"],
            cases=tuple(Case(**case | {"shape": tuple(case["shape"])}) for case in values["cases"]),
            cells=tuple(
                Cell(**cell | {"checked_shape": tuple(cell["checked_shape"]) if cell["checked_shape"] else None})
                for cell in values["cells"]
            ),
        )
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as a bench.json ({error}); run the benchmark again") from error


def disturbances(report: BenchReport) -> list[str]:
    """Where the same copy took more than twice as long in one mode as in the other: something else ran there.
    Below 50 microseconds chance alone does that.
    """
    out = []
    for case in report.cases:
        copies = [report.find(case.name, COPY, mode) for mode in MODES]
        times = [copy.median_ms for copy in copies if copy is not None and copy.median_ms is not None]
        if len(times) == 2 and max(times) > 2 * min(times) > 2 * 0.05:
            took = " and ".join(f"{time:.3g} ms ({mode})" for time, mode in zip(times, MODES, strict=True))
            out.append(f"{case.name}: the same copy took {took}; something else was running: measure again")
    return out


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]


def tables(report: BenchReport) -> list[Table]:
    """Times and memory by mode, cases in rows and subjects in columns; and Table 5 beside what was measured."""
    out = []
    for mode, what in zip(MODES, ("evaluation, no gradients", "forward and backward"), strict=True):
        for title, show in (
            (f"{mode} ({what}): median ms (20%-80%), times the copy, times the pair", _show_time),
            (f"{mode}: peak memory in inputs, and beyond output and gradient", _show_memory(report)),
        ):
            rows = [
                [
                    case.name,
                    "x".join(map(str, case.shape)),
                    *(show(report.find(case.name, name, mode)) for name in report.subjects()),
                ]
                for case in report.cases
            ]
            out.append(Table(title, ["case", "shape", *report.subjects()], rows))
    return [*out, _table_5(report)] if _has_table_5(report) else out


def _show_time(cell: Cell | None) -> str:
    if cell is None or cell.median_ms is None:
        return "-" if cell is None else cell.status
    ratios = [ratio for ratio in (cell.ratio_to_copy, cell.ratio_to_pair) if ratio is not None]
    shown = "".join(f" {ratio:.0f}x" if ratio >= 10 else f" {ratio:.2g}x" for ratio in ratios)
    return f"{cell.median_ms:.3g} ({cell.p20_ms:.3g}-{cell.p80_ms:.3g}){shown}"


def _show_memory(report: BenchReport) -> Callable[[Cell | None], str]:
    element = 4 if report.environment["dtype"] == "float32" else 2
    inputs = {case.name: element * math.prod(case.shape) for case in report.cases}

    def show(cell: Cell | None) -> str:
        if cell is None or cell.peak_bytes is None or cell.beyond_bytes is None:
            return "-" if cell is None else cell.status
        return f"{cell.peak_bytes / inputs[cell.case]:.2f}, {cell.beyond_bytes / inputs[cell.case]:.2f}"

    return show


def _has_table_5(report: BenchReport) -> bool:
    return any(case.name.startswith("table5-") for case in report.cases)


def _table_5(report: BenchReport) -> Table:
    """The paper's rows, then ours on the same sizes."""
    sizes = list(PAPER_TABLE_5["AN"])
    rows = [
        [f"{name} (the paper)", *("-" if times[size] is None else f"{times[size]:.2f}" for size in sizes)]
        for name, times in PAPER_TABLE_5.items()
    ]
    for subject in report.subjects():
        if subject == ATTENTION or subject.startswith("an-"):
            found = [report.find(f"table5-{size}", subject, "forward") for size in sizes]
            shown = ["-" if cell is None or cell.median_ms is None else f"{cell.median_ms:.2f}" for cell in found]
            rows.append([f"{subject} (here)", *shown])
    return Table(
        "Table 5: ms at 1 x 32 channels; the paper's were on a 2080",
        ["", *(f"{size} x {size}" for size in sizes)],
        rows,
    )


def markdown(report: BenchReport) -> str:
    """The whole report as a document."""
    environment = report.environment
    lines = ["# attnorm bench layer", ""]
    lines += [
        f"{environment['device_name']}, {environment['threads']} threads, {environment['precision']}; "
        f"attnorm {environment['attnorm']}, torch {environment['torch']}, triton {environment['triton'] or 'absent'}, "
        f"Python {environment['python']}, {environment['platform']}.",
        "",
        f"Cache: {environment['cache']}.",
        f"Memory is {'kept in the process (mallopt)' if environment['retain_memory'] else 'left to the allocator'}; "
        f"variables: {json.dumps(environment['variables'])}, "
        f"preloaded: {', '.join(environment['preloaded']) or 'nothing'}.",
        f"A copy moves {environment['roofline']['bytes_per_second'] / 1e9:.4g} GB/s here, a matrix product makes "
        f"{environment['roofline']['operations_per_second'] / 1e12:.3g} TFLOP/s.",
    ]
    lines += [f"\n**{disturbance}.**" for disturbance in disturbances(report)]
    for table in tables(report):
        lines += ["", f"## {table.title[0].upper()}{table.title[1:]}", "", *_markdown_table(table)]
    measured = [cell for cell in report.cells if cell.of_roofline is not None]
    if measured:
        rows = [[c.case, c.subject, c.mode, f"{c.of_roofline:.3f}"] for c in measured]
        lines += ["", "## Share of the roofline: the least time for AN's bytes and operations / the median", ""]
        lines += _markdown_table(Table("", ["case", "subject", "mode", "share"], rows))
    checked = {(c.case, c.subject): c for c in report.cells if None not in (c.output_error, c.gradient_error)}
    rows = [
        [
            c.case,
            c.subject,
            "x".join(map(str, c.checked_shape or ())),
            f"{c.output_error:.1e}",
            f"{c.gradient_error:.1e}",
        ]
        for c in checked.values()
    ]
    allowed = " and ".join(f"{tolerance:g}" for tolerance in environment["tolerances"])
    lines += ["", f"## Relative error against the literal form in float64 (allowed: {allowed})", ""]
    lines += _markdown_table(Table("", ["case", "subject", "compared on", "output", "gradients"], rows))
    without = [
        f"- {c.case}, {c.subject}, {c.mode}: {c.status}: {c.reason}" for c in report.cells if c.median_ms is None
    ]
    if without:
        lines += ["", "## Without a time", "", *without]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (table.header, ["---"] * len(table.header), *table.rows)]


def series(report: BenchReport, mode: Mode) -> dict[str, list[tuple[int, float]]]:
    """(pixels of an image, median ms) by subject, over the cases of one batch size and channels that has most sizes."""
    kinds = [case.shape[:2] for case in report.cases]
    kind = max(kinds, key=kinds.count)
    pixels = {case.name: case.shape[2] * case.shape[3] for case in report.cases if case.shape[:2] == kind}
    out: dict[str, list[tuple[int, float]]] = {}
    for cell in report.cells:
        if cell.mode == mode and cell.median_ms is not None and cell.case in pixels:
            out.setdefault(cell.subject, []).append((pixels[cell.case], cell.median_ms))
    return {name: sorted(points) for name, points in out.items()}


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of log time against log pixels between the two largest sizes, where overheads count least: 1 is linear, 2 is
    quadratic. None for fewer than two sizes.
    """
    if len(points) < 2:
        return None
    (first, before), (last, after) = sorted(points)[-2:]
    return math.log(after / before) / math.log(last / first)


def pixels_figure(report: BenchReport) -> Figure:
    """Time against pixels, both logarithmic, with each line's slope; the paper's Table 5 in grey where it applies."""
    figure = Figure(figsize=(12, 6))
    for mode, axis in zip(MODES, figure.subplots(1, 2), strict=True):
        for name, points in series(report, mode).items():
            steepness = slope(points)
            label = name if steepness is None else f"{name}, slope {steepness:.2f}"
            axis.loglog(*zip(*points, strict=True), "o-", markersize=4, label=label)
        if mode == "forward" and _has_table_5(report):
            for (name, times), marker in zip(PAPER_TABLE_5.items(), ("s:", "^:"), strict=True):
                points = [(size * size, ms) for size, ms in times.items() if ms is not None]
                label = f"{name}, the paper on a 2080, slope {slope(points):.2f}"
                axis.loglog(*zip(*points, strict=True), marker, color="grey", markersize=4, label=label)
        axis.set_title(mode, fontsize=10)
        axis.set_xlabel("pixels of a feature map")
        axis.set_ylabel("median ms")
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    environment = report.environment
    figure.suptitle(f"{environment['device_name']}, {environment['precision']}", fontsize=10)
    figure.tight_layout()
    return figure
