"""A worker of a training run, as Ray Train starts it: the recipe run over the rows, the products stored."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import ray.train
import torch
from ray.train.v2._internal.execution import context as train_context

from trainers.attempt.fetch import fetch, local_copy
from trainers.attempt.logs import log_to_job
from trainers.attempt.publication import NewFiles, Upload
from trainers.attempt.report import Report
from trainers.attempt.stop_watch import StopWatch
from trainers.recipe import memory
from trainers.recipe.evaluation import HeldOut, answer, evaluation
from trainers.recipe.strategy import Worker
from trainers.recipe.training_loop import Hooks, train
from trainers.text.tokenization import first_examples
from trainers.text_job import hangs
from trainers.text_job.checkpoint_uploads import Uploads
from trainers.text_job.job_data import Data, load_data
from trainers.text_job.products import write_products
from trainers.text_job.ray_train_reports import KEY
from trainers.text_job.stored_checkpoints import newest_checkpoint
from trainers.text_job.watchdog import Watchdog, end_hung
from trainers.text_job.worker_task import WorkerTask
from tunesmith.clock import utc_text
from tunesmith.jobs import adapters
from tunesmith.jobs.attempts import attempt_name
from tunesmith.jobs.flavors import get_flavor
from tunesmith.jobs.spec import TextJob
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage
from tunesmith.storage.patience import PatientStorage
from tunesmith.storage.urls import open_patiently

logger = logging.getLogger(__name__)


def run_worker(task: WorkerTask) -> None:
    """Do the task's work as the worker that Ray Train says this process is."""
    settings = Settings.from_env()
    storage = open_patiently(task.root, settings)
    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), context.get_local_rank())
    # It would log every report whole; its logger is named after the file.
    logging.getLogger(train_context.__file__).setLevel(logging.WARNING)
    with log_to_job(storage, task.job.id, task.attempt, rank=str(worker.rank), settings=settings):
        _run(task, worker, storage, settings)


def _run(task: WorkerTask, worker: Worker, storage: PatientStorage, settings: Settings) -> None:
    job = task.job
    keep = job.advanced.save_total_limit
    uploads = Uploads(storage, job_id=job.id, attempt=task.attempt, keep=keep)
    reports = _Reports(worker, uploads)
    torch.set_num_threads(max(1, int(job.resources.get("CPU", 1))))
    base = fetch(storage, "model", job.model, settings).folder
    dataset = fetch(storage, "dataset", job.dataset, settings)
    data = load_data(job, base, dataset, storage, settings)
    held_out = _held_out(data, job)
    rows = data.rows
    counts = {"rows": len(rows), "skipped": rows.skipped, "truncated": rows.truncated}
    logger.info("%s: rows %s; held out: %s", job.id, counts, len(data.eval_rows) if data.eval_rows else "none")

    if set(job.resources) == {"CPU"}:  # an accelerator's memory is what runs out there
        memory.limit(get_flavor(job.flavor).memory_gib << 30)

    def save(step: int, folder: Path | None) -> None:
        reports.send(step, flush=True)
        if folder is not None:
            uploads.add_checkpoint(step, folder, lambda: _wait_until_stored(task, step, settings))

    def evaluated(step: int, model: Any, loss: float) -> None:
        assert data.eval_rows is not None
        answers = answer(
            model,
            data.tokenizer,
            held_out,
            rank=worker.rank,
            world_size=worker.world_size,
            should_stop=should_stop,
        )
        if answers is None:
            reports.send(step)
            return
        made = evaluation(step, len(data.eval_rows), loss, held_out, answers)
        if worker.rank == 0:
            uploads.add_evaluation(made)
        scores = {f"eval_{name}": value for name, value in made.scores.items()}
        reports.send(step, values={"eval_perplexity": made.perplexity, **scores})

    with (
        _earlier_adapter(storage, job) as start_from,
        newest_checkpoint(storage, job.id) as (resumed_step, resume_from),
        StopWatch(storage, job.id, task.attempt, deadline=task.deadline).watching() as stop,
        uploads if worker.rank == 0 else nullcontext(),
        _watchdog(task, worker.rank, settings.hang_timeout_s) as watchdog,
    ):

        def should_stop() -> bool:
            watchdog.beat()
            return stop.reason is not None

        outcome = train(
            base,
            rows,
            data.eval_rows,
            hyperparameters=job.hyperparameters,
            advanced=job.advanced,
            hooks=Hooks(
                report=reports.metrics,
                save=save,
                should_stop=should_stop,
                phase=reports.phase,
                evaluated=evaluated,
            ),
            worker=worker,
            start_from=start_from,
            resume_from=resume_from,
        )
    if outcome.stopped and stop.reason is None:  # another worker saw it first
        stop.look()
    summary: dict[str, Any] = {
        "steps": outcome.steps,
        "total_steps": outcome.total_steps,
        "stopped": outcome.stopped,
        "checkpoint_step": uploads.stored_step or resumed_step or None,
        "eval_loss_before": outcome.eval_loss_before,
        "eval_loss": outcome.eval_loss,
        "rows": counts,
    }
    files: NewFiles | None = None
    if not outcome.stopped:
        reports.send(outcome.steps, phase="save")
        if worker.rank == 0:
            with tempfile.TemporaryDirectory() as name:
                write_products(outcome.model, outcome.weights, base, Path(name), job, task.root)
                upload = Upload(storage, job, task.attempt)
                upload.add_folder(Path(name))
                files = upload.stored()
    reports.send(outcome.steps, products={"summary": summary, "files": files, "stop_reason": stop.reason})


@contextmanager
def _earlier_adapter(storage: Storage, job: TextJob) -> Iterator[Path | None]:
    """The adapter that the job goes on from, on this machine's disk."""
    ref = job.hyperparameters.finetuned_model
    if ref is None:
        yield None
        return
    with local_copy(storage, adapters.adapter_files(storage, str(ref))) as folder:
        yield folder


def _held_out(data: Data, job: TextJob) -> HeldOut:
    limit = job.hyperparameters.max_eval_samples
    examples = first_examples(data.eval_files, job.hyperparameters, job.training_type, limit)
    return HeldOut.of(examples, data.tokenizer, job.hyperparameters, job.advanced)


def _wait_until_stored(task: WorkerTask, step: int, settings: Settings) -> None:
    """Until storage has the metrics up to `step`: who goes on from a checkpoint does no step before it again."""
    name, ends_at = attempt_name(task.job.id, task.attempt), time.monotonic() + settings.storage_patience_s
    while hangs.stored_step(name) < step:
        if time.monotonic() > ends_at:
            logger.warning("%s: storage has not the metrics of step %d; its checkpoint counts all the same", name, step)
            return
        time.sleep(0.1)


def _watchdog(task: WorkerTask, rank: int, timeout_s: float) -> Watchdog:
    return Watchdog(timeout_s, lambda where: end_hung(where, timeout_s, lambda: hangs.tell_hang(task.run, rank)))


class _Reports:
    """Sends Reports; every worker must send the same number of them, for each is a barrier."""

    def __init__(self, worker: Worker, uploads: Uploads) -> None:
        self._worker = worker
        self._uploads = uploads
        self._process = psutil.Process()
        self._process.cpu_percent()

    def send(self, step: int = 0, **parts: Any) -> None:
        ray.train.report({KEY: Report(time=utc_text(), step=step, events=self._uploads.ended(), **parts)})

    def phase(self, name: str, data: Mapping[str, int]) -> None:
        self.send(phase=name, data=data)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if "loss" in values and self._worker.rank == 0:
            logger.info("step %d LOSS %.4f learning rate %.3g", step, values["loss"], values["learning_rate"])
        self.send(step, values=values, sampled=self._sample())

    def _sample(self) -> dict[str, float]:
        sampled = {
            "cpu_utilisation_percent": self._process.cpu_percent(),
            "memory_rss_bytes": float(self._process.memory_info().rss),
        }
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            sampled["accelerator_memory_percent"] = 100.0 * (total - free) / total
            sampled["accelerator_utilisation_percent"] = float(torch.cuda.utilization())
        return sampled
