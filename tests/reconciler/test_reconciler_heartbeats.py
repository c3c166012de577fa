"""A driver that lives outvotes Ray, one that is silent is replaced, and no two attempts of a job ever live at once.

The drivers here are real processes that do nothing; the test writes their heartbeats.
"""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serve_app.reconciler.attempt_supervisor import ENDED_S
from tests.support.stage import FakeDriver, Stage, line
from tests.support.waiting import until
from tunesmith import processes, taken_down
from tunesmith.clock import utc_text
from tunesmith.errors import StorageError
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import DriverProcess, Heartbeat
from tunesmith.records.store import Record
from tunesmith.storage.folder import FolderStorage


class Driver(FakeDriver):
    """A driver with a process of its own, which has a child that went its own way."""

    def __init__(self, stage: Stage, record: Record, attempt: int = 1, *, node: str | None = None) -> None:
        super().__init__(stage.storage, record.job, attempt)
        environment = {**os.environ, attempts.MARK: self.submission_id}
        command = ["sh", "-c", "setsid sleep 1000 & echo $!; wait"]
        self.popen = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
        assert self.popen.stdout is not None
        self.child = psutil.Process(int(self.popen.stdout.readline()))
        self.root = psutil.Process(self.popen.pid)
        self.count = 0
        self.told = DriverProcess(
            host=socket.gethostname(),
            node=node or processes.node(),
            pid=self.root.pid,
            created=self.root.create_time(),
            platform="mark",
        )
        assert self.claim(process=self.told)
        self.beat()
        self.say(line(state="running", phase="train"))

    def beat(self, lasts_s: float = 600) -> None:
        self.count += 1
        beat = Heartbeat(count=self.count, time=utc_text(), lasts_s=lasts_s)
        attempts.write_heartbeat(self.storage, self.job.id, self.attempt, beat)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(10)

    def end(self) -> None:
        processes.end(self.root, attempts.MARK, self.submission_id)
        self.popen.wait(10)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.fixture
def drivers() -> Iterator[list[Driver]]:
    started: list[Driver] = []
    yield started
    for driver in started:
        driver.end()


def running(stage: Stage, drivers: list[Driver], *, node: str | None = None, **order: object) -> tuple[Record, Driver]:
    record = stage.order(**order)
    stage.rounds()
    driver = Driver(stage, record, node=node)
    drivers.append(driver)
    stage.rounds()
    assert stage.status(record) == ("running", None, 1)
    return record, driver


@pytest.mark.parametrize("word", ["FAILED", "STOPPED", "SUCCEEDED", None])
def test_rays_false_word_ends_no_attempt_whose_driver_lives(
    stage: Stage, drivers: list[Driver], word: str | None
) -> None:
    record, driver = running(stage, drivers)
    if word is None:
        stage.launcher.forget(driver.submission_id)
    else:
        stage.launcher.tell(driver.submission_id, word, "a passing error")
    for _ in range(40):
        driver.beat()
        stage.rounds(seconds=ENDED_S)
    assert stage.status(record) == ("running", None, 1)
    assert len(stage.launcher.jobs()) <= 1
    told = [event.change.message for event in stage.store.events(record.id) if "ray_status" in event.data]
    says = "Ray no longer knows its driver" if word is None else f"Ray says {word}: a passing error"
    assert told == [f"{says}, but the driver of attempt 1 lives: it goes on"]
    driver.publish()
    driver.finish("completed")
    stage.rounds()
    assert stage.status(record) == ("completed", None, 1)


def test_a_driver_that_is_dead_is_replaced_at_once_with_all_that_it_started(
    stage: Stage, drivers: list[Driver]
) -> None:
    record, driver = running(stage, drivers)
    driver.kill()
    assert processes.is_alive(driver.child)
    stage.launcher.tell(driver.submission_id, "FAILED", "exit code -9")
    stage.rounds(2)
    assert stage.status(record) == ("preparing", None, 2)
    assert not processes.is_alive(driver.child)


def test_a_dead_driver_is_replaced_although_ray_calls_it_running(stage: Stage, drivers: list[Driver]) -> None:
    record, driver = running(stage, drivers)
    driver.kill()
    stage.rounds(3, seconds=ENDED_S)
    assert stage.status(record) == ("preparing", None, 2)


def test_a_driver_that_stands_still_is_killed_before_another_begins(stage: Stage, drivers: list[Driver]) -> None:
    record, driver = running(stage, drivers)
    driver.root.suspend()
    until(lambda: driver.root.status() == psutil.STATUS_STOPPED, limit_s=10)
    started = []
    submit = stage.launcher.submit

    def submit_and_look(*given: object, **options: object) -> None:
        started.append((processes.is_alive(driver.root), processes.is_alive(driver.child)))
        submit(*given, **options)  # type: ignore[arg-type]

    stage.launcher.submit = submit_and_look  # type: ignore[method-assign]
    stale_s = stage.settings.heartbeat_stale_s
    stage.rounds(int(stale_s / 2) - 2, seconds=2)
    assert stage.status(record) == ("running", None, 1)
    stage.rounds(6, seconds=2)
    assert stage.status(record) == ("preparing", None, 2)
    assert started == [(False, False)]
    lost = next(event for event in stage.store.events(record.id) if event.change.reason == "worker_lost")
    assert f"no sign of life for {stale_s:g} s" in str(lost.change.message)


def test_a_silent_driver_on_another_node_is_fenced_and_waited_for(stage: Stage, drivers: list[Driver]) -> None:
    record, driver = running(stage, drivers, node="another")
    stage.launcher.tell(driver.submission_id, "FAILED", "so Ray believes")
    stage.rounds(20, seconds=2)
    result = attempts.read_result(stage.storage, record.id, 1)
    assert result is not None and (result.outcome, result.fenced) == ("lost", True)
    # Another reconciler begins to wait anew: it has seen nothing itself.
    stage.reconciler.close()
    stage.reconciler = stage.new_reconciler("second")
    stage.rounds(290, seconds=2)
    assert stage.status(record) == ("running", None, 1)
    assert processes.is_alive(driver.root)
    stage.rounds(20, seconds=2)
    assert stage.status(record) == ("preparing", None, 2)


def test_a_driver_on_another_node_is_replaced_at_once_where_ray_finds_no_process(
    stage: Stage, drivers: list[Driver]
) -> None:
    record, driver = running(stage, drivers, node="another")
    stage.launcher.tell(driver.submission_id, "FAILED", "exit code -9")
    stage.launcher.told_lives = False
    stage.rounds(2)
    assert stage.status(record) == ("preparing", None, 2)


def test_an_outage_of_storage_costs_no_attempt(stage: Stage, drivers: list[Driver]) -> None:
    record, driver = running(stage, drivers)
    away = False

    class Shaky(FolderStorage):
        def get(self, key: str) -> bytes:
            if away:
                raise StorageError("away")
            return super().get(key)

    stage.reconciler.close()
    stage.reconciler = stage.new_reconciler("second", storage=Shaky(stage.storage.root))
    stage.rounds(3)
    for _ in range(3):
        away = True
        stage.rounds(60, seconds=2)
        away = False
        # It comes back to the reconciler first.
        stage.rounds(6, seconds=2)
        driver.beat()
        stage.rounds(3, seconds=2)
    assert stage.status(record) == ("running", None, 1)


def test_a_stopping_driver_that_ray_calls_ended_is_given_its_time(stage: Stage, drivers: list[Driver]) -> None:
    record, driver = running(stage, drivers)
    stage.store.request_stop(record.id)
    stage.launcher.tell(driver.submission_id, "FAILED")
    for _ in range(10):
        driver.beat()
        stage.rounds(seconds=ENDED_S)
    assert stage.status(record)[0] == "stopping"
    driver.finish("stopped", reason="stopped_by_user", message="saved")
    stage.rounds()
    assert stage.status(record) == ("stopped", "stopped_by_user", 1)
    os.kill(driver.root.pid, signal.SIGKILL)


@pytest.mark.parametrize("planned", [True, False])
def test_an_attempt_that_was_ended_with_its_platform_counts_against_no_retries(
    stage: Stage, drivers: list[Driver], planned: bool
) -> None:
    record, driver = running(stage, drivers, advanced={"max_retries": 0})
    taken_down.note(stage.settings, "mark" if planned else "another platform's")
    driver.kill()
    stage.launcher.forget(driver.submission_id)
    stage.rounds(2)
    if not planned:
        assert stage.status(record) == ("failed", "worker_lost", 1)
        return
    assert stage.status(record) == ("preparing", None, 2)
    queued = next(event for event in stage.store.events(record.id) if event.change.reason == "preempted")
    assert queued.change.message == "attempt 1 was lost: the platform was taken down; attempt 2 follows"
    # Its own fault is another thing.
    stage.launcher.tell(f"{record.id}-a2", "FAILED")
    stage.rounds(3, seconds=ENDED_S)
    assert stage.status(record) == ("failed", "worker_lost", 2)
