"""The table of jobs. Each function works inside its caller's transaction."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa

from tunesmith.errors import ConflictError, NotFoundError
from tunesmith.jobs.spec import Output, RegisterJob, TrainJob
from tunesmith.jobs.states import FINAL, MOVES, Status
from tunesmith.records.record import Record, Unfinished
from tunesmith.records.schema import JOBS, STATUS


def add(connection: sa.Connection, job: TrainJob | RegisterJob) -> Record:
    """Record a job as `pending`."""
    record = Record(
        id=job.id,
        kind=job.kind,
        name=job.name,
        account=job.account,
        status=Status(),
        output=job.output,
        text=job.model_dump_json(),
        submission_id=None,
        created_at=job.created_at,
        updated_at=job.created_at,
        started_at=None,
        ended_at=None,
        deleted_at=None,
        version=1,
    )
    connection.execute(
        JOBS.insert().values(
            id=record.id,
            kind=record.kind,
            name=record.name,
            account=record.account,
            job=record.text,
            output_kind=record.output.kind,
            output_name=record.output.name,
            output_version=record.output.version,
            created_at=record.created_at,
            updated_at=record.updated_at,
            version=record.version,
            **asdict(record.status),
        )
    )
    return record


def find(connection: sa.Connection, job_id: str) -> Record:
    """A job, deleted or not; NotFoundError (unknown_job) where there never was one."""
    row = connection.execute(sa.select(JOBS).where(JOBS.c.id == job_id)).first()
    if row is None:
        raise unknown(job_id)
    return _record(row)


def unknown(job_id: str) -> NotFoundError:
    return NotFoundError(f"there is no job {job_id!r}", fields=["job_id"], code="unknown_job")


def page(
    connection: sa.Connection,
    *,
    kind: str | None,
    states: Collection[str],
    limit: int,
    after: str | None,
    newest_first: bool,
) -> list[Record]:
    """Jobs that are not deleted, by time of creation and id, from the one that follows the job `after`."""
    place = (JOBS.c.created_at, JOBS.c.id)
    query = sa.select(JOBS).where(JOBS.c.deleted_at.is_(None)).limit(limit)
    query = query.order_by(*(column.desc() for column in place)) if newest_first else query.order_by(*place)
    if kind is not None:
        query = query.where(JOBS.c.kind == kind)
    if states:
        query = query.where(JOBS.c.state.in_(states))
    if after is not None:
        start = find(connection, after)
        here, border = sa.tuple_(*place), sa.tuple_(start.created_at, start.id)
        query = query.where(here < border if newest_first else here > border)
    return [_record(row) for row in connection.execute(query)]


def unfinished(connection: sa.Connection) -> list[Unfinished]:
    """All jobs that are not final, oldest first."""
    query = sa.select(JOBS.c.id, JOBS.c.state, JOBS.c.attempt).where(JOBS.c.state.in_(set(MOVES) - FINAL))
    return [Unfinished(*row) for row in connection.execute(query.order_by(JOBS.c.created_at, JOBS.c.id))]


def deleted_unpurged(connection: sa.Connection) -> list[Record]:
    """Deleted jobs whose folder was not yet removed from storage."""
    query = sa.select(JOBS).where(JOBS.c.deleted_at.is_not(None), JOBS.c.purged_at.is_(None))
    return [_record(row) for row in connection.execute(query)]


def newest_output(connection: sa.Connection, kind: str, name: str) -> int:
    """The highest version of a model or dataset that any job makes; 0 where none does."""
    made = (JOBS.c.output_kind == kind) & (JOBS.c.output_name == name)
    return connection.scalar(sa.select(sa.func.max(JOBS.c.output_version)).where(made)) or 0


def is_known(connection: sa.Connection, job: TrainJob | RegisterJob) -> bool:
    """Whether a job has this id, or makes the same version."""
    kind, name, version = job.output
    same = (JOBS.c.output_kind == kind) & (JOBS.c.output_name == name) & (JOBS.c.output_version == version)
    return connection.execute(sa.select(JOBS.c.id).where((JOBS.c.id == job.id) | same)).first() is not None


def update(
    connection: sa.Connection, record: Record, status: Status, *, submission_id: str | None, at: str, now: str
) -> Record:
    """Write a new status; ConflictError where the record was changed since it was read."""
    changed = replace(
        record,
        status=status,
        submission_id=submission_id or record.submission_id,
        updated_at=now,
        started_at=record.started_at or (at if status.state == "running" else None),
        ended_at=record.ended_at or (at if status.state in FINAL else None),
        version=record.version + 1,
    )
    names = ("submission_id", "updated_at", "started_at", "ended_at", "version")
    values = {**asdict(status), **{name: getattr(changed, name) for name in names}}
    unchanged = (JOBS.c.id == record.id) & (JOBS.c.version == record.version)
    if connection.execute(JOBS.update().where(unchanged).values(**values)).rowcount != 1:
        raise ConflictError(f"job {record.id} was changed meanwhile")
    return changed


def _record(row: Any) -> Record:
    return Record(
        id=row.id,
        kind=row.kind,
        name=row.name,
        account=row.account,
        status=Status(**{name: getattr(row, name) for name in STATUS}),
        output=Output(row.output_kind, row.output_name, row.output_version),
        text=row.job,
        submission_id=row.submission_id,
        created_at=row.created_at,
        updated_at=row.updated_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        deleted_at=row.deleted_at,
        version=row.version,
    )
