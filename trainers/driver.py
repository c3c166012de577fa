"""The driver of one attempt: claims it, takes the job's way, and writes how it ended."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time

import psutil

from trainers.attempt.context import Attempt
from trainers.attempt.heartbeat import WAITING, Pulse
from trainers.attempt.stop_watch import StopWatch, stopped
from tunesmith import processes
from tunesmith.assets.catalog import published
from tunesmith.clock import utc_text
from tunesmith.errors import STORAGE_FULL, LeaseLostError, SpecError, StorageError, UnavailableError
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import Claim, DriverProcess, EventWriter, Result
from tunesmith.jobs.spec import CustomJob, Job, RegisterJob, parse_job
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.storage.urls import open_patiently, open_storage

logger = logging.getLogger(__name__)


def drive(job_url: str, number: int, settings: Settings) -> int:
    """Drive attempt `number` of the job whose `job.json` lies at `job_url`; the exit code.

    Does nothing where the attempt was claimed before. Raises SpecError or NotFoundError where there is no such job,
    StorageError where storage does not take the last events or the result: then the attempt is taken for lost.
    """
    root, job_id = layout.split_job_url(job_url)
    storage = open_patiently(root, settings)
    job = parse_job(storage.get(layout.job_json(job_id)))
    if job.id != job_id:
        raise SpecError(
            f"{job_url} is the job.json of {job.id}, not of {job_id}", hint="do not copy it: render a new one"
        )
    # Whoever could write the file could write any account into it.
    job = job.model_copy(update={"account": settings.account})
    mine = Claim(submission_id=_submission_id(), time=utc_text(), process=_process())
    if not attempts.claim(storage, job_id, number, mine):
        logging.basicConfig(level=logging.INFO)
        logger.info("%s: attempt %d was claimed before; there is nothing to do", job_id, number)
        return 0
    os.environ[attempts.MARK] = attempts.attempt_name(job_id, number)  # where nobody launched this driver
    # Imported only by the owner of an attempt: a second start ends at once.
    from trainers.attempt.logs import log_to_job

    with log_to_job(storage, job_id, number, rank="driver", settings=settings):
        prompt = open_storage(root, settings, waiting=WAITING)
        stop = StopWatch(prompt, job_id, number, deadline=_deadline(storage, job, number))
        with Pulse(prompt, job_id, number, settings=settings, stop=stop).beating() as pulse:
            with EventWriter(storage, job_id, number, segment_s=settings.segment_s) as events, stop.watching():
                result = _run(Attempt(job, number, storage, settings, events, stop), pulse)
            pulse.check()
            result = attempts.finish(storage, job_id, number, result)
        logger.info("%s: attempt %d %s: %s", job_id, number, result.outcome, result.message)
    return 0 if result.outcome in ("completed", "stopped") else 1


def _run(attempt: Attempt, pulse: Pulse) -> Result:
    job = attempt.job
    try:
        if published(attempt.storage, *job.output, by=job.id) is not None:
            return Result(outcome="completed", message="it was published by an earlier attempt", time=utc_text())
        attempt.stop.look()
        if (reason := attempt.stop.reason) is not None:
            return stopped(reason, _where(attempt))
        if isinstance(job, RegisterJob):
            from trainers.registration.registration import run_registration

            return run_registration(attempt, job)
        if isinstance(job, CustomJob):
            from trainers.programs.gang import run_custom

            return run_custom(attempt, job)
        from trainers.text_job.training_run import run_training

        return run_training(attempt, job)
    except (LeaseLostError, StorageError, UnavailableError) as error:
        # Nobody's fault, and it may go well another time: a next attempt goes on from the last checkpoint.
        logger.exception("%s: attempt %d is given up", job.id, attempt.number)
        return Result(outcome="lost", reason="worker_lost", message=str(error), time=utc_text())
    except Exception as error:
        # The process's border: whatever went wrong is the attempt's result.
        if pulse.ray_is_gone():
            logger.exception("%s: attempt %d is given up: its Ray is gone", job.id, attempt.number)
            return Result(outcome="lost", reason="worker_lost", message=f"Ray was lost: {error}", time=utc_text())
        logger.exception("%s: attempt %d failed", job.id, attempt.number)
        return attempts.failure(_named(error))


def _named(error: Exception) -> Exception:
    """The error, or the platform's own in its place: of a disk that is full, also where a library met it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" of {error.filename}" if error.filename else ""
        return StorageError(
            f"the disk{where} on {socket.gethostname()} is full",
            hint="make room on the disk of the platform's home",
            code=STORAGE_FULL,
        )
    return error


def _deadline(storage: Storage, job: Job, number: int) -> float | None:
    """When the time of all attempts together is used up, seconds since the epoch."""
    if isinstance(job, RegisterJob) or job.max_run_time_s is None:
        return None
    return time.time() + job.max_run_time_s - attempts.used_s(storage, job.id, before=number)


def _where(attempt: Attempt) -> str:
    """How far the job got before this attempt."""
    saved = attempts.checkpoints(attempt.storage, attempt.job.id)
    where = f" before attempt {attempt.number} began"
    return where + (f", with the checkpoint of step {saved[-1].step}" if saved else "")


def _process() -> DriverProcess:
    return DriverProcess(
        host=socket.gethostname(),
        node=processes.node(),
        pid=os.getpid(),
        created=psutil.Process().create_time(),
        platform=os.environ.get(processes.PLATFORM_MARK),
    )


def _submission_id() -> str | None:
    """Ray's id of this process's job, from what its job supervisor hands over."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    submission_id: str | None = config.get("metadata", {}).get("job_submission_id")
    return submission_id
