"""The record store: what was promised. SQLAlchemy Core; SQLite in WAL mode by default.

Every change of a job is one transaction that checks the move, writes the record and appends the event. No network call
inside a transaction. `tunesmith/migrations/` holds the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.spec import RegisterJob, TrainJob
from tunesmith.states import Change, Status


@dataclass(frozen=True)
class Record:
    """One job as the database knows it."""

    id: str
    kind: str
    name: str
    account: str
    status: Status
    job: TrainJob | RegisterJob
    output: str
    """`NAME@VERSION` of what it makes."""
    submission_id: str | None
    """Ray's id of the newest attempt."""
    stop_requested: bool
    created_at: str
    updated_at: str
    started_at: str | None
    """When it first ran, UTC; likewise ended_at."""
    ended_at: str | None
    deleted_at: str | None
    version: int
    """Counts the record's changes; conditional updates compare it."""


@dataclass(frozen=True)
class Event:
    """One change of a job."""

    seq: int
    """Given by the database alone; grows over all jobs."""
    job_id: str
    time: str
    change: Change
    """`change.attempt` is the attempt that it speaks of."""
    data: dict[str, Any]


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

    def __init__(self, database_url: str) -> None:
        raise NotImplementedError

    def migrate(self) -> None:
        """Bring the schema up to date (Alembic), safe when several processes do it at once."""
        raise NotImplementedError

    def insert(
        self,
        job: TrainJob | RegisterJob,
        *,
        respond: Callable[[Record], dict[str, Any]],
        idempotency_key: str | None = None,
        body_hash: str | None = None,
    ) -> Insertion:
        """Promise a job: record (`pending`), first event, reserved output version and key, in one transaction.

        The job's output version is raised to the lowest that neither storage (the given one) nor a record holds. The
        same account, key and body: the first answer, replayed. Another body: ConflictError (idempotency_key_reused).
        """
        raise NotImplementedError

    def adopt(self, job: TrainJob | RegisterJob, *, lease: Lease) -> Record | None:
        """A `queued` record for a job that was started without a door; None where its id is known already."""
        raise NotImplementedError

    def get(self, job_id: str) -> Record:
        """NotFoundError (unknown_job) where there is none, or where it was deleted."""
        raise NotImplementedError

    def page(
        self,
        *,
        kind: str | None = None,
        states: Collection[str] = (),
        limit: int = 50,
        before: str | None = None,
        newest_first: bool = True,
    ) -> list[Record]:
        """Records of jobs that are not deleted, by creation and id; `before` is the id the page goes on after."""
        raise NotImplementedError

    def change(
        self,
        job_id: str,
        change: Change,
        *,
        lease: Lease | None = None,
        expect: Collection[str] = (),
        submission_id: str | None = None,
        data: Mapping[str, Any] | None = None,
        source: str | None = None,
        time: str | None = None,
    ) -> Record:
        """Apply one change through states.apply, with its event. The only way a status changes.

        `lease`: LeaseLostError unless it is still held, checked in the same transaction. `expect`: ConflictError unless
        the state is among them. `source` (`ATTEMPT/LINE`) names the line of an attempt's events that this is: one that
        was adopted before changes nothing.
        """
        raise NotImplementedError

    def request_stop(self, job_id: str) -> Record:
        """Note that the user wants it stopped: `pending` and `queued` become `stopped`, `preparing` and `running`
        `stopping`; a job that is stopping or final stays as it is, without an event."""
        raise NotImplementedError

    def delete(self, job_id: str) -> Record:
        """Mark a final job as deleted; ConflictError (job_not_final) for one that is not. Again: changes nothing."""
        raise NotImplementedError

    def deleted_unpurged(self) -> list[str]:
        """Ids of deleted jobs whose folder was not yet removed from storage."""
        raise NotImplementedError

    def mark_purged(self, job_id: str) -> None:
        raise NotImplementedError

    def known_ids(self) -> set[str]:
        """Ids of all jobs there ever were, deleted ones included."""
        raise NotImplementedError

    def adopted_lines(self, job_id: str, attempt: int) -> int:
        """How many lines of an attempt's events were adopted."""
        raise NotImplementedError

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """Events of a job with a sequence number above `after`, oldest first."""
        raise NotImplementedError

    def acquire_lease(self, name: str, holder: str, *, duration_s: float) -> Lease | None:
        """Take or renew the lease; None while another holds it."""
        raise NotImplementedError

    def release_lease(self, lease: Lease) -> None:
        """Give it back early; one that was lost already is no error."""
        raise NotImplementedError
