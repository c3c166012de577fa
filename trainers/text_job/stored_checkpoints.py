"""Checkpoints in storage: how their files get there, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainers.attempt.fetch import local_copy
from tunesmith.assets.stored_files import describe_files
from tunesmith.jobs.attempts import CheckpointManifest, checkpoint_files, checkpoints
from tunesmith.storage import layout
from tunesmith.storage.base import Storage


def upload_checkpoint(
    storage: Storage,
    folder: Path,
    *,
    job_id: str,
    attempt: int,
    step: int,
    keep: int,
    wait: Callable[[], object] = lambda: None,
) -> None:
    """Store a checkpoint's folder, after `wait` its manifest, and delete the attempt's oldest beyond the newest `keep`.

    One that is there already, from before a restart, stands: steps done again give the same.
    """
    prefix = layout.checkpoint(job_id, attempt, step)
    if not storage.exists(f"{prefix}/manifest.json"):
        files = describe_files(folder)
        storage.upload_folder(folder, prefix)
        wait()
        manifest = CheckpointManifest(step=step, files=files)
        storage.put(layout.checkpoint_manifest(prefix), manifest.model_dump_json(indent=2).encode())
    own = [checkpoint for checkpoint in checkpoints(storage, job_id) if checkpoint.attempt == attempt]
    for old in own[:-keep]:
        # Without its manifest it no longer counts, however far the deletion gets.
        storage.delete(f"{old.key}/manifest.json")
        storage.delete_folder(old.key)


@contextmanager
def newest_checkpoint(storage: Storage, job_id: str) -> Iterator[tuple[int, Path | None]]:
    """Step and local folder of the job's newest whole checkpoint over all attempts; step 0 and None without one."""
    there = checkpoints(storage, job_id)
    if not there:
        yield 0, None
        return
    newest = there[-1]
    with local_copy(storage, checkpoint_files(storage, newest.key)) as folder:
        yield newest.step, folder
