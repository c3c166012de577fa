"""Bounds of what a node keeps on its disk: caches, and what killed processes have left.

Caches of fetched models, tokens, environments and images have one bound together: what was used least recently goes.
What is in use never goes: whoever uses an entry holds a lock on it, which the system lets go when its process ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tunesmith.settings import Settings
from tunesmith.storage.base import PARTIAL

LEFT_S = 24 * 3600.0
"""What nobody has written to for so long, and nobody uses, is left over."""
SWEEP_S = 3600.0
"""Between two looks for what is left over."""
_LOCK = ".in-use"
_ENTRIES = ("cache/fetched/*", "cache/tokenized/*", "cache/environments/*/*", "cache/images")
_LEFTOVERS = ("tmp/*", "runs/*", "cache/fetched/.*", "cache/checked/*", "cache/tokenized/*.partial")

_held: dict[Path, int] = {}
_holding = threading.Lock()

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    path: Path
    size_bytes: int
    used_at: float


def hold(place: Path) -> None:
    """Say that this process uses an entry, or makes it, from now to its end; `place` need not exist yet."""
    with _holding:
        if place not in _held:
            descriptor = _lock(place, fcntl.LOCK_SH)
            if descriptor is not None:
                _held[place] = descriptor
    with suppress(OSError):
        os.utime(_lock_file(place))


def release(place: Path) -> None:
    """Say that this process does not use the entry any more."""
    with _holding:
        descriptor = _held.pop(place, None)
    if descriptor is not None:
        os.close(descriptor)
    if not place.exists():
        _drop_lock(place)


@contextmanager
def held(place: Path) -> Iterator[None]:
    """Hold an entry while the context lasts."""
    hold(place)
    try:
        yield
    finally:
        release(place)


def keep_bounds(settings: Settings) -> None:
    """Remove what is left over, once in a while, and of the caches what goes beyond their bound.

    To be called by whoever has added something. Several processes of a node may do so at once.
    """
    stamp = settings.home / "cache" / ".swept"
    with suppress(OSError):
        stamp.parent.mkdir(parents=True, exist_ok=True)
        if not stamp.exists() or time.time() - stamp.stat().st_mtime > SWEEP_S:
            stamp.touch()
            sweep(settings)
    trim(settings)


def trim(settings: Settings) -> list[Path]:
    """Remove the entries that were used least recently, until the rest is within `cache_gib`; what was removed."""
    entries = sorted(_entries(settings), key=lambda entry: entry.used_at)
    too_much = sum(entry.size_bytes for entry in entries) - (settings.cache_gib << 30)
    removed = []
    for entry in entries:
        if too_much <= 0:
            break
        if _remove_unused(entry.path):
            too_much -= entry.size_bytes
            removed.append(entry.path)
            logger.info("the caches are full: %s, which was used least recently, is gone", entry.path)
    return removed


def sweep(settings: Settings, *, older_than_s: float = LEFT_S) -> list[Path]:
    """Remove what killed processes have left in the home, and in a storage that is a folder; what was removed."""
    before, removed = time.time() - older_than_s, []
    for pattern in _LEFTOVERS:
        for path in settings.home.glob(pattern):
            if path.name.endswith(_LOCK):
                place = path.with_name(path.name.removeprefix(PARTIAL).removesuffix(_LOCK))
                if not place.exists():
                    _drop_lock(place)
            elif _newest(path) < before and _remove_unused(path):
                removed.append(path)
    root = _storage_folder(settings)
    for folder, _, names in os.walk(root) if root is not None else ():
        for path in (Path(folder, name) for name in names if name.startswith(PARTIAL)):
            with suppress(OSError):
                if not path.name.endswith(_LOCK) and path.stat().st_mtime < before:
                    path.unlink()
                    removed.append(path)
    if removed:
        logger.info("%d leftovers of processes that were killed are gone, %s first", len(removed), removed[0])
    return removed


def _entries(settings: Settings) -> Iterator[_Entry]:
    places = [path for pattern in _ENTRIES for path in settings.home.glob(pattern)]
    root = _storage_folder(settings)
    places += (root / "cache" / "tokenized").glob("*") if root is not None else ()
    for path in places:
        if not path.is_dir() or path.name.startswith(".") or path.name.endswith(".partial"):
            continue
        with suppress(OSError):
            lock = _lock_file(path)
            used_at = max(path.stat().st_mtime, lock.stat().st_mtime if lock.exists() else 0)
            yield _Entry(path, _size(path), used_at)


def _storage_folder(settings: Settings) -> Path | None:
    """The storage, where it is a folder."""
    url = settings.storage_url.removeprefix("file://")
    return None if "://" in url else Path(url).expanduser()


def _lock_file(place: Path) -> Path:
    # Storage that is a folder lists no file of such a name.
    return place.with_name(f"{PARTIAL}{place.name}{_LOCK}")


def _lock(place: Path, kind: int) -> int | None:
    """The lock of an entry, as a descriptor; None where it cannot be had, or the file system has no locks."""
    path = _lock_file(place)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, kind)
            # Whoever removed the entry has removed the file as well: then the lock is nobody's, and is taken anew.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except OSError:
            os.close(descriptor)
            return None
        os.close(descriptor)


def _drop_lock(place: Path) -> None:
    """Remove the lock of an entry that is gone, unless somebody is about to make it."""
    descriptor = _lock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if descriptor is not None:
        _lock_file(place).unlink(missing_ok=True)
        os.close(descriptor)


def _remove_unused(path: Path) -> bool:
    """Remove a file or folder that nobody holds; whether it is gone."""
    descriptor = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if descriptor is None:
        return False
    try:
        # At once out of sight of those who look for it.
        gone = path.with_name(f".gone-{os.getpid()}-{time.monotonic_ns()}")
        path.rename(gone)
        delete(gone)
        _lock_file(path).unlink(missing_ok=True)
        return True
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)
        return False
    finally:
        os.close(descriptor)


def delete(path: Path) -> None:
    """Delete what a user's program may have written, however deep it is and whatever rights its files have."""
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
        if os.path.lexists(path):
            subprocess.run([*command, "--", path], check=False, capture_output=True)


def _size(folder: Path) -> int:
    total = 0
    for above, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(above, name).lstat().st_blocks * 512
    return total


def _newest(path: Path) -> float:
    """When something was last written to a file, or to a folder and what lies just below it."""
    times = [0.0]
    with suppress(OSError):
        times.append(path.lstat().st_mtime)
        for below in path.iterdir() if path.is_dir() and not path.is_symlink() else ():
            times.append(below.lstat().st_mtime)
            times += [each.lstat().st_mtime for each in below.iterdir()] if below.is_dir() else []
    return max(times)
