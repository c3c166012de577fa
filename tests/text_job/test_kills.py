"""A job whose worker or driver is killed, or stands still, ends as if nothing had been.

What it is compared with is the recipe alone. That it makes no difference where a kill hits is in test_kill_points.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from safetensors.torch import load_file

from tests.support import jobs
from tests.support.ray_fixture import Running, running_platform
from tests.support.recipe_alone import Whole, assert_close, train_alone
from tests.support.waiting import until
from tunesmith import processes
from tunesmith.api.views import JobView
from tunesmith.jobs.attempts import MetricLine, metric_lines
from tunesmith.storage import layout
from tunesmith.storage.segments import read_segments

pytestmark = pytest.mark.ray

STEPS, SAVE_STEPS = 60, 10
KILLED_AT = 25
"""The kill comes once this step was reported."""
HYPERPARAMETERS = {
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "lora_rank": 4,
    "lora_dropout": 0.1,
}
ADVANCED = {"packing": "off", "save_total_limit": 10}
TOLERANCE = 1e-5
HANG_TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A platform whose records reach storage at once, so that a step is seen while it is the newest."""
    env = {"TUNESMITH_SEGMENT_S": "0.02", "TUNESMITH_HANG_TIMEOUT_S": str(HANG_TIMEOUT_S)}
    with running_platform(env, door=True) as running:
        jobs.publish_sources(running, tmp_path_factory.mktemp("sources"))
        yield running


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run of the recipe over the same rows, without a platform."""
    made = train_alone(tmp_path_factory.mktemp("whole"), hyperparameters=HYPERPARAMETERS, advanced=ADVANCED)
    assert sorted(made.losses) == list(range(1, STEPS + 1))
    return made


@dataclass(frozen=True)
class Killed:
    """A job with a kill in its middle."""

    job: JobView
    saved_step: Future[int]
    """The step of the newest checkpoint before the kill."""


@pytest.fixture(scope="module")
def killed(running: Running) -> Iterator[dict[str, Killed]]:
    """A job for each victim; two run at once, and each is killed in its own time."""
    given = {"train_data_file": "train.jsonl", "test_data_file": None, **HYPERPARAMETERS}
    specs = {
        victim: jobs.spec(output_model=victim, hyperparameters=given, advanced=ADVANCED)
        for victim in ("worker", "driver", "controller")
    }
    ordered = {victim: running.client.submit(spec) for victim, spec in specs.items()}
    with ThreadPoolExecutor() as pool:
        yield {victim: Killed(job, pool.submit(kill, running, job.id, victim)) for victim, job in ordered.items()}


def reported(running: Running, job_id: str, attempt: int) -> list[MetricLine]:
    """The losses that an attempt reported, in their order; read from storage itself, which is there first."""
    segments = read_segments(running.storage, layout.metrics(job_id, attempt))
    return [line for segment in segments for line in metric_lines(segment.data) if line.name == "loss"]


def kill(running: Running, job_id: str, victim: str) -> int:
    """kill -9 in the middle of the job; the step of the newest checkpoint before."""
    until(lambda: any(line.step >= KILLED_AT for line in reported(running, job_id, 1)), limit_s=400)
    until(lambda: bool(jobs.checkpoint_steps(running, job_id)))
    saved = jobs.checkpoint_steps(running, job_id)[-1]
    if victim == "driver":
        process = jobs.driver(running, job_id)
    else:
        names = {"worker": "ray::RayTrainWorker", "controller": "ray::TrainController"}
        (process,) = jobs.workers(running, job_id, names[victim])
    process.kill()
    process.wait(10)
    assert reported(running, job_id, 1)[-1].step < STEPS, "the kill came too late"
    return saved


def assert_as_if_never_killed(running: Running, job: JobView, whole: Whole, attempts: int) -> None:
    ended = running.client.wait(job.id)
    assert (ended.state, ended.attempt) == ("completed", attempts), jobs.log(running, job.id, "driver")
    lines = [line for attempt in range(1, attempts + 1) for line in reported(running, job.id, attempt)]
    assert {line.step for line in lines} == set(whole.losses)
    for line in lines:
        assert line.value == pytest.approx(whole.losses[line.step], abs=TOLERANCE), line
    made = jobs.model_files(running, job.id) / "adapter" / "adapter_model.safetensors"
    assert_close(load_file(made), load_file(whole.adapter), TOLERANCE)


def test_a_killed_worker_changes_nothing(running: Running, killed: dict[str, Killed], whole: Whole) -> None:
    job, saved = killed["worker"].job, killed["worker"].saved_step.result()
    assert_as_if_never_killed(running, job, whole, attempts=1)
    (told,) = [event.data for event in jobs.events(running, job.id) if "restart" in event.data]
    # One more may have been on its way.
    assert told["resumed_from_step"] in (saved, saved + SAVE_STEPS)
    assert told["resumed_from_step"] + told["steps_redone"] >= KILLED_AT


@pytest.mark.parametrize("victim", ["driver", "controller"])
def test_a_killed_driver_costs_an_attempt_and_changes_nothing(
    running: Running, killed: dict[str, Killed], whole: Whole, victim: str
) -> None:
    """The controller is Ray Train's; without it the driver cannot go on."""
    job, saved = killed[victim].job, killed[victim].saved_step.result()
    assert_as_if_never_killed(running, job, whole, attempts=2)
    first_steps = [event.data["first_step"] for event in jobs.events(running, job.id) if "first_step" in event.data]
    # One more may have been on its way; what workers store that outlive their driver does not count.
    assert first_steps[0] == 1 and first_steps[1] - 1 in (saved, saved + SAVE_STEPS)


def test_workers_that_hang_say_where_and_go_on_from_the_checkpoint(running: Running) -> None:
    job = running.client.submit(
        jobs.spec(cards=2, hyperparameters={"max_steps": 60, "test_data_file": None}, advanced={"num_train_epochs": 10})
    )
    jobs.wait_for_checkpoints(running, job, 2)
    frozen, _ = jobs.workers(running, job.id, "ray::RayTrainWorker")
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
