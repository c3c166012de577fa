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

from tunesmith.assets.catalog import Manifest
from tunesmith.errors import NotFoundError
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage
from tunesmith.storage.urls import open_patiently


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


def fetch(url: str, settings: Settings) -> Fetched:
    """The model or dataset at `url`, where it lies on disk, else as a copy made once a node.

    Copies are kept under the installation's home, by URL and manifest. NotFoundError where there is no manifest.
    """
    storage = open_patiently(url, settings)
    try:
        text = storage.get("manifest.json")
    except NotFoundError:
        raise NotFoundError(
            f"there is nothing at {url}", hint="was it deleted meanwhile?", code="unknown_url"
        ) from None
    manifest = Manifest.model_validate_json(text)
    local = storage.local_path("files")
    if local is not None:
        return Fetched(local, manifest)
    key = hashlib.sha256(url.encode() + b"\0" + text).hexdigest()[:32]
    place = settings.home / "cache" / "fetched" / key
    if place.is_dir():
        return Fetched(place, manifest)
    # Several workers of a node may fetch at once: each into a folder of its own, and the first one's stands.
    partial = place.with_name(f".{key}-{uuid.uuid4().hex}")
    try:
        storage.download_folder("files", partial)
        try:
            partial.rename(place)
        except OSError:
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Fetched(place, manifest)
