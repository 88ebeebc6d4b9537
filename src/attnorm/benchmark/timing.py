"""Time, memory and operations of one step, and the least that they can be: the roofline."""

# N batch, C channels, H, W; K entities.

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attnorm.benchmark.cases import NUM_ENTITIES, Case, Mode, Shape
from attnorm.benchmark.checks import step
from attnorm.config import ConfigError

FEWEST_REPEATS, MOST_REPEATS = 3, 2000
CPU = torch.device("cpu")


def peak_bytes(function: Callable[[], object], device: torch.device = CPU) -> int:
    """The most bytes that `function` held at once through the allocator of the device, beyond what was there before.

    On the CPU exact and the same every time: bytes are counted as asked for, event by event. Scratch memory that a
    library takes by itself (oneDNN, a kernel's own malloc) is not seen, and neither is what other threads allocate.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
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


def least_operations(shape: Shape, mode: Mode) -> int:
    """What AN must compute, a pixel: in each of the two forward passes v(X) and the layout, 2 C^2 + 6 K C; backward
    2 C^2 + 6 K C in the first pass and 6 C^2 + 20 K C in the second.
    """
    n, c, h, w = shape
    squares, products = {"forward": (4, 12), "training": (4 + 8, 12 + 26)}[mode]
    return n * h * w * (squares * c * c + products * NUM_ENTITIES * c)


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


class Runner:
    """Repeats one cell's step, with its gradients cleared before each, outside the time."""

    def __init__(
        self, module: nn.Module, inputs: Sequence[Tensor], gradient: Tensor, mode: Mode, dtype: torch.dtype
    ) -> None:
        self.module, self.inputs, self.gradient = module.train(mode == "training"), inputs, gradient
        self.mode, self.dtype = mode, dtype
        self.turn, self.chunk = 0, 1
        self.graphs: list[torch.cuda.CUDAGraph] = []  # one an input; none on a CPU, or where a step cannot be captured
        self.times: list[float] = []  # seconds
        self.spent = self.first_seconds = 0.0

    def prepare(self) -> int:
        """Warms up, which compiles what is compiled; returns the peak bytes of a step."""
        device = self.gradient.device
        self.first_seconds = seconds_of(self.step, device)
        for _ in range(2 if device.type == "cuda" else 0):
            self.clear()
            self.step()
        self.clear()
        peak = peak_bytes(self.step, device)
        if device.type != "cuda":
            self.clear()
            return peak
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
        step(self.module, x, self.gradient, self.mode, self.dtype)

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


def time_in_turn(runners: Sequence[Runner], seconds: float, advance: Callable[[], None]) -> None:
    """One turn each, round and round, so that a machine that grows slower or faster does so for all alike; a runner
    leaves when it has had its seconds.
    """
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


def copy_bandwidth(source: Tensor) -> float:
    """Bytes a second, read and written, of a copy of `source`."""
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), source.device)


def measure_roofline(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes a second (read and written) of a large copy, and operations a second of a large square matrix product."""
    is_cuda = device.type == "cuda"
    source = torch.ones((2**30 if is_cuda else 2**28) // 4, device=device)
    size = 1024 if not is_cuda else 4096 if dtype == torch.float32 else 8192
    matrix = torch.randn(size, size, device=device).to(dtype)
    return {
        "bytes_per_second": copy_bandwidth(source),
        "operations_per_second": 2 * size**3 / _fastest(lambda: matrix @ matrix, device),
        "matrix_size": size,
        "copied_bytes": source.nbytes,
    }


def least_seconds(case: Case, mode: Mode, element: int, roofline: Mapping[str, Any]) -> float:
    """The least time that AN can take: that of its bytes or that of its operations, whichever is more."""
    bandwidth = roofline.get("bytes_per_second_by_case", {}).get(case.name, roofline["bytes_per_second"])
    return max(
        least_bytes(case.shape, mode, element) / bandwidth,
        least_operations(case.shape, mode) / roofline["operations_per_second"],
    )


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Of one call, with all that it leaves to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _fastest(function: Callable[[], object], device: torch.device) -> float:
    """Seconds, of ten times."""
    return min(seconds_of(function, device) for _ in range(10))
