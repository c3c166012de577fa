"""A storage that is a bucket of an S3 service, or a prefix of one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import NotFoundError, SpecError, StorageError
from tunesmith.settings import Settings
from tunesmith.storage.base import Entry, Storage, _missing, checked_key, full
from tunesmith.storage.folder import _make_folder

_FULL = frozenset({"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "InsufficientStorage"})
"""What services answer that have no room left."""
ONE_REQUEST_BYTES = 32 << 20
"""Files up to this size go to S3 in one request: boto3 needs several times the processor time for parts."""


_UNKNOWN_REQUEST = frozenset({400, 405, 501})
"""How a service answers to a deletion in bulk that it does not know, or wants in another form."""

_DELETES_AT_ONCE = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Waiting:
    """How long one call waits for the service. A call takes at most tries × (connect_s + read_s) and some pauses."""

    connect_s: float = 5
    read_s: float = 60
    tries: int = 4


class S3Storage(Storage):
    """A bucket, or a prefix of one, by boto3. Keys of access come from boto3's own chain."""

    def __init__(self, url: str, settings: Settings, waiting: Waiting = Waiting()) -> None:
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
            retries={"mode": "standard", "total_max_attempts": waiting.tries},
            connect_timeout=waiting.connect_s,
            read_timeout=waiting.read_s,
            max_pool_connections=32,
        )
        self._deletes_in_bulk = True
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

    def entries(self, prefix: str = "", *, after: str = "") -> Iterator[Entry]:
        start = {"StartAfter": self._key(after)} if after else {}
        with self._errors(prefix):
            for page in self._pages(prefix, **start):
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
        with self._errors(checked_key(prefix)):
            # A page of a listing has as many keys as one request may delete: 1,000.
            for page in self._pages(prefix):
                self._delete_all(prefix, [item["Key"] for item in page.get("Contents", [])])

    def upload_file(self, path: Path, key: str) -> None:
        if path.stat().st_size <= ONE_REQUEST_BYTES:
            self.put(key, path.read_bytes())
            return
        with self._errors(key):
            self._client.upload_file(str(path), self.bucket, self._key(key))

    def download_file(self, key: str, path: Path) -> None:
        own = self._key(key)
        _make_folder(path)
        with self._errors(key):
            self._client.download_file(self.bucket, own, str(path))

    def local_path(self, key: str) -> Path | None:
        self._key(key)
        return None

    def _delete_all(self, prefix: str, keys: list[str]) -> None:
        from botocore.exceptions import ClientError

        if not keys:
            return
        if self._deletes_in_bulk:
            try:
                wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
                refused = self._client.delete_objects(Bucket=self.bucket, Delete=wanted).get("Errors", [])
            except ClientError as error:
                if _status(error) not in _UNKNOWN_REQUEST:
                    raise
                logger.warning("%s does not delete in bulk, so each object is deleted by itself: %s", self.url, error)
                self._deletes_in_bulk = False
            else:
                if refused:
                    first = refused[0]
                    said = f"{first.get('Code')} {first.get('Message')} for {first.get('Key')!r}"
                    raise StorageError(f"{self.url} refused to delete {len(refused)} objects below {prefix!r}: {said}")
                return
        with ThreadPoolExecutor(_DELETES_AT_ONCE) as pool:
            list(pool.map(lambda key: self._client.delete_object(Bucket=self.bucket, Key=key), keys))

    def _key(self, key: str) -> str:
        prefix = f"{self._root}/" if self._root else ""
        return prefix + checked_key(key, root=prefix)

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
            if code in _FULL or _status(error) == 507:
                raise full(key, self.url) from error
            raise StorageError(f"{self.url} refused {key!r}: {code} {error}") from error
        except (BotoCoreError, Boto3Error) as error:
            raise StorageError(f"{self.url} does not answer for {key!r}: {error}") from error


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _was_retried(error: Any) -> bool:
    return int(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)) > 0
