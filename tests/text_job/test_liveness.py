"""What becomes of a job on a real Ray whose driver stands still, whose Ray is killed, or whom Ray gives up falsely."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import jobs, programs
from tests.support.ray_fixture import Running, running_platform
from tests.support.waiting import until
from trainers.attempt.heartbeat import RAY_GONE_S
from tunesmith import clock, processes
from tunesmith.api.views import JobView
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import DriverProcess
from tunesmith.local import local_platform

pytestmark = pytest.mark.ray

ENV = {"TUNESMITH_HEARTBEAT_S": "2", "TUNESMITH_STORAGE_PATIENCE_S": "5", "TUNESMITH_SEGMENT_S": "0.2"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A platform whose drivers promise to end after 11 s of silence, and are called silent after 6 s."""
    with running_platform(ENV, door=True) as running:
        jobs.publish_sources(running, tmp_path_factory.mktemp("sources"))
        yield running


def order(running: Running) -> JobView:
    """A job that is half a minute under way, once it has saved a checkpoint."""
    steps = {"max_steps": 250, "save_steps": 20, "test_data_file": None}
    job = running.client.submit(jobs.spec(hyperparameters=steps, advanced={"num_train_epochs": 100, "max_retries": 2}))
    jobs.wait_for_checkpoints(running, job, 1)
    return job


def of_attempt(job: JobView, attempt: int = 1) -> list[psutil.Process]:
    """Everything that lives of an attempt: its driver, Ray's workers, and what they started."""
    return processes.members(None, attempts.MARK, attempts.attempt_name(job.id, attempt))


def assert_went_on(running: Running, job: JobView) -> None:
    """The second attempt took the job to its end, and nothing was done twice at once."""
    ended = running.client.wait(job.id)
    assert (ended.state, ended.attempt) == ("completed", 2), jobs.log(running, job.id, "driver")
    lost, claimed = attempts.read_result(running.storage, job.id, 1), attempts.read_claim(running.storage, job.id, 2)
    assert lost is not None and claimed is not None
    assert lost.outcome == "lost"
    assert clock.seconds(lost.time) <= clock.seconds(claimed.time)
    assert ended.output is not None
    assert running.client.model(ended.output).job == job.id


def assert_went_on_from_a_checkpoint(running: Running, job: JobView) -> None:
    assert_went_on(running, job)
    first_steps = [event.data["first_step"] for event in jobs.events(running, job.id) if "first_step" in event.data]
    assert first_steps[0] == 1
    assert first_steps[-1] > 20


ASK = """
import json, os, ray, sys
from serve_app.reconciler.launcher import RayLauncher
from tunesmith.jobs.attempts import DriverProcess
from tunesmith.settings import Settings

ray.init(address=sys.argv[1], log_to_driver=False)
launcher = RayLauncher(Settings.from_env())
told = DriverProcess.model_validate_json(sys.argv[2])
others = [told.model_copy(update=part) for part in ({}, {"created": 1.0}, {"node": "x"}, {"host": "x"})]
print(json.dumps([launcher.lives(each) for each in others]))
"""


def test_ray_is_asked_whether_a_process_of_another_node_lives(running: Running) -> None:
    own = psutil.Process()
    told = DriverProcess(
        host=socket.gethostname(), node=processes.node(), pid=own.pid, created=own.create_time()
    ).model_dump_json()
    environment = {**os.environ, **running.settings.to_env(), **local_platform.ray_environment(running.settings)}
    command = [sys.executable, "-c", ASK, running.started.ray_address, told]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [True, False, None, None]


def test_a_driver_that_stands_still_is_replaced(running: Running, tmp_path: Path) -> None:
    start = programs.Start(running, tmp_path, programs.publish_points(running, tmp_path))
    job = start("print('began', flush=True)\ntime.sleep(20)")
    jobs.wait_for_log(running, job, "began")
    began = of_attempt(job)
    assert jobs.driver(running, job.id) in began
    jobs.driver(running, job.id).suspend()
    until(lambda: attempts.read_claim(running.storage, job.id, 2) is not None, limit_s=60)
    # An actor that Ray Train shares among jobs is started again by Ray, as another process.
    assert not any(processes.is_alive(process) for process in began)
    assert_went_on(running, job)


@pytest.mark.soak
def test_a_job_whose_supervisor_in_ray_is_killed_goes_on_as_one(running: Running) -> None:
    job = order(running)
    first = jobs.driver(running, job.id)
    supervisor = next(process for process in of_attempt(job) if "JobSupervisor" in " ".join(process.cmdline()))
    os.kill(supervisor.pid, 9)
    ended = running.client.wait(job.id)
    assert ended.state == "completed", jobs.log(running, job.id, "driver")
    # Ray calls it failed at once. Whether the driver outlives that is Ray's affair: where it does, it goes on.
    if ended.attempt == 2:
        assert_went_on_from_a_checkpoint(running, job)
    until(lambda: not processes.is_alive(first), limit_s=60)


def test_a_driver_whose_ray_is_killed_ends_with_all_that_it_started_and_the_job_goes_on(running: Running) -> None:
    job = order(running)
    left = of_attempt(job)
    assert len(left) >= 3
    next(jobs.processes(running, "gcs_server")).kill()
    until(lambda: not of_attempt(job), limit_s=RAY_GONE_S + 30)
    assert not any(processes.is_alive(process) for process in left)
    local_platform.up(running.settings, num_cpus=2, object_store_memory=200_000_000)
    assert_went_on_from_a_checkpoint(running, job)
