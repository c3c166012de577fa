"""Models, datasets and checkpoints put straight into a platform's storage, for tests that are not about registering.

What publishes them is the registration itself, in this process: no Ray Job is started for it.
"""

import tempfile
from pathlib import Path
from typing import Literal

from tests.support.ray_fixture import Running
from trainers.attempt.context import Attempt
from trainers.attempt.stop_watch import StopWatch
from trainers.registration.registration import run_registration
from trainers.text_job.checkpoint_manifests import CheckpointManifests
from trainers.text_job.stored_checkpoints import upload_checkpoint
from tunesmith.assets.catalog import get_manifest
from tunesmith.clock import utc_text
from tunesmith.jobs.attempts import EventWriter
from tunesmith.jobs.drafting import draft, new_job_id
from tunesmith.jobs.spec import RegisterJob, RegisterSpec
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage
from tunesmith.storage.folder import FolderStorage


def files_key(storage: Storage, ref: str, kind: Literal["model", "dataset"] = "model") -> str:
    """Where the files of a published version lie: below this key."""
    return get_manifest(storage, kind, ref).stored.prefix


def publish(running: Running, asset: Literal["model", "dataset"], name: str, source: Path) -> str:
    """Publish a folder as the next version of a model or dataset; its `NAME@VERSION`."""
    return publish_in(running.storage, running.settings, asset, name, source)


def publish_in(
    storage: Storage, settings: Settings, asset: Literal["model", "dataset"], name: str, source: Path
) -> str:
    """The same in a storage that no platform is on."""
    spec = RegisterSpec(asset=asset, name=name, source=str(source))
    job = draft(spec, storage=storage, account="operator", job_id=new_job_id(), created_at=utc_text())
    assert isinstance(job, RegisterJob)
    # Its events go elsewhere: the reconciler looks at every job that its storage has a folder of.
    with tempfile.TemporaryDirectory() as scratch, EventWriter(FolderStorage(Path(scratch)), job.id, 1) as events:
        stop = StopWatch(storage, job.id, 1, deadline=None)
        result = run_registration(Attempt(job, 1, storage, settings, events, stop), job)
    assert result.outcome == "completed", result
    return job.output_asset


def save_checkpoint(
    storage: Storage, folder: Path, *, job_id: str = "job-1", attempt: int = 1, step: int, keep: int = 2
) -> None:
    """Store the folder as a whole checkpoint, of which the attempt's newest `keep` stay."""
    upload_checkpoint(storage, folder, job_id=job_id, attempt=attempt, step=step)
    with (
        EventWriter(storage, job_id, attempt) as events,
        CheckpointManifests(storage, job_id, attempt, keep=keep, events=events, flush=lambda: None) as manifests,
    ):
        manifests.add(step)
