"""The function that Ray Train runs in each worker; light to import, because Ray Train's controller holds it as well."""

from __future__ import annotations

from trainers.text_job.worker_task import WorkerTask


def train_worker(config: dict[str, WorkerTask]) -> None:
    """The train function of TorchTrainer: `config` is `{"task": WorkerTask}`."""
    # The recipe takes seconds to import, and only a worker needs it.
    from trainers.text_job.worker import run_worker

    run_worker(config["task"])
