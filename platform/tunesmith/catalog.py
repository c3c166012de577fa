"""Models and datasets as they lie in storage: a version exists when its manifest does."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tunesmith.storage import Storage


class File(BaseModel):
    model_config = ConfigDict(frozen=True)

    path: str
    """Relative to the version's `files/`."""
    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """`manifest.json`: what a version is made of and where it comes from."""

    model_config = ConfigDict(frozen=True)

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
    tables: dict[str, Table] = {}
    """For datasets: what each data file holds, by path."""
    details: dict[str, Any] = {}
    """For models: parameters, architecture, adapter-only and the like."""

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


class Table(BaseModel):
    """What was found in one data file at registration."""

    model_config = ConfigDict(frozen=True)

    format: Literal["jsonl", "json", "csv", "parquet"]
    columns: list[str]
    rows: int


Manifest.model_rebuild()


def get_manifest(storage: Storage, kind: str, ref: str, *, field: str | None = None) -> Manifest:
    """The manifest of `NAME@VERSION`, or of the newest version for a bare NAME.

    Raises SpecError (code unknown_model / unknown_dataset, fields=[field or kind]) naming the nearest there is and the
    versions there are.
    """
    raise NotImplementedError


def list_manifests(storage: Storage, kind: str, *, name: str | None = None) -> list[Manifest]:
    """All published versions, sorted by name and version."""
    raise NotImplementedError


def newest_version(storage: Storage, kind: str, name: str) -> int:
    """The highest published version, 0 where there is none."""
    raise NotImplementedError


def publish(storage: Storage, manifest: Manifest) -> None:
    """Write the manifest, last and once, by one conditional write, after its files were stored.

    Published before by the same job: does nothing. By another: ConflictError.
    """
    raise NotImplementedError


def hash_file(path: Any) -> str:
    """sha256 of a local file, hexadecimal, read in pieces."""
    raise NotImplementedError
