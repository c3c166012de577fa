"""Checkpoints in storage, from a worker's side: how their files get there, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainers.attempt.fetch import local_copy
from tunesmith.assets.stored_files import describe_files
from tunesmith.jobs.attempts import Checkpoint, CheckpointManifest, checkpoint_files
from tunesmith.storage import layout
from tunesmith.storage.base import Storage


def upload_checkpoint(storage: Storage, folder: Path, *, job_id: str, attempt: int, step: int) -> None:
    """Store the files of a checkpoint and then the list of them. It counts once the driver has made it a manifest.

    One that counts already, from before a restart, stands: steps done again give the same.
    """
    prefix = layout.checkpoint(job_id, attempt, step)
    if storage.exists(layout.checkpoint_manifest(prefix)):
        return
    # A worker that was lost may have left its own: it is not the list of what is stored now.
    storage.delete(layout.checkpoint_list(prefix))
    listed = CheckpointManifest(step=step, files=describe_files(folder))
    storage.upload_folder(folder, prefix)
    storage.put(layout.checkpoint_list(prefix), listed.model_dump_json(indent=2).encode())


@contextmanager
def checkpoint_copy(storage: Storage, checkpoint: Checkpoint | None) -> Iterator[Path | None]:
    """The local folder of a whole checkpoint, its files checked; None where there is none to go on from."""
    if checkpoint is None:
        yield None
        return
    with local_copy(storage, checkpoint_files(storage, checkpoint.key)) as folder:
        yield folder
