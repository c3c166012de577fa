"""A worker's run and its driver's half in one process, with no cluster: what is reported, saved, resumed and published.

Ray's part is played by the reports' own socket, and by a function that runs the worker here.
"""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch

from tests.support import tiny
from tests.support.stage import make_manifest
from tests.support.waiting import until
from trainers.attempt.context import Attempt
from trainers.attempt.fetch import fetch
from trainers.attempt.stop_watch import StopWatch
from trainers.recipe import memory
from trainers.recipe.strategy import Worker
from trainers.text_job import training_run
from trainers.text_job.worker import TextRun
from trainers.text_job.worker_task import WorkerTask
from tunesmith.assets.catalog import publish
from tunesmith.assets.stored_files import describe_files
from tunesmith.assets.tables import describe
from tunesmith.errors import WorkerLostError
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import Checkpoint, EventLine, EventWriter
from tunesmith.jobs.drafting import draft
from tunesmith.jobs.spec import TextJob, TrainSpec
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.patience import PatientStorage
from tunesmith.storage.segments import read_segments

STEPS, SAVE_STEPS = 8, 3


class Platform:
    """An attempt at a job over the tiny model, and what its workers are handed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = Settings.from_env({"TUNESMITH_HOME": str(folder / "home"), "TUNESMITH_SEGMENT_S": "1000"})
        self.storage = FolderStorage(Path(self.settings.storage_url))
        self._publish_sources(folder)
        h = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "save_steps": SAVE_STEPS}
        spec = TrainSpec(
            model="tiny",
            dataset="tiny",
            flavor="cpu-small",
            output_model="tuned",
            hyperparameters={**h, "max_seq_length": 64, "learning_rate": 0.01, "test_data_file": "held_out.jsonl"},
            advanced={"max_retries": 2, "save_total_limit": 2},
        )
        job = draft(spec, storage=self.storage, account="operator", job_id="job-1", created_at="t")
        assert isinstance(job, TextJob)
        self.job = job
        self.handed: list[int | None] = []
        """The step of the checkpoint that each run of the workers was handed."""
        self.when_reported: Callable[[int], None] = lambda step: None
        # It would be this process's limit.
        monkeypatch.setattr(memory, "limit", lambda size: None)
        monkeypatch.setattr(training_run, "_fit", self._fit)
        monkeypatch.setattr(training_run, "connect", lambda: None)
        self._monkeypatch = monkeypatch

    def train(self, number: int = 1) -> Any:
        """Drive an attempt whose rows are ready; its last report."""
        with EventWriter(self.storage, self.job.id, number) as events:
            stop = StopWatch(self.storage, self.job.id, number, deadline=None)
            attempt = Attempt(self.job, number, self.storage, self.settings, events, stop)
            products = training_run._train(attempt, self.job)
            if products is not None and not products["summary"]["stopped"]:
                training_run._publish(attempt, self.job, products["files"])
        return products

    def losses(self, number: int = 1) -> dict[int, float]:
        segments = read_segments(self.storage, layout.metrics(self.job.id, number))
        lines = [line for segment in segments for line in attempts.metric_lines(segment.data) if line.name == "loss"]
        return {line.step: line.value for line in lines}

    def told(self, name: str, number: int = 1) -> list[Any]:
        """What the events say under a name."""
        segments = read_segments(self.storage, layout.events(self.job.id, number))
        said = [EventLine.model_validate_json(line) for segment in segments for line in segment.data.splitlines()]
        return [event.data[name] for event in said if name in event.data]

    def checkpoints(self) -> list[Checkpoint]:
        return attempts.checkpoints(self.storage, self.job.id)

    def _fit(self, attempt: Attempt, job: TextJob, callback: Any, resume_from: Checkpoint | None) -> None:
        def report(metrics: dict[str, Any]) -> None:
            callback.after_report(None, [metrics], None)
            (said,) = metrics.values()
            self.when_reported(said.step)

        self._monkeypatch.setattr(ray.train, "report", report)
        self.handed.append(resume_from.step if resume_from is not None else None)
        task = WorkerTask(job, attempt.number, attempt.storage.url, None, "run", resume_from)
        storage = PatientStorage(self.storage, patience_s=5)
        TextRun(pickle.loads(pickle.dumps(task)), Worker(), storage, self.settings).run()

    def _publish_sources(self, folder: Path) -> None:
        model, data = tiny.make_model(folder / "model"), folder / "data"
        data.mkdir()
        for name, rows in (("train.jsonl", tiny.sums(32)), ("held_out.jsonl", tiny.sums(4))):
            (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        tables = {path.name: describe(path) for path in data.iterdir()}
        given: dict[str, Any] = {"model": {"task_type": "text-question-answering"}, "dataset": {"tables": tables}}
        for kind, source in (("model", model), ("dataset", data)):
            self.storage.upload_folder(source, layout.asset_files(kind, "tiny", 1, "files"))
            publish(self.storage, make_manifest(kind, "tiny", files=describe_files(source), **given[kind]))


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    threads = torch.get_num_threads()
    yield Platform(tmp_path, monkeypatch)
    torch.set_num_threads(threads)


def test_a_run_leaves_its_metrics_its_newest_checkpoints_and_the_model(platform: Platform) -> None:
    products = platform.train()
    assert (products["summary"]["steps"], products["summary"]["stopped"]) == (STEPS, False)
    assert sorted(platform.losses()) == list(range(1, STEPS + 1))
    assert [checkpoint.step for checkpoint in platform.checkpoints()] == [6, 8]
    assert platform.told("checkpoint_step") == [3, 6, 8]
    model = fetch(platform.storage, "model", "tuned@1", platform.settings)
    assert (model.manifest.job, model.manifest.base, model.manifest.dataset) == ("job-1", "tiny@1", "tiny@1")
    parameters = json.loads((model.folder / "training_logs" / "user_params.json").read_text())
    assert parameters["data_url"] == f"{platform.storage.url}/datasets/tiny/1"
    assert parameters["train_url"] == f"{platform.storage.url}/models/tuned/1"


def test_lost_workers_go_on_from_the_checkpoint_that_the_driver_picks(platform: Platform) -> None:
    whole = platform.train()
    right, last = platform.losses(), platform.checkpoints()[-1]
    platform.storage.delete_folder(layout.job("job-1"))
    platform.storage.delete_folder("models/tuned")

    def lose_at(step: int) -> None:
        # After the report of step 7 the checkpoint of step 6 is stored, told of or not.
        if step == 7 and len(platform.handed) == 2:
            raise WorkerLostError("gone")

    platform.when_reported = lose_at
    assert platform.train()["summary"] == whole["summary"]
    assert platform.handed == [None, None, 6]
    assert [platform.told(name) for name in ("resumed_from_step", "steps_redone")] == [[6], [1]]
    assert platform.losses() == pytest.approx(right, abs=1e-5)
    assert platform.checkpoints()[-1].step == last.step


def test_a_next_attempt_goes_on_from_an_earlier_ones_checkpoint(platform: Platform) -> None:
    stored = layout.checkpoint_list(layout.checkpoint("job-1", 1, 3))

    def lose_at(step: int) -> None:
        if step == 4:
            until(lambda: platform.storage.exists(stored))
        if step == 5:
            raise RuntimeError("the workers failed")

    platform.when_reported = lose_at
    with pytest.raises(RuntimeError):
        platform.train()
    platform.when_reported = lambda step: None
    assert [checkpoint.step for checkpoint in platform.checkpoints()] == [3]
    platform.train(2)
    assert platform.handed == [None, 3]
    assert sorted(platform.losses(2)) == list(range(4, STEPS + 1))
    assert (platform.losses(1).keys() | platform.losses(2).keys()) == set(range(1, STEPS + 1))
