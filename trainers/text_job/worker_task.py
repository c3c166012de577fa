"""What the driver hands to every worker. It is light to import: the driver and Ray Train's controller hold it too."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.jobs.attempts import Checkpoint
from tunesmith.jobs.spec import TextJob


@dataclass(frozen=True)
class WorkerTask:
    """A worker's part in a run of the workers."""

    job: TextJob
    attempt: int
    root: str
    """URL of the storage that holds the job's folder."""
    deadline: float | None
    """When the job's time is up, seconds since the epoch."""
    run: str
    """Name of this run of the workers: a restart's is another."""
    resume_from: Checkpoint | None
    """What all workers go on from; None: they begin with the first step."""
