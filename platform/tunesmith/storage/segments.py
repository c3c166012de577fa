"""Records that grow, kept as numbered segments because S3 cannot append (docs/contracts.md, section 8)."""

from __future__ import annotations

import bisect
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tunesmith.errors import StorageError
from tunesmith.storage.base import Storage

MAX_BYTES = 1 << 20
"""Size at which a segment is closed."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    number: int
    data: bytes


class SegmentWriter:
    """Appends lines; closes a segment when it is `max_age_s` old or 1 MiB big, in a thread of its own.

    Goes on after the highest segment there is. A write never blocks on storage; what storage refuses for a while is
    kept and tried again until `close`. One writer a prefix. A context manager.
    """

    def __init__(
        self,
        storage: Storage,
        prefix: str,
        *,
        max_age_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage = storage
        self._prefix = prefix
        self._max_age_s = max_age_s
        self._clock = clock
        self._next = _first_free(storage, prefix)
        self._lines: list[bytes] = []
        self._size = 0
        self._opened_at = 0.0
        self._changed = threading.Condition()
        self._storing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"segments {prefix}", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Append whole lines (each ends in a newline). Thread-safe. A segment never ends inside a line."""
        if not data.endswith(b"\n"):
            raise ValueError("a segment holds whole lines: the data must end in a newline")
        with self._changed:
            if self._closed:
                raise ValueError("the writer is closed")
            if not self._lines:
                self._opened_at = self._clock()
            self._lines.append(data)
            self._size += len(data)
            self._changed.notify()

    def flush(self) -> None:
        """Close the open segment now; returns when it is stored. Raises StorageError when it could not be."""
        while self._store():
            pass

    def close(self) -> None:
        """Store what is left and end the thread; StorageError when it could not be stored."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self.flush()

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self) -> None:
        pause_s: float | None = None
        while self._wait(pause_s):
            try:
                self._store()
                pause_s = None
            except StorageError as error:
                pause_s = min(30.0, 2 * (pause_s or 0.5))
                logger.warning("%s: kept, tried again in %.0f s: %s", self._prefix, pause_s, error)

    def _wait(self, pause_s: float | None) -> bool:
        """Wait until a segment is due (after a refusal, for `pause_s` first); False once the writer is closed."""
        with self._changed:
            if pause_s is not None:
                self._changed.wait_for(lambda: self._closed, timeout=pause_s)
            while not self._closed:
                left_s = self._opened_at + self._max_age_s - self._clock() if self._lines else None
                if self._size >= MAX_BYTES or (left_s is not None and left_s <= 0):
                    return True
                self._changed.wait(left_s)
        return False

    def _store(self) -> bool:
        """Store one segment of at most 1 MiB or one write; whether lines are left."""
        with self._storing:
            with self._changed:
                count, size = 0, 0
                while count < len(self._lines) and (count == 0 or size + len(self._lines[count]) <= MAX_BYTES):
                    size += len(self._lines[count])
                    count += 1
                taken = self._lines[:count]
            if not taken:
                return False
            self._storage.put(_key(self._prefix, self._next), b"".join(taken))
            with self._changed:
                self._next += 1
                del self._lines[:count]
                self._size -= size
                self._opened_at = self._clock()
                return bool(self._lines)


def read_segments(storage: Storage, prefix: str, *, after: int = 0) -> Iterator[Segment]:
    """The segments numbered above `after`, in order. To read on costs one listing of what is new."""
    for entry in storage.entries(prefix, after=_key(prefix, after)):
        name = entry.key.removeprefix(f"{prefix}/")
        if name.isdecimal():
            yield Segment(int(name), storage.get(entry.key))


def _key(prefix: str, number: int) -> str:
    return f"{prefix}/{number:08d}"


def _first_free(storage: Storage, prefix: str) -> int:
    """The number after the highest.

    Segments are numbered from 1 without a gap, so it is found by halving: one request for a new record, some thirty for
    one of 17,000 segments, as a worker writes in a day.
    """

    def is_free(number: int) -> bool:
        return not storage.exists(_key(prefix, number))

    above = 1
    while not is_free(above):
        above *= 2
    low = above // 2 + 1
    return low + bisect.bisect_left(range(low, above), True, key=is_free)
