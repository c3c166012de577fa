"""Starts attempts as Ray Jobs, and asks Ray how they are."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from tunesmith import processes
from tunesmith.errors import EXIT_STORAGE_FULL, UnavailableError
from tunesmith.jobs.attempts import MARK, DriverProcess, attempt_name
from tunesmith.settings import Settings

ALIVE = frozenset({"PENDING", "RUNNING"})
"""Ray's words for a job that has not ended; the others are SUCCEEDED, FAILED and STOPPED."""

STOP_WAIT_S = 30
"""Time between Ray's SIGTERM and its SIGKILL for a job that is stopped, seconds."""

_TIMEOUT_S = 30
"""Timeout of one request to Ray's Jobs API, seconds. Ray's client has none and would hang with the dashboard."""


@dataclass(frozen=True)
class RayJob:
    """What Ray says of a submission."""

    status: str
    message: str | None = None


class Launcher(Protocol):
    """Where attempts run. Every call may raise UnavailableError and may then be tried again."""

    def submit(self, job_id: str, attempt: int, job_url: str, *, account: str) -> None:
        """Start the driver of an attempt; one that was submitted before is left alone.

        `account` owns what the job makes.
        """

    def status(self, submission_id: str) -> RayJob | None:
        """None where Ray does not know it (never submitted, or forgotten when its head was lost)."""

    def stop(self, submission_id: str) -> None:
        """Ask Ray to end it; returns at once. One that ended, or is unknown, is left alone."""

    def lives(self, process: DriverProcess) -> bool | None:
        """Whether a driver's process, on whatever node of the cluster, lives; None where no node can say so."""

    def capacity(self) -> Mapping[str, float]:
        """All resources of the cluster, in use or not."""


class RayLauncher:
    """The Ray cluster this process is connected to, and its Jobs API at `settings.ray_jobs_url`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connection: Any = None

    def submit(self, job_id: str, attempt: int, job_url: str, *, account: str) -> None:
        command = [self._settings.python, "-m", "trainers", job_url, "--attempt", str(attempt)]
        # No working_dir: a folder of the user's would come before site-packages.
        # No database: a driver needs none, its URL may hold a password, and Ray shows the environment to all.
        settings = self._settings.model_copy(update={"account": account})
        own = {name: text for name, text in settings.to_env().items() if name != "TUNESMITH_DATABASE_URL"}
        environment = {**own, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), MARK: attempt_name(job_id, attempt)}
        with self._errors():
            try:
                self._client().submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=attempt_name(job_id, attempt),
                    entrypoint_num_cpus=0,
                    metadata={"job_id": job_id, "attempt": str(attempt)},
                    runtime_env={"env_vars": environment},
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise

    def status(self, submission_id: str) -> RayJob | None:
        with self._errors():
            try:
                info = self._client().get_job_info(submission_id)
            except RuntimeError as error:
                if _is_unknown(error):
                    return None
                raise
        return RayJob(str(info.status), _first_line(info.message))

    def stop(self, submission_id: str) -> None:
        with self._errors():
            try:
                self._client().stop_job(submission_id)
            except RuntimeError as error:
                if not _is_unknown(error):
                    raise

    def lives(self, process: DriverProcess) -> bool | None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        with self._errors():
            for node in ray.nodes():
                if not node["Alive"] or node["NodeManagerHostname"] != process.host:
                    continue
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                look = ray.remote(num_cpus=0, max_retries=0)(processes.lives).options(scheduling_strategy=there)
                answer = ray.get(look.remote(process.node, process.pid, process.created), timeout=_TIMEOUT_S)
                if answer is not None:
                    return bool(answer)
        return None

    def capacity(self) -> Mapping[str, float]:
        import ray

        with self._errors():
            return {str(name): float(amount) for name, amount in ray.cluster_resources().items()}

    def _client(self) -> Any:
        # Two threads may both connect. None waits for the other, for a dashboard that hangs takes its time to tell.
        if self._connection is None:
            self._connection = _connect(self._settings.ray_jobs_url)
        return self._connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn whatever Ray's client raises into UnavailableError. The errors of `requests` are OSErrors."""
        from ray.exceptions import RayError

        try:
            yield
        except (RuntimeError, OSError, RayError) as error:
            text = f"{type(error).__name__}: {error}"[:500]
            raise UnavailableError(f"Ray at {self._settings.ray_jobs_url} could not do this: {text}") from error


def _connect(url: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, *args: Any, **options: Any) -> Any:
            return super()._do_request(*args, timeout=_TIMEOUT_S, **options)

    return Client(url)


def _is_unknown(error: RuntimeError) -> bool:
    return "status code 404" in str(error)


def _first_line(text: str | None) -> str | None:
    """Ray's message without the lines of the driver's log that it may quote: they could hold rows of the dataset."""
    line = text.strip().partition("\n")[0].partition(", last available logs")[0] if text else None
    if line is not None and line.endswith(f"exit code {EXIT_STORAGE_FULL}"):
        return f"the storage is full: {line}"
    return line
