"""The dashboard: the static files beside this module, as they are, and Plotly's script out of its own package.

There is no build step and nothing is loaded from elsewhere. The page talks to the HTTP interface like any other client; its files
hold no data, so they are served without a key, and the page asks for one when the interface wants it.

``index.html`` is the frame, ``main.js`` its pages: ``live.js`` (with ``happening.js``), ``history.js`` (with ``stored.js``),
``alerts.js`` (with ``rules.js``), ``map.js`` and ``studies.js``. They are made of ``reader.js`` (a conversation with all that is
read in it: ``transcript.js``, ``timeline.js``, ``circumplex.js``), ``dials.js`` and ``figures.js``. Below stand
``conversation.js`` (tokens, and columns of numbers), ``catalog.js`` and ``traffic.js`` (what is served, and what happens),
``api.js`` and ``dom.js``.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
from importlib.resources import files

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; frame-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The Content-Security-Policy of the page."""

FIGURES = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
"""The policy of ``figures.html``, the document in the page that holds the figures of studies: Plotly writes style attributes and
draws heat maps as images from data. Nothing else stands in it, and it cannot connect to anything."""

HEADERS = {
    "Cache-Control": "no-cache",  # kept, and asked for again by its hash
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def router() -> APIRouter:
    """The routes of the dashboard: ``/``, ``/dashboard/FILE`` and ``/plotly.min.js``.

    Example:
        >>> [route.path for route in router().routes]
        ['/', '/dashboard/{name}', '/plotly.min.js']
    """
    return APIRouter(
        routes=[
            Route("/", lambda request: _answer(request, "index.html")),
            Route("/dashboard/{name}", lambda request: _answer(request, request.path_params["name"])),
            Route("/plotly.min.js", lambda request: _answer(request, "plotly.min.js")),
        ]
    )


def _answer(request: Request, name: str) -> Response:
    found = _file(name)
    if found is None:
        return Response("there is no such file\n", 404, HEADERS, "text/plain")
    body, packed, tag, kind = found
    framed = name == "figures.html"
    policy = {"Content-Security-Policy": FIGURES if framed else POLICY, "X-Frame-Options": "SAMEORIGIN" if framed else "DENY"}
    headers = {**HEADERS, **policy, "ETag": tag, "Vary": "Accept-Encoding"}
    if request.headers.get("if-none-match") == tag:
        return Response(None, 304, headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(packed, 200, {**headers, "Content-Encoding": "gzip"}, kind)
    return Response(body, 200, headers, kind)


@functools.cache
def _names() -> frozenset[str]:
    return frozenset(each.name for each in files(__package__).iterdir() if each.name.endswith(tuple(TYPES)))


def _file(name: str) -> tuple[bytes, bytes, str, str] | None:
    """Bytes, the same compressed, their tag and their type; only of the names that are there, so that no path leads out."""
    return _read(name) if name == "plotly.min.js" or name in _names() else None


@functools.cache
def _read(name: str) -> tuple[bytes, bytes, str, str]:
    path = files("plotly") / "package_data" / name if name == "plotly.min.js" else files(__package__) / name
    body = path.read_bytes()
    kind = TYPES[name[name.rindex(".") :]]
    return body, gzip.compress(body, 6, mtime=0), f'"{hashlib.sha256(body).hexdigest()[:32]}"', kind
