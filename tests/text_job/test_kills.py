"""A run that is killed, or stands still, goes on as if it had not: the same losses, rows and adapter.

Rows are of unequal content, so the losses tell their order: `test_rows_in_another_order_show_in_the_losses`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.support import jobs, tiny
from tests.support.publishing import files_key
from tests.support.ray_fixture import Running, running_platform
from tests.support.waiting import until
from trainers.recipe.batches import BatchPlan
from trainers.recipe.training_loop import Hooks, train
from trainers.text.tokenization import tokenize_rows
from tunesmith import processes
from tunesmith.api.views import JobView
from tunesmith.jobs.attempts import MetricLine, metric_lines
from tunesmith.storage import layout
from tunesmith.storage.base import PARTIAL
from tunesmith.storage.segments import read_segments

# 260 rows: 4 steps an epoch, each of 65 passes, and so as long as a kill needs to hit the one it is meant for.
ROWS, EPOCHS, STEPS_PER_EPOCH, SAVE_STEPS = 260, 4, 4, 3
STEPS = EPOCHS * STEPS_PER_EPOCH
HYPERPARAMETERS = {
    "test_data_file": None,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": ROWS // STEPS_PER_EPOCH,
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "lora_dropout": 0.1,
}
ADVANCED = {"num_train_epochs": EPOCHS, "packing": "off", "max_retries": 10, "save_total_limit": 10}

FIRST, MIDDLE, EPOCH_END, HALF_WRITTEN = 1, 5, 8, 12
"""Steps whose report a kill follows; of the last, the checkpoint is half in storage when it comes."""

FOUND = {FIRST: 0, MIDDLE: 3, EPOCH_END: 6, HALF_WRITTEN: 9}
"""The newest checkpoint there is to go on from."""

TOLERANCE = 1e-5
HANG_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Whole:
    """What a run leaves: losses by step, and its adapter."""

    losses: dict[int, float]
    adapter: Path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A platform whose records reach storage at once, so that a step is seen while it is the newest."""
    env = {"TUNESMITH_SEGMENT_S": "0.02", "TUNESMITH_HANG_TIMEOUT_S": str(HANG_TIMEOUT_S)}
    with running_platform(env, door=True) as running:
        jobs.publish_sources(running, tmp_path_factory.mktemp("sources"))
        yield running


@pytest.fixture(scope="module")
def whole(running: Running) -> Whole:
    """A run that nobody disturbed."""
    job = order(running)
    assert running.client.wait(job.id).state == "completed", jobs.log(running, job.id, "driver")
    losses = {line.step: line.value for line in reported(running, job.id, 1)}
    assert sorted(losses) == list(range(1, STEPS + 1))
    return Whole(losses, adapter(running, job.id))


def order(running: Running) -> JobView:
    return running.client.submit(jobs.spec(hyperparameters=HYPERPARAMETERS, advanced=ADVANCED))


def reported(running: Running, job_id: str, attempt: int) -> list[MetricLine]:
    """The losses that an attempt reported, in their order; read from storage itself, which is there first."""
    segments = read_segments(running.storage, layout.metrics(job_id, attempt))
    return [line for segment in segments for line in metric_lines(segment.data) if line.name == "loss"]


def adapter(running: Running, job_id: str) -> Path:
    folder = running.storage.local_path(files_key(running.storage, running.client.job(job_id).output))
    assert folder is not None
    return folder / "adapter" / "adapter_model.safetensors"


def worker(running: Running, job_id: str) -> psutil.Process:
    (found,) = jobs.processes(running, "ray::RayTrainWorker")
    return found


def kill_at(running: Running, job_id: str, attempt: int, step: int, victim: psutil.Process) -> None:
    """kill -9 once `step` is the newest reported step since the last kill."""
    before = len(reported(running, job_id, attempt))
    until(lambda: any(line.step == step for line in reported(running, job_id, attempt)[before:]))
    os.kill(victim.pid, 9)
    victim.wait(10)
    assert reported(running, job_id, attempt)[-1].step == step, "the kill came too late"


def kill_in_checkpoint(running: Running, job_id: str, attempt: int, step: int, victim: psutil.Process) -> None:
    """kill -9 while half of the files of the checkpoint of `step` are in storage.

    What holds the other half back is a folder in the place of one of them.
    """
    place = running.storage.local_path(layout.checkpoint(job_id, attempt, step))
    assert place is not None
    obstacle = place / "optimizer.safetensors" / "in-the-way"
    obstacle.mkdir(parents=True)
    try:
        until((place / "adapter" / "adapter_model.safetensors").exists)
        os.kill(victim.pid, 9)
        victim.wait(10)
        # A put that was killed leaves its part beside them.
        there = sorted(path.name for path in place.iterdir() if not path.name.startswith(PARTIAL))
        assert there == ["adapter", "optimizer.safetensors"]
    finally:
        obstacle.rmdir()
        obstacle.parent.rmdir()


def assert_as_if_never_killed(running: Running, job: JobView, whole: Whole, attempts: int) -> None:
    ended = running.client.wait(job.id)
    assert (ended.state, ended.attempt) == ("completed", attempts), jobs.log(running, job.id, "driver")
    lines = [line for attempt in range(1, attempts + 1) for line in reported(running, job.id, attempt)]
    assert {line.step for line in lines} == set(whole.losses)
    for line in lines:
        assert line.value == pytest.approx(whole.losses[line.step], abs=TOLERANCE), line
    own, undisturbed = load_file(adapter(running, job.id)), load_file(whole.adapter)
    assert own.keys() == undisturbed.keys()
    for name, tensor in own.items():
        assert float((tensor - undisturbed[name]).abs().max()) <= TOLERANCE, name


@pytest.mark.ray
def test_a_worker_killed_at_any_point_changes_nothing(running: Running, whole: Whole) -> None:
    job = order(running)

    def restarted(count: int) -> dict[str, int]:
        told = [event.data for event in jobs.events(running, job.id) if "restart" in event.data]
        return told[count - 1] if len(told) == count else {}

    for number, (step, found) in enumerate(FOUND.items(), 1):
        until(lambda: any(jobs.processes(running, "ray::RayTrainWorker")))
        kill = kill_in_checkpoint if step == HALF_WRITTEN else kill_at
        kill(running, job.id, 1, step, worker(running, job.id))
        until(lambda number=number: bool(restarted(number)))  # type: ignore[misc]
        told = restarted(number)
        assert told["resumed_from_step"] == found
        reached = told["resumed_from_step"] + told["steps_redone"]
        # A checkpoint may be on its way before the report of its step was taken.
        assert reached in ((step,) if step != HALF_WRITTEN else range(step - 1, STEPS)), told
    assert_as_if_never_killed(running, job, whole, attempts=1)


@pytest.mark.ray
def test_a_driver_killed_at_any_point_changes_nothing(running: Running, whole: Whole) -> None:
    job = order(running)
    for attempt, step in enumerate(FOUND, 1):
        until(lambda attempt=attempt: running.storage.exists(layout.claim(job.id, attempt)))  # type: ignore[misc]
        kill = kill_in_checkpoint if step == HALF_WRITTEN else kill_at
        kill(running, job.id, attempt, step, jobs.driver(running, job.id))
    ended = running.client.wait(job.id)
    first_steps = [event.data["first_step"] for event in jobs.events(running, job.id) if "first_step" in event.data]
    resumed_from = [first - 1 for first in first_steps[1:]]
    # Workers outlive their driver for a moment: they may save the step after the one that it heard of last.
    for (step, found), resumed in zip(FOUND.items(), resumed_from, strict=True):
        assert resumed in {found, step + 1 if (step + 1) % SAVE_STEPS == 0 else found}, (resumed_from, ended)
    assert_as_if_never_killed(running, job, whole, attempts=5)


@pytest.mark.ray
def test_workers_that_hang_say_where_and_go_on_from_the_checkpoint(running: Running) -> None:
    job = running.client.submit(
        jobs.spec(cards=2, hyperparameters={"max_steps": 60, "test_data_file": None}, advanced={"num_train_epochs": 10})
    )
    jobs.wait_for_checkpoints(running, job, 2)
    frozen, _ = jobs.processes(running, "ray::RayTrainWorker")
    frozen.suspend()
    ended = running.client.wait(job.id)
    assert (ended.state, ended.attempt) == ("completed", 1), jobs.log(running, job.id, "driver")
    assert not processes.is_alive(frozen)

    (told,) = [event for event in jobs.events(running, job.id) if "restart" in event.data]
    (spoke,), (silent,) = told.data["hung"]["spoke"], told.data["hung"]["silent"]
    assert {spoke, silent} == {0, 1}
    assert told.message is not None
    assert told.message.startswith(
        f"the workers hung (no progress for 20 s: worker {spoke} said where they stood, in their logs; "
        f"worker {silent} said nothing); restart 1 goes on from step {told.data['resumed_from_step']}, "
    )
    assert told.data["resumed_from_step"] >= 10
    log = jobs.log(running, job.id, str(spoke))
    assert "no progress for 20 s, this worker ends; it stood here:" in log
    # In a collective, or where Ray waits for the reports of all.
    assert "all_reduce" in log or "ray.train.report(" in log
    assert "thread stop:" in log
    assert "no progress" not in jobs.log(running, job.id, str(silent))
    losses: dict[int, float] = {}
    for line in reported(running, job.id, 1):
        assert line.value == pytest.approx(losses.setdefault(line.step, line.value), abs=TOLERANCE)
    assert set(losses) == set(range(1, 61))


def test_rows_in_another_order_show_in_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model(tmp_path / "model")
    # The rows of a step in one pass: how they are split changes no loss.
    split = {"per_device_train_batch_size": ROWS // STEPS_PER_EPOCH, "gradient_accumulation_steps": 1}
    hyperparameters = tiny.hyperparameters(**{**HYPERPARAMETERS, **split, "max_steps": MIDDLE + 2})
    rows = tokenize_rows(
        tiny.sums(300)[:ROWS],
        tiny.make_tokenizer(),
        hyperparameters=hyperparameters,
        advanced=tiny.advanced(),
        training_type="text-question-answering",
    )

    def losses() -> dict[int, float]:
        found: dict[int, float] = {}
        hooks = Hooks(
            report=lambda step, values: found.update({step: values["loss"]}),
            save=lambda step, folder: None,
            should_stop=lambda: False,
        )
        train(model, rows, None, hyperparameters=hyperparameters, advanced=tiny.advanced(**ADVANCED), hooks=hooks)
        return found

    right, plan = losses(), BatchPlan.rows
    assert losses() == right

    def swapped(self: BatchPlan, step: int) -> list[int]:
        """One row of the step after the kill, and one of the step after that, the one in the other's place."""
        taken = {MIDDLE + 1: MIDDLE + 2, MIDDLE + 2: MIDDLE + 1}.get(step)
        return plan(self, step) if taken is None else [plan(self, taken)[0], *plan(self, step)[1:]]

    monkeypatch.setattr(BatchPlan, "rows", swapped)
    wrong = losses()
    assert wrong[MIDDLE] == right[MIDDLE]
    assert abs(wrong[MIDDLE + 1] - right[MIDDLE + 1]) > 10 * TOLERANCE
