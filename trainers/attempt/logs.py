"""Logs of drivers and workers, as segments in the job's folder."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tunesmith.errors import StorageError
from tunesmith.log_lines import LineFormatter
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.storage.segments import SegmentWriter

_FORMAT = "%(asctime)sZ %(levelname)s %(name)s: %(message)s"


class SegmentHandler(logging.Handler):
    """Writes records as lines of a segmented log."""

    def __init__(self, segments: SegmentWriter) -> None:
        super().__init__()
        self._segments = segments

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._segments.write(self.format(record).encode(errors="replace") + b"\n")
        except Exception:  # noqa: BLE001 - the logging module's own border: a log line never ends the work
            self.handleError(record)

    def flush(self) -> None:
        """Store what was logged; where storage does not take it, it is kept and tried again."""
        with suppress(StorageError):
            self._segments.flush()


@contextmanager
def log_to_job(storage: Storage, job_id: str, attempt: int, *, rank: str, settings: Settings) -> Iterator[None]:
    """Send everything logged in this process to `logs/RANK` of the attempt, while the context lasts.

    `rank` is a worker's number or `driver`. A driver logs to stderr as well, which is Ray's own log of the job; of a
    worker Ray sends it there already.
    """
    formatter = LineFormatter(_FORMAT)
    formatter.converter = time.gmtime
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    for noisy in ("botocore", "boto3", "s3transfer", "urllib3", "httpx", "httpcore", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with SegmentWriter(storage, layout.logs(job_id, attempt, rank), max_age_s=settings.segment_s) as segments:
        handlers: list[logging.Handler] = [SegmentHandler(segments)]
        if rank == "driver":
            handlers.append(logging.StreamHandler(sys.stderr))
        for handler in handlers:
            handler.setFormatter(formatter)
            root.addHandler(handler)
        try:
            yield
        finally:
            for handler in handlers:
                root.removeHandler(handler)
            root.setLevel(level)
