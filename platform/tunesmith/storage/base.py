"""Storage: a plain folder or a bucket of an S3 service, behind the same few calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import STORAGE_FULL, DataError, NotFoundError, SpecError, StorageError
from tunesmith.file_names import ALLOWED, path_fault
from tunesmith.visible_text import visible

PARTIAL = ".partial-"
"""The prefix of files that are still being written; no listing shows them."""
MAX_KEY_BYTES = 1024
"""Of a whole key with the root's own prefix: what S3 takes."""


@dataclass(frozen=True)
class Entry:
    """One stored object."""

    key: str
    size_bytes: int


class Storage(ABC):
    """Objects by key under one root. A key is a relative path; one that would leave the root is a SpecError.

    A write is durable when the call returns and is seen whole or not at all. Errors: NotFoundError where there is no
    such object, StorageError when the service does not answer after the client's own retries.
    """

    url: str
    """The root, without a slash at its end."""

    @abstractmethod
    def get(self, key: str) -> bytes: ...

    @abstractmethod
    def put(self, key: str, data: bytes) -> None: ...

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write `data` unless `key` exists; whether this call wrote it. Atomic among all writers."""

    @abstractmethod
    def exists(self, key: str) -> bool: ...

    @abstractmethod
    def entries(self, prefix: str = "", *, after: str = "") -> Iterator[Entry]:
        """The objects below the folder `prefix` whose keys sort above `after`, sorted by key.

        A listing that goes on from an earlier one costs only what is new.
        """

    @abstractmethod
    def children(self, prefix: str = "") -> list[str]:
        """Names of the immediate subfolders of the folder `prefix`, sorted.

        Some S3 services go on naming a folder after its last object was deleted.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete one object; one that is not there is no error."""

    @abstractmethod
    def delete_folder(self, prefix: str) -> None:
        """Delete all objects below the folder `prefix`, however many there are."""

    @abstractmethod
    def upload_file(self, path: Path, key: str) -> None:
        """Copy a local file in, streaming."""

    @abstractmethod
    def download_file(self, key: str, path: Path) -> None:
        """Copy an object out to a local file, streaming; its folder is made once the key is found to be one."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Where `key` (an object or a folder) lies on this machine's disk, or None where it does not."""

    def upload_folder(self, folder: Path, prefix: str) -> list[Entry]:
        """Copy all files of a local folder to below `prefix`; links are refused (DataError)."""
        paths = sorted(folder.rglob("*"))
        links = [path for path in (folder, *paths) if path.is_symlink()]
        if links:
            raise DataError(f"{links[0]} is a link; only files and folders are taken", hint="copy what it points to")
        stored = []
        for path in paths:
            if path.is_file():
                key = f"{prefix}/{path.relative_to(folder).as_posix()}"
                self.upload_file(path, key)
                stored.append(Entry(key, path.stat().st_size))
        return stored

    def download_folder(self, prefix: str, folder: Path) -> None:
        """Copy all objects below `prefix` into a local folder; SpecError before any where a key would leave it."""
        entries = list(self.entries(prefix))
        for entry in entries:
            checked_key(entry.key)
        for entry in entries:
            self.download_file(entry.key, folder / entry.key.removeprefix(f"{prefix}/"))


def checked_key(key: str, *, root: str = "") -> str:
    """The key, or SpecError where it is none. `root`: the prefix that the storage puts before it."""
    why = key_fault(key, root=root)
    if why is not None:
        raise escape(key, why)
    return key


def key_fault(key: str, *, root: str = "") -> str | None:
    """Why `key` cannot be a key, as the end of a sentence; None where it can."""
    if any(part.startswith(PARTIAL) for part in key.split("/")):
        return f"has a part that begins with {PARTIAL!r}, as storage's own files do"
    return path_fault(key, max_bytes=MAX_KEY_BYTES - len(root.encode()))


def escape(key: str, why: str = "leads out of the storage") -> SpecError:
    """The error of a key that is none."""
    return SpecError(
        f"a key is a relative path; {visible(repr(key), limit=300)} {why}", hint=ALLOWED, code="invalid_key"
    )


def full(key: str, url: str) -> StorageError:
    """The error of a storage that has no room left."""
    return StorageError(
        f"{key} could not be written to {url}: the storage is full",
        hint="delete jobs, models or datasets that are not needed any more, or make room on the disk",
        code=STORAGE_FULL,
    )


def _missing(key: str) -> NotFoundError:
    return NotFoundError(f"there is no object {key!r}", code="unknown_object")
