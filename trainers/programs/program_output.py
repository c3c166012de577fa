"""What a program leaves: its output, kept while it runs and stored at its end as the new model or with the job."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trainers.attempt.fetch import Fetched, fetch
from trainers.attempt.publication import LOGS, NewFiles, Upload, refuse_fenced, write_user_parameters
from trainers.isolation import outputs
from trainers.programs.program_task import ProgramTask
from trainers.registration.model_check import look_for_language_model
from tunesmith import caches
from tunesmith.assets.cards import FILE as CARD
from tunesmith.assets.gallery import FOLDER
from tunesmith.errors import NotFoundError, TunesmithError
from tunesmith.file_names import folded
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.storage.urls import open_patiently

COPY_S = 30.0
"""Between two looks for new files in the output, which are then kept in storage."""

RESERVED = (FOLDER, LOGS, CARD, "manifest.json")
"""What the platform alone says of a model, as files or folders: no program's output may have these names."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """What became of an output."""

    files: NewFiles
    overridden: list[str]
    """Files of the output with names that the platform, or the base model's training, has for its own."""
    left_out: list[str]
    """Links, pipes and the like, and what has a name that storage has no key for."""
    language_model: bool


def publish_output(worker: ProgramTask) -> Published:
    """Store the output as the new model's files.

    What the base model has for its training goes with it as it is, and what the platform says of the run beside it;
    nothing of the output takes the place of either.
    """
    settings = Settings.from_env()
    storage = open_patiently(worker.storage_url, settings)
    refuse_fenced(storage, worker.job, worker.attempt)
    base = fetch(storage, "model", worker.job.model, settings)
    own = worker.folder(settings) / "own"
    _write_own(worker, base, own, storage)
    kept = set(outputs.walk(own).files)
    upload = Upload(storage, worker.job, worker.attempt)
    folder = worker.folder(settings) / "output"

    is_taken = _place_of({*RESERVED, *kept})
    _, left_out = outputs.store(folder, upload.add, leave_out=is_taken)
    outputs.store(own, upload.add)
    overridden = [path for path in left_out if is_taken(path)]
    others = [path for path in left_out if not is_taken(path)]
    language_model = not others and look_for_language_model(folder, settings=settings)[1]
    return Published(upload.stored(), overridden, others, language_model)


def _place_of(names: Collection[str]) -> Callable[[str], bool]:
    """Whether a file at a path would stand where one of the names does, or be its folder, or lie in it.

    Names that some file system takes for the same are the same.
    """
    own = {folded(name) for name in names}
    folders = {parent.as_posix() for name in own for parent in PurePosixPath(name).parents}

    def is_taken(path: str) -> bool:
        given = PurePosixPath(folded(path))
        return str(given) in folders or any(each.as_posix() in own for each in (given, *given.parents))

    return is_taken


def drop_output(worker: ProgramTask) -> None:
    """Remove what is left of the output once the new model is published."""
    settings = Settings.from_env()
    open_patiently(worker.storage_url, settings).delete_folder(layout.program_output(worker.job.id, worker.attempt))
    _clean(worker, settings)


def keep_output(worker: ProgramTask) -> list[str]:
    """Store what a run that made no model has left as the attempt's own; the paths. None of more than is allowed."""
    settings = Settings.from_env()
    storage, prefix = open_patiently(worker.storage_url, settings), layout.program_output(worker.job.id, worker.attempt)
    folder = worker.folder(settings) / "output"
    kept: list[str] = []
    if outputs.fits(folder, size_bytes=settings.program_disk_gib << 30):
        kept, _ = outputs.store(folder, lambda local, path: storage.upload_file(local, f"{prefix}/{path}"))
    else:
        storage.delete_folder(prefix)
    _clean(worker, settings)
    return kept


def restore_output(worker: ProgramTask, storage: Storage, folder: Path) -> int:
    """Bring back what the newest earlier attempt has written; the number of files."""
    for number in range(worker.attempt - 1, 0, -1):
        key = layout.program_output(worker.job.id, number)
        if any(True for _ in storage.entries(key)):
            storage.download_folder(key, folder)
            return len(outputs.walk(folder).files)
    return 0


@contextmanager
def output_kept(worker: ProgramTask, storage: Storage, folder: Path, settings: Settings) -> Iterator[None]:
    """While the context lasts, keep a copy of worker 0's output in storage, beside the training."""
    if worker.rank != 0:
        yield
        return
    key = layout.program_output(worker.job.id, worker.attempt)
    copy, done = outputs.Copy(storage, folder, key, size_bytes=settings.program_disk_gib << 30), threading.Event()

    def keep() -> None:
        while not done.wait(min(COPY_S, 6 * settings.segment_s)):
            try:
                copy.update(done.is_set)
            except (TunesmithError, OSError) as error:
                logger.warning("%s: the output is kept later: %s", worker.job.id, error)

    thread = threading.Thread(target=keep, name="output", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _clean(worker: ProgramTask, settings: Settings) -> None:
    """After the last worker: remove what the run has left on this node."""
    caches.delete(worker.folder(settings))
    worker.network_file(settings).unlink(missing_ok=True)


def _write_own(worker: ProgramTask, base: Fetched, own: Path, storage: Storage) -> None:
    """The files of the new model that are not the program's."""
    job, gallery = worker.job, base.manifest.gallery
    shutil.copytree(base.folder / FOLDER, own / FOLDER)
    for name in ("README.md", *(gallery.needed_files if gallery is not None else ())):
        if (base.folder / name).is_file():
            (own / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.folder / name, own / name)
    write_user_parameters(own, job, worker.storage_url)
    for key in (layout.requirements_lock(job.id, worker.attempt), layout.image_lock(job.id, worker.attempt)):
        with suppress(NotFoundError):
            (own / LOGS / key.rpartition("/")[2]).write_bytes(storage.get(key))
