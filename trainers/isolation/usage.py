"""What a user's program uses of its node and what it may use: memory, processes and disk, also where it hides them."""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trainers.isolation import outputs
from trainers.isolation.program import Program, Sample
from tunesmith.errors import OutOfMemoryError, SpecError

DISK_LOOK_S = 2.0
"""Between two looks at the disk."""

_PSS = re.compile(rb"^(Pss|Pss_Shmem): +(\d+) kB", re.MULTILINE)
_DELETED = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) .* \(deleted\)$", re.MULTILINE
)
_ENTRY_BYTES = 4096
"""What an empty file or folder counts, because its inode and its name take room as well."""


@dataclass(frozen=True)
class Limits:
    """What a program may take."""

    name: str
    """The program's name as its user knows it: `train.py of worker 0`."""
    flavor: str
    memory_bytes: int
    disk_bytes: int
    tasks: int
    """Processes and threads."""
    files: int
    """How many files and folders it may leave. In its `/tmp` only the size counts."""


class Usage:
    """Looks at a program while it runs: at its memory and processes when asked, at its disk in a thread of its own."""

    def __init__(self, program: Program, limits: Limits) -> None:
        self._program, self._limits = program, limits
        self._excess: SpecError | None = None

    @contextmanager
    def watched(self) -> Iterator[Usage]:
        """While the context lasts, the disk is looked at."""
        done = threading.Event()

        def look() -> None:
            while self._excess is None and not done.wait(DISK_LOOK_S):
                self._excess = self._disk(done.is_set)

        thread = threading.Thread(target=look, name="disk", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            done.set()
            thread.join()

    def check(self) -> Sample:
        """What the program uses now. Raises OutOfMemoryError or SpecError where that is too much."""
        if self._excess is not None:
            raise self._excess
        limits, sample = self._limits, self._program.sample()
        if sample.tasks >= limits.tasks:
            raise SpecError(
                f"{limits.name} has {sample.tasks} processes and threads; allowed are fewer than {limits.tasks}",
                hint="start fewer at a time; the operator sets TUNESMITH_PROGRAM_PROCESSES",
                code="too_many_processes",
            )
        self.check_memory()
        taken = self._program.memory_bytes()
        if taken is None:
            taken = _memory_bytes(self._pids(), sample.rss_bytes, limits.memory_bytes)
        if taken > limits.memory_bytes:
            raise self._out_of_memory(f"takes {taken >> 20} MiB of memory")
        return sample

    def check_memory(self) -> None:
        """Also after the program has ended. Raises OutOfMemoryError where the kernel ended one of its processes."""
        if self._program.memory_ran_out():
            raise self._out_of_memory("took more memory than the kernel lets it have")

    def _out_of_memory(self, what: str) -> OutOfMemoryError:
        limits = self._limits
        return OutOfMemoryError(
            f"{limits.name} {what}, all its processes and its shared memory together; "
            f"flavor {limits.flavor} has {limits.memory_bytes >> 20} MiB",
            hint="use less at a time, or choose a larger flavor",
        )

    def check_disk(self) -> None:
        """To be called after the program has ended. Raises SpecError where it has left too much on the disk."""
        too_much = self._excess or self._disk()
        if too_much is not None:
            raise too_much

    def _disk(self, is_done: Callable[[], bool] = lambda: False) -> SpecError | None:
        limits, launch = self._limits, self._program.launch
        hidden = size = _unlinked_bytes(self._pids())
        count = 0
        for folder in (*launch.writable, *([launch.temporary] if launch.temporary is not None else [])):
            for path, status in outputs.scan(folder):
                size += max(status.st_size, status.st_blocks * 512, _ENTRY_BYTES)
                count += 1
                if path.count("/") >= outputs.MAX_DEPTH:
                    return self._too_much(f"has folders that lie {outputs.MAX_DEPTH} deep; allowed is less")
                if count > limits.files and folder != launch.temporary:
                    return self._too_much(f"has written more than the {limits.files} files and folders allowed")
                if size > limits.disk_bytes or is_done():
                    break
        if size <= limits.disk_bytes:
            return None
        if hidden >> 20:
            how = f"{hidden >> 20} of them in files that it deleted and still holds"
        else:
            how = f"in {count} files and folders, of which each counts at least {_ENTRY_BYTES >> 10} KiB"
        return self._too_much(f"has written more than the {limits.disk_bytes >> 20} MiB allowed, {how}")

    def _too_much(self, what: str) -> SpecError:
        return SpecError(
            f"{self._limits.name} {what}; its output is not kept",
            hint="delete what is not needed any more, and put many files into one; "
            "the operator sets TUNESMITH_PROGRAM_DISK_GIB",
            code="too_much_output",
        )

    def _pids(self) -> list[int]:
        return [process.pid for process in self._program.tree()]


def _memory_bytes(pids: Sequence[int], rss_bytes: int, limit_bytes: int) -> int:
    """What processes use together, including shared memory that none of them has mapped.

    Where a bound that is quickly had is below the limit, it is that bound; else every page counts once.
    """
    unmapped = _shared_bytes(pids)
    if rss_bytes + unmapped <= limit_bytes:
        return rss_bytes + unmapped
    own, mapped = 0, 0
    for pid in pids:
        with suppress(OSError):
            found = {name: int(kib) << 10 for name, kib in _PSS.findall(Path(f"/proc/{pid}/smaps_rollup").read_bytes())}
            own += found[b"Pss"] - found.get(b"Pss_Shmem", 0)
            mapped += found.get(b"Pss_Shmem", 0)
    return own + max(mapped, unmapped)


def _shared_bytes(pids: Sequence[int]) -> int:
    """What lies in the room's `/dev/shm`, and in memory that processes hold as an open file (memfd_create)."""
    rooms: dict[int, int] = {}
    for pid in pids:
        with suppress(OSError):
            place = f"/proc/{pid}/root/dev/shm"
            device = Path(place).stat().st_dev
            if device not in rooms and device != Path("/dev/shm").stat().st_dev:
                found = os.statvfs(place)
                used = (found.f_blocks - found.f_bfree) * found.f_frsize
                rooms[device] = used if _is_in_memory(device, pid) else 0
    memory = _memfd_device()
    held = {key: size for key, size in _open_unlinked(pids) if key[0] == memory}
    return sum(rooms.values()) + sum(held.values())


def _is_in_memory(device: int, pid: int) -> bool:
    """Whether a file system that the process sees is a tmpfs: a container has others in its place as it is set up."""
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = (line.split(" ") for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines())
    return any(mount[2] == number and mount[mount.index("-") + 1] == "tmpfs" for mount in mounts)


def _unlinked_bytes(pids: Sequence[int]) -> int:
    """What lies on a disk in files that are deleted, and that processes still hold: open, or mapped alone.

    Of the latter the system tells no size; what is mapped of them counts.
    """
    in_memory = {_memfd_device()}
    for pid in pids:
        with suppress(OSError):
            in_memory.add(Path(f"/proc/{pid}/root/dev/shm").stat().st_dev)
    held = {key: size for key, size in _open_unlinked(pids) if key[0] not in in_memory}
    mapped: dict[tuple[int, int], int] = {}
    for pid in pids:
        with suppress(OSError):
            for found in _DELETED.findall(Path(f"/proc/{pid}/maps").read_bytes()):
                first, last, offset, major, minor = (int(text, 16) for text in found[:5])
                key = (os.makedev(major, minor), int(found[5]))
                if key not in held and key[0] not in in_memory:
                    mapped[key] = max(mapped.get(key, 0), offset + last - first)
    return sum(held.values()) + sum(mapped.values())


def _open_unlinked(pids: Sequence[int]) -> Iterator[tuple[tuple[int, int], int]]:
    """Device and inode of each file that has no name and that a process has open, with what it takes."""
    for pid in pids:
        with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with suppress(OSError):
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                        yield (status.st_dev, status.st_ino), status.st_blocks * 512


@cache
def _memfd_device() -> int:
    """The device on which all files of memfd_create lie; those of shared anonymous memory as well."""
    descriptor = os.memfd_create("probe")
    try:
        return os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)
