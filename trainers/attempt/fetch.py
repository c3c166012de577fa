"""Local copies of published models and datasets."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunesmith.assets.catalog import Manifest, get_manifest
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.base import Storage


@dataclass(frozen=True)
class Fetched:
    """A model or dataset at hand."""

    folder: Path
    """Its files; read only."""
    manifest: Manifest


@contextmanager
def local_copy(storage: Storage, key: str) -> Iterator[Path]:
    """The folder `key` of `storage` on this machine's disk: where it lies, else a copy for as long as the context."""
    local = storage.local_path(key)
    if local is not None:
        yield local
        return
    with tempfile.TemporaryDirectory() as folder:
        storage.download_folder(key, Path(folder))
        yield Path(folder)


def fetch(storage: Storage, kind: str, ref: str, settings: Settings) -> Fetched:
    """The model or dataset `NAME@VERSION`, where it lies on disk, else as a copy made once a node.

    Copies are kept under the installation's home, by storage and manifest. SpecError where there is no such version.
    """
    manifest = get_manifest(storage, kind, ref)
    prefix = layout.asset_files(kind, manifest.name, manifest.version)
    local = storage.local_path(prefix)
    if local is not None:
        return Fetched(local, manifest)
    key = hashlib.sha256(f"{storage.url}\0{manifest.model_dump_json()}".encode()).hexdigest()[:32]
    place = settings.home / "cache" / "fetched" / key
    if place.is_dir():
        return Fetched(place, manifest)
    # Several workers of a node may fetch at once: each into a folder of its own, and the first one's stands.
    partial = place.with_name(f".{key}-{uuid.uuid4().hex}")
    try:
        storage.download_folder(prefix, partial)
        try:
            partial.rename(place)
        except OSError:
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Fetched(place, manifest)
