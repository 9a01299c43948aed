"""Records, their scores, what they share, and alerts."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "affectlens_records",
        sa.Column("seq", number, primary_key=True, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("created", sa.BigInteger, nullable=False),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("kind", "key", "model", "finish", "title", "steering")),
        *(sa.Column(name, sa.Integer, nullable=False) for name in ("prompt_tokens", "tokens", "company", "alerts")),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("names", sa.Text, nullable=False),
        sa.Column("extremes", sa.LargeBinary, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("affectlens_records_created", "affectlens_records", ["created", "seq"])

    def record(primary_key: bool = True) -> sa.Column[int]:
        own = sa.ForeignKey("affectlens_records.seq", ondelete="CASCADE")
        return sa.Column("seq", number, own, nullable=False, primary_key=primary_key)

    op.create_table(
        "affectlens_bodies",
        record(),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("scores", sa.LargeBinary, nullable=False),
    )
    if op.get_bind().dialect.name == "postgresql":
        for column in ("body", "scores"):  # compressed already: to try it again takes longer than all the rest
            op.execute(f"ALTER TABLE affectlens_bodies ALTER COLUMN {column} SET STORAGE EXTERNAL")
    op.create_table("affectlens_words", record(), sa.Column("words", sa.Text, nullable=False))
    op.create_table(
        "affectlens_concepts",
        sa.Column("id", number, primary_key=True, autoincrement=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
    )
    op.create_table(
        "affectlens_peaks",
        sa.Column("concept", sa.Integer, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("peak", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("concept", "created", "seq", name="affectlens_peaks_pkey", postgresql_include=["peak"]),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "affectlens_parts",
        sa.Column("hash", sa.Text, primary_key=True),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "affectlens_uses",
        record(),
        sa.Column("hash", sa.Text, sa.ForeignKey("affectlens_parts.hash"), primary_key=True),
        sqlite_with_rowid=False,
    )
    op.create_index("affectlens_uses_hash", "affectlens_uses", ["hash"])
    op.create_table(
        "affectlens_alerts",
        sa.Column("id", number, primary_key=True, autoincrement=True),
        record(primary_key=False),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("rule", "state", "note")),
        sa.Column("changed", sa.BigInteger),
        sa.Column("data", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("affectlens_alerts_seq", "affectlens_alerts", ["seq"])
    op.create_index("affectlens_alerts_rule", "affectlens_alerts", ["rule", "id"])
    op.create_index("affectlens_alerts_state", "affectlens_alerts", ["state", "id"])
    op.create_table(
        "affectlens_settings",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
