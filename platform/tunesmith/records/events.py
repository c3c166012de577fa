"""The table of events. Each function works inside its caller's transaction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from tunesmith.jobs.states import Change
from tunesmith.records.record import Event, Line
from tunesmith.records.schema import EVENTS, STATUS


def append(
    connection: sa.Connection,
    job_id: str,
    change: Change,
    *,
    at: str,
    data: Mapping[str, Any] | None = None,
    line: Line | None = None,
) -> None:
    connection.execute(
        EVENTS.insert().values(
            job_id=job_id,
            time=at,
            data=json.dumps(dict(data or {})),
            line_attempt=line.attempt if line else None,
            line=line.number if line else None,
            **{name: getattr(change, name) for name in STATUS},
        )
    )


def after(connection: sa.Connection, job_id: str, *, seq: int, limit: int) -> list[Event]:
    """Events of a job with a sequence number above `seq`, oldest first."""
    query = sa.select(EVENTS).where(EVENTS.c.job_id == job_id, EVENTS.c.seq > seq).order_by(EVENTS.c.seq).limit(limit)
    return [_event(row) for row in connection.execute(query)]


def last_entry(connection: sa.Connection, job_id: str, state: str) -> str | None:
    """When an event last said that the job is in `state`, UTC."""
    query = sa.select(EVENTS.c.time).where(EVENTS.c.job_id == job_id, EVENTS.c.state == state)
    time: str | None = connection.scalar(query.order_by(EVENTS.c.seq.desc()).limit(1))
    return time


def adopted(connection: sa.Connection, job_id: str, attempt: int) -> int:
    """How many lines of an attempt's events were adopted."""
    last = sa.select(sa.func.max(EVENTS.c.line)).where(EVENTS.c.job_id == job_id, EVENTS.c.line_attempt == attempt)
    number = connection.scalar(last)
    return 0 if number is None else int(number) + 1


def _event(row: Any) -> Event:
    change = Change(**{name: getattr(row, name) for name in STATUS})
    return Event(seq=row.seq, job_id=row.job_id, time=row.time, change=change, data=json.loads(row.data))
