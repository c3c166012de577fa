"""A control group for each program, where this process may make one: the system then limits the program's processes."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

ROOTS = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))
"""The folders in which groups are made, for version 1 and version 2 of control groups."""
_PREFIX = "tunesmith-program-"


def make(name: str, *, tasks: int) -> Path | None:
    """Make a group that never has more processes and threads; None where that is not possible, usually without root."""
    for root in ROOTS:
        _remove_left(root)
        group = root / f"{_PREFIX}{os.getpid()}-{name}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            # Not made where it is not there: without the controller, or where the root is an ordinary folder.
            limit = os.open(group / "pids.max", os.O_WRONLY)
            try:
                os.write(limit, str(tasks).encode())
            finally:
                os.close(limit)
            return group
        except OSError:
            remove(group)
    return None


def remove(group: Path) -> None:
    """Remove a group that no process is in any more."""
    for _ in range(40):
        with suppress(OSError):
            group.rmdir()
        if not group.exists():
            return
        time.sleep(0.05)  # the dead are still members until somebody has heard of their end


def _remove_left(root: Path) -> None:
    """Remove the groups that a killed worker has left."""
    for left in root.glob(f"{_PREFIX}*"):
        owner = left.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path("/proc", owner).exists():
            with suppress(OSError):
                left.rmdir()
