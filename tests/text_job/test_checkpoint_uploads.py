"""Checkpoints reach storage beside the training: whole, in their order, through storage's troubles."""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.s3_server import BUCKET, endpoint, free_ports, s3_keys, s3_process
from tests.support import workers
from tests.support.waiting import until
from trainers.text_job.checkpoint_uploads import Uploads
from tunesmith.errors import StorageError
from tunesmith.jobs.evaluation_record import Evaluation
from tunesmith.jobs.stored_reports import read_evaluations
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.patience import PatientStorage
from tunesmith.storage.urls import open_storage


class Troubled(FolderStorage):
    """A folder that takes a file only when `permits` has no objection."""

    def __init__(self, root: Path, permits: Callable[[str], None]) -> None:
        super().__init__(root)
        self._permits = permits

    def upload_file(self, path: Path, key: str) -> None:
        self._permits(key)
        super().upload_file(path, key)

    def put(self, key: str, data: bytes) -> None:
        self._permits(key)
        super().put(key, data)


def made(tmp_path: Path, step: int) -> Path:
    folder = tmp_path / f"made-{step}"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_bytes(str(step).encode() * 1000)
    (folder / "state.json").write_text(f'{{"step": {step}}}')
    return folder


def uploads(storage: Storage, **options: Any) -> Uploads:
    return Uploads(storage, **{"job_id": f"job-{os.getpid()}", "attempt": 1, "keep": 2, **options})


def evaluated(step: int) -> Evaluation:
    return Evaluation(step=step, rows=1, loss=1.0, perplexity=2.7, scores={}, answers=[])


def steps(storage: Storage) -> list[int]:
    """Those whose files are all stored."""
    prefix = layout.checkpoints(f"job-{os.getpid()}", 1)
    there = [int(step) for step in storage.children(prefix)]
    return sorted(step for step in there if storage.exists(layout.checkpoint_list(f"{prefix}/{step}")))


def test_checkpoints_are_stored_whole_and_told_of_once(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "storage")
    with uploads(storage) as beside:
        for step in (10, 20, 30):
            beside.add_checkpoint(step, made(tmp_path, step))
            until(lambda step=step: step in steps(storage))  # type: ignore[misc]
    assert steps(storage) == [10, 20, 30]
    key = layout.checkpoint(f"job-{os.getpid()}", 1, 30)
    assert storage.get(f"{key}/adapter/weights") == b"30" * 1000
    assert not list(tmp_path.glob("made-*"))
    assert (beside.uploaded(), beside.uploaded(), beside.troubles()) == ([10, 20, 30], [], [])


def test_what_is_stored_again_is_not_listed_before_it_is_whole(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "storage")
    with uploads(storage) as beside:
        beside.add_checkpoint(10, made(tmp_path, 10))
    refused = Troubled(tmp_path / "storage", _refuses("state.json"))
    with uploads(refused) as again:
        again.add_checkpoint(10, made(tmp_path, 10))
    assert (steps(storage), again.uploaded()) == ([], [])


def _refuses(part: str) -> Callable[[str], None]:
    def permits(key: str) -> None:
        if part in key:
            raise StorageError("away")

    return permits


def test_nothing_waits_for_storage_and_few_wait_for_it(tmp_path: Path) -> None:
    answers, asked = threading.Event(), threading.Event()

    def permits(key: str) -> None:
        asked.set()
        answers.wait()

    storage = Troubled(tmp_path / "storage", permits)
    with uploads(storage) as beside:
        beside.add_checkpoint(1, made(tmp_path, 1))
        asked.wait()
        for step in range(2, 7):
            beside.add_checkpoint(step, made(tmp_path, step))
        assert steps(storage) == []
        answers.set()
    # The first was under way; the two newest waited.
    assert beside.uploaded() == [1, 5, 6]
    assert steps(storage) == [1, 5, 6]


def test_what_is_refused_is_tried_again_and_stored_whole(tmp_path: Path) -> None:
    refusals = iter([StorageError("away")] * 9)

    def permits(key: str) -> None:
        for refusal in refusals:
            raise refusal

    storage = Troubled(tmp_path / "storage", permits)
    with uploads(PatientStorage(storage, patience_s=60, pause=lambda _: None)) as beside:
        beside.add_checkpoint(1, made(tmp_path, 1))
        beside.add_evaluation(evaluated(1))
    assert steps(storage) == [1]
    assert next(refusals, None) is None
    assert read_evaluations(storage, f"job-{os.getpid()}") == [evaluated(1)]


def test_an_evaluation_that_cannot_be_stored_is_said_and_the_next_one_is(tmp_path: Path) -> None:
    def permits(key: str) -> None:
        if "evaluations/1" in key:
            raise StorageError("away")

    storage = Troubled(tmp_path / "storage", permits)
    with uploads(storage) as beside:
        beside.add_evaluation(evaluated(1))
        beside.add_evaluation(evaluated(2))
    assert [event.message for event in beside.troubles()] == ["evaluation of step 1 could not be stored: away"]
    assert read_evaluations(storage, f"job-{os.getpid()}") == [evaluated(2)]


@pytest.mark.parametrize("trouble", [StorageError("away"), OSError("no such disk")])
def test_one_that_cannot_be_stored_is_said_and_the_next_one_is(tmp_path: Path, trouble: Exception) -> None:
    def permits(key: str) -> None:
        if "checkpoints/1/state" in key:
            raise trouble

    storage = Troubled(tmp_path / "storage", permits)
    with uploads(storage) as beside:
        beside.add_checkpoint(1, made(tmp_path, 1))
        beside.add_checkpoint(2, made(tmp_path, 2))
    assert [event.message for event in beside.troubles()] == [f"checkpoint of step 1 could not be stored: {trouble}"]
    assert beside.uploaded() == [2]
    # What there is of the first is not listed, so it will not count.
    assert steps(storage) == [2]


def _killed_with_a_checkpoint_under_way(tmp_path: Path, job_id: str) -> None:
    def permits(key: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with uploads(Troubled(tmp_path / "storage", permits), job_id=job_id) as beside:
        beside.add_checkpoint(7, made(tmp_path, 7))


def test_what_a_killed_worker_left_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    storage, job_id = FolderStorage(tmp_path / "storage"), f"job-{os.getpid()}"
    assert workers.exit_code(_killed_with_a_checkpoint_under_way, tmp_path, job_id) == -signal.SIGKILL
    left = list(Path(tempfile.gettempdir()).glob(f"tunesmith-{job_id}-*/7"))
    assert len(left) == 1
    with uploads(storage) as beside:
        beside.add_checkpoint(8, made(tmp_path, 8))
    assert steps(storage) == [8]
    assert not left[0].exists()


@pytest.mark.s3
def test_a_server_that_is_killed_for_a_while_costs_no_checkpoint(tmp_path: Path) -> None:
    server, ports = tmp_path / "server", free_ports(8)
    server.mkdir()
    with s3_keys():
        storage = open_storage(
            f"s3://{BUCKET}/outage",
            Settings.from_env({"TUNESMITH_S3_ENDPOINT": endpoint(ports), "TUNESMITH_HOME": str(tmp_path)}),
        )
        refused = threading.Event()

        def pause(_: float) -> None:
            refused.set()
            time.sleep(0.2)

        with uploads(PatientStorage(storage, patience_s=120, pause=pause), keep=5) as beside:
            with s3_process(server, ports):
                beside.add_checkpoint(1, made(tmp_path, 1))
                until(lambda: 1 in steps(storage))
            for step in range(2, 6):
                beside.add_checkpoint(step, made(tmp_path, step))
            assert refused.wait(120)
            with s3_process(server, ports):
                until(lambda: beside.uploaded()[-1:] == [5])
        with s3_process(server, ports):
            # The server answers before it has found all of its volumes again.
            there = PatientStorage(storage, patience_s=60)
            assert steps(there) == [1, 2, 3, 4, 5]
            for step in range(1, 6):
                key = layout.checkpoint(f"job-{os.getpid()}", 1, step)
                assert there.get(f"{key}/adapter/weights") == str(step).encode() * 1000
