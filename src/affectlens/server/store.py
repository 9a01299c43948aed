"""The store: replies with their scores, alerts and rules, in SQLite or PostgreSQL.

    store = Store("sqlite:///traces.db", max_age=timedelta(days=30))
    store.put(record).result()                         # committed, and safe from a power cut
    store.search(emotion="desperate", above=3)

One thread writes (:mod:`affectlens.server.writer`); readers have connections of their own, and neither waits for the other.
What a record is and what is left of it where texts are not kept: :mod:`affectlens.server.records`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, Self, TypeVar

import numpy as np
from sqlalchemy import Connection, Row, Select, delete, exists, func, select, tuple_, update

from affectlens.actions import Policy, action
from affectlens.errors import StoreError, UnknownName
from affectlens.rules import parse
from affectlens.server import tables as t
from affectlens.server.database import Database
from affectlens.server.records import Record as Record
from affectlens.server.records import Text, alert_from, decode, encode, from_micros, hashed, micros, shared
from affectlens.server.writer import Status as Status
from affectlens.server.writer import Writer, clean
from affectlens.traces import Alert

FRESH, PATIENCE = 2.0, 2.0
"""Seconds for which a successful write says that the store is well, and that a trial write may take."""

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """Some of many: ``next`` is the cursor of the page after it, None at the end."""

    items: tuple[T, ...]
    next: str | None = None


@dataclass(frozen=True)
class Summary:
    """A record as a list shows it.

    Args:
        id, created, kind, key, finish, company: As in :class:`Record`.
        model: Id of the model.
        title: The beginning of what was asked.
        steering: What the caller steered with: concept to strength.
        prompt_tokens, tokens: Of the prompt and of the reply.
        peaks, means: The highest score and the mean of each concept over the reply's words.
        alerts: How many rules fired.
    """

    id: str
    created: datetime
    kind: str
    key: str
    model: str
    finish: str
    title: str
    steering: Mapping[str, float]
    prompt_tokens: int
    tokens: int
    company: int
    peaks: Mapping[str, float]
    means: Mapping[str, float]
    alerts: int

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` concepts with the highest means, highest first."""
        return sorted(self.means.items(), key=lambda each: -each[1])[:k]


@dataclass(frozen=True)
class StoredAlert:
    """An alert and what became of it: ``state`` is ``open`` or ``acknowledged``, since ``changed``, with a ``note``."""

    id: int
    trace: str
    created: datetime
    alert: Alert
    state: str
    note: str
    changed: datetime | None


@dataclass(frozen=True)
class StoredRule:
    """A rule that was written while the server ran; its actions are plain data. ``policy`` is what a monitor takes."""

    id: int
    name: str
    text: str
    actions: tuple[Mapping[str, Any], ...]
    armed: bool
    created: datetime

    @property
    def policy(self) -> Policy:
        return Policy(parse(self.text), tuple(action(each) for each in self.actions))


@dataclass(frozen=True)
class Passage:
    """The token of a reply at which a concept is highest, with the words that lead up to it."""

    trace: str
    created: datetime
    score: float
    token: int
    words: str


class Store:
    """Keeps records, alerts and rules. Safe to use from many threads, and from several processes on one database.

    Args:
        url: ``sqlite:///traces.db``, the path of an SQLite file, or ``postgresql://user@host/database``.
        text: What is kept of texts: ``full``, ``hash`` or ``none``.
        max_age: Delete records that are older.
        max_bytes: Delete the oldest records when all take more.
        new: Whether to begin a store where there is none.

    Raises:
        StoreError: The database cannot be opened, or a later version wrote it.
        MissingExtra: There is no driver for the database.

    Example:
        >>> import tempfile
        >>> with Store(f"{tempfile.mkdtemp()}/traces.db") as store:
        ...     store.search().items, store.healthy()
        ((), True)
    """

    def __init__(
        self,
        url: str,
        *,
        text: Text = "full",
        max_age: timedelta | None = None,
        max_bytes: int | None = None,
        new: bool = True,
    ) -> None:
        if text not in ("full", "hash", "none"):
            raise StoreError(f"the store cannot keep texts as {text!r}: use full, hash or none")
        if (max_age is not None and max_age <= timedelta(0)) or (max_bytes is not None and max_bytes < 2**20):
            raise StoreError("the store would keep nothing: give an age above 0, and a megabyte or more")
        self.text = text
        self._database = Database(url, new=new)
        with self._database.transaction() as connection:
            self._secret = self._own_secret(connection)
        self._names: dict[str, list[str]] = {}
        self._writer = Writer(self._database, max_age=max_age, max_bytes=max_bytes)

    def __str__(self) -> str:
        return str(self._database)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ── records ──

    def put(self, record: Record) -> Future[None]:
        """Take a record to be written; from any thread. It does not wait for the database.

        Returns:
            A future that resolves at the commit. It raises StoreError where the record is refused: there is no room, or another
            record has its id. While the database is gone it stays open: wait with a timeout, and see :meth:`healthy`.

        Raises:
            FormatError: It is no plain data.
            StoreError: The store is closed.
        """
        return self._writer.put(encode(record, text=self.text, secret=self._secret))

    def get(self, id: str) -> Record | None:
        """The record of an id; None when there is none."""
        with self._database.reading() as connection:
            row = connection.execute(_whole().where(t.RECORDS.c.id == clean(id))).first()
            return next(iter(self._decoded(connection, [] if row is None else [row])), None)

    def records(self, since: datetime | None = None, until: datetime | None = None) -> Iterator[Record]:
        """All records, the oldest first; it holds up nobody, and those that are written meanwhile come as well.

        Args:
            since: Not those before.
            until: Only those before.
        """
        order, last = (t.RECORDS.c.created, t.RECORDS.c.seq), (-1, -1)
        while True:
            query = _between(_whole(), since, until).where(tuple_(*order) > last).order_by(*order).limit(50)
            with self._database.reading() as connection:
                rows = connection.execute(query).all()
                found = self._decoded(connection, rows)
            if not rows:
                return
            yield from found
            last = (rows[-1].created, rows[-1].seq)

    def search(
        self,
        *,
        words: str = "",
        emotion: str | None = None,
        above: float | None = None,
        alert: str | bool | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> Page[Summary]:
        """Find records, the newest first.

        Args:
            words: That are said in it, in any case; where texts are hashed, a whole message.
            emotion: Only those in which this was read.
            above: And whose reply has a token above this score.
            alert: Only those in which this rule fired; True for any rule, False for none.
            since, until: Only those asked for from then on, and before then.
            limit: How many to a page.
            after: ``next`` of the page before.

        Raises:
            UnknownName: No record has such an emotion.
            StoreError: The cursor is none of ours, or the database is gone.
        """
        r, p = t.RECORDS.c, t.PEAKS.c
        query, order = select(t.RECORDS), (r.created, r.seq)
        with self._database.reading() as connection:
            if emotion is not None:
                concept = self._concept(connection, emotion)
                if concept is None:
                    return Page(())
                # The peaks lead, in the order in which they lie: the search ends as soon as the page is full.
                query, order = query.join(t.PEAKS, p.seq == r.seq).where(p.concept == concept), (p.created, p.seq)
                query = query if above is None else query.where(p.peak > above)
            query = _between(query, since, until, order[0])
            if words.strip():
                said = hashed(words, self._secret) if self.text == "hash" else clean(words.casefold())
                query = query.join(t.WORDS, t.WORDS.c.seq == r.seq).where(t.WORDS.c.words.contains(said, autoescape=True))
            if isinstance(alert, str):
                query = query.where(exists().where(t.ALERTS.c.seq == r.seq, t.ALERTS.c.rule == clean(alert)))
            elif alert is not None:
                query = query.where(r.alerts > 0 if alert else r.alerts == 0)
            if after is not None:
                query = query.where(tuple_(*order) < _cursor(after, 2))
            rows = connection.execute(query.order_by(*(column.desc() for column in order)).limit(limit + 1)).all()
            names = self._names_of(connection, {row.names for row in rows})
        found = tuple(_summary(row, names[row.names]) for row in rows[:limit])
        return Page(found, f"{rows[limit - 1].created}-{rows[limit - 1].seq}" if len(rows) > limit else None)

    def strongest(self, emotion: str, *, limit: int = 10, words: int = 12) -> list[Passage]:
        """Where a concept is highest, one passage of each reply, the highest first.

        Args:
            emotion: The concept.
            limit: How many.
            words: How many tokens of each passage at most; the highest one is its last.

        Raises:
            UnknownName: No record has such an emotion.
        """
        p = t.PEAKS.c
        with self._database.reading() as connection:
            concept = self._concept(connection, emotion)
            best = select(p.seq).where(p.concept == concept).order_by(p.peak.desc(), p.created.desc()).limit(limit)
            seqs = connection.scalars(best).all()
            rows = {row.seq: row for row in connection.execute(_whole().where(t.RECORDS.c.seq.in_(seqs)))}
            found = self._decoded(connection, [rows[seq] for seq in seqs if seq in rows])
        return [_passage(record, emotion, words) for record in found]

    def count(self) -> int:
        """How many records there are."""
        with self._database.reading() as connection:
            return int(connection.scalar(select(func.count()).select_from(t.RECORDS)) or 0)

    # ── alerts and rules ──

    def alerts(
        self, *, rule: str | None = None, state: str | None = None, limit: int = 50, after: str | None = None
    ) -> Page[StoredAlert]:
        """Alerts, the newest first.

        Args:
            rule: Only those of this rule, by its name.
            state: Only ``open`` or ``acknowledged`` ones.
            limit, after: As for :meth:`search`.
        """
        query = _alerts().order_by(t.ALERTS.c.id.desc()).limit(limit + 1)
        if rule is not None:
            query = query.where(t.ALERTS.c.rule == clean(rule))
        if state is not None:
            query = query.where(t.ALERTS.c.state == state)
        if after is not None:
            query = query.where(t.ALERTS.c.id < _cursor(after, 1)[0])
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return Page(tuple(_stored_alert(row) for row in rows[:limit]), str(rows[limit - 1].id) if len(rows) > limit else None)

    def acknowledge(self, alert_id: int, note: str = "") -> StoredAlert:
        """Mark an alert as seen, with a note; one that is acknowledged already gets the new note.

        Raises:
            UnknownName: There is no such alert.
        """
        own = t.ALERTS.c.id == alert_id

        def change(connection: Connection) -> Row[Any] | None:
            values = {"state": "acknowledged", "note": clean(note), "changed": micros(datetime.now(UTC))}
            connection.execute(update(t.ALERTS).where(own).values(values))
            return connection.execute(_alerts().where(own)).first()

        row = self._writer.change(change)
        if row is None:
            raise UnknownName("alert", str(alert_id), [str(each.id) for each in self.alerts(limit=8).items])
        return _stored_alert(row)

    def mute(self, rule: str, until: datetime | None) -> None:
        """Let a rule be silent until then; None lets it speak again. By name, so that rules of a file can be muted too."""

        def change(connection: Connection) -> None:
            connection.execute(delete(t.MUTES).where(t.MUTES.c.rule == clean(rule)))
            if until is not None:
                connection.execute(t.MUTES.insert(), {"rule": clean(rule), "until": micros(until)})

        self._writer.change(change)

    def mutes(self) -> dict[str, datetime]:
        """The rules that are silent now, and until when."""
        with self._database.reading() as connection:
            rows = connection.execute(select(t.MUTES).where(t.MUTES.c.until > micros(datetime.now(UTC))))
            return {row.rule: from_micros(row.until) for row in rows}

    def rules(self) -> list[StoredRule]:
        """The rules that are kept here, in the order in which they were written."""
        with self._database.reading() as connection:
            return [_stored_rule(row) for row in connection.execute(select(t.RULES).order_by(t.RULES.c.id))]

    def save_rule(self, text: str, actions: Sequence[Mapping[str, Any]] = (), armed: bool = True) -> StoredRule:
        """Keep a rule; it takes the place of one with the same name.

        Args:
            text: In the language of rules.
            actions: Plain data, as :func:`affectlens.actions.action` takes it.
            armed: Whether it watches.

        Raises:
            RuleError: It is no rule.
            FormatError: An action does not exist.
        """
        own = t.RULES.c.name == (name := clean(parse(text).name))
        for each in actions:
            action(each)
        values = {"text": clean(text), "actions": json.dumps([dict(each) for each in actions]), "armed": armed}

        def change(connection: Connection) -> Row[Any]:
            if not connection.execute(update(t.RULES).where(own).values(values)).rowcount:
                connection.execute(t.RULES.insert(), {"name": name, "created": micros(datetime.now(UTC)), **values})
            return connection.execute(select(t.RULES).where(own)).one()

        return _stored_rule(self._writer.change(change))

    def delete_rule(self, id: int) -> bool:
        """Forget a rule; says whether there was one. Its alerts stay."""
        return bool(self._writer.change(lambda c: c.execute(delete(t.RULES).where(t.RULES.c.id == id)).rowcount))

    # ── care ──

    def prune(self) -> int:
        """Delete what is too old or too much, and give its room back; the writer does so by itself from time to time.

        SQLite's file shrinks, and nothing of what was deleted is left in it. PostgreSQL keeps the room for what comes next.

        Returns:
            How many records were deleted.
        """
        return self._writer.prune()

    def status(self) -> Status:
        """How it is, without asking the database."""
        return self._writer.status()

    def healthy(self) -> bool:
        """Whether it can be written to: by the latest commit, or, when that was a while ago, by a trial."""
        status = self.status()
        if self._writer.closed or (status.waiting and (status.error or status.lag > PATIENCE)):
            return False
        if time.monotonic() - self._writer.well < FRESH:
            return True
        trial = update(t.SETTINGS).where(t.SETTINGS.c.key == "trial").values(value=datetime.now(UTC).isoformat())
        try:
            self._writer.change(lambda connection: connection.execute(trial).rowcount, timeout=PATIENCE)
        except StoreError:
            return False
        return True

    def close(self, timeout: float = 10.0) -> None:
        """Write what waits, for so many seconds at most, and let go of the database; what is left then is lost and counted."""
        self._writer.close(timeout)
        self._database.close()

    # ── rows ──

    def _own_secret(self, connection: Connection) -> bytes:
        """The key of the hashes, which is made when the store is."""
        made = [{"key": "secret", "value": secrets.token_hex(32)}, {"key": "trial", "value": ""}]
        connection.execute(self._database.insert_new(t.SETTINGS), made)
        return bytes.fromhex(connection.scalars(select(t.SETTINGS.c.value).where(t.SETTINGS.c.key == "secret")).one())

    def _decoded(self, connection: Connection, rows: Sequence[Row[Any]]) -> list[Record]:
        seqs = [row.seq for row in rows]
        parts: dict[int, dict[str, bytes]] = {seq: {} for seq in seqs}
        alerts: dict[int, list[Alert]] = {seq: [] for seq in seqs}
        used = select(t.USES.c.seq, t.PARTS).join_from(t.USES, t.PARTS, t.USES.c.hash == t.PARTS.c.hash)
        for row in connection.execute(used.where(t.USES.c.seq.in_(seqs))):
            parts[row.seq][row.hash] = row.data
        fired = select(t.ALERTS.c.seq, t.ALERTS.c.data).where(t.ALERTS.c.seq.in_(seqs)).order_by(t.ALERTS.c.id)
        for row in connection.execute(fired):
            alerts[row.seq].append(alert_from(row.data))
        # A record that was pruned between two of these queries has lost its parts.
        return [decode(row._asdict(), own, alerts[row.seq]) for row in rows if (own := parts[row.seq])]

    def _concept(self, connection: Connection, name: str) -> int | None:
        """The number of a concept; None while nothing has been read at all."""
        known = {row.name: int(row.id) for row in connection.execute(select(t.CONCEPTS))}
        if known and name not in known:
            raise UnknownName("emotion", name, known)
        return known.get(name)

    def _names_of(self, connection: Connection, hashes: set[str]) -> dict[str, list[str]]:
        """The concepts of records by the hash of their names, which never changes."""
        if missing := [key for key in hashes if key not in self._names]:
            for row in connection.execute(select(t.PARTS).where(t.PARTS.c.hash.in_(missing))):
                self._names[row.hash] = shared(row.data)
        return {key: self._names.get(key, []) for key in hashes}


def _whole() -> Select[Any]:
    bodies = t.BODIES.c
    return select(t.RECORDS, bodies.body, bodies.scores).join_from(t.RECORDS, t.BODIES, bodies.seq == t.RECORDS.c.seq)


def _between(
    query: Select[Any], since: datetime | None, until: datetime | None, created: Any = t.RECORDS.c.created
) -> Select[Any]:
    query = query if since is None else query.where(created >= micros(since))
    return query if until is None else query.where(created < micros(until))


def _alerts() -> Select[Any]:
    records = t.RECORDS.c
    return select(t.ALERTS, records.id.label("trace"), records.created).join_from(
        t.ALERTS, t.RECORDS, records.seq == t.ALERTS.c.seq
    )


def _summary(row: Row[Any], names: Sequence[str]) -> Summary:
    pairs = np.frombuffer(row.extremes, "<f4").reshape(-1, 2).tolist()
    same = ("id", "kind", "key", "model", "finish", "title", "prompt_tokens", "tokens", "company", "alerts")
    return Summary(
        created=from_micros(row.created),
        steering=json.loads(row.steering),
        peaks={name: peak for name, (peak, _) in zip(names, pairs, strict=False)},
        means={name: mean for name, (_, mean) in zip(names, pairs, strict=False)},
        **{name: getattr(row, name) for name in same},
    )


def _passage(record: Record, emotion: str, words: int) -> Passage:
    trace, (peak, _) = record.trace, record.extremes()[emotion]
    turns, offsets = trace.turns, trace.layout.offsets
    token = int(np.flatnonzero(trace.scores[:, trace.names.index(emotion)] == np.float32(peak))[-1])
    first = next(i for i in range(max(0, token - words + 1), token + 1) if turns[i] == turns[token])
    said = trace.layout.text[offsets[first][0] : offsets[token][1]]
    return Passage(record.id, record.created, peak, token, " ".join(said.split()))


def _stored_alert(row: Row[Any]) -> StoredAlert:
    changed = None if row.changed is None else from_micros(row.changed)
    return StoredAlert(row.id, row.trace, from_micros(row.created), alert_from(row.data), row.state, row.note, changed)


def _stored_rule(row: Row[Any]) -> StoredRule:
    return StoredRule(row.id, row.name, row.text, tuple(json.loads(row.actions)), bool(row.armed), from_micros(row.created))


def _cursor(text: str, n: int) -> tuple[int, ...]:
    parts = text.split("-")
    numbers = tuple(int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 20)
    if len(numbers) != n or len(parts) != n or max(numbers) >= 2**63:
        raise StoreError(f"{text[:40]!r} is no place to go on from: give what the page before said as next")
    return numbers
