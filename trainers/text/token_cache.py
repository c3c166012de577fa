"""Where tokenised rows are kept: in storage for all, and as a copy on each node that has storage elsewhere.

`cache/tokenized/KEY/` holds a manifest and, in a folder of its builder's own, the shards that it names. The manifest is
written last and conditionally: of two builders the first one's stands. What else lies there is removed once no builder
can still be writing it.
"""

from __future__ import annotations

import fcntl
import logging
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from trainers.text.shards import Batch, Shard, ShardWriter, TokenizedRows
from tunesmith import caches
from tunesmith.errors import NotFoundError, StorageError
from tunesmith.frozen import Frozen
from tunesmith.jobs.audit_report import AuditCounts
from tunesmith.storage import layout
from tunesmith.storage.base import Storage

LONGEST_BUILD_S = 24 * 3600
"""A builder that takes longer gives up, so that what older ones have left can be removed."""

_BUILDER = re.compile(r"(?P<node>[0-9a-f]{8})-(?P<began>\d{12})-[0-9a-f]{8}")

logger = logging.getLogger(__name__)


class CacheManifest(Frozen):
    """`manifest.json` of tokenised data."""

    builder: str
    """The folder of the shards."""
    shards: list[Shard]
    counts: AuditCounts


class TokenCache:
    """The tokenised rows of one key: read where they are stored, or made and stored."""

    def __init__(self, storage: Storage, node: Path, key: str) -> None:
        """`node` is the folder of this node's own copies and locks."""
        self._storage = storage
        self._node = node
        self._key = key
        self._folder = layout.tokenized(key)
        self._manifest_key = f"{self._folder}/manifest.json"
        self.has_added = False
        """Whether anything was added to this node's disk."""

    def rows(self, batches: Iterable[Batch]) -> TokenizedRows:
        """The stored rows, or else those of `batches`. On a node one process builds and the others wait for it."""
        if (local := self._storage.local_path(self._folder)) is not None:
            caches.hold(local)
        with _alone(self._node / f"{self._key}.lock") as node:
            for path in self._node.glob(f"{self._key}-*.partial"):
                shutil.rmtree(path, ignore_errors=True)  # of a killed builder: here nobody else is at work
            manifest = self._read()
            if manifest is not None:
                try:
                    return self._open(manifest, node)
                except (NotFoundError, OSError, ValueError) as error:
                    logger.warning("%s is not whole and is made again: %s", self._folder, error)
                    if self._read() == manifest:  # another node may have made it again meanwhile
                        self._storage.delete(self._manifest_key)
            return self._open(self._build(batches, node), node)

    def _read(self) -> CacheManifest | None:
        try:
            return CacheManifest.model_validate_json(self._storage.get(self._manifest_key))
        except NotFoundError:
            return None

    def _open(self, manifest: CacheManifest, node: str | None) -> TokenizedRows:
        """The rows; what dead builders have left is removed. NotFoundError, OSError or ValueError: not whole."""
        prefix = f"{self._folder}/{manifest.builder}"
        place = self._storage.local_path(prefix) or self._copy(manifest, prefix)
        _check_whole(place, manifest)
        rows = TokenizedRows.open([place / shard.name for shard in manifest.shards], manifest.counts)
        for builder in self._storage.children(self._folder):
            if builder != manifest.builder and _is_dead(builder, node):
                self._storage.delete_folder(f"{self._folder}/{builder}")
        return rows

    def _copy(self, manifest: CacheManifest, prefix: str) -> Path:
        place = self._place(manifest.builder)
        caches.hold(place)
        try:
            _check_whole(place, manifest)
        except (OSError, ValueError):
            partial = self._place(f"{manifest.builder}.partial")
            for shard in manifest.shards:
                self._storage.download_file(f"{prefix}/{shard.name}", partial / shard.name)
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
            self.has_added = True
        return place

    def _build(self, batches: Iterable[Batch], node: str | None) -> CacheManifest:
        """Write the shards, then the manifest. Returns the manifest that is valid, which may be another builder's."""
        self.has_added = True
        began = int(time.time())
        builder = f"{node or secrets.token_hex(4)}-{began:012d}-{secrets.token_hex(4)}"
        prefix = f"{self._folder}/{builder}"
        local = self._storage.local_path(prefix)
        place = local or self._place(f"{builder}.partial")
        writer = ShardWriter(place, lambda path: self._shard_closed(path, prefix, began, upload=local is None))
        standing: CacheManifest | None = None
        try:
            counts = AuditCounts()
            for batch in batches:
                writer.write(batch)
                counts += batch.counts
            writer.close()
            made = CacheManifest(builder=builder, shards=writer.shards, counts=counts)
            self._storage.put_if_absent(self._manifest_key, made.model_dump_json(indent=2).encode())
            standing = self._read()
        except _BeatenError:
            standing = self._read()
        finally:
            writer.abandon()
            if standing is None or standing.builder != builder:
                self._storage.delete_folder(prefix)
                shutil.rmtree(place, ignore_errors=True)
        if standing is None:
            raise StorageError(f"{self._manifest_key} was there and is gone")
        if local is None and standing.builder == builder:
            place.rename(self._place(builder))
        return standing

    def _shard_closed(self, path: Path, prefix: str, began: int, *, upload: bool) -> None:
        if self._storage.exists(self._manifest_key):
            raise _BeatenError
        if time.time() - began > LONGEST_BUILD_S:
            raise StorageError(f"tokenising takes longer than {LONGEST_BUILD_S / 3600:g} hours, which nobody waits for")
        if upload:
            self._storage.upload_file(path, f"{prefix}/{path.name}")

    def _place(self, name: str) -> Path:
        return self._node / f"{self._key}-{name}"


class _BeatenError(Exception):
    """Another node's builder was faster."""


def _is_dead(builder: str, node: str | None) -> bool:
    """Whether nobody can still be writing there: it is of this node, whose lock is ours, or of long ago."""
    known = _BUILDER.fullmatch(builder)
    if known is None:
        return False
    return known["node"] == node or time.time() - int(known["began"]) > LONGEST_BUILD_S


def _check_whole(place: Path, manifest: CacheManifest) -> None:
    for shard in manifest.shards:
        size = (place / shard.name).stat().st_size
        if size != shard.size_bytes:
            raise ValueError(f"{shard.name} has {size} bytes, not {shard.size_bytes}")


@contextmanager
def _alone(path: Path) -> Iterator[str | None]:
    """Hold the lock of a file, and say the name of the node, all processes that share the lock; None without locks.

    The system lets the lock go with its process, however that ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                node: str | None = _name(file)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError as error:
                # Some network file systems have no locks; then two may build, and the first one's manifest stands.
                logger.warning("%s cannot be locked: %s", path, error)
                node = None
                break
        yield node


def _name(file: TextIO) -> str:
    """What the locked file says; a random name where it says none yet."""
    file.seek(0)
    name = file.read()
    if re.fullmatch("[0-9a-f]{8}", name) is None:
        name = secrets.token_hex(4)
        file.truncate(0)
        file.write(name)
        file.flush()
    return name
