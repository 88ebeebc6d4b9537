"""Compiles the layer's C operator into wheels. All else that a build has to know is in pyproject.toml.

The library has nothing of Python or torch in it, so a wheel of one platform serves every Python (py3-none-PLATFORM). It
is built once for each level of the processor's instruction set; attnorm/ops/native.py loads the highest that the
machine has. Without a compiler the wheel is pure, and the operator is built on first use as in a source checkout.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# As in attnorm/ops/native.py, which would import torch; a test compares them.
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
LIBRARIES = ("-lm", "-lpthread")
LEVELS = {"x86_64": {"default": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}}
LEVELS["amd64"] = LEVELS["x86_64"]


def compile_native(folder: Path) -> list[Path]:
    """The libraries in attnorm/ops below `folder`; none where a compiler is missing or fails."""
    found = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    command = shlex.split(os.environ.get("CC", "")) or ([found] if found else [])
    made: list[Path] = []
    for level, march in LEVELS.get(platform.machine().lower(), {"default": ""}).items():
        path = folder / "attnorm" / "ops" / f"native-{level}.so"
        tuning = [f"-march={march}"] if march else []
        source = str(Path("src", "attnorm", "ops", "native.c"))
        arguments = [*command, *FLAGS, *tuning, "-o", str(path), source, *LIBRARIES]
        try:
            if command:
                subprocess.run(arguments, check=True)
                made.append(path)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"attnorm: {error}; the C operator will be built on first use", file=sys.stderr)
    if not command:
        print("attnorm: no C compiler; the C operator will be built on first use", file=sys.stderr)
    return made


class BuildWithNative(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.distribution.native_libraries = compile_native(Path(self.build_lib))


class PlatformWheel(bdist_wheel):
    def run(self) -> None:
        self.run_command("build")  # what came of it decides what the wheel is called
        self.root_is_pure = not getattr(self.distribution, "native_libraries", [])
        self.distribution.has_ext_modules = lambda: not self.root_is_pure
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(cmdclass={"build_py": BuildWithNative, "bdist_wheel": PlatformWheel})
