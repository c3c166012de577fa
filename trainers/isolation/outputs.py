"""The output folder of a user's program, stored file by file. No link is followed, because the program made it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.file_names import path_fault
from tunesmith.storage.base import Storage, key_fault

MAX_FILES = 10_000
"""How many files and folders an output may have, because the new model's manifest lists all of them."""
MAX_DEPTH = 64
"""How deep folders may lie in each other. Anything deeper is not looked at."""


@dataclass
class Walk:
    """The files below a folder, and everything else that lies there."""

    files: dict[str, os.stat_result] = field(default_factory=dict)
    """By path relative to the folder."""
    others: list[str] = field(default_factory=list)
    """Links, pipes and the like, and files whose names storage has no key for."""


def walk(folder: Path) -> Walk:
    """All that lies below `folder`."""
    found = Walk()
    for path, status in scan(folder):
        if stat.S_ISREG(status.st_mode) and _is_storable(path):
            found.files[path] = status
        elif not stat.S_ISDIR(status.st_mode) or path.count("/") >= MAX_DEPTH:
            found.others.append(path)
    return found


def fits(folder: Path, *, size_bytes: int) -> bool:
    """Whether all that lies below `folder` is no more than that, and no more than MAX_FILES; holes count as well."""
    total = 0
    for number, (_, status) in enumerate(scan(folder), start=1):
        total += status.st_size
        if number > MAX_FILES or total > size_bytes:
            return False
    return True


def scan(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Path and status of all that lies below `folder`, however much; folders at MAX_DEPTH are not entered."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    yield from _scan(descriptor, "", MAX_DEPTH)


def store(
    folder: Path, add: Callable[[Path, str], object], *, leave_out: Callable[[str], bool] = lambda path: False
) -> tuple[list[str], list[str]]:
    """Have `add` store every file below `folder`, given where to read it and its path; those stored, and those not.

    Nothing may write to the folder meanwhile.
    """
    found = walk(folder)
    stored, left_out = [], list(found.others)
    for path in sorted(found.files):
        if leave_out(path):
            left_out.append(path)
            continue
        try:
            with opened(folder, path) as (descriptor, _):
                add(Path(f"/proc/self/fd/{descriptor}"), path)
        except PermissionError:
            left_out.append(path)
            continue
        stored.append(path)
    return stored, sorted(left_out)


class Copy:
    """Keeps a copy of an output folder in storage while the program writes to it.

    A file is stored when it has not changed since the look before, so that one that is being written is not; files
    that are gone are deleted.
    """

    def __init__(self, storage: Storage, folder: Path, prefix: str, *, size_bytes: int) -> None:
        """`size_bytes`: nothing is stored while the folder has more."""
        self._storage, self._folder, self._prefix, self._size_bytes = storage, folder, prefix, size_bytes
        self._seen: dict[str, tuple[int, int]] = {}
        self._stored: dict[str, tuple[int, int]] = {}

    def update(self, is_done: Callable[[], bool] = lambda: False) -> None:
        """Look once, and store what is new until `is_done`. StorageError where storage does not take it."""
        if not fits(self._folder, size_bytes=self._size_bytes):
            return
        now = {path: (status.st_size, status.st_mtime_ns) for path, status in walk(self._folder).files.items()}
        for path, state in sorted(now.items()):
            if is_done():
                return
            if self._seen.get(path) != state or self._stored.get(path) == state:
                continue
            try:
                with opened(self._folder, path) as (descriptor, _):
                    self._storage.upload_file(Path(f"/proc/self/fd/{descriptor}"), f"{self._prefix}/{path}")
            except OSError:
                continue  # it is gone, or no file any more
            self._stored[path] = state
        for path in [path for path in self._stored if path not in now]:
            self._storage.delete(f"{self._prefix}/{path}")
            del self._stored[path]
        self._seen = now


@contextmanager
def opened(folder: Path, path: str) -> Iterator[tuple[int, os.stat_result]]:
    """A descriptor of a file below `folder`, opened without following a link on the way. OSError where it is none."""
    parts = path.split("/")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        file = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
    finally:
        os.close(descriptor)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no file")
        yield file, status
    finally:
        os.close(file)


def _scan(descriptor: int, above: str, depth: int) -> Iterator[tuple[str, os.stat_result]]:
    """Below the open folder, which is closed at the end."""
    try:
        with os.scandir(descriptor) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                    yield above + entry.name, status
                    if depth and stat.S_ISDIR(status.st_mode):
                        yield from _scan(_open_folder(entry.name, descriptor), f"{above}{entry.name}/", depth - 1)
                except OSError:
                    continue  # it is gone meanwhile
    finally:
        os.close(descriptor)


def _open_folder(name: str, above: int) -> int:
    """A folder of the open one; a program that has taken away the right to read it hides nothing."""
    options = os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        return os.open(name, os.O_RDONLY | options, dir_fd=above)
    except PermissionError:
        place = os.open(name, os.O_PATH | options, dir_fd=above)
    try:
        Path(f"/proc/self/fd/{place}").chmod(0o700)
        return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(place)


def _is_storable(path: str) -> bool:
    """Whether storage has a key for it."""
    return key_fault(path) is None and path_fault(path) is None
