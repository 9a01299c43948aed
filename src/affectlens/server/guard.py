"""What stands before every route: who may ask, from where, how often and how much; and the headers of every answer.

It is an ASGI application around another one. A body is read here, up to its limit and within its time, before anything else
happens; the application gets it whole.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from affectlens.server.keys import Keyring
from affectlens.server.problems import failure
from affectlens.server.settings import Settings

LOG = logging.getLogger("affectlens.server")

OPEN = ("/", "/plotly.min.js", "/health", "/ready")
"""Paths that need no key: for whoever watches the process. The dashboard's files hold no data and need none either."""

HEARD_OUT = 16
"""So many times the largest body is heard out before it is refused: who is cut off while sending sees no answer."""

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})

SECURITY = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
"""On every answer that does not say otherwise, as the dashboard's files do."""


class Refused(Exception):
    """An answer that says no.

    Args:
        status: Of HTTP.
        message: What is wrong and what to do.
        kind, code: OpenAI's ``type`` and ``code``.
        headers: More of them.
    """

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Guard:
    """The application with everything before it that it should not have to think of.

    Args:
        app: What answers.
        settings: Limits, and where the server listens.
        keys: Who may ask; none for everybody, which is for loopback only.
        broken: Told of a request that failed by a fault of the application.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, keys: Keyring, broken: Callable[[Request], None]) -> None:
        self._app, self._settings, self._keys, self._broken = app, settings, keys, broken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, f"req-{secrets.token_hex(8)}")
        headers = Headers(scope=scope)
        try:
            self._check_where(scope, headers)
            scope.setdefault("state", {})["key"] = self._check_key(scope, headers)
            body = await self._body(scope, headers, receive)
        except Refused as error:
            said = failure(error.status, str(error), kind=error.kind, code=error.code, headers=error.headers)
            await said(scope, receive, answer)
            return
        except _Left:
            return
        try:
            await self._app(scope, _again(body, receive), answer)
        except Exception:
            LOG.exception("%s %s failed", scope["method"], scope["path"])
            self._broken(Request(scope))
            if answer.begun:
                raise
            await failure(500, "the server failed: its log has the reason", kind="server_error")(scope, receive, answer)

    def _check_where(self, scope: Scope, headers: Headers) -> None:
        """Refuse what a web page elsewhere makes a browser send: by another name for this machine, or from another origin."""
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise Refused(400, "a request has one Host header: send it")
        try:
            host = urlsplit(f"//{hosts[0]}")
            name, port = host.hostname or "", host.port
        except ValueError:
            raise Refused(400, "the Host header is no host: send HOST:PORT") from None
        # With keys a page elsewhere has nothing to send; without them only this machine's own names are its names.
        if not len(self._keys) and name.lower() not in {*LOCAL, self._settings.host.lower()}:
            raise Refused(
                421, f"this server answers as localhost, not as {name[:80]!r}: call it by that name, or start it with --api-keys"
            )
        origin = headers.get("origin")
        if scope["method"] in ("GET", "HEAD", "OPTIONS") or origin is None:
            return
        try:
            theirs = urlsplit(origin)
            same = (theirs.hostname or "").lower() == name.lower() and _port(theirs.port, theirs.scheme) == _port(
                port, theirs.scheme
            )
        except ValueError:
            same = False
        if not same:
            raise Refused(
                403,
                f"requests of web pages at {origin[:80]!r} are not taken: call the API from a program",
                kind="permission_error",
            )

    def _check_key(self, scope: Scope, headers: Headers) -> str:
        """The name of the key that is presented, or nothing where none is needed."""
        path = scope["path"]
        if not len(self._keys) or path in OPEN or path.startswith("/dashboard/"):
            return ""
        scheme, _, presented = headers.get("authorization", "").partition(" ")
        key = self._keys.find(presented.strip() if scheme.lower() == "bearer" else "")
        if key is None:
            wanted = "send one as Authorization: Bearer KEY" if not presented else "it is not among those of this server"
            raise Refused(
                401,
                f"an API key is needed: {wanted}",
                kind="authentication_error",
                code="invalid_api_key",
                WWW_Authenticate="Bearer",
            )
        if (wait := self._keys.spend(key)) > 0:
            seconds = math.ceil(wait)
            raise Refused(
                429, f"{key.name} may make {key.rate} requests a minute: try again in {seconds} seconds", kind="rate_limit_error",
                code="rate_limit_exceeded", Retry_After=str(seconds),
            )  # fmt: skip
        return key.name

    async def _body(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        """The body, whole."""
        most = self._settings.max_body
        too_much = Refused(
            413, f"the body is larger than {most} bytes: send less at once", code="body_too_large", Connection="close"
        )
        length = headers.get("content-length")
        if length is not None and (not length.isascii() or not length.isdigit() or int(length[:20]) > HEARD_OUT * most):
            raise too_much
        pieces, size = [], 0
        try:
            async with asyncio.timeout(self._settings.body_time):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Left
                    size += len(message.get("body", b""))
                    if size <= most:
                        pieces.append(message.get("body", b""))
                    elif size > HEARD_OUT * most:
                        raise too_much
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise Refused(
                408, f"the body did not arrive within {self._settings.body_time:g} seconds: send it at once", Connection="close"
            ) from None
        if size > most:
            raise too_much
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if size and kind != "application/json":
            # Also what keeps forms of web pages elsewhere away: a browser asks before it sends this kind.
            raise Refused(415, "the body must be JSON: send it with Content-Type: application/json")
        return b"".join(pieces)


class _Left(Exception):
    """The caller hung up before the request was whole."""


def _port(port: int | None, scheme: str) -> int:
    return port if port is not None else 443 if scheme == "https" else 80


def _again(body: bytes, receive: Receive) -> Receive:
    """What the application receives: the body, then whatever else comes."""
    whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return whole.pop() if whole else await receive()

    return next_message


class _Answer:
    """An answer with the headers of :data:`SECURITY` and the id of its request."""

    def __init__(self, send: Send, request: str) -> None:
        self._send, self._request, self.begun = send, request, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY.items():
                headers.setdefault(name, value)
            headers["X-Request-Id"] = self._request
        await self._send(message)
