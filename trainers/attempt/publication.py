"""What an attempt publishes: the files of a new version, stored in a folder of their own, and its manifest."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainers.attempt.context import Attempt
from tunesmith.assets import catalog
from tunesmith.assets.catalog import Description, Manifest
from tunesmith.assets.model_folder import refuse_links
from tunesmith.assets.stored_files import File, describe_file
from tunesmith.clock import utc_text
from tunesmith.errors import LeaseLostError, StorageError
from tunesmith.jobs.spec import RegisterJob, TrainJob
from tunesmith.storage import layout
from tunesmith.storage.base import Storage

LOGS = "training_logs"
"""The folder of a model in which the platform says how it was made."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewFiles:
    """What was stored for a new version; it is nothing before a manifest names it."""

    folder: str
    """Beside the manifest."""
    files: Sequence[File]


class Upload:
    """Stores the files of the version that an attempt makes, in a folder that no one else writes to.

    So whatever another attempt, or a worker that was lost and goes on, stores at the same time is part of nothing that
    is published.
    """

    def __init__(self, storage: Storage, job: TrainJob | RegisterJob, attempt: int) -> None:
        self._storage, self._job, self._attempt = storage, job, attempt
        self._folder = layout.new_files_folder(job.id, attempt)
        self._files: list[File] = []

    def add(self, local: Path, path: str) -> None:
        """Store a local file as `path`. LeaseLostError where the attempt was given up for lost meanwhile."""
        refuse_fenced(self._storage, self._job, self._attempt)
        self._storage.upload_file(local, f"{layout.asset_files(*self._job.output, self._folder)}/{path}")
        self._files.append(describe_file(local, path))

    def add_folder(self, folder: Path) -> None:
        """Store all files of a local folder; links are refused (DataError)."""
        refuse_links(folder)
        for local in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.add(local, local.relative_to(folder).as_posix())

    def stored(self) -> NewFiles:
        """What was stored so far."""
        return NewFiles(self._folder, sorted(self._files, key=lambda file: file.path))


def publish(attempt: Attempt, made: NewFiles, about: Description) -> Manifest:
    """Write the manifest of what the attempt has made, once its files are stored; the one that stands.

    LeaseLostError where the attempt was given up for lost, ConflictError where another job has taken the version.
    """
    job, storage = attempt.job, attempt.storage
    refuse_fenced(storage, job, attempt.number)
    kind, name, version = job.output
    manifest = Manifest(
        **dict(about),
        kind=kind,
        name=name,
        version=version,
        folder=made.folder,
        files=list(made.files),
        created_at=utc_text(),
        account=job.account,
        job=job.id,
    )
    standing = catalog.publish(storage, manifest)
    try:
        catalog.remove_leftovers(storage, kind, name, version, of=job.id)
    except StorageError as error:  # they go with the job's folder at the latest
        logger.warning("%s: what earlier attempts stored is not removed yet: %s", job.id, error.message)
    return standing


def refuse_fenced(storage: Storage, job: TrainJob | RegisterJob, attempt: int) -> None:
    """LeaseLostError where the attempt was given up for lost: another one may be at work."""
    if storage.exists(layout.result(job.id, attempt)):
        raise LeaseLostError(f"attempt {attempt} of {job.id} was given up for lost; it publishes nothing")


def write_user_parameters(folder: Path, job: TrainJob, root: str) -> None:
    """Write `training_logs/user_params.json`: every parameter the job ran with; `root` is the storage's URL."""
    name, _, version = job.dataset.partition("@")
    places = {
        "data_url": layout.join(root, layout.asset("dataset", name, int(version))),
        "train_url": layout.join(root, layout.asset(*job.output)),
    }
    given = job.model_dump(include={"hyperparameters", "advanced"})
    parameters = {"method": job.method, **given["advanced"], **given["hyperparameters"]}
    parameters |= {key: url for key, url in places.items() if parameters.get(key) is None}
    file = folder / LOGS / "user_params.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(parameters, indent=2, ensure_ascii=False), encoding="utf-8")
