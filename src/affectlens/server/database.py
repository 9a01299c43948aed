"""A database behind a store: its address, connections for one writer and many readers, and what each kind of database needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, inspect, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from affectlens.errors import MissingExtra, StoreError
from affectlens.server import tables

BUSY = 30.0
"""Seconds that a process waits for another one that writes to the same SQLite file."""

READERS = {"pool_size": 8, "max_overflow": 8, "pool_timeout": 5.0}
"""How many may read at once, and for how many seconds others wait: fewer than the server has threads, so that a database that
does not answer cannot take all of them."""

# The order matters: how room is given back must be settled before anything is written.
_PRAGMAS = ("auto_vacuum = INCREMENTAL", "journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON")


class Database:
    """Connections to SQLite or PostgreSQL, with the tables of this revision.

    Args:
        address: ``sqlite:///FILE``, the path of a file, or ``postgresql://USER@HOST/DATABASE``.
        new: Whether to begin where there is nothing yet.

    Raises:
        StoreError: It cannot be opened, or a later version wrote it.
        MissingExtra: There is no driver for it.
    """

    def __init__(self, address: str, *, new: bool = True) -> None:
        self.url = _url(address)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        self._file: tuple[int, int] | None = None
        nothing = f"there is no store in {self}: name that of a server, or a file that was exported as jsonl"
        if self.sqlite and not new and not Path(self.url.database or "").exists():
            raise StoreError(nothing)
        try:
            self._writer, self._readers = self._connect(writer=True), self._connect(writer=False)
            with self.transaction() as connection:
                if not new and not inspect(connection).has_table(tables.REVISION):
                    raise StoreError(nothing)
                tables.migrate(connection)
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or "psycopg", "serve") from None
        except SQLAlchemyError as error:
            raise StoreError(f"the store {self} cannot be opened ({reason(error)}): mend it, or name another one") from None
        self._file = self._inode()

    def __str__(self) -> str:
        return self.url.set(query={}).render_as_string(hide_password=True)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction of the one writer; what is raised inside rolls it back."""
        if self._file is not None and self._inode() != self._file:
            # SQLite would go on writing to a file that has no name any more.
            raise StoreError(f"the file {self.url.database} was moved, removed or replaced: put it back, or start again")
        with self._writer.begin() as connection:
            if self.sqlite:
                # Take the lock before reading: of two processes that both read first, one could not write afterwards.
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that reads, and waits for no writer.

        Raises:
            StoreError: The database is not there.
        """
        try:
            with self._readers.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise StoreError(f"the store cannot be read ({reason(error)}): see whether the database is there") from None

    def insert_new(self, table: Any) -> Any:
        """An insert that passes over what is there already: another process may have been faster."""
        return (sqlite if self.sqlite else postgresql).insert(table).on_conflict_do_nothing()

    def insert_peaks(self, connection: Connection, rows: Sequence[tuple[int, int, int, float]]) -> None:
        """Write rows of the peaks: thousands to a batch, so past what builds a statement out of each."""
        head = f"INSERT INTO {tables.PEAKS.name} (concept, created, seq, peak)"
        if self.sqlite:
            connection.exec_driver_sql(f"{head} VALUES (?, ?, ?, ?)", list(rows))
            return
        arrays = ", ".join(f"%s::{kind}[]" for kind in ("integer", "bigint", "bigint", "double precision"))
        connection.exec_driver_sql(
            f"{head} SELECT * FROM unnest({arrays})", tuple(list(column) for column in zip(*rows, strict=True))
        )

    def used(self, connection: Connection) -> int:
        """Bytes in use: of SQLite's file without the pages that are free; in PostgreSQL the sum over records."""
        if not self.sqlite:
            return int(connection.scalar(select(func.coalesce(func.sum(tables.RECORDS.c.size), 0))) or 0)
        names = ("page_size", "page_count", "freelist_count")
        page, pages, free = (int(connection.exec_driver_sql(f"PRAGMA {name}").scalar() or 0) for name in names)
        return page * (pages - free)

    def give_back(self) -> None:
        """Return the room of what was deleted: SQLite's to the file system, PostgreSQL's to its own tables."""
        with self._writer.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            if not self.sqlite:
                connection.exec_driver_sql("VACUUM " + ", ".join(table.name for table in tables.METADATA.sorted_tables))
                return
            plain = connection.connection.driver_connection
            assert plain is not None
            # A script runs to its end; a single statement would stop after the first page.
            plain.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE);")

    def reconnect(self) -> None:
        """Let go of the writer's connection; the next transaction makes another."""
        self._writer.dispose()

    def close(self) -> None:
        self._writer.dispose()
        self._readers.dispose()

    def _connect(self, *, writer: bool) -> Engine:
        pool: dict[str, Any] = {"pool_size": 1, "max_overflow": 0} if writer else READERS
        if not self.sqlite:
            # A database that is cut off has to be noticed: by itself TCP waits for a quarter of an hour.
            arguments = {"connect_timeout": 5, "tcp_user_timeout": 15000, "application_name": "affectlens"}
            level = "READ COMMITTED" if writer else "AUTOCOMMIT"
            return create_engine(
                self.url, isolation_level=level, pool_pre_ping=True, hide_parameters=True, connect_args=arguments, **pool
            )
        path = Path(self.url.database or "")
        if not path.exists():
            # Conversations are nobody else's business, and a file that SQLite makes itself anyone can read.
            with contextlib.suppress(OSError):
                path.touch(0o600, exist_ok=False)
        arguments = {"timeout": BUSY, "check_same_thread": False}
        engine = create_engine(self.url, isolation_level="AUTOCOMMIT", hide_parameters=True, connect_args=arguments, **pool)

        @event.listens_for(engine, "connect")
        def prepare(plain: Any, _: Any) -> None:
            for setting in _PRAGMAS if writer else ("query_only = ON",):
                plain.execute(f"PRAGMA {setting}").close()

        return engine

    def _inode(self) -> tuple[int, int] | None:
        if self.sqlite:
            with contextlib.suppress(OSError):
                found = Path(self.url.database or "").stat()
                return found.st_dev, found.st_ino
        return None


def _url(address: str) -> URL:
    fix = "use sqlite:///FILE, the path of a file, or postgresql://USER@HOST/DATABASE"
    try:
        url = make_url(address) if "://" in address else URL.create("sqlite", database=address)
    except (ArgumentError, ValueError):
        raise StoreError(f"this is no address of a store: {fix}") from None
    if url.get_backend_name() == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if url.drivername != "sqlite" or not url.database or url.database == ":memory:":
        raise StoreError(f"a store cannot be kept in {url.database or url.drivername!r}: {fix}")
    return url


def reason(error: BaseException) -> str:
    """What went wrong, on one line and without what was to be written."""
    origin = getattr(error, "orig", None) or error
    return (str(origin).strip() or type(origin).__name__).splitlines()[0]
