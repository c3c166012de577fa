"""From `ray.train.report` on the workers to the job's folder and Ray's metrics, through one writer on the driver.

Ray Train calls back in its controller, an actor on the driver's node. The callback passes every report on to the driver
through a Unix socket and waits for its answer; a thread there is the one writer of the attempt's metrics and of the
events that workers cause.
"""

from __future__ import annotations

import logging
import secrets
import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from trainers.attempt.context import Attempt
from trainers.attempt.report import Report
from trainers.text_job import hangs
from trainers.text_job.ray_train_reports import ForwardReports
from tunesmith.jobs.attempts import EventWriter, MetricLine, attempt_name
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.storage.segments import SegmentWriter

logger = logging.getLogger(__name__)


class ReportWriter:
    """The driver's end. A context manager; when it is left, all that was reported is stored."""

    def __init__(
        self, storage: Storage, job_id: str, attempt: int, events: EventWriter, *, segment_s: float, secret: bytes
    ) -> None:
        self._attempt, self._name = attempt, attempt_name(job_id, attempt)
        self._events = events
        self._gauges = Gauges(job_id, attempt)
        self._metrics = SegmentWriter(
            storage, layout.metrics(job_id, attempt), max_age_s=segment_s, stored=self._tell_stored
        )
        self._telling = threading.Lock()
        self._awaited: deque[tuple[int, int]] = deque()
        self._written_size = self._stored_size = 0
        self._folder = tempfile.TemporaryDirectory(prefix="tunesmith-")
        self._listener = Listener(str(Path(self._folder.name) / "reports"), "AF_UNIX", authkey=secret)
        self._secret = secret
        self._running = False
        self.last_step = 0
        """The newest step that was reported."""
        self.products: Mapping[str, Any] | None = None
        threading.Thread(target=self._accept, name="reports", daemon=True).start()

    def callback(self) -> ForwardReports:
        """For RunConfig(callbacks=[…]) of one run of the workers."""
        return ForwardReports(str(self._listener.address), self._secret)

    def close(self) -> None:
        self._listener.close()
        self._metrics.close()
        self._folder.cleanup()

    def __enter__(self) -> ReportWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._read, args=(connection,), name="reports", daemon=True).start()

    def _read(self, connection: Connection) -> None:
        with connection:
            while True:
                try:
                    self._write(connection.recv())
                    connection.send(None)
                except (EOFError, OSError):
                    return  # the controller is gone

    def write(self, report: Report, rank: int) -> None:
        """Take one worker's report, for workers that do not wait for each other. One caller at a time."""
        self._write([report], first_rank=rank)

    def _write(self, reports: list[Report], first_rank: int = 0) -> None:
        first = reports[0]
        lines = [self._line(first, None, name, value) for name, value in first.values.items()]
        for rank, report in enumerate(reports, start=first_rank):
            lines += [self._line(report, rank, name, value) for name, value in report.sampled.items()]
        if lines:
            data = b"".join(line.model_dump_json().encode() + b"\n" for line in lines)
            self._written_size += len(data)
            self._metrics.write(data)
            self._gauges.set(lines)
        if first.flush:
            with self._telling:
                self._awaited.append((self._written_size, first.step))
            self._metrics.flush_soon()
            self._tell_stored(0)  # they may all be there
        self.last_step = max(self.last_step, first.step)
        for event in first.events:
            self._events.append(event)
        if first.phase is not None:
            state = "running" if first.phase == "train" and not self._running else None
            self._running = self._running or state is not None
            self._events.write(state=state, phase=first.phase, **first.data)
        if first.products is not None:
            self.products = first.products

    def _tell_stored(self, size: int) -> None:
        """Tell the workers of steps whose metrics are among the `size` bytes that storage has now."""
        with self._telling:
            self._stored_size = max(self._stored_size, size)
            while self._awaited and self._awaited[0][0] <= self._stored_size:
                _, step = self._awaited.popleft()
                try:
                    hangs.tell_stored(self._name, step)
                except Exception:  # a thread's border: the records go on without Ray
                    logger.exception("%s: the workers could not be told of step %d", self._name, step)

    def _line(self, report: Report, rank: int | None, name: str, value: float) -> MetricLine:
        return MetricLine(time=report.time, attempt=self._attempt, step=report.step, rank=rank, name=name, value=value)


def report_writer(attempt: Attempt) -> ReportWriter:
    """The writer of an attempt, in its driver."""
    return ReportWriter(
        attempt.storage,
        attempt.job.id,
        attempt.number,
        attempt.events,
        segment_s=attempt.settings.segment_s,
        secret=secrets.token_bytes(32),
    )


class Gauges:
    """The newest value of every metric as `tunesmith_NAME` in Ray's metrics, tagged with job, attempt and rank."""

    def __init__(self, job_id: str, attempt: int) -> None:
        self._tags = {"job_id": job_id, "attempt": str(attempt)}
        self._gauges: dict[str, Any] = {}

    def set(self, lines: list[MetricLine]) -> None:
        from ray.util.metrics import Gauge

        for line in lines:
            gauge = self._gauges.get(line.name)
            if gauge is None:
                tags = ("job_id", "attempt", "rank")
                gauge = Gauge(f"tunesmith_{line.name}", f"{line.name} of a fine-tuning job", tag_keys=tags)
                self._gauges[line.name] = gauge
            gauge.set(line.value, tags={**self._tags, "rank": "" if line.rank is None else str(line.rank)})
