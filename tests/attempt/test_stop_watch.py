"""Why a job is to stop: told as it was written, counted over all attempts, and never invented by an outage."""

import json
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.waiting import until
from trainers.attempt.stop_watch import FENCED, StoppedError, StopWatch, stopped
from trainers.driver import drive
from tunesmith.assets.catalog import Manifest
from tunesmith.clock import utc_text
from tunesmith.errors import LeaseLostError, NotFoundError, StorageError
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import Claim, Result
from tunesmith.jobs.spec import RegisterJob
from tunesmith.jobs.stored_reports import read_audit, read_evaluations
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.patience import PatientStorage

NOW = 1_800_000_000.0
LOST = Result(outcome="lost", reason="worker_lost", time=utc_text(NOW))


class AwayStorage(FolderStorage):
    """A storage that does not answer."""

    def get(self, key: str) -> bytes:
        raise StorageError("away")

    def exists(self, key: str) -> bool:
        raise StorageError("away")


@pytest.fixture
def storage(tmp_path: Path) -> FolderStorage:
    return FolderStorage(tmp_path / "storage")


@pytest.mark.parametrize("reason", ["balance", "preempted", "stopped_by_user"])
def test_a_stop_has_the_reason_that_was_written(storage: FolderStorage, reason: str) -> None:
    watch = StopWatch(storage, "job-1", 1, deadline=None)
    watch.look()
    assert watch.reason is None
    watch.check()
    attempts.request_stop(storage, "job-1", reason)
    with watch.watching():
        until(lambda: watch.reason is not None, limit_s=20)
    assert watch.reason == reason
    with pytest.raises(StoppedError, match=reason):
        watch.check()
    result = stopped(reason, " at step 3", {"steps": 3})
    assert (result.outcome, result.reason, result.summary) == ("stopped", reason, {"steps": 3})


@pytest.mark.parametrize("text", [b"", b"{", b'{"reason": "because", "time": "2026-01-01T00:00:00.000Z"}'])
def test_a_stop_object_without_a_known_reason_is_the_users(storage: FolderStorage, text: bytes) -> None:
    storage.put(layout.stop("job-1"), text)
    watch = StopWatch(storage, "job-1", 1, deadline=None)
    watch.look()
    assert watch.reason == "stopped_by_user"


def test_a_storage_that_is_away_stops_no_job_and_gives_none_more_time(tmp_path: Path) -> None:
    away, now = PatientStorage(AwayStorage(tmp_path), patience_s=600), NOW
    watch = StopWatch(away, "job-1", 1, deadline=NOW + 10, clock=lambda: now)
    watch.look()
    assert watch.reason is None
    now = NOW + 10
    assert watch.reason == "time_limit"
    watch.look()
    assert watch.reason == "time_limit"


def test_a_fenced_attempt_neither_saves_nor_publishes_whatever_else_is_wished(storage: FolderStorage) -> None:
    watch = StopWatch(storage, "job-1", 1, deadline=None)
    attempts.request_stop(storage, "job-1")
    watch.look()
    assert watch.reason == "stopped_by_user"
    attempts.finish(storage, "job-1", 1, LOST)
    watch.look()
    assert watch.reason == FENCED
    with pytest.raises(LeaseLostError):
        stopped(FENCED, "")


def test_the_time_of_a_job_counts_over_all_its_attempts(tmp_path: Path, storage: FolderStorage) -> None:
    settings = Settings.from_env({"TUNESMITH_HOME": str(tmp_path), "TUNESMITH_STORAGE_URL": storage.url})
    job = tiny.train_job(tiny.hyperparameters(), tiny.advanced()).model_copy(update={"max_run_time_s": 100})
    storage.put(layout.job_json(job.id), job.model_dump_json().encode())
    for attempt, took_s in ((1, 60), (2, 40)):
        claimed = Claim(submission_id=None, time=utc_text(NOW))
        assert attempts.claim(storage, job.id, attempt, claimed)
        attempts.finish(storage, job.id, attempt, LOST.model_copy(update={"time": utc_text(NOW + took_s)}))
    storage.put(f"{layout.checkpoint(job.id, 1, 5)}/manifest.json", b"{}")
    assert attempts.used_s(storage, job.id, before=2) == 60
    assert attempts.used_s(storage, job.id, before=3) == 100
    drive(layout.join(storage.url, layout.job_json(job.id)), 3, settings)
    result = attempts.read_result(storage, job.id, 3)
    assert result is not None
    assert (result.outcome, result.reason) == ("stopped", "time_limit")
    assert result.message == "its time limit was reached before attempt 3 began, with the checkpoint of step 5"


def test_an_account_written_into_job_json_owns_nothing(tmp_path: Path, storage: FolderStorage) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    settings = Settings.from_env(
        {
            "TUNESMITH_HOME": str(tmp_path / "home"),
            "TUNESMITH_STORAGE_URL": storage.url,
            "TUNESMITH_ACCOUNT": "team",
            "TUNESMITH_IMPORT_ROOTS": str(source),
        }
    )
    job = RegisterJob(
        id="job-1",
        account="mallory",
        name="data",
        asset="dataset",
        source=str(source),
        output_asset="data@1",
        created_at=utc_text(NOW),
    )
    storage.put(layout.job_json(job.id), job.model_dump_json().encode())
    assert drive(layout.join(storage.url, layout.job_json(job.id)), 1, settings) == 0
    manifest = Manifest.model_validate_json(storage.get(layout.asset_manifest("dataset", "data", 1)))
    assert manifest.account == "team"


def test_a_stray_folder_among_the_attempts_is_none(storage: FolderStorage) -> None:
    for name in ("notes", "0", "01", "²", "1", "10", "2"):
        storage.put(f"{layout.attempts('job-1')}/{name}/file", json.dumps(name).encode())
    assert attempts.attempt_numbers(storage, "job-1") == [1, 2, 10]
    assert read_evaluations(storage, "job-1") == []
    with pytest.raises(NotFoundError):
        read_audit(storage, "job-1")
