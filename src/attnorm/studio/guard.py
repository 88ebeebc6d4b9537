"""What stands between the network and the studio: who may ask, from which page, and how much may be sent."""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "attnorm-studio"
# Scripts, styles, pictures and answers are the studio's own; nothing else is loaded, framed or sent anywhere.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# swagger-ui puts styles into its markup.
DOCS_POLICY = CONTENT_SECURITY_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
SMALL_BODY = 64 * 1024  # of requests that send no photograph


class Guard:
    """ASGI middleware. A request is refused

    - whose Host is none of ours: a page of another name that was made to mean this machine (DNS rebinding);
    - that a page of another origin makes;
    - without the token, where there is one: in a header (Authorization: Bearer ...), or in the cookie that is set when
      the page is opened with ?token=...;
    - whose body is too long, by what it says of itself or by what comes.

    Args:
        hosts: Names under which the studio is reached, without a port, beside the loopback ones.
        token: What to ask for; empty: nothing, which is for the loopback address alone.
        upload_bytes: The longest body of a request that sends a photograph.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], token: str, upload_bytes: int) -> None:
        self.app, self.token, self.upload_bytes = app, token, upload_bytes
        self.hosts = {host.lower() for host in hosts} | {"localhost", "127.0.0.1", "::1"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's own start and end; there are no web sockets
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        query = parse_qs(scope["query_string"].decode("latin-1"))
        send = _with_headers(scope, send)
        status, problem = self._problem(scope, headers)
        if problem:
            await _refuse(send, status, problem)
        elif not self._is_known(headers, query):
            await _refuse(send, 401, "a token is needed: open the address that `attnorm studio` printed")
        elif self.token and scope["path"] == "/" and "token" in query:
            await self._give_cookie(scope, query, send)
        else:
            limit = self.upload_bytes if scope["path"] in ("/api/inpaint", "/api/photograph") else SMALL_BODY
            await self._bounded(scope, headers, limit, receive, send)

    def _problem(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str]:
        host = headers.get("host", "")
        if not self._is_ours(host):
            return 421, f"the host {host[:100]!r} is none of this studio's; say --host when it is started"
        origin = headers.get("origin")
        if origin is not None and origin != f"{scope['scheme']}://{host}":
            return 403, f"requests from {origin[:100]!r} are refused: this is another page's"
        is_a_visit = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not is_a_visit:
            return 403, "requests of other pages are refused"
        return 0, ""

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.hosts:
            return True
        if self.token:  # no page of another name can be reached by a number
            try:
                ipaddress.ip_address(name)
            except ValueError:
                return False
            return True
        return False

    def _is_known(self, headers: dict[str, str], query: dict[str, list[str]]) -> bool:
        if not self.token:
            return True
        given = [headers.get("authorization", "").removeprefix("Bearer "), *query.get("token", [])]
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        given += [cookie.value] if cookie else []
        return any(hmac.compare_digest(text.encode(), self.token.encode()) for text in given)

    async def _give_cookie(self, scope: Scope, query: dict[str, list[str]], send: Send) -> None:
        rest = urlencode([(key, value) for key, values in query.items() for value in values if key != "token"])
        cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/"
        headers = [(b"location", f"/{'?' if rest else ''}{rest}".encode()), (b"set-cookie", cookie.encode())]
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def _bounded(self, scope: Scope, headers: dict[str, str], limit: int, receive: Receive, send: Send) -> None:
        message = f"the request is longer than the {limit:,} bytes that are read; send a smaller file"
        said = headers.get("content-length", "0")
        if not said.isdecimal() or int(said) > limit:
            await _refuse(send, 413, message)
            return
        read, has_started = 0, False

        async def counted() -> Message:
            nonlocal read
            part = await receive()
            read += len(part.get("body", b""))
            if read > limit:
                raise _TooLong
            return part

        async def watched(part: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(part)

        try:
            await self.app(scope, counted, watched)
        except _TooLong:
            if not has_started:
                await _refuse(send, 413, message)


class _TooLong(BaseException):  # so that nothing on its way takes it for an error of its own
    pass


def _with_headers(scope: Scope, send: Send) -> Send:
    policy = DOCS_POLICY if scope["path"] == "/api/docs" else CONTENT_SECURITY_POLICY
    added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    added.append((b"content-security-policy", policy.encode()))

    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", []), *added]
            if not any(name.lower() == b"cache-control" for name, _ in headers):
                headers.append((b"cache-control", b"no-store" if scope["path"].startswith("/api") else b"no-cache"))
            message = {**message, "headers": headers}
        await send(message)

    return with_headers


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
