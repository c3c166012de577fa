"""What a driver has at hand."""

from __future__ import annotations

from dataclasses import dataclass

from trainers.attempt.stop_watch import StopWatch
from tunesmith.jobs.attempts import EventWriter, attempt_name
from tunesmith.jobs.spec import Job
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage


@dataclass(frozen=True)
class Attempt:
    """The attempt that this process drives."""

    job: Job
    number: int
    storage: Storage
    settings: Settings
    events: EventWriter
    stop: StopWatch

    @property
    def name(self) -> str:
        return attempt_name(self.job.id, self.number)
