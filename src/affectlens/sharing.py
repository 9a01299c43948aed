"""One model, many callers: a worker thread owns the engine's session, and every caller has a place in it.

    shared = SharedEngine(engine, live=32, queue=64, deadline=300)
    with shared.place() as place:              # Busy when too many wait
        place.wait()
        for token in monitor.stream(place, chat): ...

A place is what a caller holds from the first token to the last: what runs for it (a reply, the second reading of its words, the
rest after a rule began to steer) never waits in the queue again. At most ``live`` places are at work, in the order in which they
were taken; ``queue`` more may wait. Whoever leaves, by closing or from another thread by :meth:`Place.cancel`, is gone from the
model before its next step.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from affectlens.engine import Engine, Request, Result, Session
from affectlens.errors import AffectlensError, Busy, EngineError

LOG = logging.getLogger("affectlens.sharing")

AHEAD = 4
"""Requests of one call that are with the model at a time: a long list must not crowd out the replies of others."""

Answer = TypeVar("Answer")


def in_a_thread(work: Callable[[], Answer]) -> Answer:
    """Do something in a thread that ends with it: load the model of a :class:`SharedEngine`, say, whose worker will run it.

    torch multiplies with OpenMP, which gives each thread that computes helpers of its own for as long as that thread lives. Once
    there are more of them than cores they sleep between two operations, and waking them takes longer than a small model does: a
    server whose main thread had loaded the model gave tokens a third more slowly.

    Example:
        >>> from affectlens import open_engine
        >>> shared = SharedEngine(in_a_thread(lambda: open_engine("toy")), live=2, queue=2, deadline=60)
        >>> shared.close()
    """
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    thread = threading.Thread(target=run, name="affectlens loading", daemon=True)
    try:
        thread.start()
        return answer.result()
    except KeyboardInterrupt as pressed:
        # Ctrl-C reaches the main thread alone, and must not wait for a model to be read.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(type(pressed)))
        raise
    finally:
        if thread.is_alive():  # it may never have begun
            thread.join()


class Cancelled(Exception):
    """A place was given up while something ran for it: whoever waited for that is to stop, and nobody is to be told."""


class ModelFailed(EngineError):
    """The model itself failed, not the request."""


class TimedOut(EngineError):
    """What was asked for was not done within its time."""


class SharedEngine(Engine):
    """An engine that many threads may call at once.

    Args:
        engine: The model; from now on nobody else may use it.
        live: How many places are at work at a time.
        queue: How many more may wait.
        deadline: Seconds that a place lasts, waiting included.

    Raises:
        EngineError: From whatever runs: it cannot be run as asked, or did not end within the deadline.
        Busy: From :meth:`place` and :meth:`run`: too many wait.

    Example:
        >>> from affectlens.engine import Sampling, open_engine
        >>> shared = SharedEngine(open_engine("toy"))
        >>> [result.done for result in shared.run([Request("the calm sea", sampling=Sampling(max_tokens=2), stream=True)])]
        [False, False, True]
        >>> shared.close()
    """

    def __init__(self, engine: Engine, *, live: int = 32, queue: int = 64, deadline: float = 300.0) -> None:
        self.info = engine.info
        self.live, self.queue, self.deadline = live, queue, deadline
        self._engine = engine
        self._changed = threading.Condition()
        self._waiting: deque[Place] = deque()
        self._at_work: set[Place] = set()
        self._orders: deque[Callable[[Session], None]] = deque()
        self._jobs: dict[int, _Job] = {}
        self._draining = self._closed = False
        self._held = 1.0  # seconds that a place was held lately: what Retry-After is made of
        self._worker = threading.Thread(target=self._work, name="affectlens engine", daemon=True)
        self._worker.start()

    # ── as an engine ──

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Run requests from any thread, in a place of their own; closing the iterator cancels them."""
        with self.place() as place:
            place.wait()
            yield from place.run(requests)

    def unembed(self, residuals: np.ndarray) -> np.ndarray:
        return self._between_steps(lambda: self._engine.unembed(residuals))

    @cached_property
    def vocabulary(self) -> Sequence[str]:
        return self._between_steps(lambda: self._engine.vocabulary)

    def texts(self, name: str) -> list[dict[str, Any]] | None:
        return self._engine.texts(name)

    # ── places ──

    def place(self, size: int = 1, *, deadline: float | None = None) -> Place:
        """Take a place at the end of the queue.

        Args:
            size: How many replies will be generated in it at once.
            deadline: Seconds that it lasts; by default that of the engine.

        Raises:
            Busy: Too many wait, or the server is shutting down.
            EngineError: More replies than are ever generated at once.
        """
        if size > self.live:
            raise EngineError(f"{size} replies at once are more than the {self.live} that this server generates: ask for fewer")
        with self._changed:
            if self._draining:
                raise Busy("the server is shutting down: try again when it is back", 5.0)
            waiting = sum(place.size for place in self._waiting)
            if (self._waiting or self._busy + size > self.live) and waiting + size > self.queue:
                after = min(60.0, max(1.0, self._held * (waiting + size) / self.live))
                raise Busy(f"{waiting} requests are waiting already: try again in {math.ceil(after)} seconds", after)
            place = Place(self, size, deadline or self.deadline)
            self._waiting.append(place)
        self._admit()
        return place

    @property
    def depth(self) -> tuple[int, int]:
        """How many replies wait, and how many have a place at work."""
        with self._changed:
            return sum(place.size for place in self._waiting), self._busy

    @property
    def alive(self) -> bool:
        """Whether the worker is there to run anything."""
        return self._worker.is_alive()

    @property
    def _busy(self) -> int:
        return sum(place.size for place in self._at_work)

    def _admit(self) -> None:
        """Let those in front in while there is room; they are told when nothing is locked any more."""
        admitted = []
        with self._changed:
            while self._waiting and self._busy + self._waiting[0].size <= self.live:
                place = self._waiting.popleft()
                self._at_work.add(place)
                admitted.append(place)
        for place in admitted:
            place.admitted()

    def leave(self, place: Place) -> None:
        """Give a place back."""
        with self._changed:
            if place in self._at_work:
                self._at_work.remove(place)
                self._held += 0.2 * (time.monotonic() - place.began - self._held)
            elif place in self._waiting:
                self._waiting.remove(place)
            self._changed.notify_all()
        self._admit()

    def drain(self, timeout: float) -> bool:
        """Take nobody in any more, and wait until all have left; says whether they have, within ``timeout`` seconds."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._waiting and not self._at_work, timeout)

    def close(self) -> None:
        """Cancel everything and end the worker."""
        with self._changed:
            self._draining = self._closed = True
            places = [*self._waiting, *self._at_work]
            self._changed.notify_all()
        for place in places:
            place.cancel()
        self._worker.join()

    # ── the worker ──

    def submit(self, job: _Job) -> None:
        """Hand a request to the worker."""

        def begin(session: Session) -> None:
            if job.cancelled:
                return
            try:
                job.ticket = session.submit(job.request)
                self._jobs[job.ticket] = job
            except AffectlensError as error:
                job.box.put(error)
            except Exception as error:
                job.box.put(_failed(error))
                raise

        self._order(begin)

    def withdraw(self, job: _Job) -> None:
        """Take a request back before the next step."""
        job.cancelled = True

        def end(session: Session) -> None:
            if job.ticket is not None and self._jobs.get(job.ticket) is job:
                del self._jobs[job.ticket]
                session.cancel(job.ticket)

        self._order(end)

    def _between_steps(self, work: Callable[[], Answer]) -> Answer:
        """What the worker finds by ``work``, which may use the model, between two steps."""
        future: Future[Answer] = Future()

        def answer(_: Session) -> None:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        self._order(answer)
        try:
            return future.result(self.deadline)
        except TimeoutError:
            raise TimedOut(f"the model did not answer within {self.deadline:g} seconds: try again") from None

    def _order(self, order: Callable[[Session], None]) -> None:
        with self._changed:
            if self._closed:
                raise Cancelled
            self._orders.append(order)
            self._changed.notify_all()

    def _work(self) -> None:
        session = self._engine.session()
        while True:
            with self._changed:
                while not self._orders and not session.live and not self._closed:
                    self._changed.wait()
                orders, self._orders = self._orders, deque()
            for order in orders:
                try:
                    order(session)
                except Exception:
                    LOG.exception("a request could not be begun or ended")
            if self._closed:
                break
            try:
                self._step(session)
            except Exception as error:  # a bug or no memory: those at work are told, the server goes on
                LOG.exception("the model failed; %d requests are ended", len(self._jobs))
                session = self._begin_again(session, error)
        session.close()

    def _step(self, session: Session) -> None:
        company = session.live
        if not company:
            return
        for job in self._jobs.values():
            job.place.company = max(job.place.company, company)
        for ticket, result in session.step():
            job = self._jobs[ticket]
            if isinstance(result, AffectlensError) or result.done:
                del self._jobs[ticket]
            job.box.put(result)

    def _begin_again(self, session: Session, error: Exception) -> Session:
        for job in self._jobs.values():
            job.box.put(_failed(error))
        self._jobs.clear()
        try:
            session.close()
        except Exception:
            LOG.exception("a session that failed could not be closed")
        return self._engine.session()


def _failed(error: Exception) -> ModelFailed:
    return ModelFailed(f"the model failed ({type(error).__name__}): the log has the reason; try again")


class _Job:
    """A request on its way through the worker, and what has come of it so far."""

    def __init__(self, place: Place, request: Request) -> None:
        self.place, self.request = place, request
        self.box: queue.SimpleQueue[Result | AffectlensError | None] = queue.SimpleQueue()
        self.ticket: int | None = None
        self.cancelled = False


class Place(Engine):
    """A caller's place at a shared engine; made by :meth:`SharedEngine.place`. Itself an engine, for any number of threads.

    ``ready`` is resolved when it has come to the front of the queue; ``company`` is the most requests that shared a forward pass
    with one of its own, itself included.
    """

    def __init__(self, shared: SharedEngine, size: int, seconds: float) -> None:
        self.info, self.size, self.company = shared.info, size, 0
        self.ready: Future[None] = Future()
        self.since = self.began = time.monotonic()
        self._shared, self._seconds = shared, seconds
        self._lock = threading.Lock()
        self._jobs: set[_Job] = set()
        self._over = False

    @property
    def left(self) -> float:
        """Seconds until its deadline."""
        return self.since + self._seconds - time.monotonic()

    def admitted(self) -> None:
        """It has come to the front."""
        self.began = time.monotonic()
        with contextlib.suppress(InvalidStateError):  # it was given up meanwhile
            self.ready.set_result(None)

    def wait(self) -> None:
        """Wait until it is at work.

        Raises:
            Busy: It was not within its deadline.
            Cancelled: It was given up.
        """
        try:
            self.ready.result(max(0.0, self.left))
        except TimeoutError:
            self.cancel()
            raise Busy(f"no room was found within {self._seconds:g} seconds: try again later", 30.0) from None
        except CancelledError:
            raise Cancelled from None

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Run requests; at most :data:`AHEAD` of them are with the model at a time.

        Raises:
            EngineError: One cannot be run, or did not end within the deadline.
            Cancelled: The place was given up.
        """
        source, begun = iter(requests), deque[_Job]()
        try:
            while True:
                while len(begun) < AHEAD and (request := next(source, None)) is not None:
                    begun.append(self._begin(request))
                if not begun:
                    return
                result = self._next(begun[0])
                if result.done:
                    self._forget(begun.popleft())
                yield result
        finally:
            for job in begun:
                self._forget(job)
                self._withdraw(job)

    def unembed(self, residuals: np.ndarray) -> np.ndarray:
        return self._shared.unembed(residuals)

    @property
    def vocabulary(self) -> Sequence[str]:
        return self._shared.vocabulary

    def texts(self, name: str) -> list[dict[str, Any]] | None:
        return self._shared.texts(name)

    def cancel(self) -> None:
        """Give it up, from any thread: what runs for it ends before the next step, and whoever waits for that stops."""
        with self._lock:
            self._over, jobs = True, list(self._jobs)
            self._jobs.clear()
        self.ready.cancel()
        for job in jobs:
            self._withdraw(job)
            job.box.put(None)
        self._shared.leave(self)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def _begin(self, request: Request) -> _Job:
        job = _Job(self, request)
        with self._lock:
            if self._over:
                raise Cancelled
            self._jobs.add(job)
        self._shared.submit(job)
        return job

    def _next(self, job: _Job) -> Result:
        try:
            result = job.box.get(timeout=max(0.0, self.left))
        except queue.Empty:
            raise TimedOut(f"this took longer than the {self._seconds:g} seconds allowed: ask for less at once") from None
        if result is None:
            raise Cancelled
        if isinstance(result, AffectlensError):
            raise result
        return result

    def _forget(self, job: _Job) -> None:
        with self._lock:
            self._jobs.discard(job)

    def _withdraw(self, job: _Job) -> None:
        try:
            self._shared.withdraw(job)
        except Cancelled:  # the engine is closed: nothing runs any more
            job.cancelled = True
