"""What the record store gives out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tunesmith.jobs.spec import Output, RegisterJob, TrainJob, parse_job
from tunesmith.jobs.states import Change, Status


@dataclass(frozen=True)
class Record:
    """One job as the database knows it."""

    id: str
    kind: str
    name: str
    account: str
    status: Status
    output: Output
    text: str
    """What it runs with, job.json. Nothing is parsed before `job` is asked for."""
    submission_id: str | None
    """Ray's id of the newest attempt."""
    created_at: str
    updated_at: str
    started_at: str | None
    """When it first ran, UTC; likewise ended_at."""
    ended_at: str | None
    deleted_at: str | None
    version: int
    """Counts the record's changes; a conditional update compares it."""

    @cached_property
    def job(self) -> TrainJob | RegisterJob:
        """What it runs with."""
        return parse_job(self.text)


@dataclass(frozen=True)
class Unfinished:
    """What tells who must look after a job: less than its record, for there may be thousands."""

    id: str
    state: str
    attempt: int


@dataclass(frozen=True)
class Event:
    """One change of a job."""

    seq: int
    """Given by the database alone; grows over all jobs."""
    job_id: str
    time: str
    change: Change
    data: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """Which line of an attempt's own events an event was adopted from."""

    attempt: int
    number: int


@dataclass(frozen=True)
class Lease:
    """The right to act, which one process holds at a time."""

    name: str
    holder: str
    epoch: int
    """Grows with every new holder: the fencing token."""


@dataclass(frozen=True)
class Insertion:
    """How an order was recorded."""

    record: Record
    response: dict[str, Any]
    """The first answer."""
    replayed: bool
