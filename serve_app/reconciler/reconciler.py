"""The reconciler: takes every acknowledged job to its end, in rounds that may die at any line and go on.

Each step looks at what is there and does what is missing; what it does can be done twice without harm: job.json and
the claim are conditional writes, Ray refuses a used submission id, and the database checks the lease and every move.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial

from serve_app.reconciler.launcher import Launcher, submission_id
from serve_app.reconciler.lease import LeasedRecords
from serve_app.reconciler.scheduler import take_turns
from serve_app.reconciler.supervisor import Supervisor, became
from tunesmith.errors import ConflictError, LeaseLostError, SpecError, StorageError, UnavailableError
from tunesmith.jobs import attempts
from tunesmith.jobs.spec import parse_job
from tunesmith.jobs.states import ON_CLUSTER, Change
from tunesmith.records.store import Record, RecordStore
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.base import Storage

LEASE = "reconciler"
ADOPTION_S = 10.0
"""Pause between two looks for jobs that were started without a door, seconds."""

logger = logging.getLogger(__name__)


class Reconciler:
    """See the module. One thread calls `round`; of several reconcilers, only the lease's holder does anything."""

    def __init__(
        self,
        store: RecordStore,
        storage: Storage,
        launcher: Launcher,
        settings: Settings,
        *,
        holder: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._storage = storage
        self._launcher = launcher
        self._settings = settings
        self._clock = clock
        self._records = LeasedRecords(store, LEASE, holder=holder, duration_s=settings.lease_s, clock=clock)
        self._supervisor = Supervisor(self._records, storage, launcher, settings, clock)
        self._looked_at: float | None = None
        self._strangers: set[str] = set()
        """Folders that hold no job which could be adopted; said once."""
        self._unclaimed: set[tuple[str, int]] = set()
        """Next attempts of queued jobs that nobody had claimed."""
        self._lost_at: dict[tuple[str, int], float] = {}
        """When the last attempts of queued jobs were lost, seconds since the epoch."""
        self._complaints: dict[str, str] = {}

    def round(self) -> None:
        """One pass over all jobs that are not final. Does nothing while another holds the lease."""
        try:
            if not self._records.hold():
                return
            self._guarded("adoption", self._adopt)
            for record in self._records_in("pending"):
                self._guarded(record.id, partial(self._write_down, record))
            self._guarded("queue", self._start_next)
            for record in self._records_in(*ON_CLUSTER):
                self._guarded(record.id, partial(self._supervisor.step, record))
            for job_id in self._records.store.deleted_unpurged():
                self._guarded(job_id, partial(self._purge, job_id))
        except LeaseLostError as error:
            logger.warning("this round ends: %s", error)

    def close(self) -> None:
        """Give the lease back."""
        self._records.release()

    def _adopt(self) -> None:
        """Take in jobs that were started without a door: their folder is claimed, and no record knows it."""
        now = self._clock()
        if self._looked_at is not None and now - self._looked_at < ADOPTION_S:
            return
        folders = self._storage.children("jobs")
        for job_id in set(folders) - self._records.store.known_ids() - self._strangers:
            self._guarded(job_id, partial(self._adopt_one, job_id))
        self._looked_at = now

    def _adopt_one(self, job_id: str) -> None:
        if not self._storage.exists(layout.claim(job_id, 1)):
            return
        job = parse_job(self._storage.get(layout.job_json(job_id)))
        if job.id != job_id:
            self._strangers.add(job_id)
            raise SpecError(f"jobs/{job_id}/job.json is of job {job.id}")
        # Who wrote the file is not known: it goes on the operator's account, whatever it says.
        record = self._records.adopt(job.model_copy(update={"account": self._settings.account}))
        if record is None:
            self._strangers.add(job_id)
            raise ConflictError("the version it makes is another job's")
        logger.info("%s: adopted, it was started without a door", job_id)

    def _write_down(self, record: Record) -> None:
        """`pending` → `queued`: job.json is in storage."""
        text = record.job.model_dump_json(indent=2)
        self._storage.put_if_absent(layout.job_json(record.id), text.encode())
        self._records.change(record, Change(state="queued"))

    def _start_next(self) -> None:
        """`queued` → `preparing`, as turns and resources allow; the supervisor then submits."""
        for record in self._records_in("queued"):
            if (record.id, record.status.attempt + 1) not in self._unclaimed:
                self._guarded(record.id, partial(self._take_claimed, record))
        queued = [record for record in self._records_in("queued") if not self._rests(record)]
        if not queued:
            return
        turns = take_turns(queued, self._records_in(*ON_CLUSTER), self._launcher.capacity())
        for record in turns.start:
            self._guarded(record.id, partial(self._prepare, record))
        for record, why in turns.waiting:
            if record.status.message != why:
                self._guarded(record.id, partial(self._records.change, record, Change(message=why)))

    def _rests(self, record: Record) -> bool:
        """Whether the pause after a lost attempt is not over yet."""
        attempt = record.status.attempt
        if attempt == 0:
            return False
        key = (record.id, attempt)
        if key not in self._lost_at:
            self._lost_at[key] = became(self._records.store, record, "queued")
        return self._clock() < self._lost_at[key] + attempts.retry_pause_s(attempt)

    def _take_claimed(self, record: Record) -> None:
        """A next attempt that runs already, started without a door, needs no turn."""
        attempt = record.status.attempt + 1
        claim = attempts.read_claim(self._storage, record.id, attempt)
        if claim is None:
            self._unclaimed.add((record.id, attempt))
            return
        change = Change(state="preparing", attempt=attempt)
        self._records.change(record, change, submission_id=claim.submission_id, at=claim.time)

    def _prepare(self, record: Record) -> None:
        attempt = record.status.attempt + 1
        change = Change(state="preparing", attempt=attempt)
        self._records.change(record, change, submission_id=submission_id(record.id, attempt))
        self._unclaimed.discard((record.id, attempt))
        self._lost_at.pop((record.id, record.status.attempt), None)

    def _purge(self, job_id: str) -> None:
        """Remove a deleted job's folder; what it published stays."""
        self._storage.delete_folder(layout.job(job_id))
        if next(iter(self._storage.entries(layout.job(job_id))), None) is None:
            self._records.store.mark_purged(job_id)

    def _records_in(self, *states: str) -> Iterator[Record]:
        """All jobs in these states, oldest first, as they are now."""
        records: list[Record] = []
        while page := self._records.store.page(
            states=states, limit=1000, after=records[-1].id if records else None, newest_first=False
        ):
            records += page
        return iter(records)

    def _guarded(self, subject: str, step: Callable[[], object]) -> None:
        """Run a step; whatever goes wrong in it is logged and tried again next round, and stops no other job."""
        self._records.renew()
        try:
            step()
        except LeaseLostError:
            raise
        except ConflictError as error:
            # Its state was changed meanwhile, by a user's stop for example.
            self._complain(subject, error, logging.INFO)
        except (StorageError, UnavailableError) as error:
            self._complain(subject, error, logging.WARNING)
        except Exception as error:  # noqa: BLE001 - logged with its traceback
            self._complain(subject, error, logging.ERROR)
        else:
            self._complaints.pop(subject, None)

    def _complain(self, subject: str, error: Exception, level: int) -> None:
        """Log, with the traceback where it is nobody's known trouble; the same again in the next round is not news."""
        text = f"{type(error).__name__}: {error}"
        if self._complaints.get(subject) != text:
            self._complaints[subject] = text
            logger.log(level, "%s: %s; tried again next round", subject, text, exc_info=level >= logging.ERROR)
