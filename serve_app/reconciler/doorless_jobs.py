"""Jobs that were started without a door: taken in where they are."""

from __future__ import annotations

import logging
from collections.abc import Callable

from serve_app.reconciler.lease import LeasedRecords
from tunesmith.errors import ConflictError, SpecError
from tunesmith.jobs.spec import parse_job
from tunesmith.storage import layout
from tunesmith.storage.base import Storage

PAUSE_S = 10.0
"""Pause between two looks, seconds."""

logger = logging.getLogger(__name__)


class Adoption:
    """Finds job folders that are claimed and that no record knows."""

    def __init__(self, records: LeasedRecords, storage: Storage, *, account: str, clock: Callable[[], float]) -> None:
        self._records = records
        self._storage = storage
        self._account = account
        self._clock = clock
        self._looked_at: float | None = None
        self.unknown: frozenset[str] = frozenset()
        """Folders that no record knew at the last look."""
        self._refused: set[str] = set()
        """Those of them that hold no job which could be adopted; said once."""

    def is_due(self) -> bool:
        return self._looked_at is None or self._clock() - self._looked_at >= PAUSE_S

    def look(self) -> frozenset[str]:
        """The folders that may have to be adopted."""
        now = self._clock()
        self.unknown = frozenset(self._storage.children("jobs")) - self._records.store.known_ids()
        self._refused.intersection_update(self.unknown)
        self._looked_at = now
        return self.unknown - self._refused

    def adopt(self, job_id: str) -> bool:
        """Record the job of a folder; False where nobody has claimed it yet."""
        if not self._storage.exists(layout.claim(job_id, 1)):
            return False
        job = parse_job(self._storage.get(layout.job_json(job_id)))
        if job.id != job_id:
            self._refused.add(job_id)
            raise SpecError(f"jobs/{job_id}/job.json is of job {job.id}")
        # Who wrote the file is not known: it goes on the operator's account, whatever it says.
        record = self._records.adopt(job.model_copy(update={"account": self._account}))
        if record is None:
            self._refused.add(job_id)
            raise ConflictError("the version it makes is another job's")
        logger.info("%s: adopted, it was started without a door", job_id)
        return True
