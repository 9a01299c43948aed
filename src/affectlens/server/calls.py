"""A call and what happens while it is answered, as plain data; and who else is told of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from affectlens.engine import Chat, Sampling
from affectlens.errors import AffectlensError
from affectlens.monitor import Monitor, Token
from affectlens.server.dials import Bias
from affectlens.server.records import Record
from affectlens.server.schemas import Readings
from affectlens.traces import Alert


class Metrics(Protocol):
    """Counts what happens; :class:`affectlens.server.metrics.Metrics` is one. Called from the threads of replies."""

    def reply(self, record: Record) -> None:
        """A reply has ended, or a text was scored."""

    def ended(self, kind: str, outcome: str) -> None:
        """A call ended without a record: ``cancelled``, ``timeout``, ``error``, ``busy`` or ``refused``."""

    def add_rule(self, name: str) -> None:
        """A rule is watched from now on."""

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """What ``/metrics`` answers, and its content type."""


class Telemetry(Protocol):
    """Tells others of replies; :class:`affectlens.server.telemetry.Telemetry` is one."""

    def reply(self, record: Record, headers: Mapping[str, str] | None = None) -> None:
        """A reply has ended; ``headers`` of its request may make it part of the caller's trace."""

    def close(self) -> None:
        """Send what is left."""


class WrongField(AffectlensError):
    """Something in a request is wrong.

    Args:
        error: What.
        param: The field.
    """

    def __init__(self, error: AffectlensError, param: str) -> None:
        super().__init__(str(error))
        self.error, self.param = error, param


@contextlib.contextmanager
def field(param: str) -> Iterator[None]:
    """Say of what goes wrong in which field it is."""
    try:
        yield
    except AffectlensError as error:
        raise WrongField(error, param) from None


# ── a call ──


@dataclass(frozen=True)
class Choice:
    """One reply of a call.

    Args:
        index: Its number in the answer.
        id: Of its trace.
        prompt: What it answers.
        seed: Of its draws.
        steered: False for the unsteered reply of a comparison.
    """

    index: int
    id: str
    prompt: str | Chat
    seed: int
    steered: bool = True


@dataclass(frozen=True)
class Call:
    """What is asked for, checked and with every default filled in.

    Args:
        id: Of the whole answer, and of its first trace.
        created: UTC.
        kind: ``chat`` or ``completion``.
        key: Name of the API key.
        headers: Those of the request that make it part of a trace of the caller's.
        choices: Its replies.
        sampling: Of all; the seed is each choice's own, and ``max_tokens`` counts where ``limit`` is one.
        limit: Most tokens of a reply; None for as many as there is room for.
        bias: What is steered.
        readings: Which scores the caller wants; None for none.
        names: Their emotions, or those that are watched.
        monitor: With the rules that are armed and the caller's own.
        compare: Whether the second choice is the unsteered reply.
        echoed: Whether the prompt is to be repeated before the reply.
    """

    id: str
    created: datetime
    kind: str
    key: str
    headers: Mapping[str, str]
    choices: tuple[Choice, ...]
    sampling: Sampling
    limit: int | None
    bias: Bias
    readings: Readings | None
    names: tuple[str, ...]
    monitor: Monitor
    compare: bool = False
    echoed: bool = False

    def echo(self, choice: Choice) -> str:
        """What stands before a reply."""
        return choice.prompt if self.echoed and isinstance(choice.prompt, str) else ""


# ── what happens while it is answered ──


@dataclass(frozen=True)
class Began:
    """A reply begins. ``prompt`` has the scores of what was said before, where they were asked for."""

    choice: Choice
    prompt: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class Said:
    """A token. ``row`` is what was read at it: position, text, role and scores; None where no scores are due."""

    choice: Choice
    token: Token
    row: dict[str, Any] | None


@dataclass(frozen=True)
class Ended:
    """A reply has ended and is kept. ``summary`` states the emotions of its words, read by the untouched model."""

    choice: Choice
    record: Record
    summary: dict[str, Any]


Event = Began | Said | Ended


def alert_data(alert: Alert) -> dict[str, Any]:
    """An alert as plain data."""
    return {**vars(alert), "scores": dict(alert.scores)}
