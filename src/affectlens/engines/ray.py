"""Any engine on many workers, on this machine or a cluster, with Ray: ``open_engine("hf/…", replicas=8)``.

Each worker is a process (a Ray actor) that loads the model once and keeps it for every run. A run is cut into windows, which are
what the engine in this process would look at together: so a result has the same bits whatever number of workers there is. Windows
go to whichever worker has least to do, and results come back in the order of the requests; :data:`AHEAD` windows for each worker
are under way at a time, so memory does not depend on how many requests there are, and an endless stream will do.

A worker that dies is replaced, and what it had not given is done again by the others. Results that were handed on already are
counted and left out when it is done again: none is given twice. What was being done by three workers that died is given up. What
was only waiting there is hardly blamed: all workers lost at once count for it as one that was lost at work.

What travels is data (:mod:`affectlens.engines.wire`). Directions that many requests share are put into Ray's object store once,
and each machine fetches them once. What Ray itself pickles is the class :class:`~affectlens.engines.ray_worker.Worker`, bytes,
numbers and those arrays.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, partial
from typing import Any

import numpy as np

from affectlens.engine import Engine, Request, Result, Session, batched, check_request
from affectlens.engines import wire
from affectlens.engines.ray_pool import LOSSES, Cluster, Member, Pool, Room, device_of, reason
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
    """A piece of work on its way.

    Args:
        task: Begins it, given a worker's actor.
        what: Its name in an error.
        id: What it is stopped by.
        member: Who has it.
        stream: What comes of it.
        begun: Whether the worker has begun it.
        came: Results that this worker has given.
        given: Results that were handed on.
        losses: Workers that were lost with it, weighed (:meth:`RayEngine._weight`).
    """

    task: Callable[[Any], Any]
    what: str
    id: str = ""
    member: Any = None
    stream: Any = None
    begun: bool = False
    came: int = 0
    given: int = 0
    losses: Fraction = Fraction(0)


class RayEngine(Engine):
    """An engine on workers; any number of threads may use it.

    Args:
        name: What each worker opens, as for :func:`affectlens.open_engine`. On a cluster every machine must find it.
        replicas: How many workers. On GPUs each has one of its own; the cores are shared among them.
        address: Of a Ray cluster that this machine belongs to (``auto``, ``host:6379``); None starts Ray on this machine alone,
            without a dashboard, and ends it with :meth:`close` or with the process. A Ray that this process is in is used.
        options: For the engine of each worker.

    Raises:
        MissingExtra: Ray is not installed.
        EngineError: No cluster there, not enough room on it, workers that die while they load, or a model that is already loaded.
        AffectlensError: What loading the model raises in a worker.

    Example:
        >>> with RayEngine("toy", replicas=2) as engine:                                            # doctest: +SKIP
        ...     engine.generate(["the calm sea"])
    """

    def __init__(self, name: Any, *, replicas: int = 1, address: str | None = None, **options: Any) -> None:
        if not isinstance(name, str):
            raise EngineError("workers load their model by name: save it to a folder and name that, or leave replicas out")
        self.replicas = replicas
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._keeping = threading.Lock()
        self._cluster = Cluster.enter(self, address)
        self._ray = ray = self._cluster.ray
        try:
            device, parts = device_of(name, options), int(options.get("tensor_parallel", 1))
            room = Room.find(ray, replicas, alone=self._cluster.alone, device=device, parts=parts)
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
        self._cluster.leave(self)

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
                stop = unit.member.actor.stop.options(concurrency_group="beside")
                self._pool.tell(partial(stop.remote, unit.id))
        if problem is not None:
            raise problem

    def _unit(self, window: Sequence[Request]) -> _Unit:
        for request in window:
            check_request(request, self.info)
        self._pool.check_open()
        data, apart = self._sent(tuple(window))
        name = os.urandom(8).hex()
        return self._begun(_Unit(lambda actor: actor.run.remote(name, data, apart), f"{len(window)} requests", id=name))

    def _begun(self, unit: _Unit) -> _Unit:
        unit.begun, unit.came = False, 0
        unit.member, unit.stream = self._pool.begin(unit.task)
        return unit

    def _weight(self, begun: bool) -> Fraction:
        """How much it counts against a piece of work that a worker died with it: which had ``begun`` it, or would have later."""
        return Fraction(1) if begun else Fraction(1, self.replicas)

    def _parts(self, unit: _Unit) -> Iterator[bytes]:
        """What comes of a unit, from its beginning again whenever a worker is lost with it."""
        while True:
            self._pool.check_open()
            try:
                for part in unit.stream:
                    data = self._ray.get(part)
                    if unit.begun:
                        yield data
                        self._pool.check_open()
                    unit.begun = True
                return
            except self._pool.lost as error:
                self._pool.replace(unit.member, error)
                unit.losses += self._weight(unit.begun)
                if unit.losses >= LOSSES:
                    raise EngineError(
                        f"{LOSSES} workers died while they did the same {unit.what} ({reason(error)}): give the workers more "
                        "memory, or ask for shorter texts or for less of them"
                    ) from error
                self._begun(unit)

    def _results(self, unit: _Unit) -> Iterator[Result]:
        for part in self._parts(unit):
            results, failure = wire.unpack(part, tuple[tuple[Result, ...], Failure | None])
            for result in results:
                unit.came += 1
                if unit.came > unit.given:  # of work that is done again, some was given already
                    unit.given += 1
                    yield result
            if failure:
                raise failure.error

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
        data = wire.pack(value)
        unit = self._begun(_Unit(lambda actor: actor.call.remote(what, data), f"work ({what})"))
        (part,) = self._parts(unit)
        answer, failure = wire.unpack(part, CALLS[what].answer)
        if failure:
            raise failure.error
        return answer

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
    """A request of a session.

    Args:
        request: What was asked.
        member: Who has it.
        taken: The reference of its being taken on; None once it was.
        came: Results that this worker has given.
        given: Results that were handed on.
        losses: Workers that were lost with it, weighed.
    """

    request: Request
    member: Member
    taken: Any
    came: int = 0
    given: int = 0
    losses: Fraction = Fraction(0)


class RaySession(Session):
    """Requests that come and go, each on the worker that had fewest of them: a session there for each worker."""

    def __init__(self, engine: RayEngine) -> None:
        super().__init__(engine)
        self.exact, self.shares = engine.sessions
        self._ray, self._pool, self._sent, self._weight = engine._ray, engine._pool, engine._sent, engine._weight
        self._id = os.urandom(8).hex()
        self._lives: dict[int, _Live] = {}
        self._members: set[Member] = set()

    @property
    def live(self) -> int:
        return len(self._lives)

    def submit(self, request: Request) -> int:
        check_request(request, self._engine.info)
        ticket = next(self._tickets)
        self._place(ticket, request)
        return ticket

    def _place(self, ticket: int, request: Request, losses: Fraction = Fraction(0), given: int = 0) -> None:
        up = self._pool.up()
        member = min(up, key=lambda member: sum(live.member is member for live in self._lives.values()))
        self._members.add(member)
        taken = member.actor.submit.remote(self._id, ticket, *self._sent(request))
        self._lives[ticket] = _Live(request, member, taken, given=given, losses=losses)

    def step(self) -> list[tuple[int, Result | AffectlensError]]:
        self._pool.check_open()
        out: list[tuple[int, Result | AffectlensError]] = []
        members = list(dict.fromkeys(live.member for live in self._lives.values()))
        steps = [(member, member.actor.step.remote(self._id)) for member in members]
        for member, step in steps:
            try:
                for each in self._lives.values():
                    if each.member is member and each.taken is not None:
                        self._ray.get(each.taken)  # done before the step; raises what is a fault and no refusal
                        each.taken = None
                answer = wire.unpack(self._ray.get(step), tuple[tuple[int, Result | None, Failure | None], ...])
            except self._pool.lost as error:
                self._pool.replace(member, error)
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
        self._members.discard(member)
        lost: list[tuple[int, Result | AffectlensError]] = []
        for ticket, live in [(ticket, live) for ticket, live in self._lives.items() if live.member is member]:
            del self._lives[ticket]
            losses = live.losses + self._weight(live.taken is None)
            if losses >= LOSSES:
                fix = "submit it alone, or make it shorter"
                lost.append((ticket, EngineError(f"{LOSSES} workers died with this request ({reason(error)}): {fix}")))
            else:
                self._place(ticket, live.request, losses, live.given)
        return lost

    def cancel(self, ticket: int) -> None:
        if (live := self._lives.pop(ticket, None)) is not None:
            self._pool.tell(partial(live.member.actor.cancel.remote, self._id, ticket))

    def close(self) -> None:
        for member in self._members:
            self._pool.tell(partial(member.actor.close.remote, self._id))
        self._members.clear()
        self._lives.clear()
