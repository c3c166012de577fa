"""From a spec to a job: every name looked up, every rule checked, every default filled in.

Used alike by the front door and by `tunesmith jobs render`; reads manifests from storage and nothing else.
"""

from __future__ import annotations

from tunesmith.settings import Settings
from tunesmith.spec import RegisterJob, RegisterSpec, TrainJob, TrainSpec
from tunesmith.storage import Storage


def new_job_id() -> str:
    """A new job's id: `job-` and 16 characters that grow with time."""
    raise NotImplementedError


def draft(
    spec: TrainSpec | RegisterSpec, *, storage: Storage, settings: Settings, account: str, job_id: str, created_at: str
) -> TrainJob | RegisterJob:
    """Check `spec` and fill it in; the output's version is one above the newest in storage.

    Raises SpecError (also DataError for a dataset without the named columns) that says what was given, what is allowed
    and what to do.
    """
    raise NotImplementedError


def with_version(job: TrainJob | RegisterJob, version: int) -> TrainJob | RegisterJob:
    """The same job, with another version of its output."""
    raise NotImplementedError
