"""What the driver hands to every worker; light to import, for the driver and Ray Train's controller hold it as well."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.spec import TrainJob


@dataclass(frozen=True)
class Task:
    """A worker's part in a run of the workers."""

    job: TrainJob
    attempt: int
    root: str
    """URL of the storage that holds the job's folder."""
    deadline: float | None
    """When the job's time is up, seconds since the epoch."""
    run: str
    """Name of this run of the workers: a restart's is another."""


def train_worker(config: dict[str, Task]) -> None:
    """The train function of TorchTrainer: `config` is `{"task": Task}`."""
    # The recipe takes seconds to import, and only a worker needs it.
    from trainers.worker import run_worker

    run_worker(config["task"])
