"""Records that grow, kept as numbered segments because S3 cannot append (contracts.md, section 8)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tunesmith.storage import Storage

MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Segment:
    number: int
    data: bytes


class SegmentWriter:
    """Appends lines; closes a segment when it is `max_age_s` old or 1 MiB big, in a thread of its own.

    Goes on after the highest segment there is. A write never blocks on storage; what storage refuses for a while is
    kept and tried again until `close`. One writer a prefix. A context manager.
    """

    def __init__(self, storage: Storage, prefix: str, *, max_age_s: float = 5.0) -> None:
        raise NotImplementedError

    def write(self, data: bytes) -> None:
        """Append whole lines (each ends in a newline). Thread-safe. A segment never ends inside a line."""
        raise NotImplementedError

    def flush(self) -> None:
        """Close the open segment now; returns when it is stored. Raises StorageError when it could not be."""
        raise NotImplementedError

    def close(self) -> None:
        """Store what is left and end the thread; StorageError when it could not be stored."""
        raise NotImplementedError

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_segments(storage: Storage, prefix: str, *, after: int = 0) -> Iterator[Segment]:
    """The segments numbered above `after`, in order. Names are the number in 8 digits."""
    raise NotImplementedError
