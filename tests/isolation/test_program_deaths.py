"""A program dies with the worker that started it, whatever the moment, and what is left is found by the next one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import until
from trainers.isolation import networks, sandbox
from trainers.isolation.bubblewrap import find_bubblewrap
from trainers.isolation.program import MARK, Program, end_earlier, program_mark
from trainers.isolation.sandbox import Room
from tunesmith import processes
from tunesmith.settings import Settings


def start(folder: Path, isolation: str, *, mark: str, code: str | None = None) -> Program:
    """A program that leaves a file as soon as it runs, and then sleeps."""
    settings = Settings.from_env({"TUNESMITH_HOME": str(folder / "home"), "TUNESMITH_ISOLATION": isolation})
    for name in ("out", "tmp"):
        (folder / name).mkdir(exist_ok=True, parents=True)
    room = Room([], [folder / "out"], folder / "tmp", "none", {"CPU": 1}, 1 << 30)
    command = ["/bin/sh", "-c", code or f"touch {folder / 'out' / 'began'}; sleep 4000; true"]
    launch = sandbox.launch(command, cwd=folder / "out", room=room, variables={}, settings=settings)
    return Program(replace(launch, mark=mark))


def marked(mark: str, variable: str = MARK) -> list[psutil.Process]:
    return processes.members(None, variable, mark)


def in_a_killed_worker(work: Callable[[], object], after_s: float) -> None:
    """Do `work` in a process that is killed so long after it."""
    worker = os.fork()
    if worker == 0:
        work()
        time.sleep(after_s)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(worker, 0)


@pytest.mark.parametrize("isolation", ["bubblewrap", "none"])
def test_a_program_dies_with_its_worker_whatever_the_moment(tmp_path: Path, isolation: str) -> None:
    find_bubblewrap()
    job = f"job-{os.urandom(4).hex()}"
    for number, after_ms in enumerate((0, 0, 1, 2, 3, 4, 6, 8, 10, 15, 20, 40)):
        mark = program_mark(job, 1, number)
        in_a_killed_worker(lambda mark=mark: start(tmp_path / mark, isolation, mark=mark), after_ms / 1000)
    until(lambda: not any(marked(program_mark(job, 1, number)) for number in range(12)), limit_s=20)


@pytest.mark.parametrize("isolation", ["bubblewrap", "none"])
def test_a_program_that_runs_dies_with_its_worker_and_all_it_began(tmp_path: Path, isolation: str) -> None:
    mark = program_mark(f"job-{os.urandom(4).hex()}", 1, 0)
    code = f"sleep 4000 & sleep 4000 & touch {tmp_path / 'out' / 'began'}; wait"

    def work() -> None:
        start(tmp_path, isolation, mark=mark, code=code)
        until((tmp_path / "out" / "began").exists, limit_s=20)

    in_a_killed_worker(work, 0)
    assert (tmp_path / "out" / "began").exists()
    until(lambda: not marked(mark), limit_s=20)


@pytest.mark.parametrize("isolation", ["bubblewrap", "none"])
def test_the_next_attempt_ends_what_is_left_of_an_earlier_one(tmp_path: Path, isolation: str) -> None:
    job = f"job-{os.urandom(4).hex()}"
    earlier, own, other = (program_mark(*given) for given in ((job, 1, 1), (job, 2, 0), (f"{job}0", 1, 0)))
    programs = [start(tmp_path / mark, isolation, mark=mark) for mark in (earlier, own, other)]
    try:
        for mark in (earlier, own, other):
            until((tmp_path / mark / "out" / "began").exists, limit_s=20)
        assert end_earlier(job, 2) >= 1
        assert [bool(marked(mark)) for mark in (earlier, own, other)] == [False, True, True]
    finally:
        for program in programs:
            program.end()


def test_down_finds_a_program_by_the_mark_of_its_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = os.urandom(8).hex()
    monkeypatch.setenv(processes.PLATFORM_MARK, platform)
    with start(tmp_path, "bubblewrap", mark="here"):
        until((tmp_path / "out" / "began").exists, limit_s=20)
        assert marked(platform, processes.PLATFORM_MARK)
        assert processes.end(None, processes.PLATFORM_MARK, platform)
        until(lambda: not marked("here"), limit_s=20)


def test_the_network_of_a_job_dies_with_its_worker(tmp_path: Path) -> None:
    file = tmp_path / "network"

    def work() -> None:
        networks.own_network(file).__enter__()

    in_a_killed_worker(work, 0)
    pid, created = file.read_text().split()
    until(lambda: processes.find(int(pid), float(created)) is None, limit_s=20)


def test_a_lifeline_kills_all_in_the_session_and_nothing_else(tmp_path: Path) -> None:

    with processes.lifeline() as stdin:
        command = processes.with_lifeline([sys.executable, "-c", "import time; time.sleep(4000)"])
        child = subprocess.Popen(command, stdin=stdin, start_new_session=True)
    assert child.wait(20) == -signal.SIGKILL
