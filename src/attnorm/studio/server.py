"""Serving the studio: an address, a token where others can reach it, and a browser that opens it."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from attnorm.config import ConfigError
from attnorm.studio.app import create_app
from attnorm.studio.service import Service
from attnorm.system.devices import find_device


def serve(
    runs: Sequence[Path],
    *,
    host: str,
    port: int,
    token: str,
    device: str,
    opens: bool,
    say: Callable[[str], object],
) -> None:
    """Serves until it is interrupted.

    Raises:
        ConfigError: the address cannot be listened at, or the token is too short to be one.
    """
    find_device(device)
    if not is_loopback(host):
        token = token or secrets.token_urlsafe(16)
    if token and (len(token) < 8 or not token.isascii() or not token.replace("-", "").replace("_", "").isalnum()):
        raise ConfigError("the token is too short, or no word; expected 8 or more letters, digits, - or _")
    listener = _listen(host, port)
    app = create_app(Service(runs, device=device), hosts={host, socket.gethostname()} if token else {host}, token=token)
    shown = "localhost" if host in ("", "0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
    say(f"the studio is at {address} (Ctrl-C ends it)")
    if opens:
        threading.Timer(1.0, webbrowser.open, [address]).start()
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=128,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    listener = None
    try:
        family, *_, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, OverflowError) as error:
        if listener is not None:
            listener.close()
        raise ConfigError(
            f"cannot listen at {host}:{port} ({error}); choose another --port (0: any that is free), or another --host"
        ) from None
    return listener
