"""Storages by their URLs."""

from __future__ import annotations

from pathlib import Path

from tunesmith.errors import SpecError
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.patience import PatientStorage
from tunesmith.storage.s3 import S3Storage, Waiting

_PROMPT = Waiting(connect_s=2, read_s=10, tries=2)


def open_storage(url: str, settings: Settings, *, waiting: Waiting = Waiting()) -> Storage:
    """The storage rooted at `url`: a path, `file://`, `s3://bucket/prefix` or `obs://bucket/prefix`."""
    scheme, parted, rest = url.partition("://")
    if not parted:
        return FolderStorage(Path(url))
    if scheme == "file":
        return FolderStorage(Path(rest))
    if scheme in ("s3", "obs"):
        return S3Storage(url, settings, waiting)
    raise SpecError(f"storage is a folder, file://, s3:// or obs://, got {url!r}")


def open_patiently(url: str, settings: Settings) -> PatientStorage:
    """The storage rooted at `url`; its calls wait out an outage for as long as the settings say."""
    return PatientStorage(open_storage(url, settings), patience_s=settings.storage_patience_s)


def open_promptly(url: str, settings: Settings) -> Storage:
    """The storage rooted at `url`, for the control plane: an answer within half a minute, or StorageError."""
    return open_storage(url, settings, waiting=_PROMPT)
