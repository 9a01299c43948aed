"""The tables of a store, and how a database of any earlier revision is brought to this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
)

from affectlens.errors import StoreError

# A database may have other tenants: all names begin with ours.
METADATA = MetaData()
MIGRATIONS = Path(__file__).parent / "migrations"
REVISION = "affectlens_revision"
_LOCK = 5_131_207_244_601
"""Advisory lock in PostgreSQL: processes that open a store at once migrate one after the other."""

# SQLite numbers rows by itself only in a column that is INTEGER and nothing else.
_NUMBER = BigInteger().with_variant(Integer, "sqlite")

RECORDS = Table(
    "affectlens_records",
    METADATA,
    Column("seq", _NUMBER, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("created", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("finish", Text, nullable=False),
    Column("title", Text, nullable=False),
    Column("steering", Text, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("company", Integer, nullable=False),
    Column("alerts", Integer, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("digest", Text, nullable=False),
    Column("names", Text, nullable=False),
    Column("extremes", LargeBinary, nullable=False),
    Index("affectlens_records_created", "created", "seq"),
    sqlite_autoincrement=True,
)


def _of_a_record() -> Column[Any]:
    return Column("seq", _NUMBER, ForeignKey("affectlens_records.seq", ondelete="CASCADE"), primary_key=True)


BODIES = Table(
    "affectlens_bodies",
    METADATA,
    _of_a_record(),
    Column("body", LargeBinary, nullable=False),
    Column("scores", LargeBinary, nullable=False),
)
WORDS = Table("affectlens_words", METADATA, _of_a_record(), Column("words", Text, nullable=False))
CONCEPTS = Table(
    "affectlens_concepts",
    METADATA,
    Column("id", _NUMBER, primary_key=True, autoincrement=True),
    Column("name", Text, nullable=False, unique=True),
)
# In the order of the search: all peaks of a concept, the newest at the end, in pages of their own. A reference to the records
# would need an index as large as the table; who deletes records deletes these.
PEAKS = Table(
    "affectlens_peaks",
    METADATA,
    Column("concept", Integer, nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("peak", Double, nullable=False),
    # SQLite keeps the rows in this order; PostgreSQL keeps them as they come, so the peak has to be in the index as well.
    PrimaryKeyConstraint("concept", "created", "seq", name="affectlens_peaks_pkey", postgresql_include=["peak"]),
    sqlite_with_rowid=False,
)
PARTS = Table("affectlens_parts", METADATA, Column("hash", Text, primary_key=True), Column("data", LargeBinary, nullable=False))
USES = Table(
    "affectlens_uses",
    METADATA,
    _of_a_record(),
    Column("hash", Text, ForeignKey("affectlens_parts.hash"), primary_key=True),
    Index("affectlens_uses_hash", "hash"),
    sqlite_with_rowid=False,
)
ALERTS = Table(
    "affectlens_alerts",
    METADATA,
    Column("id", _NUMBER, primary_key=True, autoincrement=True),
    Column("seq", _NUMBER, ForeignKey("affectlens_records.seq", ondelete="CASCADE"), nullable=False),
    Column("rule", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("note", Text, nullable=False),
    Column("changed", BigInteger),
    Column("data", Text, nullable=False),
    Index("affectlens_alerts_seq", "seq"),
    Index("affectlens_alerts_rule", "rule", "id"),
    Index("affectlens_alerts_state", "state", "id"),
    sqlite_autoincrement=True,
)
SETTINGS = Table("affectlens_settings", METADATA, Column("key", Text, primary_key=True), Column("value", Text, nullable=False))
RULES = Table(
    "affectlens_rules",
    METADATA,
    Column("id", _NUMBER, primary_key=True, autoincrement=True),
    Column("name", Text, nullable=False, unique=True),
    Column("text", Text, nullable=False),
    Column("actions", Text, nullable=False),
    Column("armed", Boolean, nullable=False),
    Column("created", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)
MUTES = Table("affectlens_mutes", METADATA, Column("rule", Text, primary_key=True), Column("until", BigInteger, nullable=False))


def migrate(connection: Connection, *, to: str = "head") -> None:
    """Bring the tables to a revision, within the transaction of the connection.

    Args:
        connection: With a transaction that has begun.
        to: A later revision than that of the database; by default the latest one.

    Raises:
        StoreError: The database was written by a later version.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    script = ScriptDirectory.from_config(config)
    # What alembic's own upgrade command does, without a file of settings.
    with EnvironmentContext(config, script, fn=lambda rev, _: script._upgrade_revs(to, rev)) as environment:
        environment.configure(connection=connection, target_metadata=METADATA, version_table=REVISION)
        current = environment.get_context().get_current_revision()
        if current is not None and current not in {each.revision for each in script.walk_revisions()}:
            raise StoreError(
                f"the store has revision {current}, which a later affectlens wrote: upgrade affectlens, or name another --store"
            )
        environment.run_migrations()
