"""Models and datasets as they lie in storage: a version exists when its manifest does."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tunesmith.assets.gallery import Gallery
from tunesmith.assets.stored_files import File, StoredFiles
from tunesmith.assets.training_types import TEXT_TYPES, TrainingTypes, training_types
from tunesmith.errors import ConflictError, NotFoundError, SpecError, nearest
from tunesmith.frozen import Tolerant
from tunesmith.storage import layout
from tunesmith.storage.base import Storage


class Table(Tolerant):
    """What was found in one data file at registration."""

    format: Literal["jsonl", "json", "csv", "parquet"]
    columns: list[str]
    rows: int


class Description(Tolerant):
    """What a version is, beside its name and its files."""

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


class Manifest(Description):
    """`manifest.json`: what a version is made of and where it comes from."""

    kind: Literal["model", "dataset"]
    name: str
    version: int
    folder: str
    """The folder beside the manifest that holds the files: that of the attempt which stored them."""
    files: list[File]
    created_at: str
    account: str
    job: str
    """The job that made it: a registration or a training run."""

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def stored(self) -> StoredFiles:
        """Its files in storage."""
        return StoredFiles(layout.asset_files(self.kind, self.name, self.version, self.folder), self.files)

    @property
    def training(self) -> TrainingTypes:
        """How a model may be trained."""
        found = self.task_type in TEXT_TYPES if self.language_model is None else self.language_model
        return training_types(self.task_type, self.gallery, language_model=found)


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


def published(storage: Storage, kind: str, name: str, version: int, *, by: str) -> Manifest | None:
    """The manifest of a version that the job `by` published; None where nobody did.

    ConflictError where another job did: what this one makes would have no place.
    """
    manifest = _find(storage, kind, name, version)
    if manifest is not None and manifest.job != by:
        raise ConflictError(
            f"{manifest.kind} {manifest.ref} was published already, by job {manifest.job}",
            hint="order or render the job again: it gets a version of its own",
        )
    return manifest


def publish(storage: Storage, manifest: Manifest) -> Manifest:
    """Write the manifest, last and once, by one conditional write, after its files were stored; the one that stands.

    That is an earlier one where the same job published before. Where another job did: ConflictError.
    """
    key = layout.asset_manifest(manifest.kind, manifest.name, manifest.version)
    if storage.put_if_absent(key, manifest.model_dump_json(indent=2).encode()):
        return manifest
    return published(storage, manifest.kind, manifest.name, manifest.version, by=manifest.job) or manifest


def remove_leftovers(storage: Storage, kind: str, name: str, version: int, *, of: str) -> None:
    """Delete what attempts of the job `of` stored for a version and its manifest, if there is one, does not name."""
    manifest = _find(storage, kind, name, version)
    for folder in storage.children(layout.asset(kind, name, version)):
        if layout.is_files_folder(folder, of) and (manifest is None or folder != manifest.folder):
            storage.delete_folder(layout.asset_files(kind, name, version, folder))


def _versions(storage: Storage, kind: str, name: str) -> list[int]:
    folders = storage.children(f"{layout.ASSET_FOLDERS[kind]}/{name}")
    numbers = sorted(int(folder) for folder in folders if folder.isdecimal())
    return [number for number in numbers if storage.exists(layout.asset_manifest(kind, name, number))]


def _find(storage: Storage, kind: str, name: str, version: int) -> Manifest | None:
    try:
        return _read(storage, kind, name, version)
    except NotFoundError:
        return None


def _read(storage: Storage, kind: str, name: str, version: int) -> Manifest:
    return Manifest.model_validate_json(storage.get(layout.asset_manifest(kind, name, version)))
