"""Devices, and at what precision they multiply."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from attnorm.config import ConfigError
from attnorm.system.provenance import cpu_info


def find_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda", "cuda:1" or "mps" means here; ConfigError where it is not there."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ConfigError(f"the device is {name!r}; expected auto, cpu, cuda, cuda:1 or mps")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    device = torch.device(name)
    if cuda and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"the device is {name!r}; this machine has {torch.cuda.device_count()}, counted from cuda:0")
    if (device.type == "cuda" and not cuda) or (device.type == "mps" and not mps):
        raise ConfigError(f"the device is {name!r}, but torch finds none on this machine; take auto or cpu")
    return device


def find_precision(
    name: Literal["float32", "bfloat16", "auto"], device: torch.device
) -> Literal["float32", "bfloat16"]:
    """What "auto" means on a device: bfloat16 where it has units for that (it is slow where not), else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    units = ("amx_bf16", "avx512_bf16")
    has_units = device.type == "cpu" and any(unit in line for line in cpu_info() for unit in units)
    return "bfloat16" if has_units else "float32"


def device_name(device: torch.device) -> str:
    """A GPU's model, or the kind of what is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def memory_of(device: torch.device) -> int:
    """Bytes of the machine, or of a GPU; 0 where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def usable_memory(device: torch.device) -> int:
    """Bytes that one measurement may take: half of the machine's memory, nine tenths of a GPU's."""
    return int((0.9 if device.type == "cuda" else 0.5) * memory_of(device))


def set_tf32(allowed: bool) -> None:
    """Whether NVIDIA's GPUs may round the factors of float32 products and convolutions to 10 bits, from now on and in
    the whole process.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def temporary_tf32(allowed: bool) -> Iterator[None]:
    """As `set_tf32`, until the block ends."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_tf32(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Logits and statistics keep their precision under autocast, which would round them to 8 bits (row 11)."""
    if x.device.type == "meta":  # where autocast does not exist
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def why_not_compiled() -> str:
    """Why torch.compile cannot make code for the CPU here, or ""; on a GPU it needs Triton alone, and finds that."""
    if torch.cuda.is_available():
        return ""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return f"{' '.join(str(error).split())}; install g++, or name a C++ compiler in CXX"
    return ""
