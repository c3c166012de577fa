"""A worker that hangs says where it stands, once, and one that goes on is left alone."""

import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.waiting import until
from trainers.text_job.watchdog import HUNG, Watchdog, stacks
from tunesmith.storage import layout
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.segments import read_segments

HANGS = """
import logging, sys, threading
from pathlib import Path
from trainers.attempt.logs import log_to_job
from trainers.text_job import watchdog
from trainers.text_job.watchdog import Watchdog, end_hung
from tunesmith.errors import StorageError
from tunesmith.storage.patience import PatientStorage
from tunesmith.settings import Settings
from tunesmith.storage.folder import FolderStorage


class Away(FolderStorage):
    def put(self, key, data):
        raise StorageError("away")


def tell():
    Path(sys.argv[2]).touch()
    threading.Event().wait()


watchdog.FAREWELL_S = 1.0
kind = Away if sys.argv[3] == "away" else FolderStorage
storage = PatientStorage(kind(Path(sys.argv[1])), patience_s=600)
settings = Settings.from_env({"TUNESMITH_HOME": sys.argv[1], "TUNESMITH_SEGMENT_S": "600"})
with (
    log_to_job(storage, "job-1", 1, rank="0", settings=settings),
    Watchdog(0.1, lambda where: end_hung(where, 0.1, tell)),
):
    threading.Event().wait()
"""


def test_a_hang_is_said_once_with_the_stack_of_every_thread() -> None:
    said: queue.Queue[str] = queue.Queue()
    held = threading.Event()

    def waits_here_for_ever() -> None:
        held.wait()

    other = threading.Thread(target=waits_here_for_ever, name="loader")
    other.start()
    with Watchdog(0.05, said.put):
        text = said.get(timeout=60)
        until(lambda: "watchdog" not in {thread.name for thread in threading.enumerate()}, limit_s=60)
    held.set()
    other.join()
    assert "thread loader:" in text
    assert "waits_here_for_ever" in text
    assert "test_a_hang_is_said_once_with_the_stack_of_every_thread" in text
    assert said.empty()


def test_work_that_goes_on_is_left_alone() -> None:
    """Each time the watchdog looks, less than its time has passed since the last beat, and more since the first."""
    said: list[str] = []
    seconds, looks = 0.0, 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return seconds

    with Watchdog(0.01, said.append, clock=clock) as watchdog:
        for _ in range(5):
            watchdog.beat()
            seconds += 0.008
            before = looks
            until(lambda before=before: looks >= before + 4, limit_s=10)  # type: ignore[misc]
            watchdog.beat()
    assert said == []


def test_stacks_name_the_threads() -> None:
    assert "thread MainThread:" in stacks()


@pytest.mark.parametrize("storage", ["there", "away"])
def test_a_worker_that_hangs_ends_within_a_bound_whatever_it_hangs_on(tmp_path: Path, storage: str) -> None:
    command = [sys.executable, "-c", HANGS, str(tmp_path), str(tmp_path / "told"), storage]
    path = os.pathsep.join(path for path in sys.path if path)
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == HUNG
    assert (tmp_path / "told").exists()
    assert "no progress for 0.1 s, this worker ends; it stood here:" in done.stderr
    assert "threading.Event().wait()" in done.stderr or 'File "<string>"' in done.stderr
    logged = b"".join(segment.data for segment in read_segments(FolderStorage(tmp_path), layout.logs("job-1", 1, "0")))
    assert (b"no progress for 0.1 s" in logged) == (storage == "there")
