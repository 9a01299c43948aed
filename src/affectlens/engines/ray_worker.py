"""What runs in a worker of :mod:`affectlens.engines.ray`: a process that holds one engine and is asked through bytes."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any

from affectlens.engine import Request, Result, Session, open_engine
from affectlens.engines import asking, wire
from affectlens.engines.asking import Call, Loaded
from affectlens.engines.wire import Failure
from affectlens.errors import AffectlensError

CHUNK = 2**24
"""Bytes of results that come back at a time."""


class Worker:
    """A process with a model in it. What it takes and gives are bytes of :mod:`affectlens.engines.wire`."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._sessions: dict[str, Session] = {}
        self._tickets: dict[str, dict[int, int]] = {}
        self._refused: dict[str, list[tuple[int, None, Failure]]] = {}
        self._stopped: deque[str] = deque(maxlen=1000)

    def load(self, spec: bytes, threads: int) -> bytes:
        """Open the engine; the answer is a :class:`Loaded`, or a failure."""
        os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is loaded

        def load() -> Loaded:
            name, options = wire.unpack(spec, tuple[str, Any])
            self._engine = open_engine(name, **options)
            return Loaded.of(self._engine)

        return _answer(load)

    def stop(self, unit: str) -> None:
        """Nobody waits for this any more. Called beside :meth:`run`, in another thread."""
        self._stopped.append(unit)

    def run(self, unit: str, data: bytes, apart: Mapping[str, Any]) -> Iterator[bytes]:
        """Run requests; yields nothing when it begins, then results in parts, the last one with a failure if there is one."""
        import ray

        yield b""  # it has begun: only then was it this work that a worker was lost with
        failure, done, size = None, list[Result](), 0
        try:
            shared = {key: ray.get(ref) for key, ref in apart.items()}
            requests = () if unit in self._stopped else wire.unpack(data, tuple[Request, ...], apart=shared)
            streams = any(request.stream for request in requests)
            with contextlib.closing(self._engine.run(requests)) as results:
                for result in results:
                    if unit in self._stopped:
                        break
                    done.append(result)
                    size += 24 * len(result.layout) + sum(reading.values.nbytes for reading in result.readings)
                    if streams or size > CHUNK:
                        yield wire.pack((done, None))
                        done, size = [], 0
        except AffectlensError as error:
            failure = Failure.of(error)
        yield wire.pack((done, failure))

    def call(self, what: str, data: bytes) -> Iterator[bytes]:
        """What the engine says to one of :data:`CALLS`, in one part."""
        yield b""
        yield _answer(lambda: CALLS[what].ask(self._engine, wire.unpack(data, CALLS[what].takes)))

    # ── sessions ──

    def submit(self, session: str, ticket: int, data: bytes, apart: Mapping[str, Any]) -> None:
        """Take a request on; that it cannot be run is told with the next step."""
        import ray

        if session not in self._sessions:
            self._sessions[session], self._tickets[session], self._refused[session] = self._engine.session(), {}, []
        try:
            request = wire.unpack(data, Request, apart={key: ray.get(ref) for key, ref in apart.items()})
            self._tickets[session][self._sessions[session].submit(request)] = ticket
        except AffectlensError as error:
            self._refused[session].append((ticket, None, Failure.of(error)))

    def step(self, session: str) -> bytes:
        """One token more for each: tickets with a result or a failure."""
        found: list[tuple[int, Result | None, Failure | None]] = list(self._refused[session])
        self._refused[session].clear()
        for own, result in self._sessions[session].step():
            ticket = self._tickets[session][own]
            if isinstance(result, AffectlensError):
                found.append((ticket, None, Failure.of(result)))
            else:
                found.append((ticket, result, None))
            if isinstance(result, AffectlensError) or result.done:
                del self._tickets[session][own]
        return wire.pack(found)

    def cancel(self, session: str, ticket: int) -> None:
        """Let a request go."""
        tickets = self._tickets.get(session, {})
        for own in [own for own, other in tickets.items() if other == ticket]:
            self._sessions[session].cancel(own)
            del tickets[own]

    def close(self, session: str) -> None:
        """Let all of a session go."""
        if session in self._sessions:
            self._sessions.pop(session).close()
            del self._tickets[session], self._refused[session]


CALLS = {**asking.CALLS, "session": Call(lambda engine, _: _kind_of(engine.session()), NoneType, tuple[bool, bool])}


def _kind_of(session: Session) -> tuple[bool, bool]:
    session.close()
    return session.exact, session.shares


def _answer(work: Callable[[], Any]) -> bytes:
    try:
        return wire.pack((work(), None))
    except AffectlensError as error:
        return wire.pack((None, Failure.of(error)))
