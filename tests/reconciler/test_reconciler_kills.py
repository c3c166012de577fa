"""kill -9 of the reconciler between any two of its writes: every job still ends as it would have, and only once."""

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve_app.reconciler.attempt_supervisor import ENDED_S
from serve_app.reconciler.launcher import ALIVE
from tests.support.stage import NOW, FakeDriver, Stage, line, play_round
from tunesmith.jobs.states import FINAL, replay
from tunesmith.records.record import Record
from tunesmith.storage import layout

WRITES = {
    *("change", "adopt", "mark_purged", "release_lease"),
    *("put", "put_if_absent", "delete", "delete_folder"),
    *("submit", "stop"),
}
"""Calls that leave something. To be killed elsewhere is to be killed before the next of these."""

ROUNDS = 60

Reaches = tuple[str, list[str], list[str], list[str]]
"""Of one job: name, states it went through, what its drivers said, submissions."""


class Mortal:
    """An object whose owner is killed before the k-th write of all."""

    def __init__(self, target: Any, before_write: Callable[[], None]) -> None:
        self._target = target
        self._before_write = before_write

    def __getattr__(self, name: str) -> Any:
        if name in WRITES:
            self._before_write()
        return getattr(self._target, name)


class Life:
    """Counts writes, and ends the process at the one it is told."""

    def __init__(self, kill_at: int | None) -> None:
        self.writes = 0
        self.kill_at = kill_at
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.writes += 1
            if self.writes == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


def in_a_process(play: Callable[[], None]) -> int:
    """The signal that ended a child which ran `play`, 0 where none did; a child that fails fails the test."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            play()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.waitstatus_to_exitcode(status) == 0
    return 0


def prepare(home: Path) -> None:
    """One job for each way a job can go."""
    stage = Stage(home)
    for name in ("plain", "lost", "never-begun", "published", "stopped"):
        stage.order(output_model=name)
    stage.order(kind="register", name="registered", source="/x")
    removed = stage.order(output_model="removed")
    stage.storage.put(layout.job_json(removed.id), b"{}")
    stage.store.request_stop(removed.id)
    stage.store.delete(removed.id)
    job = stage.draft(output_model="by-hand")
    stage.storage.put(layout.job_json(job.id), job.model_dump_json().encode())
    driver = FakeDriver(stage.storage, job)
    driver.claim("raysubmit_1")
    driver.say(line(state="running", message="running"))
    driver.publish()
    driver.finish("completed")


def drive(stage: Stage, record: Record, submission_id: str) -> None:
    """What the driver of a submission does, all at once, as its job's name says."""
    name, attempt = record.job.name, int(submission_id.rpartition("-a")[2])
    driver = FakeDriver(stage.storage, record.job, attempt)
    if name == "never-begun" and attempt == 1:
        stage.launcher.tell(submission_id, "FAILED")
        return
    if name == "stopped" and record.status.state == "stopping":
        if stage.storage.exists(layout.stop(record.id)):
            driver.finish("stopped", reason="stopped_by_user")
            stage.launcher.tell(submission_id, "SUCCEEDED")
        return
    if name == "stopped" and record.status.state == "running":
        stage.store.request_stop(record.id)
        return
    if not driver.claim():
        return
    driver.say(line(phase="fetch", message="fetch"), line(state="running", message=f"running {attempt}"))
    if name == "stopped":
        return
    if name == "lost" and attempt == 1:
        stage.launcher.tell(submission_id, "FAILED")
        return
    driver.publish()
    if name != "published":
        driver.finish("completed")
    stage.launcher.tell(submission_id, "SUCCEEDED")


def run_rounds(home: Path, life: Life, start: float) -> None:
    """A reconciler's life, with drivers and a user beside it, until there is nothing left to do."""
    stage = Stage(home)
    stage.clock.seconds = start
    stage.launcher.resources = {"CPU": 8.0}
    reconciler = stage.new_reconciler(
        f"born {start}",
        store=Mortal(stage.store, life),
        storage=Mortal(stage.storage, life),
        launcher=Mortal(stage.launcher, life),
    )
    for _ in range(ROUNDS):
        play_round(reconciler)
        stage.clock.seconds += ENDED_S
        records = stage.store.page(limit=100)
        for record in records:
            for submission_id, job in stage.launcher.jobs().items():
                if submission_id.startswith(record.id) and job["status"] in ALIVE:
                    drive(stage, stage.store.get(record.id), submission_id)
        if all(record.status.state in FINAL for record in records) and not stage.store.deleted_unpurged():
            reconciler.close()
            return
    raise AssertionError("jobs are left that do not end")


def reached(home: Path) -> list[Reaches]:
    stage = Stage(home)
    found = []
    for record in stage.store.page(limit=100):
        events = stage.store.events(record.id)
        assert replay(event.change for event in events) == record.status
        states = [event.change.state for event in events if event.change.state]
        said = [event.change.message or "" for event in events if (event.change.message or "").startswith(("run", "f"))]
        submissions = [name.removeprefix(record.id) for name in stage.launcher.jobs() if name.startswith(record.id)]
        found.append((record.job.name, states, said, submissions))
    assert sum(1 for _ in stage.storage.entries("models")) == 1 + 5  # the base, and one of each that completed
    assert sum(1 for _ in stage.storage.entries("datasets")) == 1 + 1
    return sorted(found)


@pytest.mark.slow
def test_a_reconciler_killed_between_any_two_writes_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    in_a_process(lambda: prepare(tmp_path / "prepared"))
    shutil.copytree(tmp_path / "prepared", tmp_path / "whole")
    in_a_process(lambda: run_rounds(tmp_path / "whole", Life(None), NOW))
    whole = reached(tmp_path / "whole")
    begun = ["pending", "queued", "preparing", "running"]
    said = ["fetch", "running 1"]
    again = ["queued", "preparing", "running", "completed"]
    assert whole == [
        ("by-hand", [*begun, "completed"], ["running"], []),
        ("lost", [*begun, *again], [*said, "fetch", "running 2"], ["-a1", "-a2"]),
        ("never-begun", [*begun[:3], *again], ["fetch", "running 2"], ["-a1", "-a2"]),
        ("plain", [*begun, "completed"], said, ["-a1"]),
        ("published", [*begun, "completed"], said, ["-a1"]),
        ("register-dataset-registered", [*begun, "completed"], said, ["-a1"]),
        ("stopped", [*begun, "stopping", "stopped"], said, ["-a1"]),
    ]
    kill_at = 0
    ended = signal.SIGKILL
    while ended:
        kill_at += 1
        home = tmp_path / str(kill_at)
        shutil.copytree(tmp_path / "prepared", home)
        ended = in_a_process(lambda home=home, life=Life(kill_at): run_rounds(home, life, NOW))
        if ended:
            assert in_a_process(lambda home=home: run_rounds(home, Life(None), NOW + 1000)) == 0
        assert reached(home) == whole, f"killed before write {kill_at}"
    assert kill_at > 50


@pytest.mark.soak
@pytest.mark.parametrize("writes", [1, 2, 3, 5, 8])
def test_a_reconciler_killed_again_and_again_still_gets_every_job_to_its_end(tmp_path: Path, writes: int) -> None:
    in_a_process(lambda: prepare(tmp_path))
    lives = 0
    # Each life is let write once more than the one before.
    while in_a_process(lambda n=lives: run_rounds(tmp_path, Life(writes + n), NOW + 1000 * n)):
        lives += 1
    assert lives > 3
    assert len(reached(tmp_path)) == 7
