"""The record store as the reconciler may write to it: only while it holds the lease."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tunesmith.errors import LeaseLostError
from tunesmith.jobs.spec import RegisterJob, TrainJob
from tunesmith.jobs.states import Change
from tunesmith.records.record import Lease, Line, Record
from tunesmith.records.store import RecordStore


class LeasedRecords:
    """Every write checks the lease in its own transaction, so one who lost it changes nothing (LeaseLostError).

    One thread holds the lease, by `hold`; any number of threads write.
    """

    def __init__(
        self,
        store: RecordStore,
        name: str,
        *,
        holder: str,
        duration_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self._name = name
        self._holder = holder
        self._duration_s = duration_s
        self._clock = clock
        self._lease: tuple[Lease, float] | None = None
        """The lease, and when it ends unless it is renewed."""

    def hold(self) -> bool:
        """Take the lease, or renew it where a third of its time is over; False while another holds it."""
        now = self._clock()
        if self._lease is not None and self._lease[1] - now > self._duration_s * 2 / 3:
            return True
        lease = self.store.acquire_lease(self._name, self._holder, duration_s=self._duration_s)
        self._lease = None if lease is None else (lease, now + self._duration_s)
        return lease is not None

    def held(self) -> Lease:
        """The lease; LeaseLostError where it is not held. Call it before work that no transaction guards."""
        held = self._lease
        if held is None or held[1] <= self._clock():
            raise LeaseLostError(f"the lease {self._name!r} is not held")
        return held[0]

    def release(self) -> None:
        """Give it back, so that the next need not wait for its end."""
        held, self._lease = self._lease, None
        if held is not None:
            self.store.release_lease(held[0])

    def change(
        self,
        record: Record,
        change: Change,
        *,
        submission_id: str | None = None,
        data: Mapping[str, Any] | None = None,
        line: Line | None = None,
        at: str | None = None,
        expect: Collection[str] | None = None,
    ) -> Record:
        """Change a job; ConflictError where its state is no longer the record's (or among `expect`)."""
        return self.store.change(
            record.id,
            change,
            lease=self.held(),
            expect=(record.status.state,) if expect is None else expect,
            submission_id=submission_id,
            data=data,
            line=line,
            at=at,
        )

    def adopt(self, job: TrainJob | RegisterJob) -> Record | None:
        return self.store.adopt(job, lease=self.held())

    def mark_purged(self, job_id: str) -> None:
        self.store.mark_purged(job_id, lease=self.held())
