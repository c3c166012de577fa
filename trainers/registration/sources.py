"""The files of a registration: looked at before anything is copied, and copied by what was looked at.

A local source is walked by descriptors from the root of the file system, and no link is followed: a parent folder or a
file that is swapped meanwhile leads nowhere else.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from tunesmith.assets.sources import SYSTEM, check_source, never
from tunesmith.errors import DataError, SpecError, StorageError
from tunesmith.file_names import ALLOWED, MAX_PATH_BYTES, collision, folded, path_fault
from tunesmith.settings import Settings
from tunesmith.storage.base import PARTIAL, Storage, key_fault
from tunesmith.storage.urls import open_storage
from tunesmith.visible_text import visible

MAX_DEPTH = 64
"""Of folders in each other."""
_PIECE_BYTES = 8 << 20

Listen = Callable[[], None]
"""Called between two pieces of work; raises what keeps it from going on."""


@dataclass(frozen=True)
class Bounds:
    """What a source may have."""

    files: int
    file_bytes: int
    total_bytes: int


class Source(Protocol):
    """Files that can be copied one by one."""

    sizes: dict[str, int]
    """Of every file, by its path relative to the source."""
    folders: list[str]
    """All folders, the empty ones among them."""

    def copy(self, path: str, folder: Path, listen: Listen) -> None:
        """Copy one file to its path below `folder`."""


@contextmanager
def opened_source(source: str, settings: Settings, bounds: Bounds, listen: Listen) -> Iterator[Source]:
    """A file, a folder, or all below a bucket's prefix, once its names, number and sizes are known to be allowed.

    SpecError where the source is not allowed or not there, DataError where it has too much, or what is no file.
    """
    source = check_source(source, settings)
    if "://" in source:
        remote = _Bucket(open_storage(source, settings), bounds, listen)
        if not remote.sizes:
            raise SpecError(
                f"there is nothing at {source}", fields=["source"], hint="give a prefix with files below it"
            )
        yield remote
        return
    with _opened(source) as top:
        yield _Local(top, Path(source).name, settings, bounds, listen)


def copy_files(source: Source, paths: Iterable[str], folder: Path, listen: Listen) -> None:
    """Copy these files of the source to `folder`.

    SpecError where one of the source's files would take another's place there, StorageError where the disk has not the
    room for them.
    """
    paths = list(paths)
    folder.mkdir(parents=True, exist_ok=True)
    _check_places(source, folder)
    needed, free = sum(source.sizes[path] for path in paths), shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"the source has {needed:,} bytes, and {folder} has room for {free:,}",
            hint="make room on the disk of the platform's home",
            code="storage_full",
        )
    for path in source.folders:
        (folder / path).mkdir(parents=True, exist_ok=True)
    for path in paths:
        listen()
        source.copy(path, folder, listen)


def _check_places(source: Source, folder: Path) -> None:
    """SpecError where a file would take another's place: as its folder, or because the file system folds names."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="a-", suffix="-A") as probe:
        folds = Path(probe.name).with_name(folded(Path(probe.name).name)).exists()
    pair = collision(source.sizes, folds=folds)
    if pair is not None:
        raise SpecError(
            f"{visible(repr(pair[0]))} and {visible(repr(pair[1]))} of the source cannot lie in one folder here",
            fields=["source"],
            hint="rename one of them",
            code="invalid_key",
        )


class _Tally:
    """What was found so far, against the bounds."""

    def __init__(self, bounds: Bounds) -> None:
        self.sizes: dict[str, int] = {}
        self._bounds, self._total = bounds, 0

    def add(self, path: str, size: int) -> None:
        _check_name(path)
        self.sizes[path] = size
        self._total += size
        bounds = self._bounds
        if size > bounds.file_bytes or self._total > bounds.total_bytes:
            raise DataError(
                f"{path} has {size:,} bytes, the files so far {self._total:,}; allowed are "
                f"{bounds.file_bytes >> 30} GB a file and {bounds.total_bytes >> 30} GB in all",
                fields=["source"],
                hint="split the file, or leave some out",
                code="too_large",
            )
        if len(self.sizes) > bounds.files:
            raise DataError(
                f"the source has more than {bounds.files:,} files",
                fields=["source"],
                hint="put many small files into one, or leave some out",
                code="too_large",
            )


class _Bucket:
    def __init__(self, storage: Storage, bounds: Bounds, listen: Listen) -> None:
        self._storage, tally = storage, _Tally(bounds)
        for entry in storage.entries():
            listen()
            tally.add(entry.key, entry.size_bytes)
        self.sizes = tally.sizes
        self.folders: list[str] = []

    def copy(self, path: str, folder: Path, listen: Listen) -> None:
        self._storage.download_file(path, folder / path)
        size = (folder / path).stat().st_size
        if size != self.sizes[path]:
            raise _changed(path)


class _Local:
    """`top`: a descriptor of a folder, or of one file."""

    def __init__(self, top: int, name: str, settings: Settings, bounds: Bounds, listen: Listen) -> None:
        self._top = top
        self._tally, self._listen = _Tally(bounds), listen
        self.folders: list[str] = []
        self._refused = _identities(settings)
        self._entries_left = 2 * bounds.files
        status = os.fstat(top)
        self._is_folder = stat.S_ISDIR(status.st_mode)
        if self._is_folder:
            self._walk(top, "")
        else:
            self._add(name, status)
        self.sizes = self._tally.sizes

    def copy(self, path: str, folder: Path, listen: Listen) -> None:
        with self._file(path) as file:
            self._check(path, os.fstat(file))
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            left = self.sizes[path]
            with target.open("wb") as out:
                # One byte more than was seen: a file that grows is not copied without an end.
                while piece := os.read(file, min(_PIECE_BYTES, left + 1)):
                    left -= len(piece)
                    if left < 0:
                        raise _changed(path)
                    out.write(piece)
                    listen()
            if left:
                raise _changed(path)

    @contextmanager
    def _file(self, path: str) -> Iterator[int]:
        if not self._is_folder:
            os.lseek(self._top, 0, os.SEEK_SET)
            yield self._top
            return
        *above, name = path.split("/")
        with _below(self._top, above, path) as folder:
            file = _open(name, os.O_RDONLY | os.O_NONBLOCK, folder, path)
            try:
                yield file
            finally:
                os.close(file)

    def _walk(self, folder: int, above: str) -> None:
        if above.count("/") >= MAX_DEPTH:
            raise DataError(f"{above} lies {MAX_DEPTH} folders deep; allowed is less", fields=["source"])
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in islice(entries, self._entries_left + 1))
        self._entries_left -= len(names)
        if self._entries_left < 0:
            raise DataError("the source has too many files and folders", fields=["source"], code="too_large")
        for name in names:
            self._listen()
            path = above + name
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                self._add(path, status)
                continue
            with _below(folder, [name], path) as descriptor:
                self._check(path, os.fstat(descriptor))
                _check_name(path)
                self.folders.append(path)
                self._walk(descriptor, f"{path}/")

    def _add(self, path: str, status: os.stat_result) -> None:
        self._check(path, status)
        self._tally.add(path, status.st_size)

    def _check(self, path: str, status: os.stat_result) -> None:
        if stat.S_ISLNK(status.st_mode):
            raise DataError(f"{path} is a link; only files and folders are taken", hint="copy what it points to")
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise DataError(f"{path} is neither a file nor a folder", fields=["source"], hint="leave it out")
        if (status.st_dev, status.st_ino) in self._refused or (status.st_dev, None) in self._refused:
            raise SpecError(
                f"{path} belongs to the platform or the system, and is never taken",
                fields=["source"],
                code="source_not_allowed",
            )


def _identities(settings: Settings) -> set[tuple[int, int | None]]:
    """Device and inode of what is never taken, under whatever name it is met; inode None: the whole device."""
    found: set[tuple[int, int | None]] = set()
    for path in never(settings):
        with suppress(OSError):
            status = Path(path).stat()
            found.add((status.st_dev, status.st_ino))
    for path in SYSTEM[:3]:
        with suppress(OSError):
            device = Path(path).stat().st_dev
            if device != Path("/").stat().st_dev:
                found.add((device, None))
    return found


@contextmanager
def _opened(path: str) -> Iterator[int]:
    """A descriptor of a real path, every part of which is opened without following a link."""
    *above, name = [part for part in path.split("/") if part] or [""]
    if not name:
        raise SpecError("source may not be the whole file system", fields=["source"], code="source_not_allowed")
    root = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        with _below(root, above, path) as folder:
            top = _open(name, os.O_RDONLY | os.O_NONBLOCK, folder, path)
    finally:
        os.close(root)
    try:
        yield top
    finally:
        os.close(top)


@contextmanager
def _below(folder: int, parts: list[str], path: str) -> Iterator[int]:
    """A descriptor of a folder below an open one."""
    current = os.dup(folder)
    try:
        for part in parts:
            inner = _open(part, os.O_RDONLY | os.O_DIRECTORY, current, path)
            os.close(current)
            current = inner
        yield current
    finally:
        os.close(current)


def _open(name: str, flags: int, folder: int, path: str) -> int:
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        raise DataError(
            f"{path} cannot be opened as it was seen, because {name} cannot: {error.strerror}",
            fields=["source"],
            hint="links are not followed; leave the files alone while they are registered, and let the platform's "
            "user read them",
            code="source_changed",
        ) from error


def _check_name(path: str) -> None:
    """SpecError where storage has no key for a file of that name."""
    why = key_fault(path) or path_fault(path)
    if why is not None:
        raise SpecError(
            f"the source has a file of the name {visible(repr(path), limit=300)}, which cannot be stored: it {why}",
            fields=["source"],
            hint=f"{ALLOWED}; none begins with {PARTIAL!r}, and a path has at most {MAX_PATH_BYTES} bytes",
            code="invalid_key",
        )


def _changed(path: str) -> DataError:
    return DataError(
        f"{path} changed while it was copied",
        fields=["source"],
        hint="leave the files alone while they are registered",
        code="source_changed",
    )
