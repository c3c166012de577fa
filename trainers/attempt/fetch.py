"""Local copies of published models and datasets."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunesmith import caches
from tunesmith.assets.catalog import Manifest, get_manifest
from tunesmith.assets.stored_files import StoredFiles
from tunesmith.settings import Settings
from tunesmith.storage.base import PARTIAL, Storage


@dataclass(frozen=True)
class Fetched:
    """A model or dataset at hand."""

    folder: Path
    """Its files and no others; read only."""
    manifest: Manifest


@contextmanager
def local_copy(storage: Storage, stored: StoredFiles) -> Iterator[Path]:
    """The files on this machine's disk, checked: where they lie, else as a copy for as long as the context."""
    local = storage.local_path(stored.prefix)
    if local is not None:
        stored.check(local)
        yield local
        return
    with tempfile.TemporaryDirectory() as folder:
        stored.copy(storage, Path(folder))
        yield Path(folder)


def fetch(storage: Storage, kind: str, ref: str, settings: Settings) -> Fetched:
    """The files of the model or dataset `NAME@VERSION`: where they lie on disk, else a copy that is made once a node.

    Copies are kept under the installation's home, by storage and manifest, and each file's size and hash are checked as
    it is copied. Files that are read where they lie are checked by size each time and by hash once a node, which a note
    under the home remembers as long as it is used: a large model is not read through for every job.
    Raises SpecError where there is no such version, DamagedError where a file is not what the manifest says.
    """
    manifest = get_manifest(storage, kind, ref)
    stored = manifest.stored
    key = hashlib.sha256(f"{storage.url}\0{manifest.model_dump_json()}".encode()).hexdigest()[:32]
    local = storage.local_path(stored.prefix)
    # Where a folder holds more than the manifest lists, only a copy is without the rest.
    if local is not None and _paths(local) <= {file.path for file in stored.files}:
        _check_once(stored, local, settings.home / "cache" / "checked" / key)
        return Fetched(local, manifest)
    place = settings.home / "cache" / "fetched" / key
    caches.hold(place)
    if not place.is_dir():
        _copy(storage, stored, place)
        caches.keep_bounds(settings)
    return Fetched(place, manifest)


def _check_once(stored: StoredFiles, folder: Path, note: Path) -> None:
    """Check the files in their place, by hash where no `note` says that this node did so before."""
    stored.check(folder, hashes=not note.exists())
    note.parent.mkdir(parents=True, exist_ok=True)
    note.touch()


def _copy(storage: Storage, stored: StoredFiles, place: Path) -> None:
    """Several workers of a node may copy at once: each into a folder of its own, and the first one's stands."""
    partial = place.with_name(f".{place.name}-{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        stored.copy(storage, partial)
        try:
            partial.rename(place)
        except OSError:
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _paths(folder: Path) -> set[str]:
    """What lies below a folder, relative to it; without what is not written to its end."""
    return {
        Path(above, name).relative_to(folder).as_posix()
        for above, _, names in os.walk(folder)
        for name in names
        if not name.startswith(PARTIAL)
    }
