"""The record store: what was promised. SQLAlchemy Core; SQLite in WAL mode by default.

Every change of a job is one transaction that checks the move, writes the record and appends the event. No network call
inside a transaction. `tunesmith/migrations/` holds the schema.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tunesmith.clock import utc_text
from tunesmith.errors import ConflictError, LeaseLostError, NotFoundError, SpecError
from tunesmith.jobs.spec import Output, RegisterJob, TrainJob, parse_job
from tunesmith.jobs.states import FINAL, MOVES, Change, Status, apply

KEYS_S = 30 * 86400.0
"""How long an idempotency key is kept, seconds."""

KEYS = 100_000
"""How many idempotency keys are kept; beyond that the oldest go."""

MIGRATIONS = Path(__file__).with_name("migrations")

_METADATA = sa.MetaData()
_STATUS = ("state", "phase", "reason", "message", "attempt")
_JOBS = sa.Table(
    "jobs",
    _METADATA,
    *(sa.Column(name, sa.String) for name in ("id", "kind", "name", "account", "state", "phase", "reason", "message")),
    *(sa.Column(name, sa.String) for name in ("job", "output_kind", "output_name", "submission_id")),
    *(sa.Column(f"{name}_at", sa.String) for name in ("created", "updated", "started", "ended", "deleted", "purged")),
    *(sa.Column(name, sa.Integer) for name in ("attempt", "output_version", "version")),
)
_EVENTS = sa.Table(
    "events",
    _METADATA,
    sa.Column("seq", sa.Integer, primary_key=True),
    *(sa.Column(name, sa.String) for name in ("job_id", "time", "state", "phase", "reason", "message", "data")),
    *(sa.Column(name, sa.Integer) for name in ("attempt", "line_attempt", "line")),
)
_KEYS = sa.Table(
    "idempotency",
    _METADATA,
    *(sa.Column(name, sa.String) for name in ("account", "key", "body_hash", "job_id", "response", "created_at")),
)
_LEASES = sa.Table(
    "leases",
    _METADATA,
    *(sa.Column(name, sa.String) for name in ("name", "holder")),
    sa.Column("epoch", sa.Integer),
    sa.Column("expires_at", sa.Float),
)


@dataclass(frozen=True)
class Record:
    """One job as the database knows it."""

    id: str
    kind: str
    name: str
    account: str
    status: Status
    output: Output
    text: str
    """What it runs with, job.json: nothing is parsed before somebody asks for it."""
    submission_id: str | None
    """Ray's id of the newest attempt."""
    created_at: str
    updated_at: str
    started_at: str | None
    """When it first ran, UTC; likewise ended_at."""
    ended_at: str | None
    deleted_at: str | None
    version: int
    """Counts the record's changes; a conditional update compares it."""

    @cached_property
    def job(self) -> TrainJob | RegisterJob:
        """What it runs with."""
        return parse_job(self.text)


@dataclass(frozen=True)
class Unfinished:
    """What tells who must look after a job: less than its record, for there may be thousands."""

    id: str
    state: str
    attempt: int


@dataclass(frozen=True)
class Event:
    """One change of a job."""

    seq: int
    """Given by the database alone; grows over all jobs."""
    job_id: str
    time: str
    change: Change
    data: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """Which line of an attempt's own events an event was adopted from."""

    attempt: int
    number: int


@dataclass(frozen=True)
class Lease:
    name: str
    holder: str
    epoch: int
    """Grows with every new holder: the fencing token."""


@dataclass(frozen=True)
class Insertion:
    record: Record
    response: dict[str, Any]
    """The first answer."""
    replayed: bool


class RecordStore:
    """See the module. Methods are safe from several threads and several processes."""

    def __init__(self, database_url: str, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        url = sa.make_url(database_url)
        if url.get_backend_name() != "sqlite" or not url.database:
            raise SpecError(f"the record store is a SQLite file in this version, got {database_url!r}")
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        self._engine = sa.create_engine(url, connect_args={"timeout": 30})
        sa.event.listen(self._engine, "connect", _on_connect)

    def migrate(self) -> None:
        """Bring the schema up to date (Alembic), safe when several processes do it at once."""
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        with self._transaction() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def insert(
        self,
        job: TrainJob | RegisterJob,
        *,
        respond: Callable[[Record], dict[str, Any]],
        idempotency_key: str | None = None,
        body_hash: str = "",
    ) -> Insertion:
        """Promise a job: record (`pending`), first event, reserved output version and key, in one transaction.

        A key is known for KEYS_S seconds, and at most KEYS of them.

        The job's output version is raised to the lowest that neither storage (the given one) nor a record holds. The
        same account, key and body: the first answer, replayed. Another body: ConflictError (idempotency_key_reused).
        """
        with self._transaction() as connection:
            first = self._first_answer(connection, job.account, idempotency_key, body_hash)
            if first is not None:
                return first
            kind, name, version = job.output
            taken = connection.scalar(
                sa.select(sa.func.max(_JOBS.c.output_version)).where(
                    _JOBS.c.output_kind == kind, _JOBS.c.output_name == name
                )
            )
            job = job.with_version(max(version, (taken or 0) + 1))
            record = self._add(connection, job)
            response = respond(record)
            if idempotency_key is not None:
                self._forget_keys(connection)
                connection.execute(
                    _KEYS.insert().values(
                        account=job.account,
                        key=idempotency_key,
                        body_hash=body_hash,
                        job_id=job.id,
                        response=json.dumps(response),
                        created_at=self._now(),
                    )
                )
        return Insertion(record, response, replayed=False)

    def first_answer(self, account: str, *, idempotency_key: str, body_hash: str) -> Insertion | None:
        """What `insert` answered to this key and body before, None where it did not; errors as there."""
        with self._engine.connect() as connection:
            return self._first_answer(connection, account, idempotency_key, body_hash)

    def adopt(self, job: TrainJob | RegisterJob, *, lease: Lease) -> Record | None:
        """A `pending` record for a job that was started without a door; None where its id or output is known."""
        kind, name, version = job.output
        with self._transaction() as connection:
            self._check_lease(connection, lease)
            known = sa.select(_JOBS.c.id).where(
                (_JOBS.c.id == job.id)
                | ((_JOBS.c.output_kind == kind) & (_JOBS.c.output_name == name) & (_JOBS.c.output_version == version))
            )
            if connection.execute(known).first() is not None:
                return None
            return self._add(connection, job)

    def get(self, job_id: str) -> Record:
        """NotFoundError (unknown_job) where there is none, or where it was deleted."""
        with self._engine.connect() as connection:
            record = self._find(connection, job_id)
        if record.deleted_at is not None:
            raise _unknown(job_id)
        return record

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
        place = sa.tuple_(_JOBS.c.created_at, _JOBS.c.id)
        query = sa.select(_JOBS).where(_JOBS.c.deleted_at.is_(None)).limit(limit)
        columns = (_JOBS.c.created_at, _JOBS.c.id)
        query = query.order_by(*(c.desc() for c in columns)) if newest_first else query.order_by(*columns)
        if kind is not None:
            query = query.where(_JOBS.c.kind == kind)
        if states:
            query = query.where(_JOBS.c.state.in_(states))
        with self._engine.connect() as connection:
            if after is not None:
                start = self._find(connection, after)
                border = sa.tuple_(start.created_at, start.id)
                query = query.where(place < border if newest_first else place > border)
            return [_record(row) for row in connection.execute(query)]

    def unfinished(self) -> list[Unfinished]:
        """All jobs that are not final, oldest first."""
        query = (
            sa.select(_JOBS.c.id, _JOBS.c.state, _JOBS.c.attempt)
            .where(_JOBS.c.state.in_(set(MOVES) - FINAL))
            .order_by(_JOBS.c.created_at, _JOBS.c.id)
        )
        with self._engine.connect() as connection:
            return [Unfinished(*row) for row in connection.execute(query)]

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
        with self._transaction() as connection:
            if lease is not None:
                self._check_lease(connection, lease)
            record = self._find(connection, job_id)
            if line is not None and line.number < self._adopted(connection, job_id, line.attempt):
                return record
            if expect and record.status.state not in expect:
                raise ConflictError(f"job {job_id} is {record.status.state}, not {' or '.join(sorted(expect))}")
            return self._write(connection, record, change, submission_id=submission_id, data=data, line=line, at=at)

    def request_stop(self, job_id: str) -> Record:
        """What the user wants stopped: `pending` and `queued` become `stopped`, `preparing` and `running` `stopping`.

        A job that is stopping or final stays as it is, without an event.
        """
        with self._transaction() as connection:
            record = self._find(connection, job_id)
            if record.deleted_at is not None:
                raise _unknown(job_id)
            state = record.status.state
            if state in FINAL or state == "stopping":
                return record
            to = "stopped" if state in ("pending", "queued") else "stopping"
            change = Change(state=to, reason="stopped_by_user", message="stopped by the user")
            return self._write(connection, record, change)

    def delete(self, job_id: str) -> None:
        """Mark a final job as deleted; ConflictError (job_not_final) for one that is not. Again: changes nothing."""
        with self._transaction() as connection:
            record = self._find(connection, job_id)
            if record.status.state not in FINAL:
                raise ConflictError(
                    f"job {job_id} is {record.status.state}; only {', '.join(sorted(FINAL))} jobs can be deleted",
                    hint="stop it first",
                    code="job_not_final",
                )
            if record.deleted_at is None:
                connection.execute(_JOBS.update().where(_JOBS.c.id == job_id).values(deleted_at=self._now()))

    def deleted_unpurged(self) -> list[str]:
        """Ids of deleted jobs whose folder was not yet removed from storage."""
        query = sa.select(_JOBS.c.id).where(_JOBS.c.deleted_at.is_not(None), _JOBS.c.purged_at.is_(None))
        with self._engine.connect() as connection:
            return list(connection.scalars(query))

    def mark_purged(self, job_id: str, *, lease: Lease) -> None:
        """The folder of a deleted job is gone from storage."""
        with self._transaction() as connection:
            self._check_lease(connection, lease)
            connection.execute(_JOBS.update().where(_JOBS.c.id == job_id).values(purged_at=self._now()))

    def known_ids(self) -> set[str]:
        """Ids of all jobs there ever were, deleted ones included."""
        with self._engine.connect() as connection:
            return set(connection.scalars(sa.select(_JOBS.c.id)))

    def adopted_lines(self, job_id: str, attempt: int) -> int:
        """How many lines of an attempt's events were adopted."""
        with self._engine.connect() as connection:
            return self._adopted(connection, job_id, attempt)

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """Events of a job with a sequence number above `after`, oldest first."""
        query = (
            sa.select(_EVENTS)
            .where(_EVENTS.c.job_id == job_id, _EVENTS.c.seq > after)
            .order_by(_EVENTS.c.seq)
            .limit(limit)
        )
        with self._engine.connect() as connection:
            return [_event(row) for row in connection.execute(query)]

    def acquire_lease(self, name: str, holder: str, *, duration_s: float) -> Lease | None:
        """Take or renew the lease; None while another holds it."""
        with self._transaction() as connection:
            now = self._clock()
            row = connection.execute(sa.select(_LEASES).where(_LEASES.c.name == name)).first()
            if row is None:
                connection.execute(
                    _LEASES.insert().values(name=name, holder=holder, epoch=1, expires_at=now + duration_s)
                )
                return Lease(name, holder, 1)
            mine = row.holder == holder and row.expires_at > now
            if not mine and row.expires_at > now:
                return None
            epoch = row.epoch if mine else row.epoch + 1
            update = _LEASES.update().where(_LEASES.c.name == name)
            connection.execute(update.values(holder=holder, epoch=epoch, expires_at=now + duration_s))
            return Lease(name, holder, epoch)

    def release_lease(self, lease: Lease) -> None:
        """Give it back early; one that was lost already is no error."""
        with self._transaction() as connection:
            held = (_LEASES.c.name == lease.name) & (_LEASES.c.epoch == lease.epoch)
            connection.execute(_LEASES.update().where(held).values(expires_at=0.0))

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        """A transaction that writes; it takes SQLite's write lock at once, so that what it reads stays true."""
        with self._engine.connect() as connection, connection.begin():
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    def _first_answer(
        self, connection: sa.Connection, account: str, key: str | None, body_hash: str
    ) -> Insertion | None:
        if key is None:
            return None
        row = connection.execute(sa.select(_KEYS).where(_KEYS.c.account == account, _KEYS.c.key == key)).first()
        if row is None:
            return None
        if row.body_hash != body_hash:
            raise ConflictError(
                f"the idempotency key {key!r} was used with another body, for job {row.job_id}",
                fields=["Idempotency-Key"],
                hint="use a new key for a new request",
                code="idempotency_key_reused",
            )
        return Insertion(self._find(connection, row.job_id), json.loads(row.response), replayed=True)

    def _forget_keys(self, connection: sa.Connection) -> None:
        """Make room for a key."""
        newest = sa.select(_KEYS.c.created_at).order_by(_KEYS.c.created_at.desc()).limit(1).offset(KEYS - 1)
        oldest = max(connection.scalar(newest) or "", utc_text(self._clock() - KEYS_S))
        connection.execute(_KEYS.delete().where(_KEYS.c.created_at <= oldest))

    def _add(self, connection: sa.Connection, job: TrainJob | RegisterJob) -> Record:
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
            _JOBS.insert().values(
                id=record.id,
                kind=record.kind,
                name=record.name,
                account=record.account,
                **{name: getattr(record.status, name) for name in _STATUS},
                job=record.text,
                output_kind=record.output.kind,
                output_name=record.output.name,
                output_version=record.output.version,
                created_at=record.created_at,
                updated_at=record.updated_at,
                version=record.version,
            )
        )
        self._append(connection, job.id, Change(state="pending"), at=job.created_at)
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
        status = apply(record.status, change)
        now = self._now()
        values: dict[str, Any] = {name: getattr(status, name) for name in _STATUS}
        values |= {"updated_at": now, "version": record.version + 1}
        if submission_id is not None:
            values["submission_id"] = submission_id
        if status.state == "running" and record.started_at is None:
            values["started_at"] = at or now
        if status.state in FINAL and record.ended_at is None:
            values["ended_at"] = at or now
        unchanged = (_JOBS.c.id == record.id) & (_JOBS.c.version == record.version)
        if connection.execute(_JOBS.update().where(unchanged).values(**values)).rowcount != 1:
            raise ConflictError(f"job {record.id} was changed meanwhile")
        self._append(connection, record.id, change, at=at or now, data=data, line=line)
        return self._find(connection, record.id)

    def _append(
        self,
        connection: sa.Connection,
        job_id: str,
        change: Change,
        *,
        at: str,
        data: Mapping[str, Any] | None = None,
        line: Line | None = None,
    ) -> None:
        connection.execute(
            _EVENTS.insert().values(
                job_id=job_id,
                time=at,
                data=json.dumps(dict(data or {})),
                line_attempt=line.attempt if line else None,
                line=line.number if line else None,
                **{name: getattr(change, name) for name in _STATUS},
            )
        )

    def _adopted(self, connection: sa.Connection, job_id: str, attempt: int) -> int:
        last = sa.select(sa.func.max(_EVENTS.c.line)).where(
            _EVENTS.c.job_id == job_id, _EVENTS.c.line_attempt == attempt
        )
        number = connection.scalar(last)
        return 0 if number is None else int(number) + 1

    def _check_lease(self, connection: sa.Connection, lease: Lease) -> None:
        row = connection.execute(sa.select(_LEASES).where(_LEASES.c.name == lease.name)).first()
        if row is None or row.epoch != lease.epoch or row.expires_at <= self._clock():
            raise LeaseLostError(f"the lease {lease.name!r} is no longer held by {lease.holder}")

    def _find(self, connection: sa.Connection, job_id: str) -> Record:
        row = connection.execute(sa.select(_JOBS).where(_JOBS.c.id == job_id)).first()
        if row is None:
            raise _unknown(job_id)
        return _record(row)

    def _now(self) -> str:
        return utc_text(self._clock())


def _on_connect(connection: Any, _: object) -> None:
    # Transactions are begun by hand, so that they can be IMMEDIATE.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _record(row: Any) -> Record:
    return Record(
        id=row.id,
        kind=row.kind,
        name=row.name,
        account=row.account,
        status=Status(**{name: getattr(row, name) for name in _STATUS}),
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


def _event(row: Any) -> Event:
    change = Change(**{name: getattr(row, name) for name in _STATUS})
    return Event(seq=row.seq, job_id=row.job_id, time=row.time, change=change, data=json.loads(row.data))


def _unknown(job_id: str) -> NotFoundError:
    return NotFoundError(f"there is no job {job_id!r}", fields=["job_id"], code="unknown_job")
