"""Models and datasets as they lie in storage: a version exists when its manifest does."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tunesmith.assets.gallery import Gallery
from tunesmith.assets.training_types import TEXT_TYPES, TrainingTypes, training_types
from tunesmith.errors import ConflictError, SpecError, nearest
from tunesmith.frozen import Tolerant
from tunesmith.storage import layout
from tunesmith.storage.base import Storage


class File(Tolerant):
    path: str
    """Relative to the version's `files/`."""
    size_bytes: int
    sha256: str


class Manifest(Tolerant):
    """`manifest.json`: what a version is made of and where it comes from."""

    kind: Literal["model", "dataset"]
    name: str
    version: int
    files: list[File]
    created_at: str
    account: str
    job: str
    """The job that made it: a registration or a training run."""
    task_type: str | None = None
    framework: str | None = None
    license: str | None = None
    base: str | None = None
    """`NAME@VERSION` of the model it was tuned from."""
    dataset: str | None = None
    """`NAME@VERSION` of the data it was tuned on."""
    tables: dict[str, Table] = Field(default={})
    """For datasets: what each data file holds, by path."""
    details: dict[str, Any] = Field(default={})
    """For models: parameters, architecture, adapter-only and the like."""
    gallery: Gallery | None = None
    """For models: what it brings for its own training."""
    language_model: bool | None = None
    """For models: whether its files were found to be a causal language model; None: it has the task type of one."""

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def training(self) -> TrainingTypes:
        """How a model may be trained."""
        found = self.task_type in TEXT_TYPES if self.language_model is None else self.language_model
        return training_types(self.task_type, self.gallery, language_model=found)


class Table(Tolerant):
    """What was found in one data file at registration."""

    format: Literal["jsonl", "json", "csv", "parquet"]
    columns: list[str]
    rows: int


Manifest.model_rebuild()


def get_manifest(storage: Storage, kind: str, ref: str, *, field: str | None = None) -> Manifest:
    """The manifest of `NAME@VERSION`, or of the newest version for a bare NAME.

    Raises SpecError (code unknown_model or unknown_dataset) that names the nearest there is or the versions there are.
    """
    field = field or kind
    name, version = layout.parse_ref(ref, field=field)
    versions = _versions(storage, kind, name)
    if version is None and versions:
        version = versions[-1]
    if version is None or version not in versions:
        names = storage.children(layout.ASSET_FOLDERS[kind])
        there = f"{name} has version {', '.join(map(str, versions))}" if versions else nearest(name, names)
        raise SpecError(
            f"there is no {kind} {ref!r}",
            fields=[field],
            hint=there or f"`tunesmith {layout.ASSET_FOLDERS[kind]} list` shows those there are",
            code=f"unknown_{kind}",
        )
    return _read(storage, kind, name, version)


def list_manifests(storage: Storage, kind: str, *, name: str | None = None) -> list[Manifest]:
    """All published versions, sorted by name and version."""
    names = [name] if name is not None else storage.children(layout.ASSET_FOLDERS[kind])
    return [_read(storage, kind, each, version) for each in names for version in _versions(storage, kind, each)]


def newest_version(storage: Storage, kind: str, name: str) -> int:
    """The highest published version, 0 where there is none."""
    return max(_versions(storage, kind, name), default=0)


def publish(storage: Storage, manifest: Manifest) -> None:
    """Write the manifest, last and once, by one conditional write, after its files were stored.

    Published before by the same job: does nothing. By another: ConflictError.
    """
    key = layout.asset_manifest(manifest.kind, manifest.name, manifest.version)
    if storage.put_if_absent(key, manifest.model_dump_json(indent=2).encode()):
        return
    there = Manifest.model_validate_json(storage.get(key))
    if there.job != manifest.job:
        raise ConflictError(f"{manifest.kind} {manifest.ref} was published already, by job {there.job}")


def describe_files(folder: Path) -> list[File]:
    """Path, size and sha256 of every file below a local folder, sorted by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        File(path=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size, sha256=hash_file(path))
        for path in paths
    ]


def hash_file(path: Path) -> str:
    """sha256 of a local file, hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions(storage: Storage, kind: str, name: str) -> list[int]:
    folders = storage.children(f"{layout.ASSET_FOLDERS[kind]}/{name}")
    numbers = sorted(int(folder) for folder in folders if folder.isdecimal())
    return [number for number in numbers if storage.exists(layout.asset_manifest(kind, name, number))]


def _read(storage: Storage, kind: str, name: str, version: int) -> Manifest:
    return Manifest.model_validate_json(storage.get(layout.asset_manifest(kind, name, version)))
