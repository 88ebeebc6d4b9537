"""Where a number comes from: the commit of the code, the machine's processor."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path


@cache  # what is measured later in this process was imported before
def commit() -> str:
    """The commit of the checkout that this package is run from, "-dirty" where its code was changed; or nothing."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "src") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def cpu_info() -> list[str]:
    """What the system says of the CPUs, line by line; nothing where it says nothing (it is Linux that does)."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def processor() -> str:
    """The CPU's model name."""
    models = [line.partition(":")[2].strip() for line in cpu_info() if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
