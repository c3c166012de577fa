"""From what workers report to the job's folder and Ray's metrics, through one writer on the driver."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainers.attempt.context import Attempt
from trainers.attempt.report import Report
from tunesmith.jobs.attempts import EventWriter, MetricLine
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.storage.segments import SegmentWriter


class ReportWriter:
    """The one writer of an attempt's metrics, and of the events that its workers cause.

    A context manager; when it is left, all that was reported is stored.
    """

    def __init__(
        self,
        storage: Storage,
        job_id: str,
        attempt: int,
        *,
        events: EventWriter,
        segment_s: float,
    ) -> None:
        self._attempt = attempt
        self._events = events
        self._gauges = Gauges(job_id, attempt)
        self._metrics = SegmentWriter(storage, layout.metrics(job_id, attempt), max_age_s=segment_s)
        self._running = False
        self.last_step = 0
        """The newest step that was reported."""
        self.products: Mapping[str, Any] | None = None

    def flush(self) -> None:
        """Return once all metrics that were reported are stored. Raises StorageError when they could not be."""
        self._metrics.flush()

    def close(self) -> None:
        self._metrics.close()

    def __enter__(self) -> ReportWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def write(self, report: Report, rank: int) -> None:
        """Take one worker's report, for workers that do not wait for each other. One caller at a time."""
        self.write_all([report], first_rank=rank)

    def write_all(self, reports: list[Report], *, first_rank: int = 0) -> None:
        """Take the reports of all workers of one step, in the order of their ranks. One caller at a time."""
        first = reports[0]
        lines = [self._line(first, None, name, value) for name, value in first.values.items()]
        for rank, report in enumerate(reports, start=first_rank):
            lines += [self._line(report, rank, name, value) for name, value in report.sampled.items()]
        if lines:
            self._metrics.write(b"".join(line.model_dump_json().encode() + b"\n" for line in lines))
            self._gauges.set(lines)
        self.last_step = max(self.last_step, first.step)
        for event in first.events:
            self._events.append(event)
        if first.phase is not None:
            state = "running" if first.phase == "train" and not self._running else None
            self._running = self._running or state is not None
            self._events.write(state=state, phase=first.phase, **first.data)
        if first.products is not None:
            self.products = first.products

    def _line(self, report: Report, rank: int | None, name: str, value: float) -> MetricLine:
        return MetricLine(time=report.time, attempt=self._attempt, step=report.step, rank=rank, name=name, value=value)


def report_writer(attempt: Attempt) -> ReportWriter:
    """The writer of an attempt, in its driver."""
    return ReportWriter(
        attempt.storage,
        attempt.job.id,
        attempt.number,
        events=attempt.events,
        segment_s=attempt.settings.segment_s,
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
