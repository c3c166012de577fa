"""The table of idempotency keys. Each function works inside its caller's transaction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from tunesmith.clock import utc_text
from tunesmith.errors import ConflictError
from tunesmith.records.schema import IDEMPOTENCY

KEEP_S = 30 * 86400.0
"""How long a key is known, seconds."""

MOST = 100_000
"""How many keys are known; beyond that the oldest go."""


@dataclass(frozen=True)
class FirstAnswer:
    """What a key was used for."""

    job_id: str
    response: dict[str, Any]


def find(connection: sa.Connection, account: str, key: str, *, body_hash: str) -> FirstAnswer | None:
    """ConflictError (idempotency_key_reused) where the key was used with another body."""
    used = (IDEMPOTENCY.c.account == account) & (IDEMPOTENCY.c.key == key)
    row = connection.execute(sa.select(IDEMPOTENCY).where(used)).first()
    if row is None:
        return None
    if row.body_hash != body_hash:
        raise ConflictError(
            f"the idempotency key {key!r} was used with another body, for job {row.job_id}",
            fields=["Idempotency-Key"],
            hint="use a new key for a new request",
            code="idempotency_key_reused",
        )
    return FirstAnswer(row.job_id, json.loads(row.response))


def add(connection: sa.Connection, account: str, key: str, *, body_hash: str, answer: FirstAnswer, now: float) -> None:
    """Remember a key; those that are too old, or too many, are forgotten."""
    newest = IDEMPOTENCY.c.created_at.desc()
    first_beyond = sa.select(IDEMPOTENCY.c.created_at).order_by(newest).limit(1).offset(MOST - 1)
    oldest = max(connection.scalar(first_beyond) or "", utc_text(now - KEEP_S))
    connection.execute(IDEMPOTENCY.delete().where(IDEMPOTENCY.c.created_at <= oldest))
    connection.execute(
        IDEMPOTENCY.insert().values(
            account=account,
            key=key,
            body_hash=body_hash,
            job_id=answer.job_id,
            response=json.dumps(answer.response),
            created_at=utc_text(now),
        )
    )
