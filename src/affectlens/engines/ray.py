"""Any engine on many workers, on this machine or a cluster, with Ray: ``open_engine("hf/…", replicas=8)``.

Each worker is a process (a Ray actor) that loads the model once and keeps it for every run. A run is cut into windows, which are
what the engine in this process would look at together: so a result has the same bits whatever number of workers there is. Windows
go to whichever worker has least to do, and results come back in the order of the requests; :data:`AHEAD` windows for each worker
are under way at a time, so memory does not depend on how many requests there are, and an endless stream will do.

A worker that dies is replaced, and what it had not given is done again by the others. Results that a stream has given already are
counted and left out when it is done again: none is given twice.

What travels is data (:mod:`affectlens.engines.wire`). Directions that many requests share are put into Ray's object store once,
and each machine fetches them once. What Ray pickles is the class :class:`Worker`, bytes, numbers and those arrays.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from affectlens.engine import Engine, Request, Result, Session, batched, check_request
from affectlens.engines import wire
from affectlens.engines.ray_pool import LOSSES, Member, Pool, Room, device_of, join, library, reason
from affectlens.engines.ray_worker import CALLS, Worker
from affectlens.engines.wire import Failure
from affectlens.errors import AffectlensError, EngineError
from affectlens.layout import Layout

AHEAD = 2
"""Windows of a run that are under way for each worker: one is run, one waits there, so that no worker waits for this process."""

KEPT = 2**30
"""Bytes of shared directions that stay in the object store for later runs."""


@dataclass(eq=False)
class _Unit:
    """A window on its way: what is asked, by whom it is done, how many results were given, how often it was lost."""

    data: bytes
    apart: dict[str, Any]
    size: int
    id: str = field(default_factory=lambda: os.urandom(8).hex())
    member: Any = None
    stream: Any = None
    given: int = 0
    losses: int = 0


class RayEngine(Engine):
    """An engine on workers; any number of threads may use it.

    Args:
        name: What each worker opens, as for :func:`affectlens.open_engine`. On a cluster every machine must find it.
        replicas: How many workers. On GPUs each has one of its own; the cores are shared among them.
        address: Of a Ray cluster (``auto``, ``host:6379``, ``ray://host:10001``); None starts Ray on this machine alone, without
            a dashboard, and ends it with :meth:`close` or with the process. A cluster that this process is in already is used.
        options: For the engine of each worker.

    Raises:
        MissingExtra: Ray is not installed.
        EngineError: No cluster there, not enough room on it, or a model that is already loaded.
        AffectlensError: What loading the model raises in a worker.

    Example:
        >>> with RayEngine("toy", replicas=2) as engine:                                            # doctest: +SKIP
        ...     engine.generate(["the calm sea"])
    """

    _sharing: ClassVar[weakref.WeakSet[RayEngine]] = weakref.WeakSet()
    """Engines on a Ray that one of them started: the last one to close ends it."""

    def __init__(self, name: Any, *, replicas: int = 1, address: str | None = None, **options: Any) -> None:
        if not isinstance(name, str):
            raise EngineError("workers load their model by name: save it to a folder and name that, or leave replicas out")
        self._ray = ray = library(local=address is None)
        self.replicas = replicas
        own = join(ray, address, started=bool(RayEngine._sharing))
        if own or RayEngine._sharing:
            RayEngine._sharing.add(self)
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._keeping = threading.Lock()
        try:
            room = Room.find(ray, replicas, local=self in RayEngine._sharing, device=device_of(name, options))
            spec, actor = wire.pack((name, options)), ray.remote(concurrency_groups={"beside": 1})(Worker)

            def start() -> tuple[Any, Any]:
                begun = actor.options(num_cpus=room.cpus, num_gpus=room.gpus, max_restarts=0).remote()
                return begun, begun.load.remote(spec, room.threads)

            self._pool = Pool(ray, start, size=replicas, name=name)
            loaded = self._pool.loaded
        except BaseException:
            self.close()
            raise
        workers = f"{replicas} on Ray {ray.__version__}, {room.threads} thread{'s' * (room.threads > 1)} each"
        self.info = replace(loaded.info, checks=(*loaded.info.checks, ("workers", workers)))
        self.window = loaded.window
        self.at_once = AHEAD * replicas

    def close(self) -> None:
        """End the workers, and Ray if it was started for them. What still runs fails; the engine cannot be used any more."""
        if hasattr(self, "_pool"):
            self._pool.close()
        with self._keeping:
            self._kept.clear()
        if self in RayEngine._sharing:
            RayEngine._sharing.discard(self)
            if not RayEngine._sharing:
                self._ray.shutdown()

    # ── the seam ──

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        windows = batched(requests, self.window)
        ahead: deque[_Unit] = deque()
        problem: Exception | None = None
        try:
            while True:
                while problem is None and len(ahead) < AHEAD * self.replicas:
                    try:
                        if (window := next(windows, None)) is None:
                            break
                        ahead.append(self._unit(window))
                    except Exception as error:  # comes out behind the results of what was asked before it
                        problem = error
                if not ahead:
                    break
                yield from self._results(ahead[0])
                ahead.popleft()
        finally:
            # Not by ray.cancel: where a task is cancelled before it begins, the next one may wait for it for half a minute.
            for unit in ahead:
                with contextlib.suppress(Exception):  # its worker may be gone, and Ray as well
                    unit.member.actor.stop.options(concurrency_group="beside").remote(unit.id)
        if problem is not None:
            raise problem

    def _unit(self, window: Sequence[Request]) -> _Unit:
        for request in window:
            check_request(request, self.info)
        unit = _Unit(*self._sent(tuple(window)), size=len(window))
        self._begin(unit)
        return unit

    def _begin(self, unit: _Unit) -> None:
        unit.member, unit.stream = self._pool.begin(lambda actor: actor.run.remote(unit.id, unit.data, unit.apart))

    def _results(self, unit: _Unit) -> Iterator[Result]:
        while True:
            try:
                came = 0
                for part in unit.stream:
                    results, failure = wire.unpack(self._ray.get(part), tuple[tuple[Result, ...], Failure | None])
                    for result in results:
                        came += 1
                        if came > unit.given:  # of work that is done again, some was given already
                            unit.given += 1
                            yield result
                    if failure:
                        raise failure.error
                return
            except self._pool.lost as error:
                unit.losses += 1
                self._pool.replace(unit.member)
                if unit.losses == LOSSES:
                    raise EngineError(
                        f"{LOSSES} workers died of the same {unit.size} requests ({reason(error)}): give the workers more "
                        "memory, or make the texts shorter"
                    ) from error
                self._begin(unit)

    def _sent(self, value: Any) -> tuple[bytes, dict[str, Any]]:
        """A value as bytes, and references to its large arrays, which are put into the object store once."""
        apart: dict[str, np.ndarray] = {}
        data = wire.pack(value, apart=apart)
        with self._keeping:
            for key, array in apart.items():
                if key not in self._kept:
                    self._kept[key] = self._ray.put(array), array.nbytes
                self._kept.move_to_end(key)
            refs = {key: self._kept[key][0] for key in apart}
            while sum(size for _, size in self._kept.values()) > KEPT:
                self._kept.popitem(last=False)
        return data, refs

    def _call(self, what: str, value: Any) -> Any:
        data, reason = wire.pack(value), ""
        for _ in range(LOSSES):
            member, ref = self._pool.begin(lambda actor: actor.call.remote(what, data))
            try:
                answer, failure = wire.unpack(self._ray.get(ref), CALLS[what].answer)
            except self._pool.lost as error:
                self._pool.replace(member)
                reason = reason(error)
                continue
            if failure:
                raise failure.error
            return answer
        raise EngineError(f"{LOSSES} workers died when asked for {what} ({reason}): give the workers more memory")

    def layout(self, request: Request) -> Layout:
        check_request(request, self.info)
        layout: Layout = self._call("layout", request)
        return layout

    def unembed(self, residuals: np.ndarray) -> np.ndarray:
        logits: np.ndarray = self._call("unembed", np.asarray(residuals))
        return logits

    @cached_property
    def vocabulary(self) -> Sequence[str]:
        words: Sequence[str] = self._call("vocabulary", None)
        return words

    def texts(self, name: str) -> list[dict[str, Any]] | None:
        records: list[dict[str, Any]] | None = self._call("texts", name)
        return records

    @cached_property
    def sessions(self) -> tuple[bool, bool]:
        """Whether the sessions of the workers are exact, and whether requests share passes in them."""
        kind: tuple[bool, bool] = self._call("session", None)
        return kind

    def session(self) -> Session:
        return RaySession(self)


@dataclass(eq=False)
class _Live:
    """A request of a session: who has it, how many results came of it, how many of them are not to be given again."""

    request: Request
    member: Member
    begun: Any
    came: int = 0
    given: int = 0
    losses: int = 0


class RaySession(Session):
    """Requests that come and go, each on the worker that had fewest of them: a session there for each worker."""

    def __init__(self, engine: RayEngine) -> None:
        super().__init__(engine)
        self.exact, self.shares = engine.sessions
        self._ray, self._pool, self._sent = engine._ray, engine._pool, engine._sent
        self._id = os.urandom(8).hex()
        self._lives: dict[int, _Live] = {}

    @property
    def live(self) -> int:
        return len(self._lives)

    def submit(self, request: Request) -> int:
        check_request(request, self._engine.info)
        ticket = next(self._tickets)
        self._place(ticket, request)
        return ticket

    def _place(self, ticket: int, request: Request, losses: int = 0, given: int = 0) -> None:
        up = self._pool.up()
        member = min(up, key=lambda member: sum(live.member is member for live in self._lives.values()))
        begun = member.actor.submit.remote(self._id, ticket, *self._sent(request))
        self._lives[ticket] = _Live(request, member, begun, 0, given, losses)

    def step(self) -> list[tuple[int, Result | AffectlensError]]:
        out: list[tuple[int, Result | AffectlensError]] = []
        members = list(dict.fromkeys(live.member for live in self._lives.values()))
        steps = [(member, member.actor.step.remote(self._id)) for member in members]
        for member, step in steps:
            try:
                for each in self._lives.values():
                    if each.member is member and not each.came:
                        self._ray.get(each.begun)  # done before the step; raises what is a fault and no refusal
                answer = wire.unpack(self._ray.get(step), tuple[tuple[int, Result | None, Failure | None], ...])
            except self._pool.lost as error:
                self._pool.replace(member)
                out += self._again(member, error)
                continue
            for ticket, result, failure in answer:
                if (live := self._lives.get(ticket)) is None or live.member is not member:
                    continue
                live.came += 1
                if failure or result.done:
                    del self._lives[ticket]
                if live.came > live.given:  # of what is done again, some was given already
                    live.given += 1
                    out.append((ticket, failure.error if failure else result))
        return out

    def _again(self, member: Member, error: Exception) -> list[tuple[int, Result | AffectlensError]]:
        """Give what a worker had to the others; what was lost too often comes back as an error."""
        lost: list[tuple[int, Result | AffectlensError]] = []
        for ticket, live in [(ticket, live) for ticket, live in self._lives.items() if live.member is member]:
            del self._lives[ticket]
            if live.losses + 1 == LOSSES:
                lost.append((ticket, EngineError(f"{LOSSES} workers died of this request ({reason(error)}): make it shorter")))
            else:
                self._place(ticket, live.request, live.losses + 1, live.given)
        return lost

    def cancel(self, ticket: int) -> None:
        if (live := self._lives.pop(ticket, None)) is not None:
            live.member.actor.cancel.remote(self._id, ticket)

    def close(self) -> None:
        for member in dict.fromkeys(live.member for live in self._lives.values()):
            member.actor.close.remote(self._id)
        self._lives.clear()
