"""What goes wrong, in OpenAI's shape: a status, a type, a code, and the field that is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from affectlens.errors import AffectlensError, Busy, MissingExtra, RuleError, StoreError, UnknownName
from affectlens.server.armed import Standing
from affectlens.server.calls import WrongField
from affectlens.sharing import ModelFailed, TimedOut

LONGEST = 2000
"""Characters of a message that are sent."""

SAID: dict[int, str] = {
    400: "Something in the request is wrong; `param` names it.",
    401: "An API key is needed.",
    404: "There is no such thing.",
    409: "It stands in the rules file and cannot be changed from outside.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    429: "The queue is full, or the key has used up its minute; `Retry-After` says when to come again.",
    503: "The server is shutting down, or its store is not there.",
}
"""The statuses of errors, for the OpenAPI document."""

SHAPE: dict[str, Any] = {
    "type": "object",
    "title": "Error",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


class Hung(Exception):
    """The caller hung up: there is nobody to answer."""


class NotThere(AffectlensError):
    """Something that a path or a field names does not exist."""

    def __init__(self, message: str, code: str = "not_found", param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


@contextlib.contextmanager
def there() -> Iterator[None]:
    """Names that a path holds: unknown ones are 404, and the message names the nearest."""
    try:
        yield
    except UnknownName as error:
        raise NotThere(str(error)) from None


@dataclass(frozen=True)
class Meaning:
    """What an error is over HTTP: its status, its outcome in metrics, and OpenAI's type, code and param."""

    status: int
    outcome: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None


def meaning(error: AffectlensError) -> Meaning:
    """What an error is over HTTP.

    Example:
        >>> meaning(Busy("full")).status, meaning(UnknownName("concept", "clam", ["calm"])).code
        (429, 'unknown_name')
    """
    if isinstance(error, WrongField):
        inner = meaning(error.error)
        return Meaning(inner.status, inner.outcome, inner.type, inner.code, error.param)
    if isinstance(error, NotThere):
        return Meaning(404, "refused", code=error.code, param=error.param)
    if isinstance(error, Busy):
        return Meaning(429, "busy", "rate_limit_error", "queue_full")
    if isinstance(error, TimedOut):
        return Meaning(504, "timeout", "timeout_error", "time_limit")
    if isinstance(error, ModelFailed):
        return Meaning(500, "error", "server_error")
    if isinstance(error, StoreError | MissingExtra):
        return Meaning(503, "error", "server_error", "store_unavailable")
    if isinstance(error, Standing):
        return Meaning(409, "refused", code="stands_in_file")
    if isinstance(error, RuleError):
        return Meaning(400, "refused", code="invalid_rule", param="text")
    if isinstance(error, UnknownName):
        return Meaning(400, "refused", code="unknown_name")
    return Meaning(400, "refused", code="context_length_exceeded" if "do not fit the context" in str(error) else None)


def error_of(message: str, *, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI writes it.

    Example:
        >>> error_of("no", kind="server_error")
        {'error': {'message': 'no', 'type': 'server_error', 'param': None, 'code': None}}
    """
    said = message if len(message) <= LONGEST else message[:LONGEST] + "…"
    # A message may repeat what was sent, half a character included.
    said = said.encode("utf-8", "replace").decode()
    return {"error": {"message": said, "type": kind, "param": param, "code": code}}


def failure(
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An answer that says what is wrong."""
    return JSONResponse(error_of(message, kind=kind, code=code, param=param), status_code=status, headers=headers)
