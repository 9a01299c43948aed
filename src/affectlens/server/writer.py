"""The one thread that writes to a store: what has gathered while one commit went on is written by the next, all together.

When the database is gone, records wait in memory, up to :data:`MEMORY` bytes, and are written in their order when it is back; a
record that finds no room is refused, counted and logged. A record that the database itself refuses holds up no other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import Connection, delete, exists, select
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from affectlens.errors import StoreError
from affectlens.server import tables as t
from affectlens.server.database import BUSY, Database, reason
from affectlens.server.records import Encoded, alert_data, micros

LOG = logging.getLogger("affectlens.store")

MEMORY = 256 * 2**20
"""Bytes of records that wait for the database at most."""

BATCH, BATCH_BYTES = 64, 16 * 2**20
"""Records and bytes of one commit at most."""

PRUNED = 200
"""Records that are deleted in one transaction, so that replies need not wait for long."""

PRUNE_EVERY = 60.0
"""Seconds between two looks for records that are too old."""

FIRST, LONGEST = 0.1, 5.0
"""Seconds before a failed commit is tried again, doubled each time, and at most."""

T = TypeVar("T")


@dataclass(frozen=True)
class Status:
    """How a store is.

    Args:
        error: Why the latest write failed; empty when it did not.
        waiting, waiting_bytes: What waits in memory.
        lag: Seconds that the oldest of it has waited.
        written: Records that were committed since the store was opened.
        failures: Commits that failed and were tried again.
        lost: Records that found no room, or that the database refused.
        pruned: Records that were deleted since they were too old or too much.
    """

    error: str = ""
    waiting: int = 0
    waiting_bytes: int = 0
    lag: float = 0.0
    written: int = 0
    failures: int = 0
    lost: int = 0
    pruned: int = 0


class _Waiting:
    """A record on its way to the database."""

    def __init__(self, encoded: Encoded) -> None:
        self.encoded, self.size, self.since, self.tries = encoded, encoded.size, time.monotonic(), 0
        self.future: Future[None] = Future()
        self.future.set_running_or_notify_cancel()  # what is written cannot be called back


class Writer:
    """Writes records and changes, one transaction after the other; deletes what is too old or too much.

    Args:
        database: It alone writes to it, as far as this process goes.
        max_age: Delete records that are older.
        max_bytes: Delete the oldest records when all take more.
    """

    def __init__(self, database: Database, *, max_age: timedelta | None = None, max_bytes: int | None = None) -> None:
        self._database, self._max_age, self._max_bytes = database, max_age, max_bytes
        self._wake = threading.Condition()
        self._queue: deque[_Waiting] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._bytes = self._written = self._failures = self._lost = self._pruned = 0
        self._error, self._pause, self._retry_at = "", FIRST, 0.0
        self.well = time.monotonic()
        """When something was written last; 0 since the latest failure."""
        self._prune_at = 0.0 if max_age or max_bytes else float("inf")
        self._unpruned, self._freed = 0, False
        self._closing: float | None = None
        self._concepts: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    # ── for all threads ──

    def put(self, encoded: Encoded) -> Future[None]:
        """Take a record to be written; the future resolves when it is committed, and raises StoreError when it is refused."""
        waiting, id = _Waiting(encoded), encoded.record.id
        with self._wake:
            if self._closing is not None:
                raise StoreError("the store is closed: open it again")
            if full := self._bytes + waiting.size > MEMORY:
                self._lost += 1
            else:
                self._queue.append(waiting)
                self._bytes += waiting.size
                self._wake.notify()
        if full:
            problem = (
                f"{id} is not kept, {self.status().waiting} records wait for the database already ({self._error or 'it is slow'})"
            )
            LOG.error("%s", problem)
            waiting.future.set_exception(StoreError(f"{problem}: bring it back"))
        return waiting.future

    def change(self, work: Callable[[Connection], T], *, timeout: float = BUSY) -> T:
        """Do something in a transaction of its own, and wait for it.

        Raises:
            StoreError: The database is not there, or does not answer in time.
        """

        def changed() -> T:
            with self._database.transaction() as connection:
                return work(connection)

        return self._ask(changed, timeout)

    def prune(self) -> int:
        """Delete what is too old or too much, and give its room back; returns how many records that were."""
        removed = 0
        while some := self.change(self._prune_some):
            removed += some
        self._ask(self._database.give_back, BUSY)
        return removed

    def status(self) -> Status:
        """How it is, without asking the database."""
        with self._wake:
            lag = time.monotonic() - self._queue[0].since if self._queue else 0.0
            counts = (self._written, self._failures, self._lost, self._pruned)
            return Status(self._error, len(self._queue), self._bytes, lag, *counts)

    @property
    def closed(self) -> bool:
        return self._closing is not None

    def close(self, timeout: float) -> None:
        """Write what waits, for so many seconds at most; what is left then is lost, counted and logged."""
        with self._wake:
            if self._closing is None:
                self._closing = time.monotonic() + timeout
            self._wake.notify()
        self._thread.join(timeout + BUSY)

    def _ask(self, work: Callable[[], T], timeout: float) -> T:
        future: Future[T] = Future()
        with self._wake:
            if self._closing is not None:
                raise StoreError("the store is closed: open it again")
            self._jobs.append((work, future))
            self._wake.notify()
        try:
            return future.result(timeout)
        except TimeoutError:
            raise StoreError(f"the store did not answer within {timeout:g} s: see whether the database is there") from None

    # ── its own thread ──

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._jobs and (idle := self._idle()) > 0:
                    self._wake.wait(None if idle == float("inf") else idle)
                late = self._closing is not None and time.monotonic() >= self._closing
                if self._closing is not None and not self._jobs and (late or not self._queue):
                    break
                jobs, self._jobs = list(self._jobs), deque()
                batch = self._batch() if time.monotonic() >= self._retry_at else []
            for work, future in jobs:
                self._do(work, future)
            if batch:
                self._write(batch)
            if time.monotonic() >= max(self._prune_at, self._retry_at):
                self._prune_by_itself()
        self._give_up()

    def _idle(self) -> float:
        """Seconds until there is something to do."""
        now = time.monotonic()
        moments = [max(self._prune_at, self._retry_at)]
        if self._queue:
            moments.append(self._retry_at)
        if self._closing is not None:
            moments.append(self._closing if self._queue else now)
        return min(moments) - now

    def _batch(self) -> list[_Waiting]:
        chosen: list[_Waiting] = []
        size = 0
        for each in self._queue:
            if chosen and (len(chosen) == BATCH or size + each.size > BATCH_BYTES):
                break
            chosen.append(each)
            size += each.size
        return chosen

    def _write(self, batch: list[_Waiting]) -> bool:
        """Commit a batch, in its order; False when the database is not there and the rest has to wait."""
        refused: dict[int, str] = {}
        try:
            with self._database.transaction() as connection:
                concepts = self._insert(connection, batch, refused)
        except Exception as error:
            away = isinstance(error, SQLAlchemyError | OSError | StoreError)
            if away and not isinstance(error, IntegrityError | DataError):
                self._failed(error)
                return False
            # One of them is to blame, or another process was faster: the others must not suffer from it.
            if len(batch) > 1:
                return all(self._write([each]) for each in batch)
            if isinstance(error, IntegrityError) and batch[0].tries < 3:
                batch[0].tries += 1
                return self._write(batch)
            refused = {0: reason(error)}
        else:
            self._concepts |= concepts
            self._succeeded()
        with self._wake:
            for each in batch:
                first = self._queue.popleft()
                assert first is each, "records are written in their order"
                self._bytes -= each.size
                self._unpruned += each.size
            self._written += len(batch) - len(refused)
            self._lost += len(refused)
        if self._max_bytes is not None and self._unpruned > self._max_bytes / 50:
            self._prune_at = 0.0
        for i, each in enumerate(batch):
            if i in refused:
                problem = f"{each.encoded.record.id} is not kept ({refused[i]})"
                LOG.error("%s", problem)
                each.future.set_exception(StoreError(f"{problem}: give it another id, or report it"))
            else:
                each.future.set_result(None)
        return True

    def _insert(self, connection: Connection, batch: Sequence[_Waiting], refused: dict[int, str]) -> dict[str, int]:
        """Write a batch; fills in which of it cannot be kept, and gives the numbers of concepts."""
        # A commit whose answer got lost comes a second time: what is there already is kept already.
        ids = [clean(each.encoded.record.id) for each in batch]
        rows = connection.execute(select(t.RECORDS.c.id, t.RECORDS.c.digest).where(t.RECORDS.c.id.in_(ids)))
        known: dict[str, str] = {row.id: row.digest for row in rows}
        new: list[Encoded] = []
        for i, (id, waiting) in enumerate(zip(ids, batch, strict=True)):
            digest = waiting.encoded.digest
            if id not in known:
                known[id] = digest
                new.append(waiting.encoded)
            elif known[id] != digest:
                refused[i] = "another record has this id"
        if not new:
            return {}
        parts = {key: data for each in new for key, data in each.parts.items()}
        there = set(connection.scalars(select(t.PARTS.c.hash).where(t.PARTS.c.hash.in_(list(parts)))))
        if missing := [{"hash": key, "data": data} for key, data in parts.items() if key not in there]:
            connection.execute(self._database.insert_new(t.PARTS), missing)
        concepts = self._numbers(connection, {name for each in new for name in each.extremes})
        numbered = t.RECORDS.insert().returning(t.RECORDS.c.id, t.RECORDS.c.seq)
        seqs = {row.id: row.seq for row in connection.execute(numbered, [_row(each) for each in new])}
        many: dict[Any, list[dict[str, Any]]] = {t.BODIES: [], t.WORDS: [], t.USES: [], t.ALERTS: []}
        peaks: list[tuple[int, int, int, float]] = []
        for each in new:
            seq, created = seqs[clean(each.record.id)], micros(each.record.created)
            many[t.BODIES].append({"seq": seq, "body": each.body, "scores": each.scores})
            many[t.WORDS] += [{"seq": seq, "words": clean(each.words)}] if each.words else []
            many[t.USES] += [{"seq": seq, "hash": key} for key in each.parts]
            peaks += [(concepts[name], created, seq, peak) for name, (peak, _) in each.extremes.items()]
            many[t.ALERTS] += [
                {"seq": seq, "rule": clean(a.rule), "state": "open", "note": "", "changed": None, "data": alert_data(a)}
                for a in each.record.trace.alerts
            ]
        for table, values in many.items():
            if values:
                connection.execute(table.insert(), values)
        if peaks:
            self._database.insert_peaks(connection, peaks)
        return concepts

    def _numbers(self, connection: Connection, names: set[str]) -> dict[str, int]:
        """The numbers of concepts; new ones get one."""
        if names <= set(self._concepts):
            return self._concepts
        known = set(connection.scalars(select(t.CONCEPTS.c.name)))
        if new := sorted(names - known):
            connection.execute(self._database.insert_new(t.CONCEPTS), [{"name": name} for name in new])
        return {row.name: row.id for row in connection.execute(select(t.CONCEPTS))}

    def _do(self, work: Callable[[], Any], future: Future[Any]) -> None:
        try:
            result = work()
        except SQLAlchemyError as error:
            if not isinstance(error, IntegrityError | DataError):
                self._failed(error)
            future.set_exception(StoreError(f"the store cannot be written ({reason(error)}): mend it and try again"))
        except Exception as error:
            future.set_exception(error)
        else:
            if not self._queue:  # a small change may find room where the records that wait do not
                self._succeeded()
            future.set_result(result)

    def _succeeded(self) -> None:
        if self._error:
            LOG.warning("the store can be written again")
        self._error, self._pause, self._retry_at, self.well = "", FIRST, 0.0, time.monotonic()

    def _failed(self, error: Exception) -> None:
        if (why := reason(error)) != self._error:
            LOG.error("the store cannot be written (%s): records wait in memory", why)
        self._error, self.well = why, 0.0
        self._failures += 1
        self._retry_at, self._pause = time.monotonic() + self._pause, min(2 * self._pause, LONGEST)
        self._database.reconnect()

    def _give_up(self) -> None:
        """At the end: say so to those that still wait."""
        with self._wake:
            left, self._queue = list(self._queue), deque()
            self._lost += len(left)
        if left:
            LOG.error("%d records are lost: the store was closed while the database was away (%s)", len(left), self._error)
        for each in left:
            problem = f"{each.encoded.record.id} is lost, the store was closed while the database was away ({self._error})"
            each.future.set_exception(StoreError(f"{problem}: bring it back first"))

    # ── retention ──

    def _prune_by_itself(self) -> None:
        try:
            with self._database.transaction() as connection:
                some = self._prune_some(connection)
            self._freed = self._freed or some > 0
            if some == 0:  # else there may be more: after the records that have come meanwhile
                self._prune_at, self._unpruned = time.monotonic() + PRUNE_EVERY, 0
                if self._freed:
                    self._database.give_back()
                    self._freed = False
        except (SQLAlchemyError, OSError, StoreError) as error:
            self._failed(error)

    def _prune_some(self, connection: Connection) -> int:
        r, p = t.RECORDS.c, t.PEAKS.c
        limit = micros(datetime.now(UTC) - self._max_age) if self._max_age is not None else 0
        excess = 0
        if self._max_bytes is not None and (over := self._database.used(connection) - self._max_bytes) > 0:
            excess = over + self._max_bytes // 20  # more than need be, so that it is not to be done again at once
        gone = []
        for row in connection.execute(select(r.seq, r.created, r.size).order_by(r.created, r.seq).limit(PRUNED)):
            if row.created >= limit and excess <= 0:
                break
            gone.append(row)
            excess -= row.size
        if not gone:
            return 0
        seqs = [row.seq for row in gone]
        for concept in connection.scalars(select(t.CONCEPTS.c.id)).all():
            own = delete(t.PEAKS).where(p.concept == concept, p.created.between(gone[0].created, gone[-1].created))
            connection.execute(own.where(p.seq.in_(seqs)))
        connection.execute(delete(t.RECORDS).where(r.seq.in_(seqs)))
        connection.execute(delete(t.PARTS).where(~exists().where(t.USES.c.hash == t.PARTS.c.hash)))
        self._pruned += len(gone)
        return len(gone)


def clean(text: str) -> str:
    """Text that every database takes: no zero bytes, no half surrogate pairs."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _row(each: Encoded) -> dict[str, Any]:
    record = each.record
    texts = {
        "id": record.id,
        "kind": record.kind,
        "key": record.key,
        "model": str(record.model.get("id", "")),
        "finish": record.finish,
        "title": each.title,
        "steering": each.steering,
    }
    return {
        **{name: clean(text) for name, text in texts.items()},
        "created": micros(record.created),
        "prompt_tokens": int(record.usage.get("prompt_tokens", 0)),
        "tokens": int(record.usage.get("completion_tokens", 0)),
        "company": record.company,
        "alerts": len(record.trace.alerts),
        "size": each.size,
        "digest": each.digest,
        "names": each.names,
        "extremes": np.array(list(each.extremes.values()), "<f4").tobytes(),
    }
