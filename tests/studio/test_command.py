"""attnorm studio: what it listens at, and whom it asks for a token."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx

from attnorm.studio.server import is_loopback


def test_beyond_this_machine_a_token_is_asked_for_and_ctrl_c_ends_it(runs: Path) -> None:
    command = [sys.executable, "-m", "attnorm", "studio", str(runs), "--host", "0.0.0.0", "--port", "0", "--no-open"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r"http://localhost:(\d+)/\?token=([\w-]{20,})", line)
            assert found, line
            base = f"http://127.0.0.1:{found[1]}"
            assert httpx.get(f"{base}/api/models", timeout=60).status_code == 401
            known = {"authorization": f"Bearer {found[2]}"}
            listed = httpx.get(f"{base}/api/models", headers=known, timeout=60).json()["models"]
            ids = [model["id"] for model in listed if model["source"] == "run"]
            assert ids == ["gan", "inpainter", "other", "plain"]
            process.send_signal(signal.SIGINT)
            assert process.wait(20) in (0, 130)
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def test_this_machines_own_addresses_need_no_token_and_all_others_do() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.8.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "10.0.0.1", "localhost.example", "127.0.0.1.example")))


def test_mistakes_are_told_in_a_line(refused: Callable[..., str], runs: Path, tmp_path: Path) -> None:
    assert "is no folder; expected run directories" in refused(["studio", tmp_path / "nothing"])
    assert "the token is too short" in refused(["studio", runs, "--token", "abc", "--no-open"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1:{port}" in refused(["studio", runs, "--port", port, "--no-open"])
