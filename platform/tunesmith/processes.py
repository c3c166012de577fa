"""Process trees that can be ended as a whole: what was started, what that started, and what tried to get away.

A child that called `setsid` and whose parent died is in no tree any more. So everything is started with a mark in its
environment, which every descendant inherits.

A process that must not outlive the one that started it gets a lifeline: a pipe as its stdin, whose other end its
starter holds. The system closes the pipe however the starter ends. A program that asks for PR_SET_PDEATHSIG instead
has a moment, before it asks, in which the end would go unnoticed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import psutil

PLATFORM_MARK = "TUNESMITH_PLATFORM"
"""Variable that every process of a platform carries, with the platform's mark."""

PRIVATE_UMASK = 0o077
"""What no process of a platform gives to others when it makes a file, whatever the user's own shell has set."""

_WATCHED = (
    'target=$1; shift; [ "$target" = group ] && target=-$$; exec 3<&0 </dev/null; '
    '( ( read -r _ <&3; kill -s KILL -- "$target" ) >/dev/null 2>&1 & ); exec 3<&-; exec "$@"'
)
"""Runs a command beside a watcher that kills once stdin ends. The watcher is no child of the command's."""


def node() -> str:
    """Where a process id means one process: this machine, since it was booted, and this namespace of processes."""
    try:
        place = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        place = f"{psutil.boot_time():.0f}"
    return f"{socket.gethostname()} {place}"


def find(pid: int, created: float) -> psutil.Process | None:
    """The process of that id, if it lives and is not a later one that was given the same id."""
    try:
        process = psutil.Process(pid)
        # psutil derives the time from the machine's boot time, which a clock that is set moves a little.
        return process if abs(process.create_time() - created) < 5 and is_alive(process) else None
    except psutil.Error:
        return None


def lives(place: str, pid: int, created: float) -> bool | None:
    """Whether that process of the node `place` lives; None where this is another node."""
    return find(pid, created) is not None if place == node() else None


def is_alive(process: psutil.Process) -> bool:
    """Whether the process still runs. A zombie does not, however long its parent leaves it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def members(root: psutil.Process | None, variable: str, mark: str) -> list[psutil.Process]:
    """`root`, all below it, and every process whose environment holds `variable` = `mark`; never this one."""
    found: dict[int, psutil.Process] = {}
    if root is not None:
        with suppress(psutil.NoSuchProcess):
            found = {process.pid: process for process in (root, *root.children(recursive=True))}
    for process in psutil.process_iter():
        try:
            if process.pid not in found and process.environ().get(variable) == mark:
                found[process.pid] = process
        except (psutil.Error, OSError):
            continue  # another user's process, or one that is gone
    found.pop(os.getpid(), None)
    return [process for process in found.values() if is_alive(process)]


def end(
    root: psutil.Process | None,
    variable: str,
    mark: str,
    *,
    also: Iterable[psutil.Process] = (),
    limit_s: float = 15.0,
) -> list[psutil.Process]:
    """Kill `root` and everything that belongs to it, as `members` finds it; returns those that ended.

    `also`: processes that are known to belong to it. One that is just ending has no environment to be found by.

    All are frozen before one is killed, so that none sees another die and takes it for a fault: a job's driver whose
    Ray goes away would call the job failed.
    """
    seen = {process.pid: process for process in also}
    deadline = time.monotonic() + limit_s
    while new := [process for process in members(root, variable, mark) if process.pid not in seen]:
        for process in new:
            seen[process.pid] = process
            with suppress(psutil.NoSuchProcess):
                process.suspend()
    while (left := [process for process in seen.values() if is_alive(process)]) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.02)
    if root is not None:
        with suppress(psutil.Error):
            root.wait(timeout=0)  # where it is this process's own child, it is a zombie until then
    return [process for process in seen.values() if not is_alive(process)]


@contextmanager
def private_files() -> Iterator[None]:
    """What this process writes meanwhile is for its user alone."""
    before = os.umask(PRIVATE_UMASK)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def lifeline() -> Iterator[int]:
    """A descriptor for the stdin of a child that is started by `with_lifeline`; it ends with the context."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def with_lifeline(command: Sequence[str], *, kills: Literal["group", "namespace"] = "group") -> list[str]:
    """`command`, killed as soon as its stdin ends; the command itself has an empty stdin.

    `group`: its process group is killed; start it in a session of its own. `namespace`: everything in its process
    namespace, which must be one of its own.
    """
    target = "group" if kills == "group" else "-1"
    return ["/bin/sh", "-c", _WATCHED, "sh", target, *command]
