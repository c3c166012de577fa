"""The record store: what was promised. SQLAlchemy Core; SQLite in WAL mode by default.

Every change of a job is one transaction that checks the move, writes the record and appends the event. No network call
is made inside a transaction. The tables are in `schema`, and `migrations/` brings a database to them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import sqlalchemy as sa

from tunesmith.clock import utc_text
from tunesmith.errors import ConflictError
from tunesmith.jobs.spec import RegisterJob, TrainJob
from tunesmith.jobs.states import FINAL, Change, apply
from tunesmith.records import events, idempotency, jobs, leases
from tunesmith.records.database import Database
from tunesmith.records.record import Event, Insertion, Lease, Line, Record, Unfinished
from tunesmith.records.schema import JOBS


class RecordStore:
    """See the module. Methods are safe from several threads and several processes."""

    def __init__(self, database_url: str, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.database = Database(database_url)

    def migrate(self) -> None:
        """Bring the schema up to date, safe when several processes do it at once."""
        self.database.migrate()

    def insert(
        self,
        job: TrainJob | RegisterJob,
        *,
        respond: Callable[[Record], dict[str, Any]],
        idempotency_key: str | None = None,
        body_hash: str = "",
    ) -> Insertion:
        """Promise a job: record (`pending`), first event, reserved output version and key, in one transaction.

        The job's output version is raised to the lowest that neither storage (the given one) nor a record holds. The
        same account, key and body: the first answer, replayed. Another body: ConflictError (idempotency_key_reused).
        """
        with self.database.writing() as connection:
            if idempotency_key is not None:
                first = self._first_answer(connection, job.account, idempotency_key, body_hash)
                if first is not None:
                    return first
            taken = jobs.newest_output(connection, job.output.kind, job.output.name)
            record = self._add(connection, job.with_version(max(job.output.version, taken + 1)))
            response = respond(record)
            if idempotency_key is not None:
                answer = idempotency.FirstAnswer(record.id, response)
                idempotency.add(
                    connection, job.account, idempotency_key, body_hash=body_hash, answer=answer, now=self._clock()
                )
        return Insertion(record, response, replayed=False)

    def first_answer(self, account: str, *, idempotency_key: str, body_hash: str) -> Insertion | None:
        """What `insert` answered to this key and body before, None where it did not; errors as there."""
        with self.database.reading() as connection:
            return self._first_answer(connection, account, idempotency_key, body_hash)

    def adopt(self, job: TrainJob | RegisterJob, *, lease: Lease) -> Record | None:
        """A `pending` record for a job that was started without a door; None where its id or output is known."""
        with self.database.writing() as connection:
            leases.check(connection, lease, now=self._clock())
            return None if jobs.is_known(connection, job) else self._add(connection, job)

    def get(self, job_id: str) -> Record:
        """NotFoundError (unknown_job) where there is none, or where it was deleted."""
        with self.database.reading() as connection:
            return _not_deleted(jobs.find(connection, job_id))

    def page(
        self,
        *,
        kind: str | None = None,
        states: Collection[str] = (),
        limit: int = 50,
        after: str | None = None,
        newest_first: bool = True,
    ) -> list[Record]:
        """Jobs that are not deleted, by time of creation and id, from the one that follows the job `after`."""
        with self.database.reading() as connection:
            return jobs.page(connection, kind=kind, states=states, limit=limit, after=after, newest_first=newest_first)

    def unfinished(self) -> list[Unfinished]:
        """All jobs that are not final, oldest first."""
        with self.database.reading() as connection:
            return jobs.unfinished(connection)

    def change(
        self,
        job_id: str,
        change: Change,
        *,
        lease: Lease | None = None,
        expect: Collection[str] = (),
        submission_id: str | None = None,
        data: Mapping[str, Any] | None = None,
        line: Line | None = None,
        at: str | None = None,
    ) -> Record:
        """Apply one change through states.apply, with its event: the only way a status changes.

        `lease`: LeaseLostError unless it is still held, checked in the same transaction. `expect`: ConflictError unless
        the state is among them. `line`: adopted from an attempt's events; one that was adopted before changes nothing.
        `at`: UTC time of the event, default now.
        """
        with self.database.writing() as connection:
            if lease is not None:
                leases.check(connection, lease, now=self._clock())
            record = jobs.find(connection, job_id)
            if line is not None and line.number < events.adopted(connection, job_id, line.attempt):
                return record
            if expect and record.status.state not in expect:
                raise ConflictError(f"job {job_id} is {record.status.state}, not {' or '.join(sorted(expect))}")
            return self._write(connection, record, change, submission_id=submission_id, data=data, line=line, at=at)

    def request_stop(self, job_id: str) -> Record:
        """What the user wants stopped: `pending` and `queued` become `stopped`, `preparing` and `running` `stopping`.

        A job that is stopping or final stays as it is, without an event.
        """
        with self.database.writing() as connection:
            record = _not_deleted(jobs.find(connection, job_id))
            state = record.status.state
            if state in FINAL or state == "stopping":
                return record
            to = "stopped" if state in ("pending", "queued") else "stopping"
            change = Change(state=to, reason="stopped_by_user", message="stopped by the user")
            return self._write(connection, record, change)

    def delete(self, job_id: str) -> None:
        """Mark a final job as deleted; ConflictError (job_not_final) for one that is not. Again: changes nothing."""
        with self.database.writing() as connection:
            record = jobs.find(connection, job_id)
            if record.status.state not in FINAL:
                raise ConflictError(
                    f"job {job_id} is {record.status.state}; only {', '.join(sorted(FINAL))} jobs can be deleted",
                    hint="stop it first",
                    code="job_not_final",
                )
            if record.deleted_at is None:
                connection.execute(JOBS.update().where(JOBS.c.id == job_id).values(deleted_at=self._now()))

    def deleted_unpurged(self) -> list[Record]:
        """Deleted jobs whose folder was not yet removed from storage."""
        with self.database.reading() as connection:
            return jobs.deleted_unpurged(connection)

    def mark_purged(self, job_id: str, *, lease: Lease) -> None:
        """The folder of a deleted job is gone from storage."""
        with self.database.writing() as connection:
            leases.check(connection, lease, now=self._clock())
            connection.execute(JOBS.update().where(JOBS.c.id == job_id).values(purged_at=self._now()))

    def known_ids(self) -> set[str]:
        """Ids of all jobs there ever were, deleted ones included."""
        with self.database.reading() as connection:
            return set(connection.scalars(sa.select(JOBS.c.id)))

    def taken_lines(self, job_id: str, attempt: int) -> int:
        """How many lines of an attempt's events were adopted."""
        with self.database.reading() as connection:
            return events.adopted(connection, job_id, attempt)

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """Events of a job with a sequence number above `after`, oldest first."""
        with self.database.reading() as connection:
            return events.after(connection, job_id, seq=after, limit=limit)

    def last_entry(self, job_id: str, state: str) -> str | None:
        """When the job last came into `state`, UTC, from its events."""
        with self.database.reading() as connection:
            return events.last_entry(connection, job_id, state)

    def acquire_lease(self, name: str, holder: str, *, duration_s: float) -> Lease | None:
        """Take or renew the lease; None while another holds it."""
        with self.database.writing() as connection:
            return leases.acquire(connection, name, holder, duration_s=duration_s, now=self._clock())

    def release_lease(self, lease: Lease) -> None:
        """Give it back early; one that was lost already is no error."""
        with self.database.writing() as connection:
            leases.release(connection, lease)

    def _first_answer(self, connection: sa.Connection, account: str, key: str, body_hash: str) -> Insertion | None:
        first = idempotency.find(connection, account, key, body_hash=body_hash)
        if first is None:
            return None
        return Insertion(jobs.find(connection, first.job_id), first.response, replayed=True)

    def _add(self, connection: sa.Connection, job: TrainJob | RegisterJob) -> Record:
        record = jobs.add(connection, job)
        events.append(connection, job.id, Change(state=record.status.state), at=job.created_at)
        return record

    def _write(
        self,
        connection: sa.Connection,
        record: Record,
        change: Change,
        *,
        submission_id: str | None = None,
        data: Mapping[str, Any] | None = None,
        line: Line | None = None,
        at: str | None = None,
    ) -> Record:
        now = self._now()
        at = at or now
        status = apply(record.status, change)
        written = jobs.update(connection, record, status, submission_id=submission_id, at=at, now=now)
        events.append(connection, record.id, change, at=at, data=data, line=line)
        return written

    def _now(self) -> str:
        return utc_text(self._clock())


def _not_deleted(record: Record) -> Record:
    if record.deleted_at is not None:
        raise jobs.unknown(record.id)
    return record
