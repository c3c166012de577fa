"""A training run from the driver's side: TorchTrainer, its restarts after lost workers, and the new model."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.attempt.cluster_work import connect
from trainers.attempt.context import Attempt
from trainers.attempt.publication import NewFiles, publish
from trainers.attempt.report import Report
from trainers.attempt.report_writer import ReportWriter, report_writer
from trainers.attempt.stop_watch import StoppedError, stopped
from trainers.recipe.memory import is_out_of_memory
from trainers.text_job.checkpoint_manifests import CheckpointManifests
from tunesmith import caches
from tunesmith.assets import catalog
from tunesmith.assets.catalog import Description
from tunesmith.clock import utc_text
from tunesmith.errors import OutOfMemoryError, TunesmithError, UnavailableError, WorkerLostError
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import Checkpoint, Result
from tunesmith.jobs.spec import TextJob

# Read by Ray Train when it is imported. The controller takes one report of a worker in each interval.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
# One process less to start; a node that is taken away costs the steps since the last checkpoint, as a lost one does.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

logger = logging.getLogger(__name__)


def run_training(attempt: Attempt, job: TextJob) -> Result:
    """Train, publish the new model, and say how it went. Raises what ended the run."""
    from trainers.text_job.job_data import prepare

    # Before any worker is taken: an accelerator does not wait for rows, and a refusal costs none.
    try:
        prepare(attempt, job)
    except StoppedError as stop:
        return _stopped(stop.args[0], {"steps": 0})
    connect()
    products = _train(attempt, job)
    if products is None:
        raise WorkerLostError("the workers ended without a last report")
    newest = _newest_checkpoint(attempt)
    summary = {**products["summary"], "checkpoint_step": newest.step if newest is not None else None}
    if summary["stopped"]:
        return _stopped(str(products["stop_reason"] or "stopped_by_user"), summary)
    attempt.events.write(phase="publish")
    attempt.events.flush()
    _publish(attempt, job, products["files"])
    message = f"{job.output_model} after {summary['steps']} steps"
    return Result(outcome="completed", message=message, time=utc_text(), summary=summary)


def _train(attempt: Attempt, job: TextJob) -> Mapping[str, Any] | None:
    """Run the workers to their end, with all that they report and save in storage; what their last report says."""
    from trainers.text_job.report_channel import ReportSocket

    with (
        report_writer(attempt) as reports,
        CheckpointManifests(
            attempt.storage,
            job.id,
            attempt.number,
            keep=job.advanced.save_total_limit,
            events=attempt.events,
            flush=reports.flush,
        ) as manifests,
    ):

        def take(received: list[Report]) -> None:
            reports.write_all(received)
            for step in received[0].uploaded:
                manifests.add(step)

        with ReportSocket(take) as socket:
            try:
                fit_with_restarts(
                    attempt,
                    job,
                    reports=reports,
                    manifests=manifests,
                    fit=lambda newest: _fit(attempt, job, socket.callback(), newest),
                )
            finally:
                # What workers had stored when an error ended them counts too, though none could tell of it any more.
                manifests.settle(reports.last_step)
        return reports.products


def _newest_checkpoint(attempt: Attempt) -> Checkpoint | None:
    """The job's newest whole checkpoint over all attempts."""
    whole = attempts.checkpoints(attempt.storage, attempt.job.id)
    return whole[-1] if whole else None


def fit_with_restarts(
    attempt: Attempt,
    job: TextJob,
    *,
    reports: ReportWriter,
    manifests: CheckpointManifests,
    fit: Callable[[Checkpoint | None], None],
) -> None:
    """`fit` the workers to their end; after lost ones again from the newest checkpoint, up to `max_retries` times."""
    newest = _newest_checkpoint(attempt)
    for restart in range(1, job.advanced.max_retries + 2):
        try:
            fit(newest)
            return
        except WorkerLostError as error:
            if restart > job.advanced.max_retries:
                raise
            manifests.settle(reports.last_step)
            newest = _newest_checkpoint(attempt)
            _tell_restart(attempt, restart, error, newest, reports.last_step)
            time.sleep(attempts.retry_pause_s(restart))


def _tell_restart(
    attempt: Attempt, restart: int, lost: WorkerLostError, newest: Checkpoint | None, last_step: int
) -> None:
    logger.warning("%s: %s", attempt.job.id, lost.message)
    step = newest.step if newest is not None else 0
    again = max(0, last_step - step)
    what = "the workers hung" if isinstance(lost, HungError) else "a worker was lost"
    attempt.events.write(
        f"{what} ({lost.message}); restart {restart} goes on from step {step}, {again} steps are done again",
        restart=restart,
        resumed_from_step=step,
        steps_redone=again,
        **(lost.as_data() if isinstance(lost, HungError) else {}),
    )
    attempt.events.flush()


def _fit(attempt: Attempt, job: TextJob, callback: Any, resume_from: Checkpoint | None) -> None:
    """One run of TorchTrainer. Raises WorkerLostError, UnavailableError where Ray is lost, or what a worker raised."""
    from ray.exceptions import RayError
    from ray.train.v2.api.exceptions import TrainingFailedError

    folder = attempt.settings.home / "runs"
    name = f"{attempt.name}-{secrets.token_hex(4)}"
    try:
        with caches.held(folder / name):
            _trainer(attempt, job, callback, resume_from, folder=folder, name=name).fit()
    except TrainingFailedError as error:
        raise _why_it_ended(error, attempt, run=name) from error
    except RayError as error:
        # Its controller lives on this driver's node: where it dies, Ray is going down.
        raise _ray_lost(error) from error
    finally:
        shutil.rmtree(folder / name, ignore_errors=True)


def _why_it_ended(error: Exception, attempt: Attempt, *, run: str) -> BaseException:
    """What the run of the workers is to be said to have ended with, from what Ray Train raised."""
    from ray.exceptions import RayError
    from ray.train.v2.api.exceptions import WorkerGroupError

    from trainers.text_job import hangs

    try:
        spoke = hangs.take_hangs(run)
    except RayError as lost:
        return _ray_lost(lost)
    if spoke:
        assert isinstance(attempt.job, TextJob)
        silent = [rank for rank in range(attempt.job.cards) if rank not in spoke]
        return HungError(attempt.settings.hang_timeout_s, spoke=spoke, silent=silent)
    if isinstance(error, WorkerGroupError):
        return _cause(error.worker_failures)
    return WorkerLostError(f"Ray Train gave up: {_first_line(error)}")


def _ray_lost(error: Exception) -> UnavailableError:
    return UnavailableError(f"Ray was lost: {_first_line(error)}")


def _trainer(
    attempt: Attempt, job: TextJob, callback: Any, resume_from: Checkpoint | None, *, folder: Path, name: str
) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from trainers.recipe.device import collective_backend
    from trainers.text_job.worker_entry import train_worker
    from trainers.text_job.worker_task import WorkerTask

    task = WorkerTask(
        job=job,
        attempt=attempt.number,
        root=attempt.storage.url,
        deadline=attempt.stop.deadline,
        run=name,
        resume_from=resume_from,
    )
    return TorchTrainer(
        train_worker,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(
            num_workers=job.cards, use_gpu="GPU" in job.resources, resources_per_worker=dict(job.resources)
        ),
        torch_config=TorchConfig(backend=collective_backend(job.resources)),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder),
            callbacks=[callback],
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )


class HungError(WorkerLostError):
    """The workers made no progress, and ended themselves."""

    def __init__(self, timeout_s: float, *, spoke: Sequence[int], silent: Sequence[int]) -> None:
        """`spoke`: ranks that said in their logs where they stood. `silent`: those that could not even do that."""
        message = f"no progress for {timeout_s:g} s: {_workers(spoke)} said where they stood, in their logs"
        super().__init__(message + (f"; {_workers(silent)} said nothing" if silent else ""))
        self._spoke, self._silent = list(spoke), list(silent)

    def as_data(self) -> dict[str, Any]:
        """For an event."""
        return {"hung": {"spoke": self._spoke, "silent": self._silent}}


def _workers(ranks: Sequence[int]) -> str:
    return f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _cause(failures: Mapping[int, BaseException]) -> BaseException:
    """Why the workers ended: an error that one raised on purpose before all, for its peers then fail as well."""
    errors = list(failures.values())
    for error in errors:
        if isinstance(error, TunesmithError):
            return error
    for rank, error in failures.items():
        if is_out_of_memory(error):
            return OutOfMemoryError(
                f"worker {rank} ran out of memory: {_first_line(error)}",
                hint="lower per_device_train_batch_size or max_seq_length, or choose a larger flavor",
            )
    lost = [rank for rank, error in failures.items() if _is_loss(error)]
    if lost:
        return WorkerLostError(f"worker {', '.join(map(str, lost))}: {_first_line(failures[lost[0]])}")
    return errors[0]


def _is_loss(error: BaseException) -> bool:
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import RayTrainError

    # A worker whose peer is gone sees its connection closed.
    return isinstance(error, (RayError, RayTrainError)) or "Connection closed by peer" in str(error)


def _stopped(reason: str, summary: dict[str, Any]) -> Result:
    where = " before its first step"
    if summary["steps"]:
        where = f" at step {summary['steps']} of {summary['total_steps']}, "
        # None where storage did not take it.
        saved = summary["checkpoint_step"]
        where += "without a checkpoint" if saved is None else f"with the checkpoint of step {saved}"
    return stopped(reason, where, summary)


def _publish(attempt: Attempt, job: TextJob, made: NewFiles) -> None:
    base = catalog.get_manifest(attempt.storage, "model", job.model)
    about = Description(
        task_type=job.training_type,
        framework=base.framework,
        license=base.license,
        base=job.model,
        dataset=job.dataset,
        details={**base.details, "adapter": True, "merged": job.advanced.merge_adapter},
    )
    publish(attempt, made, about)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
