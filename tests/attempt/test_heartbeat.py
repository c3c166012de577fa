"""A driver that can no longer say that it lives ends itself and all that it started, whatever it is doing."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import until
from tunesmith import processes
from tunesmith.clock import utc_text
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import Result
from tunesmith.storage.folder import FolderStorage

DRIVER = """
import ctypes, os, subprocess, sys, time
from trainers.attempt.heartbeat import Pulse
from trainers.attempt.stop_watch import StopWatch
from tunesmith.jobs import attempts
from tunesmith.settings import Settings
from tunesmith.storage.folder import FolderStorage
from pathlib import Path

home, way = Path(sys.argv[1]), sys.argv[2]
settings = Settings.from_env({
    "TUNESMITH_HOME": str(home), "TUNESMITH_HEARTBEAT_S": "0.2", "TUNESMITH_STORAGE_PATIENCE_S": "0.5",
})
storage = FolderStorage(home / "storage")
os.environ[attempts.MARK] = "job-1-a1"
# One that is in no tree of this process's any more, known by its mark alone.
subprocess.Popen(["setsid", "sh", "-c", "sleep 1000 & echo $! > %s/child; wait" % home], start_new_session=True)
stop = StopWatch(storage, "job-1", 1, deadline=None)
with stop.watching(), Pulse(storage, "job-1", 1, settings=settings, stop=stop).beating():
    if way == "hangs":
        ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock
    with open(home / "written", "ab", buffering=0) as out:
        while True:
            out.write(b"x")
            time.sleep(0.002)
"""


@dataclass
class Driver:
    home: Path
    process: psutil.Process
    storage: FolderStorage

    @property
    def child(self) -> psutil.Process:
        path = self.home / "child"
        until(lambda: path.exists() and path.read_text().endswith("\n"), limit_s=20)
        return psutil.Process(int(path.read_text()))

    def beats(self) -> int:
        beat = attempts.read_heartbeat(self.storage, "job-1", 1)
        return beat.count if beat else 0

    def is_gone(self) -> bool:
        return not processes.is_alive(self.process)


@contextmanager
def driver(home: Path, way: str) -> Iterator[Driver]:
    """A process that works with a heartbeat of 0.2 s, which promises 1.1 s."""
    home.mkdir()
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(home), way]) as child:
        process = psutil.Process(child.pid)
        try:
            yield Driver(home, process, FolderStorage(home / "storage"))
        finally:
            processes.end(process, attempts.MARK, "job-1-a1")


def take_storage_away(driver: Driver) -> None:
    shutil.rmtree(driver.home / "storage", ignore_errors=True)
    (driver.home / "storage").write_text("no folder")


def fence(driver: Driver) -> None:
    attempts.finish(driver.storage, "job-1", 1, Result(outcome="lost", time=utc_text(), fenced=True))


@pytest.mark.parametrize("trouble", [take_storage_away, fence])
def test_a_driver_that_may_work_no_longer_ends_with_all_that_it_started(
    tmp_path: Path, trouble: Callable[[Driver], None]
) -> None:
    with driver(tmp_path / "home", "works") as running:
        child = running.child
        until(lambda: running.beats() > 3, limit_s=30)
        trouble(running)
        until(running.is_gone, limit_s=15)
        until(lambda: not processes.is_alive(child), limit_s=15)


def test_a_driver_that_was_stopped_for_too_long_and_is_woken_writes_nothing_more(tmp_path: Path) -> None:
    with driver(tmp_path / "home", "works") as running:
        until(lambda: running.beats() > 3 and (running.home / "written").exists(), limit_s=30)
        os.kill(running.process.pid, signal.SIGSTOP)
        until(lambda: running.process.status() == psutil.STATUS_STOPPED, limit_s=10)
        # The kernel has its own word for it: the signal waits for the process to be woken.
        until(lambda: alarm_waits(running.process.pid), limit_s=20)
        written, beats = (running.home / "written").stat().st_size, running.beats()
        os.kill(running.process.pid, signal.SIGCONT)
        until(running.is_gone, limit_s=15)
        assert (running.home / "written").stat().st_size == written
        assert running.beats() == beats


def alarm_waits(pid: int) -> bool:
    """Whether SIGALRM is pending for a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = next(line for line in status.splitlines() if line.startswith("ShdPnd"))
    return bool(int(pending.split()[1], 16) & (1 << (signal.SIGALRM - 1)))


def test_a_driver_whose_interpreter_hangs_ends_all_the_same(tmp_path: Path) -> None:
    with driver(tmp_path / "home", "hangs") as running:
        until(running.is_gone, limit_s=30)
