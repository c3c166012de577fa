"""The one way to files: a plain folder, or a bucket of an S3 service, behind the same few calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunesmith.settings import Settings


@dataclass(frozen=True)
class Entry:
    """One stored object."""

    key: str
    size_bytes: int


class Storage(ABC):
    """Objects by key under one root. Keys are relative, parted by `/`, and never leave the root (SpecError).

    A write is durable when the call returns and is seen whole or not at all. Errors: NotFoundError where there is no
    such object, StorageError when the service does not answer after the client's own retries.
    """

    url: str

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
    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """All objects below the folder `prefix`, sorted by key."""

    @abstractmethod
    def children(self, prefix: str = "") -> list[str]:
        """Names of the immediate subfolders of the folder `prefix`, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete one object; one that is not there is no error."""

    @abstractmethod
    def delete_folder(self, prefix: str) -> None:
        """Delete all objects below the folder `prefix`."""

    @abstractmethod
    def upload_file(self, path: Path, key: str) -> None:
        """Copy a local file in, streaming."""

    @abstractmethod
    def download_file(self, key: str, path: Path) -> None:
        """Copy an object out to a local file, streaming; its folder is made."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Where `key` (an object or a folder) lies on this machine's disk, or None where it does not."""

    def upload_folder(self, folder: Path, prefix: str) -> list[Entry]:
        """Copy all files of a local folder to below `prefix`; links are refused (DataError)."""
        raise NotImplementedError

    def download_folder(self, prefix: str, folder: Path) -> None:
        """Copy all objects below `prefix` into a local folder."""
        raise NotImplementedError


def open_storage(url: str, settings: Settings) -> Storage:
    """The storage rooted at `url`: a path, `file://`, `s3://bucket/prefix` or `obs://bucket/prefix`."""
    raise NotImplementedError
