"""What is published is what one attempt stored: nothing that another stores, before or after, is part of it."""

from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.stage import make_settings
from trainers.attempt.context import Attempt
from trainers.attempt.fetch import fetch
from trainers.attempt.publication import NewFiles, Upload, publish
from trainers.attempt.stop_watch import StopWatch
from tunesmith.assets.catalog import Description, get_manifest, published, remove_leftovers
from tunesmith.clock import utc_text
from tunesmith.errors import ConflictError, DataError, LeaseLostError
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import EventWriter, Result
from tunesmith.jobs.spec import TrainJob
from tunesmith.storage.folder import FolderStorage

JOB = tiny.train_job(tiny.hyperparameters(), tiny.advanced())


@pytest.fixture
def storage(tmp_path: Path) -> FolderStorage:
    return FolderStorage(tmp_path / "storage")


def attempt(storage: FolderStorage, number: int, job: TrainJob = JOB) -> Attempt:
    settings = make_settings(storage.root.parent / "home")
    stop = StopWatch(storage, job.id, number, deadline=None)
    return Attempt(job, number, storage, settings, EventWriter(storage, job.id, number), stop)


def made(folder: Path, **files: str) -> Path:
    """A folder with these files, whose names' `__` is a slash."""
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def upload(storage: FolderStorage, number: int, folder: Path, job: TrainJob = JOB) -> NewFiles:
    files = Upload(storage, job, number)
    files.add_folder(folder)
    return files.stored()


def lose(storage: FolderStorage, number: int) -> None:
    attempts.finish(storage, JOB.id, number, Result(outcome="lost", time=utc_text()))


def fetched(storage: FolderStorage) -> dict[str, str]:
    folder = fetch(storage, "model", "tuned@1", make_settings(storage.root.parent / "home")).folder
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_lost_attempt_that_goes_on_storing_changes_nothing_that_is_published(
    storage: FolderStorage, tmp_path: Path
) -> None:
    early, late = made(tmp_path / "1", weights="of the first", more="left"), made(tmp_path / "2", weights="of the next")
    first = Upload(storage, JOB, 1)
    first.add(early / "weights", "weights")
    files = upload(storage, 2, late)
    publish(attempt(storage, 2), files, Description())
    # Its driver is fenced, but a worker of it has asked just before.
    first.add(early / "weights", "weights")
    first.add(early / "more", "more")
    assert fetched(storage) == {"weights": "of the next"}
    # A worker of the same attempt that was lost and goes on.
    again = Upload(storage, JOB, 2)
    again.add(early / "weights", "weights")
    assert fetched(storage) == {"weights": "of the next"}
    assert get_manifest(storage, "model", "tuned").folder == files.folder


def test_what_a_lost_attempt_left_is_no_part_of_the_model(storage: FolderStorage, tmp_path: Path) -> None:
    upload(storage, 1, made(tmp_path / "1", weights="old", half="written"))
    lose(storage, 1)
    publish(attempt(storage, 2), upload(storage, 2, made(tmp_path / "2", weights="new", adapter__w="w")), Description())
    assert fetched(storage) == {"weights": "new", "adapter/w": "w"}
    (folder,) = storage.children("models/tuned/1")
    assert folder == get_manifest(storage, "model", "tuned@1").folder


def test_an_attempt_that_was_given_up_stores_and_publishes_nothing(storage: FolderStorage, tmp_path: Path) -> None:
    files = upload(storage, 1, made(tmp_path / "1", weights="old"))
    lose(storage, 1)
    with pytest.raises(LeaseLostError):
        publish(attempt(storage, 1), files, Description())
    with pytest.raises(LeaseLostError):
        upload(storage, 1, tmp_path / "1")
    assert published(storage, *JOB.output, by=JOB.id) is None


def test_the_first_manifest_of_a_job_stands_with_its_own_files(storage: FolderStorage, tmp_path: Path) -> None:
    one = upload(storage, 1, made(tmp_path / "1", weights="one"))
    two = upload(storage, 2, made(tmp_path / "2", weights="two"))
    assert publish(attempt(storage, 1), one, Description()).folder == one.folder
    assert publish(attempt(storage, 2), two, Description()).folder == one.folder
    assert fetched(storage) == {"weights": "one"}


def test_another_jobs_version_is_refused_and_left_alone(storage: FolderStorage, tmp_path: Path) -> None:
    publish(attempt(storage, 1), upload(storage, 1, made(tmp_path / "1", weights="one")), Description())
    other = JOB.model_copy(update={"id": "job-2"})
    files = upload(storage, 1, made(tmp_path / "2", weights="two"), other)
    with pytest.raises(ConflictError, match="published already, by job job-1"):
        publish(attempt(storage, 1, other), files, Description())
    with pytest.raises(ConflictError, match="published already, by job job-1"):
        published(storage, *other.output, by=other.id)
    assert fetched(storage) == {"weights": "one"}
    # What it has stored goes with its folder; what it did not store stays.
    remove_leftovers(storage, *other.output, of=other.id)
    assert storage.children("models/tuned/1") == [get_manifest(storage, "model", "tuned").folder]


def test_a_link_is_not_published(storage: FolderStorage, tmp_path: Path) -> None:
    folder = made(tmp_path / "1", weights="one")
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(DataError, match="is a link"):
        upload(storage, 1, folder)
