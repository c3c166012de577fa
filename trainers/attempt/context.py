"""What a driver has at hand."""

from __future__ import annotations

from dataclasses import dataclass

from trainers.attempt.stop_watch import StopWatch
from tunesmith.assets.catalog import Manifest
from tunesmith.errors import ConflictError
from tunesmith.jobs.attempts import EventWriter, attempt_name
from tunesmith.jobs.spec import Job
from tunesmith.settings import Settings
from tunesmith.storage import layout
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


def published(storage: Storage, job: Job) -> Manifest | None:
    """The manifest of what the job makes, where this very job published it already.

    ConflictError where another job did: what this one makes would have no place.
    """
    key = layout.asset_manifest(*job.output)
    if not storage.exists(key):
        return None
    manifest = Manifest.model_validate_json(storage.get(key))
    if manifest.job != job.id:
        raise ConflictError(
            f"{manifest.kind} {manifest.ref} was published already, by job {manifest.job}",
            hint="order or render the job again: it gets a version of its own",
        )
    return manifest
