"""The one way to files: a plain folder, or a bucket of an S3 service, behind the same few calls."""

from __future__ import annotations

import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, NotFoundError, SpecError, StorageError
from tunesmith.settings import Settings

ONE_REQUEST_BYTES = 32 << 20
"""Files up to this size go to S3 whole: boto3's transfer of parts takes several times the processor's time."""

PARTIAL = ".partial-"
"""Files of this prefix are writes that have not ended; no listing shows them."""


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
    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """All objects below the folder `prefix`, sorted by key."""

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
        """Copy all objects below `prefix` into a local folder."""
        for entry in self.entries(prefix):
            self.download_file(entry.key, folder / entry.key.removeprefix(f"{prefix}/"))


class FolderStorage(Storage):
    """A plain folder. Writes go to a file beside their place, are synced, and are moved or linked there."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self.url = str(self.root)

    def get(self, key: str) -> bytes:
        with _not_found(key):
            return self._path(key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        with self._written(key, data) as partial:
            partial.replace(self._path(key))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._written(key, data) as partial:
            try:
                # A hard link is made only where nothing is: the folder's conditional write.
                self._path(key).hardlink_to(partial)
            except FileExistsError:
                return False
            finally:
                partial.unlink()
        return True

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        top = self._path(prefix) if prefix else self.root
        found = []
        for folder, _, names in os.walk(top):
            for name in names:
                path = Path(folder, name)
                if not name.startswith(PARTIAL) and not path.is_symlink():
                    with suppress(FileNotFoundError):
                        found.append(Entry(path.relative_to(self.root).as_posix(), path.stat().st_size))
        return iter(sorted(found, key=lambda entry: entry.key))

    def children(self, prefix: str = "") -> list[str]:
        top = self._path(prefix) if prefix else self.root
        try:
            return sorted(path.name for path in top.iterdir() if path.is_dir() and any(path.iterdir()))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, key: str) -> None:
        path = self._path(key)
        path.unlink(missing_ok=True)
        self._remove_empty(path.parent)

    def delete_folder(self, prefix: str) -> None:
        path = self._path(prefix)
        shutil.rmtree(path, ignore_errors=True)
        self._remove_empty(path.parent)

    def upload_file(self, path: Path, key: str) -> None:
        with self._partial(key) as partial:
            shutil.copyfile(path, partial)
            _sync(partial)
            partial.replace(self._path(key))

    def download_file(self, key: str, path: Path) -> None:
        with _not_found(key):
            _make_folder(path)
            shutil.copyfile(self._path(key), path)

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def _path(self, key: str) -> Path:
        path = self.root / _checked(key)
        # A link inside the root could lead out of it.
        if not path.resolve().is_relative_to(self.root):
            raise _escape(key)
        return path

    @contextmanager
    def _partial(self, key: str) -> Iterator[Path]:
        place = self._path(key)
        partial = place.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
        try:
            while True:
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    partial.touch(exist_ok=False)
                    break
                except FileNotFoundError:
                    # Between the two lines a deletion took the empty folder away.
                    continue
            yield partial
            _sync(place.parent)
        except OSError as error:
            raise StorageError(f"{key} could not be written to {self.url}: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def _written(self, key: str, data: bytes) -> Iterator[Path]:
        with self._partial(key) as partial:
            partial.write_bytes(data)
            _sync(partial)
            yield partial

    def _remove_empty(self, folder: Path) -> None:
        """Folders exist as far as they hold objects, as on S3."""
        while folder != self.root and folder.is_relative_to(self.root):
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent


class S3Storage(Storage):
    """A bucket, or a prefix of one, by boto3. Keys of access come from boto3's own chain."""

    def __init__(self, url: str, settings: Settings) -> None:
        import boto3
        from botocore.config import Config

        self.url = url.rstrip("/")
        self.bucket, _, self._root = self.url.partition("://")[2].partition("/")
        if not self.bucket:
            raise SpecError(f"a bucket's URL is s3://BUCKET or s3://BUCKET/PREFIX, got {url!r}")
        config: Any = Config(
            s3={"addressing_style": settings.s3_addressing_style},
            request_checksum_calculation=settings.s3_checksums,
            response_checksum_validation="when_required",
            retries={"mode": "standard", "max_attempts": 4},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=32,
        )
        self._client: Any = boto3.session.Session().client(
            "s3", endpoint_url=settings.s3_endpoint, region_name=settings.s3_region, config=config
        )

    def get(self, key: str) -> bytes:
        with self._errors(key):
            data: bytes = self._client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
        return data

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        with self._errors(key):
            try:
                self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*")
            except ClientError as error:
                if _status(error) not in (409, 412):
                    raise
                # The client's own retry of a write that went through meets that write.
                return self.get(key) == data and _was_retried(error)
        return True

    def exists(self, key: str) -> bool:
        try:
            with self._errors(key):
                self._client.head_object(Bucket=self.bucket, Key=self._key(key))
        except NotFoundError:
            return False
        return True

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        with self._errors(prefix):
            for page in self._pages(prefix):
                for item in page.get("Contents", []):
                    yield Entry(item["Key"].removeprefix(f"{self._root}/" if self._root else ""), item["Size"])

    def children(self, prefix: str = "") -> list[str]:
        with self._errors(prefix):
            pages = list(self._pages(prefix, Delimiter="/"))
        return sorted(
            item["Prefix"].rstrip("/").rpartition("/")[2] for p in pages for item in p.get("CommonPrefixes", [])
        )

    def delete(self, key: str) -> None:
        with self._errors(key):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def delete_folder(self, prefix: str) -> None:
        for entry in list(self.entries(_checked(prefix))):
            self.delete(entry.key)

    def upload_file(self, path: Path, key: str) -> None:
        if path.stat().st_size <= ONE_REQUEST_BYTES:
            self.put(key, path.read_bytes())
            return
        with self._errors(key):
            self._client.upload_file(str(path), self.bucket, self._key(key))

    def download_file(self, key: str, path: Path) -> None:
        _make_folder(path)
        with self._errors(key):
            self._client.download_file(self.bucket, self._key(key), str(path))

    def local_path(self, key: str) -> Path | None:
        _checked(key)
        return None

    def _key(self, key: str) -> str:
        return f"{self._root}/{_checked(key)}" if self._root else _checked(key)

    def _pages(self, prefix: str, **options: Any) -> Iterator[Any]:
        folder = f"{self._key(prefix)}/" if prefix else (f"{self._root}/" if self._root else "")
        paginator = self._client.get_paginator("list_objects_v2")
        return iter(paginator.paginate(Bucket=self.bucket, Prefix=folder, **options))

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in ("404", "NoSuchKey", "NotFound"):
                raise _missing(key) from error
            raise StorageError(f"{self.url} refused {key!r}: {code} {error}") from error
        except (BotoCoreError, Boto3Error) as error:
            raise StorageError(f"{self.url} does not answer for {key!r}: {error}") from error


def open_storage(url: str, settings: Settings) -> Storage:
    """The storage rooted at `url`: a path, `file://`, `s3://bucket/prefix` or `obs://bucket/prefix`."""
    scheme, parted, rest = url.partition("://")
    if not parted:
        return FolderStorage(Path(url))
    if scheme == "file":
        return FolderStorage(Path(rest))
    if scheme in ("s3", "obs"):
        return S3Storage(url, settings)
    raise SpecError(f"storage is a folder, file://, s3:// or obs://, got {url!r}")


def _checked(key: str) -> str:
    if not key or "\0" in key or "\\" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise _escape(key)
    if any(part.startswith(PARTIAL) for part in key.split("/")):
        raise SpecError(f"no part of a key may start with {PARTIAL!r}, got {key!r}", code="invalid_key")
    return key


def _escape(key: str) -> SpecError:
    return SpecError(f"a key is a relative path without empty parts, '.' and '..', got {key!r}", code="invalid_key")


def _missing(key: str) -> NotFoundError:
    return NotFoundError(f"there is no object {key!r}", code="unknown_object")


@contextmanager
def _not_found(key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise _missing(key) from error


def _make_folder(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _was_retried(error: Any) -> bool:
    return int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)) > 0
