"""Checkpoints in storage, put there as a worker and its driver do together."""

from pathlib import Path

from trainers.text_job.checkpoint_manifests import CheckpointManifests
from trainers.text_job.stored_checkpoints import upload_checkpoint
from tunesmith.jobs.attempts import EventWriter
from tunesmith.storage.base import Storage


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
