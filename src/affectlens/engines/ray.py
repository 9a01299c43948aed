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
import logging
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from types import GenericAlias, NoneType
from typing import Any, ClassVar

import numpy as np

from affectlens.engine import Engine, ModelInfo, Request, Result, Session, batched, check_request, open_engine
from affectlens.engines import wire
from affectlens.engines.wire import Failure
from affectlens.errors import AffectlensError, EngineError, MismatchError, MissingExtra
from affectlens.layout import Layout

LOG = logging.getLogger("affectlens.ray")

AHEAD = 2
"""Windows of a run that are under way for each worker: one is run, one waits there, so that no worker waits for this process."""

LOSSES = 3
"""How often the same work may be lost with its worker, or workers may die in a row while they load, before it is given up."""

CHUNK = 2**24
"""Bytes of results that come back at a time."""

KEPT = 2**30
"""Bytes of shared directions that stay in the object store for later runs."""

PATIENCE = 60.0
"""Seconds without any worker after which the log says what is waited for."""


@dataclass(frozen=True)
class Loaded:
    """What there is to know about the engine of a worker.

    Args:
        info: Of its model.
        window: Requests that it looks at together.
        version: Of affectlens there.
    """

    info: ModelInfo
    window: int
    version: str


# ── in a worker ──


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
            return Loaded(self._engine.info, self._engine.window, version("affectlens"))

        return _answer(load)

    def stop(self, unit: str) -> None:
        """Nobody waits for this any more. Called beside :meth:`run`, in another thread."""
        self._stopped.append(unit)

    def run(self, unit: str, data: bytes, apart: Mapping[str, Any]) -> Iterator[bytes]:
        """Run requests; yields results in parts, each with a failure if there are no more."""
        import ray

        failure, done, size = None, list[Result](), 0
        try:
            shared = {key: ray.get(ref) for key, ref in apart.items()}
            requests = () if unit in self._stopped else wire.unpack(data, tuple[Request, ...], apart=shared)
            streams = any(request.stream for request in requests)
            with contextlib.closing(self._engine.run(requests)) as results:
                for result in results:
                    done.append(result)
                    size += 24 * len(result.layout) + sum(reading.values.nbytes for reading in result.readings)
                    if streams or size > CHUNK:
                        yield wire.pack((done, None))
                        done, size = [], 0
                        if unit in self._stopped:
                            break
        except AffectlensError as error:
            failure = Failure.of(error)
        yield wire.pack((done, failure))

    def call(self, what: str, data: bytes) -> bytes:
        """What the engine says to one of ``_CALLS``."""
        return _answer(lambda: _CALLS[what].ask(self._engine, wire.unpack(data, _CALLS[what].takes)))

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


@dataclass(frozen=True)
class _Call:
    """A question to the engine of a worker: how it is asked, and the types of what it takes and gives."""

    ask: Callable[[Engine, Any], Any]
    takes: Any
    gives: Any

    @property
    def answer(self) -> Any:
        """The type of an answer: what it gives, or a failure."""
        return GenericAlias(tuple, (self.gives | None, Failure | None))


_CALLS = {
    "layout": _Call(lambda engine, request: engine.layout(request), Request, Layout),
    "unembed": _Call(lambda engine, residuals: engine.unembed(residuals), np.ndarray, np.ndarray),
    "vocabulary": _Call(lambda engine, _: tuple(engine.vocabulary), NoneType, tuple[str, ...]),
    "texts": _Call(lambda engine, name: engine.texts(name), str, Any),
    "session": _Call(lambda engine, _: _kind_of(engine.session()), NoneType, tuple[bool, bool]),
}


def _kind_of(session: Session) -> tuple[bool, bool]:
    session.close()
    return session.exact, session.shares


def _answer(work: Callable[[], Any]) -> bytes:
    try:
        return wire.pack((work(), None))
    except AffectlensError as error:
        return wire.pack((None, Failure.of(error)))


# ── in the process that asks ──


@dataclass(eq=False)
class _Member:
    """A worker as this process sees it: ``loading`` until it has its model, ``running`` what it has not finished."""

    actor: Any
    loading: Any
    running: list[Any] = field(default_factory=list)


class _Pool:
    """The workers: who has loaded, who has least to do, and a new one in place of each that dies.

    Args:
        ray: The library.
        start: Starts one: the actor, and the reference of its :class:`Loaded`.
        size: How many.
        name: Of the model, for errors.
    """

    def __init__(self, ray: Any, start: Callable[[], tuple[Any, Any]], *, size: int, name: str) -> None:
        self._ray, self._start, self._name = ray, start, name
        self._lock = threading.RLock()
        self._loaded: Loaded | None = None
        self._died = 0
        self._closed = False
        lost = ray.exceptions
        self.lost = (
            lost.RayActorError,
            lost.WorkerCrashedError,
            lost.NodeDiedError,
            lost.ObjectLostError,
            lost.OutOfMemoryError,
        )
        self._members = [_Member(*start()) for _ in range(size)]

    @property
    def loaded(self) -> Loaded:
        """What the workers loaded; waits for the first."""
        self.up()
        assert self._loaded is not None
        return self._loaded

    def up(self) -> list[_Member]:
        """The workers that have loaded; waits until there is one.

        Raises:
            AffectlensError: The model cannot be loaded, or workers die of it.
        """
        while True:
            with self._lock:
                if self._closed:
                    raise EngineError(f"the engine of {self._name} is closed: open it again")
                for member in [member for member in self._members if member.loading is not None]:
                    self._admit(member)
                if up := [member for member in self._members if member.loading is None]:
                    return up
                loading = [member.loading for member in self._members]
            if not self._ray.wait(loading, num_returns=1, timeout=PATIENCE)[0]:
                free = {what: n for what, n in self._ray.available_resources().items() if what in ("CPU", "GPU")}
                LOG.warning("no worker has loaded %s yet; Ray has room for %s", self._name, free or "nothing more")

    def begin(self, task: Callable[[Any], Any]) -> tuple[_Member, Any]:
        """Give a task to the worker that has least to do.

        Args:
            task: Begins it, given the actor.

        Returns:
            The worker, and what ``task`` returned.
        """
        while True:
            self.up()
            with self._lock:
                up = [member for member in self._members if member.loading is None]
                for member in up:
                    if member.running:
                        _, member.running = self._ray.wait(member.running, num_returns=len(member.running), timeout=0)
                if up:
                    chosen = min(up, key=lambda member: len(member.running))
                    begun = task(chosen.actor)
                    chosen.running.append(begun.completed() if hasattr(begun, "completed") else begun)
                    return chosen, begun

    def replace(self, member: _Member) -> None:
        """A new worker in place of one that died; whoever notices first gets it."""
        with self._lock:
            if member in self._members:
                self._members.remove(member)
                self._kill(member)
                if not self._closed:
                    LOG.warning("a worker with %s died; another one takes its place", self._name)
                    self._members.append(_Member(*self._start()))

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            self._closed = True
            for member in self._members:
                self._kill(member)
            self._members = []

    def _admit(self, member: _Member) -> None:
        """Let a worker in that has loaded the same model as the others."""
        if not self._ray.wait([member.loading], timeout=0)[0]:
            return
        try:
            loaded, failure = wire.unpack(self._ray.get(member.loading), tuple[Loaded | None, Failure | None])
        except self.lost as error:
            self._died += 1
            if self._died >= LOSSES:
                raise EngineError(
                    f"{self._died} workers in a row died while they loaded {self._name} ({_reason(error)}): "
                    "see that it fits the memory of a worker and that affectlens is installed on every machine"
                ) from error
            self.replace(member)
            return
        if failure:
            raise failure.error
        first = self._loaded or loaded
        if loaded.version != (own := version("affectlens")):
            raise MismatchError(f"a worker has affectlens {loaded.version}, this process {own}: install the same everywhere")
        if loaded.info != first.info:
            odd = [name for name, value in vars(first.info).items() if name != "checks" and getattr(loaded.info, name) != value]
            was, now = (getattr(each.info, odd[0]) for each in (first, loaded))
            raise MismatchError(
                f"workers have loaded different models (their {odd[0]} is {was} and {now}): give every machine the same files, "
                "and name dtype and device"
            )
        self._loaded, self._died, member.loading = first, 0, None

    def _kill(self, member: _Member) -> None:
        with contextlib.suppress(Exception):  # it is gone already, or Ray is
            self._ray.kill(member.actor, no_restart=True)


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
        self._ray = ray = _library(local=address is None)
        self.replicas = replicas
        own = _join(ray, address)
        if own or RayEngine._sharing:
            RayEngine._sharing.add(self)
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._keeping = threading.Lock()
        try:
            room = _Room.find(ray, replicas, local=self in RayEngine._sharing, device=_device(name, options))
            spec, actor = wire.pack((name, options)), ray.remote(concurrency_groups={"beside": 1})(Worker)

            def start() -> tuple[Any, Any]:
                begun = actor.options(num_cpus=room.cpus, num_gpus=room.gpus, max_restarts=0).remote()
                return begun, begun.load.remote(spec, room.threads)

            self._pool = _Pool(ray, start, size=replicas, name=name)
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
                        f"{LOSSES} workers died of the same {unit.size} requests ({_reason(error)}): give the workers more "
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
                answer, failure = wire.unpack(self._ray.get(ref), _CALLS[what].answer)
            except self._pool.lost as error:
                self._pool.replace(member)
                reason = _reason(error)
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
    member: _Member
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

    def _again(self, member: _Member, error: Exception) -> list[tuple[int, Result | AffectlensError]]:
        """Give what a worker had to the others; what was lost too often comes back as an error."""
        lost: list[tuple[int, Result | AffectlensError]] = []
        for ticket, live in [(ticket, live) for ticket, live in self._lives.items() if live.member is member]:
            del self._lives[ticket]
            if live.losses + 1 == LOSSES:
                lost.append((ticket, EngineError(f"{LOSSES} workers died of this request ({_reason(error)}): make it shorter")))
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


# ── the cluster ──


QUIET = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # that a worker died would go to stdout, between results
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of work that nobody waits for any more
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Settings of Ray that it takes from the environment, where they are not set already."""


def _library(*, local: bool) -> Any:
    """Ray, imported quietly; one that is started here listens on this machine's own address only.

    Raises:
        MissingExtra: It is not installed.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    alone = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's name for it; read when it is imported, and by nobody later
    before = os.environ.get(alone)
    if local and before is None:
        os.environ[alone] = "0"
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingExtra("ray", "ray") from None
    finally:
        if before is None:
            os.environ.pop(alone, None)
    return ray


def _join(ray: Any, address: str | None) -> bool:
    """Join a cluster, or start Ray on this machine alone, quietly; says whether it was started."""
    if ray.is_initialized():
        if address is not None and RayEngine._sharing:
            raise EngineError("this process has started a Ray of its own: close the engine that uses it, or leave address out")
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise EngineError(
                f"no Ray cluster answers at {address!r} ({reason}): see that it runs (ray start --head), or leave address out"
            ) from None
        return False
    for attempt in (1, 2):  # Ray gives up after half a minute, which is short where much else runs
        try:
            # One logical core: workers are placed by hand, and Ray would keep an idle process for each core.
            ray.init(address="local", num_cpus=1, include_dashboard=False, **quiet)
            break
        except Exception as error:  # Ray raises plain ones
            ray.shutdown()
            if attempt == 2:
                reason = str(error).strip().splitlines()[0]
                raise EngineError(
                    f"Ray cannot be started here ({reason}): try again when less runs, or leave replicas out"
                ) from error
    return True


def _device(name: str, options: Mapping[str, Any]) -> str:
    return "cpu" if name == "toy" else str(options.get("device", "auto"))


@dataclass(frozen=True)
class _Room:
    """What each worker is given: cores and GPUs that Ray counts, and threads."""

    cpus: int
    gpus: int
    threads: int

    @classmethod
    def find(cls, ray: Any, replicas: int, *, local: bool, device: str) -> _Room:
        """Divide what there is among the workers.

        Raises:
            EngineError: There is not enough for each.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes)) if device.startswith(("auto", "cuda")) else 0
        if device.startswith("cuda:"):
            raise EngineError(f"device is {device!r}, but Ray gives each worker a GPU of its own: use cuda")
        if gpus and gpus < replicas:
            raise EngineError(f"Ray has {gpus} GPUs for {replicas} workers: use {gpus} replicas, or cpu as the device")
        if local:
            # Threads as this process would have, so that a worker alone rounds as it does.
            there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            cores = int(os.environ.get("OMP_NUM_THREADS") or there)
            return cls(0, bool(gpus), max(1, cores // replicas))
        cores_of = [int(node.get("CPU", 0)) for node in nodes]
        share = max(1, sum(cores_of) // replicas)
        threads = next((n for n in range(share, 0, -1) if sum(cores // n for cores in cores_of) >= replicas), 0)
        if not threads:
            raise EngineError(f"the cluster has {sum(cores_of)} cores for {replicas} workers: use fewer replicas")
        return cls(threads, bool(gpus), threads)


def _reason(error: Exception) -> str:
    """The last line of what Ray says, which names the cause."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
