"""What the HTTP API answers: shared by the front door, which makes these, and the client, which reads them."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from tunesmith.assets.catalog import Table
from tunesmith.assets.gallery import Gallery
from tunesmith.assets.stored_files import File
from tunesmith.assets.training_types import TrainingTypes
from tunesmith.frozen import Tolerant

T = TypeVar("T")


class HealthView(Tolerant):
    """The door answers."""

    status: Literal["ok"] = "ok"
    version: str


class ErrorView(Tolerant):
    """What went wrong: TunesmithError.as_dict and the request it happened in."""

    code: str
    """For programs."""
    message: str
    """What was given, what is allowed."""
    fields: list[str]
    """Dotted paths into the request."""
    hint: str | None
    """What to do."""
    request_id: str
    """As in the header X-Request-Id; the door's log has it too."""


class ErrorBody(Tolerant):
    """Every answer that is not a success."""

    error: ErrorView


class Page(Tolerant, Generic[T]):
    """A part of a list, with the way to the part that follows."""

    items: list[T]
    next: str | None
    """Give it as `after` to read on. Lists that end have none at their end; records that grow always have one."""


class JobView(Tolerant):
    """A job: where it is, and what it runs with."""

    id: str
    kind: str
    """`train` or `register`."""
    name: str
    account: str
    state: str
    phase: str | None
    reason: str | None
    message: str | None
    attempt: int
    submission_id: str | None
    """Ray's id of the newest attempt, as the Ray dashboard shows it."""
    output_kind: str
    """`model` or `dataset`."""
    output: str
    """`NAME@VERSION` of what the job makes."""
    created_at: str
    started_at: str | None
    ended_at: str | None
    job: dict[str, Any]
    """The resolved spec, `job.json`."""


class EventView(Tolerant):
    seq: int
    time: str
    attempt: int | None
    state: str | None
    phase: str | None
    reason: str | None
    message: str | None
    data: dict[str, Any]


class LogView(Tolerant):
    """Some whole lines of one worker's log."""

    attempt: int
    rank: str
    """A worker's number, or `driver`."""
    text: str


class AssetView(Tolerant):
    """A version of a model or dataset."""

    kind: str
    name: str
    version: int
    ref: str
    task_type: str | None
    base: str | None
    dataset: str | None
    job: str
    created_at: str
    size_bytes: int
    files_url: str
    """Where the files lie in storage: a folder's path, or an `s3://` or `obs://` prefix."""
    files: list[File]
    tables: dict[str, Table]
    details: dict[str, Any]
    training: TrainingTypes | None
    """For models: how it may be trained."""
    gallery: Gallery | None
    """For models: what it brings for its own training."""
