"""A worker of a training run, as Ray Train starts it: the recipe run over the rows, the products stored."""

from __future__ import annotations

import logging
import os
import tempfile
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
from trainers.recipe.training_loop import Hooks, Outcome, train
from trainers.text.tokenized_data import first_examples
from trainers.text_job import hangs
from trainers.text_job.checkpoint_uploads import Uploads
from trainers.text_job.job_data import Data, load_data
from trainers.text_job.products import write_products
from trainers.text_job.report_channel import KEY
from trainers.text_job.stored_checkpoints import checkpoint_copy
from trainers.text_job.tokenizing import Work
from trainers.text_job.watchdog import Watchdog, end_hung
from trainers.text_job.worker_task import WorkerTask
from tunesmith.clock import utc_text
from tunesmith.jobs import adapters
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
        TextRun(task, worker, storage, settings).run()


class TextRun:
    """One worker's part in a run, from its rows to its last report."""

    def __init__(self, task: WorkerTask, worker: Worker, storage: PatientStorage, settings: Settings) -> None:
        job = task.job
        self._task, self._job, self._worker, self._storage = task, job, worker, storage
        torch.set_num_threads(max(1, int(job.resources.get("CPU", 1))))
        model = fetch(storage, "model", job.model, settings)
        self._base = model.folder
        dataset = fetch(storage, "dataset", job.dataset, settings)
        self._data = load_data(job, model, dataset, Work(storage, settings, len(os.sched_getaffinity(0))))
        self._held_out = _held_out(self._data, job)
        self._uploads = Uploads(storage, job_id=job.id, attempt=task.attempt, keep=job.advanced.save_total_limit)
        self._reports = _Reports(worker, self._uploads)
        self._stop = StopWatch(storage, job.id, task.attempt, deadline=task.deadline)
        self._watchdog = _watchdog(task, worker.rank, settings.hang_timeout_s)

    def run(self) -> None:
        """Train, and report how it ended; worker 0 with the files of the new model."""
        rows, eval_rows = self._data.rows, self._data.eval_rows
        counts = {"rows": len(rows), "skipped": rows.skipped, "truncated": rows.truncated}
        logger.info("%s: rows %s; held out: %s", self._job.id, counts, len(eval_rows) if eval_rows else "none")
        outcome = self._train()
        if outcome.stopped and self._stop.reason is None:  # another worker saw it first
            self._stop.look()
        summary = {
            "steps": outcome.steps,
            "total_steps": outcome.total_steps,
            "stopped": outcome.stopped,
            "eval_loss_before": outcome.eval_loss_before,
            "eval_loss": outcome.eval_loss,
            "rows": counts,
        }
        files = None if outcome.stopped else self._store_model(outcome)
        products = {"summary": summary, "files": files, "stop_reason": self._stop.reason}
        self._reports.send(outcome.steps, products=products)

    def _train(self) -> Outcome:
        """The recipe's run. When it returns, all that it saved is stored."""
        if set(self._job.resources) == {"CPU"}:  # an accelerator's memory is what runs out there
            memory.limit(get_flavor(self._job.flavor).memory_gib << 30)
        with (
            _earlier_adapter(self._storage, self._job) as start_from,
            checkpoint_copy(self._storage, self._task.resume_from) as resume_from,
            self._stop.watching(),
            self._uploads if self._worker.rank == 0 else nullcontext(),
            self._watchdog,
        ):
            return train(
                self._base,
                self._data.rows,
                self._data.eval_rows,
                hyperparameters=self._job.hyperparameters,
                advanced=self._job.advanced,
                hooks=Hooks(
                    report=self._reports.metrics,
                    save=self._save,
                    should_stop=self._should_stop,
                    phase=self._reports.phase,
                    evaluated=self._evaluated,
                ),
                worker=self._worker,
                start_from=start_from,
                resume_from=resume_from,
            )

    def _save(self, step: int, folder: Path | None) -> None:
        # Where reports are rare, this one tells of the checkpoint before.
        self._reports.send(step)
        if folder is not None:
            self._uploads.add_checkpoint(step, folder)

    def _should_stop(self) -> bool:
        self._watchdog.beat()
        return self._stop.reason is not None

    def _evaluated(self, step: int, model: Any, loss: float) -> None:
        """Have the model answer the held-out rows; worker 0 stores the answers, and their scores are reported."""
        assert self._data.eval_rows is not None
        answers = answer(
            model,
            self._data.tokenizer,
            self._held_out,
            rank=self._worker.rank,
            world_size=self._worker.world_size,
            should_stop=self._should_stop,
        )
        if answers is None:
            self._reports.send(step)
            return
        made = evaluation(step, len(self._data.eval_rows), loss, self._held_out, answers)
        if self._worker.rank == 0:
            self._uploads.add_evaluation(made)
        scores = {f"eval_{name}": value for name, value in made.scores.items()}
        self._reports.send(step, values={"eval_perplexity": made.perplexity, **scores})

    def _store_model(self, outcome: Outcome) -> NewFiles | None:
        """Worker 0 stores the files of the new model."""
        self._reports.send(outcome.steps, phase="save")
        if self._worker.rank != 0:
            return None
        upload = Upload(self._storage, self._job, self._task.attempt)
        with tempfile.TemporaryDirectory() as folder:
            write_products(outcome.model, outcome.weights, self._base, Path(folder), self._job, self._task.root)
            upload.add_folder(Path(folder))
        return upload.stored()


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
        uploaded, troubles = self._uploads.uploaded(), self._uploads.troubles()
        report = Report(time=utc_text(), step=step, uploaded=uploaded, events=troubles, **parts)
        ray.train.report({KEY: report})

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
