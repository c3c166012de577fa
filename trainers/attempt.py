"""What a driver has at hand."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith import layout
from tunesmith.attempts import EventWriter
from tunesmith.catalog import Manifest
from tunesmith.orders import output
from tunesmith.settings import Settings
from tunesmith.spec import RegisterJob, TrainJob
from tunesmith.storage import Storage


@dataclass(frozen=True)
class Attempt:
    """The attempt that this process drives."""

    job: TrainJob | RegisterJob
    number: int
    storage: Storage
    settings: Settings
    events: EventWriter

    @property
    def name(self) -> str:
        return f"{self.job.id}-a{self.number}"


def published(storage: Storage, job: TrainJob | RegisterJob) -> Manifest | None:
    """The manifest of what the job makes, where this very job published it already."""
    key = layout.asset_manifest(*output(job))
    if not storage.exists(key):
        return None
    manifest = Manifest.model_validate_json(storage.get(key))
    return manifest if manifest.job == job.id else None
