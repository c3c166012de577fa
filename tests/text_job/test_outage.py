"""Storage that is away costs a job time: no step, no checkpoint, no metric, no event and no line of its log."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.s3_server import BUCKET, endpoint, free_ports, s3_keys, s3_process
from tests.support import galleries, jobs
from tests.support.publishing import files_key, publish
from tests.support.ray_fixture import Running, running_platform
from tunesmith.api.client import Client
from tunesmith.api.views import JobView
from tunesmith.clock import seconds, utc_text
from tunesmith.errors import TunesmithError
from tunesmith.jobs import attempts
from tunesmith.jobs.drafting import draft, new_job_id
from tunesmith.jobs.spec import TrainSpec
from tunesmith.local.local_platform import ray_environment
from tunesmith.storage import layout
from tunesmith.storage.base import Storage

pytestmark = [pytest.mark.ray, pytest.mark.s3]

OUTAGE_S = 20.0
STEPS = 800
"""Of the recipe's job: more than it does until the outage is over."""


@dataclass
class Server:
    """An S3 server that can be killed, and started again over the same folder at the same ports."""

    folder: Path
    ports: list[int]
    _process: ExitStack = field(default_factory=ExitStack)

    def start(self) -> None:
        self._process.enter_context(s3_process(self.folder, self.ports))

    def kill(self) -> None:
        self._process.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3_keys():
        server = Server(tmp_path_factory.mktemp("s3"), free_ports(8))
        server.start()
        yield server
        server.kill()


@pytest.fixture(scope="module")
def running(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A platform on the server, whose workers count as hung after half an outage without a step."""
    env = {
        **{name: text for name, text in os.environ.items() if name.startswith("AWS_")},
        "TUNESMITH_STORAGE_URL": f"s3://{BUCKET}/outage",
        "TUNESMITH_S3_ENDPOINT": endpoint(server.ports),
        "TUNESMITH_S3_ADDRESSING_STYLE": "path",
        "TUNESMITH_HANG_TIMEOUT_S": str(OUTAGE_S / 2),
    }
    with running_platform(env, door=True) as running:
        jobs.publish_sources(running, tmp_path_factory.mktemp("sources"))
        yield running


def order(running: Running, **hyperparameters: object) -> JobView:
    h = {"save_steps": 100, "max_eval_samples": 2, **hyperparameters}
    return running.client.submit(
        jobs.spec(hyperparameters=h, advanced={"num_train_epochs": 100, "save_total_limit": 9})
    )


def wait_for_step(running: Running, job_id: str, step: int) -> None:
    deadline = time.monotonic() + 180
    while not any(line.step >= step for line in jobs.metrics(running, job_id, "loss")):
        assert time.monotonic() < deadline, running.client.job(job_id)
        time.sleep(0.2)


def assert_nothing_is_lost(running: Running, job_id: str, steps: int, save_steps: int) -> None:
    """Every step in metrics and log, once; every checkpoint in events and storage, whole; the model published."""
    assert [line.step for line in jobs.metrics(running, job_id, "loss")] == list(range(1, steps + 1))
    log = jobs.log(running, job_id, "0")
    assert [int(number) for number in re.findall(r"step (\d+) LOSS", log)] == list(range(1, steps + 1))
    told = jobs.events(running, job_id)
    assert [event.state for event in told if event.state] == ["pending", "queued", "preparing", "running", "completed"]
    assert [event.phase for event in told if event.phase][-3:] == ["evaluate", "save", "publish"]
    saved = list(range(save_steps, steps + 1, save_steps))
    assert [event.data["checkpoint_step"] for event in told if "checkpoint_step" in event.data][: len(saved)] == saved
    assert jobs.checkpoint_steps(running, job_id) == saved
    for checkpoint in attempts.checkpoints(running.storage, job_id):
        assert_whole(running.storage, checkpoint.key, checkpoint.key)
    name, _, version = running.client.job(job_id).output.partition("@")
    key = layout.asset("model", name, int(version))
    assert_whole(running.storage, key, files_key(running.storage, f"{name}@{version}"))


def assert_whole(storage: Storage, key: str, files: str) -> None:
    """Every file of the manifest under `key` is there as the manifest says."""
    manifest = json.loads(storage.get(f"{key}/manifest.json"))
    assert manifest["files"]
    for file in manifest["files"]:
        assert hashlib.sha256(storage.get(f"{files}/{file['path']}")).hexdigest() == file["sha256"], file


PROGRAM_STEPS = 40
PROGRAM = f"""
import os, pathlib, time
for step in range(1, {PROGRAM_STEPS} + 1):
    with open(os.environ["ENV_AG_USER_METRICS_LOG_PATH"], "a") as file:
        file.write(f"{{step}}|{{1 / step}}|1\\n")
    print("step", step, "at", time.time(), flush=True)
    time.sleep(0.25)
pathlib.Path(os.environ["ENV_AG_TRAIN_OUTPUT_DIR"], "weights").write_bytes(b"tuned")
"""


@dataclass(frozen=True)
class Outage:
    """A job of each kind, and when storage was away from them, seconds since the epoch."""

    recipe: JobView
    program: JobView
    away: float
    back: float
    door_answers: int


@pytest.fixture(scope="module")
def outage(running: Running, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Outage:
    """The recipe's job trains before, during and after it; the program's ends during it."""
    parameters = {"training_methods": [{"name": "full", "hyperparameters": []}]}
    folder = galleries.make(tmp_path_factory.mktemp("model") / "program", PROGRAM, parameters=parameters)
    spec = TrainSpec(
        model=publish(running, "model", "program", folder),
        dataset="tiny",
        flavor="cpu-small",
        output_model="program-new",
    )
    recipe = order(running, max_steps=STEPS)
    wait_for_step(running, recipe.id, 1)
    program = running.client.submit(spec)
    wait_for_step(running, program.id, 3)
    wait_for_step(running, recipe.id, 20)
    server.kill()
    away, answers = time.time(), 0
    with Client(running.settings.door_url, running.settings.api_token_path.read_text(), retry_s=0) as client:
        while time.time() < away + OUTAGE_S:
            # The records are in the database: the door says where the job is, and of its log that it is away.
            assert client.job(recipe.id).state == "running"
            with pytest.raises(TunesmithError, match="does not answer"):
                client.logs(recipe.id, rank="0")
            answers += 1
            time.sleep(1)
    server.start()
    return Outage(recipe, program, away, time.time(), answers)


def test_a_job_goes_on_while_storage_is_away(running: Running, outage: Outage) -> None:
    job, away = outage.recipe, outage.away
    assert outage.door_answers > 1
    ended = running.client.wait(job.id)
    assert (ended.state, ended.attempt) == ("completed", 1), jobs.log(running, job.id, "driver")
    assert_nothing_is_lost(running, job.id, STEPS, 100)
    times = [seconds(line.time) for line in jobs.metrics(running, job.id, "loss")]
    for begin in range(0, int(OUTAGE_S), 10):
        assert any(away + begin <= at < away + begin + 10 for at in times), f"no step {begin} s into the outage"
    assert times[-1] > outage.back
    assert not any("restart" in event.data for event in jobs.events(running, job.id))


def test_a_custom_job_runs_and_ends_while_storage_is_away(running: Running, outage: Outage) -> None:
    job = outage.program
    ended = running.client.wait(job.id)
    assert (ended.state, ended.attempt) == ("completed", 1), jobs.log(running, job.id, "driver")
    said = re.findall(r"step (\d+) at ([\d.]+)", jobs.log(running, job.id, "0"))
    assert [int(step) for step, _ in said] == list(range(1, PROGRAM_STEPS + 1))
    assert outage.away < float(said[-1][1]) < outage.back
    assert [line.step for line in jobs.metrics(running, job.id, "loss")] == list(range(1, PROGRAM_STEPS + 1))
    assert jobs.model_file(running, job.id, "weights") == b"tuned"


@pytest.mark.soak
def test_a_run_that_ends_while_storage_is_away_waits_with_its_model(running: Running, server: Server) -> None:
    job = order(running, max_steps=100, save_steps=50)
    wait_for_step(running, job.id, 20)
    server.kill()
    # The last steps, the last checkpoint, the evaluation, the model, the result: all while it is away.
    time.sleep(40)
    server.start()
    back = time.time()
    ended = running.client.wait(job.id)
    assert (ended.state, ended.attempt) == ("completed", 1), jobs.log(running, job.id, "driver")
    assert_nothing_is_lost(running, job.id, 100, 50)
    assert max(seconds(line.time) for line in jobs.metrics(running, job.id, "eval_loss")) < back


@pytest.mark.soak
def test_an_attempt_whose_patience_is_at_its_end_is_lost_and_another_follows(running: Running, server: Server) -> None:
    job = draft(
        jobs.spec(hyperparameters={"max_steps": 100, "save_steps": 10}, advanced={"num_train_epochs": 100}),
        storage=running.storage,
        account="operator",
        job_id=new_job_id(),
        created_at=utc_text(),
    )
    running.storage.put(layout.job_json(job.id), job.model_dump_json().encode())
    # The first attempt is started without the door, with less patience than the door would give it.
    impatient = running.settings.model_copy(update={"storage_patience_s": 5})
    code = (
        "import sys; from serve_app.reconciler.launcher import RayLauncher; from tunesmith.settings import Settings; "
        "RayLauncher(Settings.from_env()).submit(sys.argv[1], 1, sys.argv[2], account='operator')"
    )
    subprocess.run(
        [sys.executable, "-c", code, job.id, layout.join(running.storage.url, layout.job_json(job.id))],
        env={**os.environ, **impatient.to_env(), **ray_environment(impatient)},
        check=True,
    )
    while not attempts.checkpoints(running.storage, job.id):
        time.sleep(0.2)
    first = jobs.driver(running, job.id)
    server.kill()
    first.wait(180)
    server.start()
    deadline = time.monotonic() + 60
    while job.id not in {each.id for each in running.client.jobs().items}:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    ended = running.client.wait(job.id)
    assert (ended.state, ended.attempt) == ("completed", 2), jobs.log(running, job.id, "driver")
    lost = next(event for event in jobs.events(running, job.id) if event.data.get("lost_attempt") == 1)
    assert (lost.state, lost.reason) == ("queued", "worker_lost")
    first_steps = [event.data["first_step"] for event in jobs.events(running, job.id) if "first_step" in event.data]
    assert first_steps[-1] > 10
