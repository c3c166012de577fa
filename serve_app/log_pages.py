"""Logs and metrics, which grow as segments over a job's attempts, read page by page."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tunesmith.api.views import LogView, Page
from tunesmith.errors import SpecError
from tunesmith.jobs.attempts import MetricLine, metric_lines
from tunesmith.records.record import Record
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.storage.segments import MAX_BYTES, Segment, read_segments


@dataclass(frozen=True)
class Cursor:
    """A place in a job's logs or metrics: everything up to this segment of this attempt was read."""

    attempt: int = 1
    segment: int = 0

    def __str__(self) -> str:
        return f"{self.attempt}.{self.segment}"


def parse_cursor(text: str | None) -> Cursor:
    """The cursor written as ATTEMPT.SEGMENT; without one, the beginning."""
    if text is None:
        return Cursor()
    match = re.fullmatch(r"([1-9][0-9]{0,8})\.([0-9]{1,9})", text, re.ASCII)
    if match is None:
        raise SpecError(
            f"after must be ATTEMPT.SEGMENT, the `next` of an earlier page, got {text!r}",
            fields=["after"],
            code="invalid_cursor",
        )
    return Cursor(int(match[1]), int(match[2]))


def read_logs(storage: Storage, record: Record, *, rank: str, after: Cursor) -> Page[LogView]:
    """About 1 MiB of one worker's log, with the attempts in order."""
    parts, place = _read(storage, record, lambda attempt: layout.logs(record.id, attempt, rank), after)
    items = [LogView(attempt=n, rank=rank, text=part.data.decode(errors="replace")) for n, part in parts]
    return Page(items=items, next=str(place))


def read_metrics(storage: Storage, record: Record, *, names: list[str], after: Cursor) -> Page[MetricLine]:
    """The metrics in about 1 MiB of segments, of all names or of some."""
    parts, place = _read(storage, record, lambda attempt: layout.metrics(record.id, attempt), after)
    lines = [line for _, part in parts for line in metric_lines(part.data)]
    return Page(items=[line for line in lines if not names or line.name in names], next=str(place))


def _read(
    storage: Storage, record: Record, prefix: Callable[[int], str], after: Cursor
) -> tuple[list[tuple[int, Segment]], Cursor]:
    """The segments after the cursor with their attempts, about 1 MiB in all, and the cursor behind them.

    A later attempt follows once the one before has nothing more, so a client that asks again goes on by itself.
    """
    parts: list[tuple[int, Segment]] = []
    size, place = 0, after
    for attempt in range(after.attempt, record.status.attempt + 1):
        place = place if place.attempt == attempt else Cursor(attempt)
        for segment in read_segments(storage, prefix(attempt), after=place.segment):
            parts.append((attempt, segment))
            place = Cursor(attempt, segment.number)
            size += len(segment.data)
            if size >= MAX_BYTES:
                return parts, place
    return parts, place
