"""A driver's heavy work takes its place among the cluster's resources, and the driver listens all the while."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from tests.support.waiting import until
from trainers.attempt.cluster_work import Needs, run_on_cluster
from trainers.attempt.stop_watch import StoppedError
from tunesmith.errors import DataError, UnavailableError
from tunesmith.jobs.attempts import EventWriter
from tunesmith.storage import layout
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.segments import read_segments

Tell = Callable[[Any], None]


@pytest.fixture(scope="module")
def one_cpu() -> Iterator[None]:
    """A Ray of one CPU."""
    ray.init(num_cpus=1, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture
def events(tmp_path: Path) -> Iterator[EventWriter]:
    with EventWriter(FolderStorage(tmp_path), "job-1", 1) as writer:
        yield writer


def do(work: Callable[[Tell], Any], events: EventWriter, **given: Any) -> Any:
    options = {"name": "work", "needs": Needs(), "listen": lambda: None, **given}
    return run_on_cluster(work, events=events, **options)


def spoken(tell: Tell) -> int:
    for number in range(3):
        tell(number)
    return os.getpid()


def refuses(tell: Tell) -> None:
    raise DataError("a row is broken", fields=["rows"], code="broken")


def fails(tell: Tell) -> None:
    raise ZeroDivisionError("unforeseen")


def dies(tell: Tell) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps(tell: Tell) -> None:
    child = subprocess.Popen(["sleep", "4000"], start_new_session=True)
    tell((os.getpid(), child.pid))
    child.wait()


def holds_the_cpu(path: Path) -> None:
    path.touch()
    until(lambda: not path.exists(), limit_s=120)


def test_what_it_tells_and_returns_comes_to_the_driver(events: EventWriter) -> None:
    told: list[int] = []
    assert do(spoken, events, told=told.append) == os.getpid()
    assert told == [0, 1, 2]
    with pytest.raises(DataError, match="a row is broken") as caught:
        do(refuses, events)
    assert (caught.value.code, caught.value.fields) == ("broken", ["rows"])
    with pytest.raises(ZeroDivisionError, match="unforeseen"):
        do(fails, events)


def test_work_that_nobody_waits_for_any_more_ends_at_what_it_tells_next(events: EventWriter) -> None:
    begun: list[int] = []
    ended: list[bool] = []

    def endless(tell: Tell) -> None:
        try:
            while True:
                tell(1)
                time.sleep(0.01)
        finally:
            ended.append(True)

    def stop() -> None:
        if begun:
            raise StoppedError("stopped_by_user")

    with pytest.raises(StoppedError):
        do(endless, events, told=begun.append, listen=stop)
    until(lambda: bool(ended), limit_s=20)


@pytest.mark.ray
def test_on_ray_it_comes_to_the_driver_too(one_cpu: None, events: EventWriter) -> None:
    told: list[int] = []
    assert do(spoken, events, told=told.append) != os.getpid()
    assert told == [0, 1, 2]
    with pytest.raises(DataError, match="a row is broken") as caught:
        do(refuses, events)
    assert (caught.value.code, caught.value.fields) == ("broken", ["rows"])
    with pytest.raises(ZeroDivisionError, match="unforeseen"):
        do(fails, events)
    with pytest.raises(UnavailableError, match="the process that did work was lost"):
        do(dies, events)


@pytest.mark.ray
def test_it_waits_for_room_says_so_and_hears_the_stop_while_it_waits(
    one_cpu: None, events: EventWriter, tmp_path: Path
) -> None:
    held = tmp_path / "held"
    holder = ray.remote(num_cpus=1)(holds_the_cpu).remote(held)
    until(held.exists, limit_s=60)
    asked = time.monotonic()

    def listen() -> None:
        if time.monotonic() - asked > 8:
            raise StoppedError("stopped_by_user")

    with pytest.raises(StoppedError):
        do(spoken, events, listen=listen)
    held.unlink()
    ray.get(holder)
    events.close()
    storage = FolderStorage(tmp_path)
    lines = b"".join(segment.data for segment in read_segments(storage, layout.events("job-1", 1))).splitlines()
    assert [json.loads(line)["message"] for line in lines] == ["work waits for room on the cluster: 1 CPU"]
    # The one that was stopped is gone: the one CPU is there for the next.
    assert do(spoken, events) > 0


@pytest.mark.ray
def test_a_stop_ends_the_work_and_what_it_began(one_cpu: None, events: EventWriter) -> None:
    pids: list[tuple[int, int]] = []

    def listen() -> None:
        if pids:
            raise StoppedError("time_limit")

    with pytest.raises(StoppedError):
        do(sleeps, events, told=pids.append, listen=listen)
    until(lambda: not any(map(psutil.pid_exists, pids[0])), limit_s=30)


@pytest.mark.ray
def test_nothing_is_asked_for_that_no_node_has(one_cpu: None, events: EventWriter) -> None:
    assert do(spoken, events, needs=Needs(cpus=64, memory_bytes=1 << 50, on_this_node=True)) > 0
