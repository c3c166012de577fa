"""The tables of the record store. The migrations bring a database to exactly these; a test compares the two."""

from __future__ import annotations

import sqlalchemy as sa

METADATA = sa.MetaData()

STATUS = ("state", "phase", "reason", "message", "attempt")
"""The columns of jobs and events that hold a states.Status or a states.Change."""

JOBS = sa.Table(
    "jobs",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("account", sa.String(64), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("phase", sa.String(16)),
    sa.Column("reason", sa.String(32)),
    sa.Column("message", sa.Text),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("job", sa.Text, nullable=False),
    sa.Column("output_kind", sa.String(16), nullable=False),
    sa.Column("output_name", sa.String(64), nullable=False),
    sa.Column("output_version", sa.Integer, nullable=False),
    sa.Column("submission_id", sa.String(128)),
    sa.Column("created_at", sa.String(24), nullable=False),
    sa.Column("updated_at", sa.String(24), nullable=False),
    sa.Column("started_at", sa.String(24)),
    sa.Column("ended_at", sa.String(24)),
    sa.Column("deleted_at", sa.String(24)),
    sa.Column("purged_at", sa.String(24)),
    sa.Column("version", sa.Integer, nullable=False),
    sa.UniqueConstraint("output_kind", "output_name", "output_version"),
    sa.Index("jobs_by_creation", "created_at", "id"),
    sa.Index("jobs_by_state", "state"),
    sa.Index("jobs_by_deletion", "purged_at", "deleted_at"),
)
EVENTS = sa.Table(
    "events",
    METADATA,
    # AUTOINCREMENT: a number that was given is never given again.
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), nullable=False),
    sa.Column("time", sa.String(24), nullable=False),
    sa.Column("attempt", sa.Integer),
    sa.Column("state", sa.String(16)),
    sa.Column("phase", sa.String(16)),
    sa.Column("reason", sa.String(32)),
    sa.Column("message", sa.Text),
    sa.Column("data", sa.Text, nullable=False),
    sa.Column("line_attempt", sa.Integer),
    sa.Column("line", sa.Integer),
    sa.UniqueConstraint("job_id", "line_attempt", "line"),
    sa.Index("events_by_job", "job_id", "seq"),
    sqlite_autoincrement=True,
)
IDEMPOTENCY = sa.Table(
    "idempotency",
    METADATA,
    sa.Column("account", sa.String(64), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("body_hash", sa.String(64), nullable=False),
    sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), nullable=False),
    sa.Column("response", sa.Text, nullable=False),
    sa.Column("created_at", sa.String(24), nullable=False),
    sa.Index("idempotency_by_creation", "created_at"),
)
LEASES = sa.Table(
    "leases",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("holder", sa.String(255), nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False),
)
