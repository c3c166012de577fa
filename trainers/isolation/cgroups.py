"""Control groups for each program, where this process may make them: the system then limits memory and processes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMORY_MARGIN = 1.1
"""The kernel's limit as a share of the flavor's memory: higher, because the look twice a second explains more."""
_PREFIX = "tunesmith-program-"
_KILLS = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Group:
    """The folders of a program's control groups: one, or one for each controller in version 1."""

    folders: tuple[Path, ...]

    @property
    def counts_memory(self) -> bool:
        """Whether the kernel counts and limits the program's memory."""
        return self._memory() is not None

    def memory_bytes(self) -> int | None:
        """What the program holds, wherever it holds it; without copies of files, which the kernel can drop."""
        folder = self._memory()
        if folder is None:
            return None
        try:
            found = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            return None
        names = ("anon", "shmem") if "anon" in found else ("total_rss", "total_shmem")
        return sum(int(found.get(name, 0)) for name in names)

    def memory_ran_out(self) -> bool:
        """Whether the kernel has ended a process of the program because it took more than its memory."""
        folder = self._memory()
        if folder is None:
            return False
        for name in ("memory.events", "memory.oom_control"):
            with suppress(OSError):
                said = _KILLS.search((folder / name).read_text())
                return said is not None and int(said[1]) > 0
        return False

    def exists(self) -> bool:
        return any(folder.exists() for folder in self.folders)

    def remove(self) -> None:
        """Remove the group; no process may be in it any more."""
        for folder in self.folders:
            _remove(folder)

    def _memory(self) -> Path | None:
        return next((each for each in self.folders if (each / "memory.stat").exists()), None)


def make(name: str, *, tasks: int, memory_bytes: int | None = None) -> Group | None:
    """Make a group that never has more processes and threads, nor more memory. None where that is not possible.

    Where only one of the two can be limited, the group limits that one. Usually it takes root.
    """
    memory = int(memory_bytes * MEMORY_MARGIN) if memory_bytes is not None else None
    limits = {
        "pids": {"pids.max": str(tasks)},
        "memory": {
            "memory.max": str(memory),
            "memory.swap.max": "0",
            # The program ends as a whole, because half of one only hangs.
            "memory.oom.group": "1",
            "memory.limit_in_bytes": str(memory),
            "memory.memsw.limit_in_bytes": str(memory),
        },
    }
    kinds = ["pids", *(["memory"] if memory is not None else [])]
    made: dict[Path, None] = {}
    for kind in kinds:
        for parent in _parents(kind):
            _remove_left(parent)
            folder = parent / f"{_PREFIX}{os.getpid()}-{name}"
            if _make_one(folder, limits[kind]):
                made[folder] = None
                break
    return Group(tuple(made)) if made else None


def _parents(kind: str) -> Iterator[Path]:
    """The folders in which a group that limits this may be made, the best one first.

    That is below this process's own group, so that limits above it count as well. In version 2 groups with limits lie
    beside processes nowhere but at the root: there it is the next group above that passes its controllers on.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        place = Path(own)
        if kind in controllers.split(","):
            yield from (each for each in (ROOT / kind / str(place).lstrip("/"), ROOT / kind) if each.is_dir())
        elif not controllers:
            for each in (place, *place.parents):
                folder = ROOT / str(each).lstrip("/")
                with suppress(OSError):
                    if kind in (folder / "cgroup.subtree_control").read_text().split():
                        yield folder


def _make_one(folder: Path, limits: dict[str, str]) -> bool:
    """Make the group, or use it where another controller has made it, and limit it."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        return False
    written = 0
    for name, value in limits.items():
        # Each version has names of its own; none is made where it is not there.
        with suppress(OSError):
            descriptor = os.open(folder / name, os.O_WRONLY)
            try:
                os.write(descriptor, value.encode())
                written += 1
            finally:
                os.close(descriptor)
    if not written:
        with suppress(OSError):
            folder.rmdir()
    return written > 0


def _remove(folder: Path) -> None:
    for _ in range(40):
        with suppress(OSError):
            folder.rmdir()
        if not folder.exists():
            return
        time.sleep(0.05)  # the dead are still members until somebody has heard of their end


def _remove_left(parent: Path) -> None:
    """Remove the groups that a killed worker has left."""
    for left in parent.glob(f"{_PREFIX}*"):
        owner = left.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path("/proc", owner).exists():
            with suppress(OSError):
                left.rmdir()
