"""One worker of a custom job: the model's program as a child in its room, followed until it ends. A Ray task runs this.

The program is `gallery_train/train.py` with the platform's Python, or what the model's card names in an image.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from trainers.attempt.fetch import fetch
from trainers.attempt.report import Report
from trainers.attempt.stop_watch import FENCED, StoppedError, StopWatch, stopped
from trainers.isolation import outputs
from trainers.isolation.program import Launch, Program, end_earlier
from trainers.isolation.usage import Limits, Usage
from trainers.programs import images
from trainers.programs.images import Image
from trainers.programs.metrics_file import MAX_BYTES, MAX_QUOTED, MetricsFile
from trainers.programs.program_launch import (
    CONTAINER,
    Inputs,
    find_place,
    launch_program,
    metrics_path,
    network_of,
    program_name,
)
from trainers.programs.program_log import ProgramLog
from trainers.programs.program_output import output_kept, restore_output
from trainers.programs.program_task import ProgramTask
from tunesmith import caches
from tunesmith.assets.gallery import TRAIN
from tunesmith.clock import utc_text
from tunesmith.errors import LeaseLostError, OutOfMemoryError, SpecError, StorageError, TunesmithError, UnavailableError
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import Result
from tunesmith.jobs.flavors import get_flavor
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.patience import PatientStorage
from tunesmith.storage.segments import SegmentWriter
from tunesmith.storage.urls import open_patiently

MAX_INSTALLED_FILES = 1_000_000
LOOK_S = 0.5
"""Between two looks at the program, its metrics and its limits."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Said:
    """What a worker tells the driver while it works; the last one has the result."""

    reports: list[Report] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Messages with their data."""
    result: Result | None = None


def run_program(worker: ProgramTask) -> Iterator[Said]:
    """Run the program to its end, telling how it goes. What ends it is in the last thing said.

    Raises StorageError at the end of patience with storage, and what else is nobody's fault.
    """
    settings = Settings.from_env()
    storage = open_patiently(worker.storage_url, settings)
    try:
        yield from _Run(worker, storage, settings).steps()
    except StoppedError as stop:
        yield Said(result=stopped(stop.args[0], f" before {TRAIN} was started"))
    except (LeaseLostError, StorageError, UnavailableError):
        raise
    except TunesmithError as error:
        if error.code == "too_much_output":
            caches.delete(worker.folder(settings) / "output")
            storage.delete_folder(layout.program_output(worker.job.id, worker.attempt))
        yield Said(result=attempts.failure(error))
    finally:
        # The output of worker 0 is stored first.
        if worker.rank != 0:
            caches.delete(worker.folder(settings))


def free_port() -> int:
    """A port of this node that was free just now."""
    import socket

    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


class _Run:
    def __init__(self, worker: ProgramTask, storage: PatientStorage, settings: Settings) -> None:
        self._worker, self._storage, self._settings = worker, storage, settings
        self._job = worker.job
        self._folder = worker.folder(settings)
        self._stop = StopWatch(storage, self._job.id, worker.attempt, deadline=worker.deadline)
        self._step = 0
        self._program_name = TRAIN

    def steps(self) -> Iterator[Said]:
        yield self._phase("fetch")
        # A driver or worker that was lost may have left some.
        end_earlier(self._job.id, self._worker.attempt)
        for left in self._folder.parent.glob(f"{self._job.id}-a*-{self._worker.rank}"):
            images.remove_cgroups(left / CONTAINER)
            caches.delete(left)
        caches.hold(self._folder)
        for name in ("output", "metrics", "tmp"):
            (self._folder / name).mkdir(mode=0o700, parents=True)
        base = fetch(self._storage, "model", self._job.model, self._settings)
        dataset = fetch(self._storage, "dataset", self._job.dataset, self._settings)
        restored = restore_output(self._worker, self._storage, self._folder / "output") if self._worker.rank == 0 else 0
        if restored:
            message = f"the output has {restored} files that an earlier attempt left"
            yield Said(events=[(message, {"restored_files": restored})])
        key = layout.logs(self._job.id, self._worker.attempt, str(self._worker.rank))
        with self._log(key) as log, self._stop.watching():
            yield self._phase("environment")
            self._program_name = program_name(base)
            place = find_place(self._worker, base, settings=self._settings, log=log, watch=self._wait)
            if place.lock is not None and self._worker.rank == 0:
                of_job = layout.image_lock if isinstance(place, Image) else layout.requirements_lock
                self._storage.put(of_job(self._job.id, self._worker.attempt), place.lock.encode())
            yield self._phase("train")
            with network_of(self._worker, self._settings) as network:
                inputs = Inputs(base, dataset, restored=restored > 0)
                result = yield from self._train(
                    launch_program(self._worker, place, inputs, network, self._settings), log
                )
        if self._worker.rank != 0:
            yield self._dropped_output()
        yield Said(result=result)

    def _dropped_output(self) -> Said:
        """Say how many files of this worker are not kept: only worker 0's are."""
        count = len(outputs.walk(self._folder / "output").files)
        message = f"worker {self._worker.rank} left {count} files; only worker 0's output is kept"
        return Said(events=[(message, {"dropped_files": count})] if count else [])

    def _train(self, launch: Launch, log: ProgramLog) -> Generator[Said, None, Result]:
        """Run the program, telling how it goes; returns the result."""
        program = Program(launch)
        metrics, reason = MetricsFile(metrics_path(self._worker, self._settings)), None
        usage = Usage(program, self._limits(self._program_name, files=outputs.MAX_FILES))
        # At any trouble the program ends before the copies do.
        output = output_kept(self._worker, self._storage.impatient, self._folder / "output", self._settings)
        with output, log.following(program), usage.watched():
            while program.exit_code() is None:
                yield self._look(usage, metrics, log)
                reason = self._stop.reason
                if reason is not None:
                    yield from self._terminate(program, usage, reason)
                    break
                time.sleep(LOOK_S)
            code = program.exit_code()
        images.remove_cgroups(self._folder / CONTAINER)
        if code != 0 and reason is None:
            usage.check_memory()
        yield self._look(None, metrics, log)
        while metrics.has_more and self._stop.reason is None:
            yield self._look(None, metrics, log)
        if code == 0:
            usage.check_disk()
        return self._result(code, reason, log)

    def _terminate(self, program: Program, usage: Usage, reason: str) -> Iterator[Said]:
        """Send SIGTERM and wait for the program's end, as long as it keeps within its limits."""
        if reason == FENCED:
            return
        grace_s = self._settings.stop_grace_s / 2
        if self._worker.rank == 0:
            message = f"{self._program_name} was sent SIGTERM; after {grace_s:g} s it is killed"
            yield Said(events=[(message, {"grace_s": grace_s})])
        program.terminate()
        ends_at = time.monotonic() + grace_s
        with suppress(SpecError, OutOfMemoryError):
            while program.exit_code() is None and time.monotonic() < ends_at:
                usage.check()
                time.sleep(LOOK_S / 2)

    def _result(self, code: int | None, reason: str | None, log: ProgramLog) -> Result:
        if reason is not None:
            how = "was killed" if code is None else f"ended with exit code {code}"
            return stopped(reason, f"; {self._program_name} {how}")
        if code == 0:
            return Result(outcome="completed", time=utc_text(), summary={"steps": self._step})
        how = f"exit code {code}" if code is not None and code < 128 else f"signal {(code or 128) - 128}"
        raise SpecError(
            f"{self._program_name} of worker {self._worker.rank} ended with {how}; its last lines:\n{log.tail()}",
            hint="the worker's log has all that it wrote"
            + ("; signal 9 may be the node's memory that ran out" if code == 137 else ""),
            code="train_failed",
        )

    def _look(self, usage: Usage | None, metrics: MetricsFile, log: ProgramLog) -> Said:
        """What is new since the last look; with `usage`, the program still runs, and its limits are checked."""
        look, losses = metrics.look(at_end=usage is None), log.losses()
        reports: list[Report] = []
        events: list[tuple[str, dict[str, Any]]] = []
        # One curve: workers that train together have one loss.
        if self._worker.rank == 0:
            for point in look.points:
                self._step = point.step
                values = {"loss": point.loss, "throughput": point.throughput}
                reports.append(Report(time=utc_text(), step=point.step, values=values))
            if not metrics.seen:
                for step, loss in losses:
                    self._step = step
                    reports.append(Report(time=utc_text(), step=step, values={"loss": loss}))
            events = [(f"a malformed line of the metrics file, {each}", {"malformed": each}) for each in look.malformed]
            if usage is None and not metrics.has_more:
                events += _last_words(metrics)
        if usage is not None:
            sample = usage.check()
            sampled = {
                "cpu_utilisation_percent": sample.cpu_percent,
                "memory_rss_bytes": float(sample.rss_bytes),
            }
            reports.append(Report(time=utc_text(), step=self._step, sampled=sampled))
        return Said(reports=reports, events=events)

    def _limits(self, name: str, *, files: int) -> Limits:
        return Limits(
            name=f"{name} of worker {self._worker.rank}",
            flavor=self._job.flavor,
            memory_bytes=get_flavor(self._job.flavor).memory_gib << 30,
            disk_bytes=self._settings.program_disk_gib << 30,
            tasks=self._settings.program_processes,
            files=files,
        )

    def _wait(self, program: Program) -> None:
        """Wait until the environment is there. Raises what prevents that."""
        usage = Usage(program, self._limits("what makes the environment", files=MAX_INSTALLED_FILES))
        with usage.watched():
            while program.exit_code() is None:
                usage.check()
                self._stop.check()
                time.sleep(LOOK_S / 2)
        if program.exit_code() != 0:
            usage.check_memory()
        usage.check_disk()

    @contextmanager
    def _log(self, key: str) -> Iterator[ProgramLog]:
        """The worker's log. While storage is away, its lines are kept and the program goes on; its end waits."""
        storage, age_s = self._storage.impatient, self._settings.segment_s
        segments = self._storage.patiently(lambda: SegmentWriter(storage, key, max_age_s=age_s))
        try:
            yield ProgramLog(segments)
        finally:
            self._storage.patiently(segments.close)

    def _phase(self, phase: str) -> Said:
        """A phase begins; rank 0 says so for all."""
        return Said(reports=[Report(time=utc_text(), step=0, phase=phase)] if self._worker.rank == 0 else [])


def _last_words(metrics: MetricsFile) -> list[tuple[str, dict[str, Any]]]:
    """What remains to be told about a metrics file after it was read."""
    said: list[tuple[str, dict[str, Any]]] = []
    if (count := metrics.malformed_lines) > MAX_QUOTED:
        said.append((f"the metrics file has {count} malformed lines", {"malformed_lines": count}))
    if metrics.is_cut:
        said.append((f"the metrics file has more than {MAX_BYTES >> 20} MiB; the rest is not read", {}))
    return said
