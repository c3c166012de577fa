"""The event lines that drivers write, read once and in order."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

from pydantic import ValidationError

from tunesmith.jobs.attempts import EventLine
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.storage.segments import read_segments

logger = logging.getLogger(__name__)


class DriverEvents:
    """Remembers how far each attempt was read. What it forgets is read again, never skipped."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._places: dict[tuple[str, int], tuple[int, int]] = {}
        """By job and attempt: the last segment that was read, and how many lines there were up to its end."""

    def unread(self, job_id: str, attempt: int, *, taken: int) -> Iterator[tuple[int, EventLine]]:
        """Lines with their number from 0, from line `taken` on. A line counts as read when the next is asked for."""
        segment, number = self._places.get((job_id, attempt), (0, 0))
        for part in read_segments(self._storage, layout.events(job_id, attempt), after=segment):
            for text in part.data.splitlines():
                line = _parse(text, job_id) if number >= taken else None
                if line is not None:
                    yield number, line
                number += 1
            self._places[job_id, attempt] = (part.number, number)

    def forget(self, job_id: str, attempt: int) -> None:
        self._places.pop((job_id, attempt), None)

    def keep(self, job_ids: Collection[str]) -> None:
        """Forget all jobs but these."""
        for job_id, attempt in list(self._places):
            if job_id not in job_ids:
                self.forget(job_id, attempt)


def _parse(text: bytes, job_id: str) -> EventLine | None:
    try:
        return EventLine.model_validate_json(text)
    except ValidationError:
        logger.exception("%s: an event line cannot be read and is left out", job_id)
        return None
