"""The reconciler: takes every acknowledged job to its end, in rounds that may die at any line and go on.

Each step looks at what is there and does what is missing; what it does can be done twice without harm: job.json and
the claim are conditional writes, Ray refuses a used submission id, and the database checks the lease and every move.

A round asks the database alone. What has to ask storage or Ray is handed to threads, so that a slow answer delays its
own job and no other, and never costs the lease.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial

from serve_app.reconciler.attempt_supervisor import Supervisor, became
from serve_app.reconciler.doorless_jobs import Adoption
from serve_app.reconciler.lanes import Countdown, Lanes
from serve_app.reconciler.launcher import Launcher
from serve_app.reconciler.lease import LeasedRecords
from serve_app.reconciler.scheduler import take_turns
from tunesmith.assets.catalog import remove_leftovers
from tunesmith.errors import ConflictError, LeaseLostError, NotFoundError, StorageError, UnavailableError
from tunesmith.jobs import attempts
from tunesmith.jobs.states import ON_CLUSTER, Change
from tunesmith.records.record import Record, Unfinished
from tunesmith.records.store import RecordStore
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.base import Storage

LEASE = "reconciler"
_WIDTHS = {"jobs": 16, "queue": 1, "adoption": 1, "purges": 2}
"""How many threads do what: look after a job each; take turns; look for jobs without a record; delete a job each."""

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
        self._clock = clock
        self._records = LeasedRecords(store, LEASE, holder=holder, duration_s=settings.lease_s, clock=clock)
        self._supervisor = Supervisor(self._records, storage=storage, launcher=launcher, settings=settings, now=clock)
        self._adoption = Adoption(self._records, storage, account=settings.account, clock=clock)
        self._lanes = Lanes(_WIDTHS)
        self._unclaimed: set[tuple[str, int]] = set()
        """Next attempts of queued jobs that nobody had claimed."""
        self._lost_at: dict[tuple[str, int], float] = {}
        """When the last attempts of queued jobs were lost, seconds since the epoch."""
        self._complaints: dict[str, str] = {}

    def round(self) -> None:
        """Renew the lease and hand all jobs that are not final to the threads; nothing while another holds it."""
        if not self._records.hold():
            self._keep(())
            return
        jobs = self._records.store.unfinished()
        deleted = self._records.store.deleted_unpurged()
        self._keep([*(job.id for job in jobs), *(job.id for job in deleted), *self._adoption.unknown])
        if self._adoption.is_due():
            self._hand("adoption", "adoption", self._adopt)
        # Turns are taken once all that came since the last round can have theirs, so that the order is kept.
        arrivals = Countdown(self._hand_queue)
        for job in jobs:
            if job.state in ON_CLUSTER or self._lanes.is_busy("jobs", job.id):
                self._hand_job(job.id)
            elif not self._has_arrived(job):
                self._hand("jobs", job.id, arrivals.add(partial(self._look_after, job.id)))
        arrivals.begin()
        for record in deleted:
            self._hand("purges", record.id, partial(self._purge, record))

    def settle(self, timeout_s: float) -> bool:
        """Wait until everything that was handed to the threads is done; False when the time is over first."""
        return self._lanes.wait(timeout_s)

    def close(self, timeout_s: float = 0) -> None:
        """Begin nothing more, wait for what is under way, and give the lease back."""
        self._lanes.close()
        self._lanes.wait(timeout_s)
        self._records.release()

    def _hand_job(self, job_id: str) -> None:
        self._hand("jobs", job_id, partial(self._look_after, job_id))

    def _hand_queue(self) -> None:
        self._hand("queue", "queue", self._start_next)

    def _hand(self, lane: str, subject: str, step: Callable[[], object]) -> None:
        self._lanes.hand(lane, subject, partial(self._guarded, subject, step))

    def _look_after(self, job_id: str) -> None:
        """Take a job as far as it goes now, whatever its state."""
        try:
            record = self._records.store.get(job_id)
        except NotFoundError:
            return
        if record.status.state == "pending":
            record = self._write_down(record)
        if record.status.state == "queued":
            record = self._take_claimed(record)
        if record.status.state in ON_CLUSTER:
            self._supervisor.step(record)

    def _write_down(self, record: Record) -> Record:
        """`pending` → `queued`: job.json is in storage."""
        text = record.job.model_dump_json(indent=2)
        self._storage.put_if_absent(layout.job_json(record.id), text.encode())
        return self._records.change(record, Change(state="queued"))

    def _take_claimed(self, record: Record) -> Record:
        """A next attempt that runs already, started without a door, needs no turn; any other waits for its turn."""
        attempt = record.status.attempt + 1
        if (record.id, attempt) in self._unclaimed:
            return record
        claim = attempts.read_claim(self._storage, record.id, attempt)
        if claim is None:
            self._unclaimed.add((record.id, attempt))
            return record
        change = Change(state="preparing", attempt=attempt)
        return self._records.change(record, change, submission_id=claim.submission_id, at=claim.time)

    def _has_arrived(self, job: Unfinished) -> bool:
        """Whether a job that is not on the cluster may have its turn."""
        return job.state == "queued" and (job.id, job.attempt + 1) in self._unclaimed

    def _start_next(self) -> None:
        """`queued` → `preparing`, as turns and resources allow; the supervisor then submits."""
        queued = [record for record in self._records_in("queued") if self._may_start(record)]
        if not queued:
            return
        turns = take_turns(queued, self._records_in(*ON_CLUSTER), self._launcher.capacity())
        for record in turns.start:
            self._guarded(record.id, partial(self._prepare, record))
        for record, why in turns.waiting:
            if record.status.message != why:
                self._guarded(record.id, partial(self._records.change, record, Change(message=why)))

    def _may_start(self, record: Record) -> bool:
        """Whether a queued job waits for nothing but its turn: nobody began its attempt, and no pause holds it back."""
        attempt = record.status.attempt
        if (record.id, attempt + 1) not in self._unclaimed:
            return False
        if attempt == 0:
            return True
        key = (record.id, attempt)
        if key not in self._lost_at:
            self._lost_at[key] = became(self._records.store, record, "queued")
        return self._clock() >= self._lost_at[key] + attempts.retry_pause_s(attempt)

    def _prepare(self, record: Record) -> None:
        attempt = record.status.attempt + 1
        change = Change(state="preparing", attempt=attempt)
        self._records.change(record, change, submission_id=attempts.attempt_name(record.id, attempt))
        self._unclaimed.discard((record.id, attempt))
        self._lost_at.pop((record.id, record.status.attempt), None)
        self._hand_job(record.id)

    def _adopt(self) -> None:
        for job_id in self._adoption.look():
            self._hand("jobs", job_id, partial(self._adopt_one, job_id))

    def _adopt_one(self, job_id: str) -> None:
        if self._adoption.adopt(job_id):
            self._look_after(job_id)

    def _purge(self, record: Record) -> None:
        """Remove a deleted job's folder, and files that it stored for a model without publishing them."""
        remove_leftovers(self._storage, *record.output, of=record.id)
        folder = layout.job(record.id)
        self._storage.delete_folder(folder)
        left = next(iter(self._storage.entries(folder)), None)
        if left is not None:
            raise StorageError(f"{left.key} is still there after the deletion")
        self._records.mark_purged(record.id)

    def _keep(self, subjects: Collection[str]) -> None:
        """Forget what is remembered of all jobs but these."""
        subjects = {*subjects, "queue", "adoption"}
        self._supervisor.keep(subjects)
        for subject in list(self._complaints):
            if subject not in subjects:
                self._complaints.pop(subject, None)
        for key in list(self._lost_at):
            if key[0] not in subjects:
                self._lost_at.pop(key, None)
        self._unclaimed -= {key for key in list(self._unclaimed) if key[0] not in subjects}

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
        try:
            self._records.held()
            step()
        except LeaseLostError as error:
            logger.warning("%s: left to the one who has the lease: %s", subject, error)
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
        """Log an error, unless the last round logged the same; `logging.ERROR` and above with the traceback."""
        text = f"{type(error).__name__}: {error}"
        if self._complaints.get(subject) != text:
            self._complaints[subject] = text
            logger.log(level, "%s: %s; tried again next round", subject, text, exc_info=level >= logging.ERROR)
