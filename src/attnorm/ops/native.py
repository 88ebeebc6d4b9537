"""Attentive Normalization on the CPU by native.c, which a wheel brings along compiled, for some instruction sets.

Where it does not, or the variable CC names a compiler, the machine's C compiler builds it on first use, for the very
processor: what is built is kept in the cache folder ($ATTNORM_CACHE, else attnorm in $XDG_CACHE_HOME or ~/.cache), one
file for each source, compiler and processor. Importing this module builds nothing. ATTNORM_NATIVE=0 switches it off.
"""

# N batch, C channels, K entities, P = H*W pixels; M = N, or 1 where the batch shares its filters.

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from attnorm.ops.dispatch import Parameters
from attnorm.ops.regional_norm import SMALLEST_AREA
from attnorm.system.files import default_cache_dir, write_atomically
from attnorm.system.provenance import cpu_info

_log = logging.getLogger("attnorm")
_lock = threading.Lock()
_libraries: dict[tuple[str | None, ...], ctypes.CDLL | str] = {}

_SOURCE = Path(__file__).with_name("native.c")
# Torch itself is built without the errno and the traps; what would change NaN, infinity or order stays out.
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_TUNING = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler takes
_LIBRARIES = ("-lm", "-lpthread")

_ORDERS = {"forward": 0, "backward": 1, "double_backward": 2}


class _Layer(ctypes.Structure):
    """The first part of `layer` in native.c, field by field; its derived part is room."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "channels", "entities", "pixels")),
        *((name, ctypes.c_int64) for name in ("filter_images", "channels_last", "half", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "grad", "filters", "offset", "value_weight", "value_bias")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "rho")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("tangent", "filters_dot", "offset_dot", "value_weight_dot")),
        *((name, ctypes.c_void_p) for name in ("weight_dot", "bias_dot", "rho_dot")),
        *((name, ctypes.c_void_p) for name in ("out", "area", "mean", "rstd", "dfilters", "doffset")),
        *((name, ctypes.c_void_p) for name in ("dvalue_weight", "dweight", "dbias", "drho")),
        *((name, ctypes.c_void_p) for name in ("dgrad", "dfilters_dot", "doffset_dot")),
        ("workspace", ctypes.c_void_p),
        ("team", ctypes.c_void_p),
        ("derived", ctypes.c_int64 * 64),
    )


def unsupported_reason(
    device: torch.device,
    dtype: torch.dtype,
    num_channels: int,
    num_entities: int,
    channels_last: bool,
    *,
    order: int = 1,
) -> str | None:
    """Why this implementation cannot run on such a feature map; None if it can. The first call builds the library.

    Any number of channels and entities, either layout and derivatives of `order` 1 and 2 will do.
    """
    if os.environ.get("ATTNORM_NATIVE") == "0":
        return "ATTNORM_NATIVE=0 switches it off"
    if device.type != "cpu":
        return f"x is on {device}; it runs on the CPU"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"x is {dtype}; it takes float32 and bfloat16"
    library = _library()
    return library if isinstance(library, str) else None


def forward(x: Tensor, parameters: Parameters, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq. 4 to 6 with weighted instance moments: rho * regional_norm(v, softmax(filters x + offset)) + x.

    Args:
        x: [N, C, H, W], float32 or bfloat16; the output has its dtype and layout, contiguous or channels_last.
        eps: What is added to the variance.

    Returns:
        out, and for `backward`, float32: area [N, K] (at least 1e-12), mean and rstd = 1 / sqrt(var + eps) [N, K, C].
    """
    x, channels_last = _dense(x)
    out = torch.empty_like(x)
    images, (entities, channels) = x.shape[0], parameters.weight.shape
    area, (mean, rstd) = _floats(images, entities), (_floats(images, entities, channels) for _ in range(2))
    if not x.numel():
        return out, area.fill_(SMALLEST_AREA), mean.zero_(), rstd.fill_(eps**-0.5)
    _run("forward", x, channels_last, parameters, eps, {"out": out, "area": area, "mean": mean, "rstd": rstd})
    return out, area, mean, rstd


def backward(
    grad: Tensor, x: Tensor, parameters: Parameters, moments: tuple[Tensor, Tensor, Tensor], eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`, whose arguments and results (area, mean, rstd) it takes; `grad` is that of its output.

    Returns:
        dx (as x), and float32: dfilters [M, K, C], doffset [M, K], dvalue_weight [C, C], dvalue_bias [C] (zeros: it
        shifts the regions' means and drops out of Eq. 5), dweight and dbias [K, C], drho [].
    """
    x, channels_last = _dense(x)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad = grad.to(x.dtype).contiguous(memory_format=layout)
    dx, gradients = torch.empty_like(x), _gradients(parameters)
    if not x.numel():
        for gradient in gradients.values():
            gradient.zero_()
    else:
        parts = {"grad": grad, "out": dx, **_named(moments), **gradients}
        _run("backward", x, channels_last, parameters, eps, parts)
    dfilters, doffset, dvalue_weight, dweight, dbias, drho = gradients.values()
    dvalue_bias = _floats(*parameters.value_bias.shape).zero_()
    return dx, dfilters, doffset, dvalue_weight, dvalue_bias, dweight, dbias, drho


def double_backward(
    tangent: Tensor,
    dots: tuple[Tensor | None, ...],
    grad: Tensor,
    x: Tensor,
    parameters: Parameters,
    moments: tuple[Tensor, Tensor, Tensor],
    eps: float = 1e-5,
) -> tuple[Tensor, ...]:
    """Gradients of <tangent, dx> + <filters_dot, dfilters> + ..., where dx, dfilters, ... are what `backward` returns.

    Args:
        tangent: That of dx, as x; a gradient of a norm of dx, say.
        dots: filters_dot, offset_dot, value_weight_dot, weight_dot, bias_dot and rho_dot, those of the parameters'
            gradients; None for zeros. dvalue_bias is 0 and has none.
        grad, ...: The arguments of `backward`.

    Returns:
        dgrad, which is also the derivative of the output along the tangents (forward mode), and dx, both as x; float32:
        dfilters, doffset, dvalue_weight, dvalue_bias (zeros), dweight, dbias and drho as of `backward`; and what
        `backward` returns for filters and offset, which are the gradients of filters_dot and offset_dot (where
        filters_dot is None, zeros for the first).
    """
    x, channels_last = _dense(x)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad, tangent = (part.detach().to(x.dtype).contiguous(memory_format=layout) for part in (grad, tangent))
    dgrad, dx, gradients = torch.empty_like(x), torch.empty_like(x), _gradients(parameters)
    filters, offset = parameters[:2]
    gradients |= {"dfilters_dot": _floats(*filters.shape), "doffset_dot": _floats(*offset.shape)}
    if not x.numel():
        for gradient in gradients.values():
            gradient.zero_()
    else:
        names = (f"{name}_dot" for name in Parameters._fields if name != "value_bias")
        given = {name: _plain(part) for name, part in zip(names, dots, strict=True) if part is not None}
        parts = {"grad": grad, "tangent": tangent, "out": dx, "dgrad": dgrad, **given, **_named(moments), **gradients}
        _run("double_backward", x, channels_last, parameters, eps, parts)
    dfilters, doffset, dvalue_weight, *others = gradients.values()
    dvalue_bias = _floats(*parameters.value_bias.shape).zero_()
    return dgrad, dx, dfilters, doffset, dvalue_weight, dvalue_bias, *others


def _gradients(parameters: Parameters) -> dict[str, Tensor]:
    """Room for the gradients of the parameters, but for value_bias."""
    return {f"d{name}": _floats(*part.shape) for name, part in parameters._asdict().items() if name != "value_bias"}


def _named(moments: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    return {name: _plain(part) for name, part in zip(("area", "mean", "rstd"), moments, strict=True)}


def _run(
    function: str,
    x: Tensor,
    channels_last: bool,
    parameters: Parameters,
    eps: float,
    parts: dict[str, Tensor],
) -> None:
    """Call a function of native.c; `parts` are the other tensors that it reads and all that it writes."""
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"attentive_norm: the native implementation cannot run: {library}")
    # Held to the end of the call: of a tensor that had to be copied, C has the address only.
    parts = {name: _plain(part) for name, part in parameters._asdict().items()} | parts
    layer = _Layer(
        images=x.shape[0],
        channels=x.shape[1],
        entities=parameters.filters.shape[1],
        pixels=x.shape[2] * x.shape[3],
        filter_images=parameters.filters.shape[0],
        channels_last=channels_last,
        half=x.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        x=x.data_ptr(),
        eps=eps,
        team=_team(),
        **{name: part.data_ptr() for name, part in parts.items()},
    )
    pointer = ctypes.byref(layer)
    workspace = _floats(library.attnorm_workspace(pointer, _ORDERS[function]))
    layer.workspace = workspace.data_ptr()
    getattr(library, f"attnorm_{function}")(pointer)  # ctypes releases the GIL meanwhile


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """`x` contiguous or channels_last, and whether it is the second."""
    x = x.detach()
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x, True
    return x.contiguous(), False


def _floats(*shape: int) -> Tensor:
    """What C writes: float32 on the CPU, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


@functools.cache
def _team() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch runs on; None where it has another one."""
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / name))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _library() -> ctypes.CDLL | str:
    """The library, or why there is none; found out once for each value of CC and what names the cache folder."""
    settings = tuple(map(os.environ.get, ("CC", "ATTNORM_CACHE", "XDG_CACHE_HOME", "HOME")))
    found = _libraries.get(settings)
    if found is None:  # three times in a step of a layer: on a small map a path takes as long as the kernel
        with _lock:
            found = _libraries[settings] = _build_and_load(os.environ.get("CC", ""), str(default_cache_dir()))
    return found


def _shipped() -> ctypes.CDLL | None:
    """The library that came with the wheel, for the highest instruction set that torch finds here; None: there is none.

    setup.py makes them. A level that the machine has not would end the process, so nothing is tried.
    """
    levels = ("default", "avx2", "avx512")
    highest = torch.backends.cpu.get_cpu_capability().lower()
    for level in reversed(levels[: levels.index(highest) + 1] if highest in levels else levels[:1]):
        path = _SOURCE.with_name(f"native-{level}.so")
        if path.exists():
            try:
                return _load(path)
            except (OSError, AttributeError) as error:  # of another platform, or damaged
                _log.warning("not using %s: %s", path, error)
    return None


@functools.cache
def _build_and_load(compiler: str, folder: str) -> ctypes.CDLL | str:
    shipped = None if compiler else _shipped()
    if shipped is not None:
        return shipped
    command = shlex.split(compiler) or [next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "cc")]
    if shutil.which(command[0]) is None:
        return f"no C compiler: {command[0]!r} is not found; install gcc or clang, or name one with CC"
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, check=False).stdout
        parts = [_SOURCE.read_bytes(), repr((command, _FLAGS, _TUNING, _LIBRARIES)).encode(), version, _processor()]
        key = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]
        path = Path(folder) / f"native-{key}.so"
        if path.exists():
            try:
                return _load(path)
            except (OSError, AttributeError):
                pass  # damaged: build it again
        return _build(command, path) or _load(path)
    except OSError as error:
        return f"building in {folder} failed ({error}); name another cache folder with ATTNORM_CACHE"


class _CompilerError(Exception):
    """The compiler's message."""


def _build(command: list[str], path: Path) -> str | None:
    """Compile native.c into `path`; the reason if that fails. Any number of processes may do so at once."""
    started = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)

    def compile_to(temporary: Path) -> None:
        for tuning in _TUNING:
            arguments = [*command, *_FLAGS, *tuning, "-o", str(temporary), str(_SOURCE), *_LIBRARIES]
            result = subprocess.run(arguments, capture_output=True, text=True, errors="replace", check=False)
            if result.returncode == 0:
                return
        lines = (result.stderr or result.stdout).strip().splitlines()
        said = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise _CompilerError(f"{shlex.join(command)} cannot build it: {said.strip()}")

    try:
        write_atomically(path, compile_to)
    except _CompilerError as error:
        return str(error)
    _log.info("built %s with %s in %.1f s", path, command[0], time.perf_counter() - started)
    return None


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer = ctypes.POINTER(_Layer)
    library.attnorm_workspace.argtypes = (pointer, ctypes.c_int)
    library.attnorm_workspace.restype = ctypes.c_int64
    for name in _ORDERS:
        function = getattr(library, f"attnorm_{name}")
        function.argtypes, function.restype = (pointer,), None
    return library


def _processor() -> bytes:
    """What -march=native depends on: a home directory may be shared by different machines."""
    kinds = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU ")
    lines = {line for line in cpu_info() if line.startswith(kinds)}
    return "\n".join([platform.platform(), *sorted(lines)]).encode()
