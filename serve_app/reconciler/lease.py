"""The record store as the reconciler may write to it: only while it holds the lease."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tunesmith.errors import LeaseLostError
from tunesmith.jobs.spec import RegisterJob, TrainJob
from tunesmith.jobs.states import Change
from tunesmith.records.store import Lease, Line, Record, RecordStore


class LeasedRecords:
    """Every write checks the lease in its own transaction, so one who lost it changes nothing (LeaseLostError)."""

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
        self._lease: Lease | None = None
        self._renewed_at = 0.0

    def hold(self) -> bool:
        """Take or renew the lease; False while another holds it."""
        self._lease = self.store.acquire_lease(self._name, self._holder, duration_s=self._duration_s)
        self._renewed_at = self._clock()
        return self._lease is not None

    def renew(self) -> None:
        """Keep it through a long round; LeaseLostError where another took it."""
        if self._clock() - self._renewed_at > self._duration_s / 3 and not self.hold():
            raise LeaseLostError(f"the lease {self._name!r} was taken by another")

    def release(self) -> None:
        """Give it back, so that the next need not wait for its end."""
        if self._lease is not None:
            self.store.release_lease(self._lease)
            self._lease = None

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
            lease=self._held(),
            expect=(record.status.state,) if expect is None else expect,
            submission_id=submission_id,
            data=data,
            line=line,
            at=at,
        )

    def adopt(self, job: TrainJob | RegisterJob) -> Record | None:
        return self.store.adopt(job, lease=self._held())

    def _held(self) -> Lease:
        if self._lease is None:
            raise LeaseLostError(f"the lease {self._name!r} is not held")
        return self._lease
