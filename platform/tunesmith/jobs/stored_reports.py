"""A job's audit and evaluations, read from what its attempts left in storage."""

from __future__ import annotations

from pathlib import PurePosixPath

from tunesmith.errors import NotFoundError
from tunesmith.jobs.attempts import attempt_numbers
from tunesmith.jobs.audit_report import AuditReport
from tunesmith.jobs.evaluation_record import Evaluation
from tunesmith.storage import layout
from tunesmith.storage.base import Storage


def read_audit(storage: Storage, job_id: str) -> AuditReport:
    """The report of the job's newest attempt that has one. NotFoundError where none has."""
    for attempt in reversed(attempt_numbers(storage, job_id)):
        if storage.exists(key := layout.audit(job_id, attempt)):
            return AuditReport.model_validate_json(storage.get(key))
    raise NotFoundError(
        f"{job_id} has no audit", hint="it is made once the job's rows are tokenised, before training", code="no_audit"
    )


def read_evaluations(storage: Storage, job_id: str, *, after: int = -1, limit: int | None = None) -> list[Evaluation]:
    """Evaluations of a job by their step, those above `after`; of those made again, the newest attempt's."""
    found: dict[int, str] = {}
    for attempt in attempt_numbers(storage, job_id):
        for entry in storage.entries(layout.evaluations(job_id, attempt)):
            found[int(PurePosixPath(entry.key).stem)] = entry.key
    steps = sorted(step for step in found if step > after)[:limit]
    return [Evaluation.model_validate_json(storage.get(found[step])) for step in steps]
