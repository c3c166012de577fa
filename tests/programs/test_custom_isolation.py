"""What a hostile train.py tries on a platform that really runs, alone and with a second worker: it gets none of it."""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support import galleries, jobs
from tests.support.publishing import files_key, publish
from tests.support.ray_fixture import Running
from trainers.isolation import sandbox
from trainers.isolation.program import Program
from trainers.isolation.sandbox import Room
from tunesmith.jobs.spec import TrainSpec
from tunesmith.local import local_platform

pytestmark = pytest.mark.ray

PARAMETERS = {"training_methods": [{"name": "full", "hyperparameters": []}]}
TRY = """
import json, os, socket, sys

def attempt(what, name):
    try:
        what()
        got.append(name)
    except OSError:
        pass

def look(path):
    "Read what is there, and leave a file beside it."
    folders = os.path.isdir(path) and os.walk(path) or [(os.path.dirname(path), [], [os.path.basename(path)])]
    for folder, below, names in folders:
        if folder.startswith(own):
            below.clear()
            continue
        for name in names:
            if name != "was-here":
                attempt(lambda: open(os.path.join(folder, name), "rb").read(1), os.path.join(folder, name))
        try:
            open(os.path.join(folder, "was-here"), "w").close()
        except OSError:
            pass

def connect(port):
    return lambda: socket.create_connection(("127.0.0.1", port), timeout=2).close()

env = os.environ
own = tuple(env["ENV_AG_" + name] for name in ("MODEL_DIR", "DATASET_DIR", "TRAIN_OUTPUT_DIR"))
own += (os.path.dirname(env["ENV_AG_USER_METRICS_LOG_PATH"]), sys.prefix, sys.base_prefix)
got = [name for name in env if name.startswith(("AWS", "RAY", "TUNESMITH")) and name != "TUNESMITH_PROGRAM"]
for path in paths:
    look(path)
for port in ports:
    attempt(connect(port), port)
for pid in pids:
    attempt(lambda: open(f"/proc/{pid}/environ", "rb").read(1), f"environment of {pid}")
    attempt(lambda: os.kill(pid, 0), f"a signal to {pid}")
# Sockets without a file are seen by all who are on a network.
got += [line for line in open("/proc/net/unix") if "@" in line]
"""
MEET = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
everyone = [None] * int(os.environ["WORLD_SIZE"])
dist.all_gather_object(everyone, got)
got = everyone
dist.barrier()
dist.destroy_process_group()
"""
TELL = "open(os.path.join(os.environ['ENV_AG_TRAIN_OUTPUT_DIR'], 'got.json'), 'w').write(json.dumps(got))\n"


def ports_of(running: Running) -> list[int]:
    """All ports that the platform listens on: the door's, and Ray's own."""
    found: set[int] = set()
    for process in local_platform.processes_of(running.started):
        with suppress(psutil.NoSuchProcess):
            tcp = process.net_connections(kind="tcp")
            found |= {connection.laddr.port for connection in tcp if connection.status == psutil.CONN_LISTEN}
    settings = running.settings
    assert {settings.port, settings.ray_port, settings.ray_dashboard_port} <= found
    return sorted(found)


def paths_of(running: Running, job_id: str) -> list[str]:
    """The platform's secrets and records, and another job's folder and products."""
    settings, storage = running.settings, running.storage
    names = [settings.home, settings.home / "records.db", settings.api_token_path, settings.ray_token_path]
    names += [settings.home / "runs", Path(settings.ray_temp_dir), Path.home(), Path("/etc/shadow"), Path("/root")]
    names += [storage.local_path(key) for key in (f"jobs/{job_id}", f"jobs/{job_id}/job.json", "models", "datasets")]
    found = [path for path in names if path is not None and path.exists()]
    assert len(found) >= 10, found
    return [str(path) for path in found if path != Path(settings.ray_temp_dir)] + ["/tmp/ray"]


@pytest.fixture(scope="module")
def other_job(platform: Running, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job before; its dataset serves again."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.csv").write_text("x\n1\n")
    job = platform.client.register_dataset("isolated", str(folder))
    assert platform.client.wait(job.id).state == "completed"
    return job.id


def run(running: Running, folder: Path, name: str, train: str, **order: Any) -> Any:
    model = galleries.make(folder / name, train, parameters=PARAMETERS)
    publish(running, "model", name, model)
    given = {"model": name, "dataset": "isolated", "flavor": "cpu-small", "output_model": f"{name}-new", **order}
    job = running.client.submit(TrainSpec(**given))
    ended = running.client.wait(job.id)
    assert ended.state == "completed", (ended, jobs.log(running, job.id, "0"), jobs.log(running, job.id, "driver"))
    assert not [path for place in (running.settings.home, Path("/tmp/ray")) for path in place.glob("**/was-here")]
    assert not (Path.home() / "was-here").exists()
    return json.loads(running.storage.get(f"{files_key(running.storage, f'{name}-new')}/got.json"))


def hostile(running: Running, job_id: str, *then: str) -> str:
    pids = [process.pid for process in local_platform.processes_of(running.started)]
    paths, ports = paths_of(running, job_id), ports_of(running)
    return "\n".join([f"paths, ports, pids = {paths!r}, {ports!r}, {pids!r}", TRY, *then, TELL])


def test_one_worker_gets_nothing(platform: Running, other_job: str, tmp_path: Path) -> None:
    assert run(platform, tmp_path, "hostile", hostile(platform, other_job)) == []


def test_two_workers_reach_each_other_and_get_nothing_else(platform: Running, other_job: str, tmp_path: Path) -> None:
    train = hostile(platform, other_job, MEET)
    assert run(platform, tmp_path, "hostile-gang", train, cards=2) == [[], []]


def said_on_the_nodes_network(running: Running, folder: Path, code: str, variables: Sequence[str] = ()) -> str:
    """What a program prints in a room that has the node's network, as workers on several nodes have."""
    (folder / "tmp").mkdir(exist_ok=True)
    room = Room([], [], folder / "tmp", "node", {"CPU": 1}, 1 << 30)
    given = dict(variable.split("=") for variable in variables)
    command = [sys.executable, "-c", code]
    launch = sandbox.launch(command, cwd=Path("/"), room=room, variables=given, settings=running.settings)
    with Program(launch) as program:
        return program.output.read().decode()


def test_on_the_nodes_network_the_platforms_ports_are_of_no_use(platform: Running, tmp_path: Path) -> None:
    settings = platform.settings
    ask = (
        "import httpx\n"
        f"for url in ('{settings.door_url}/v1/jobs', '{settings.ray_jobs_url}/api/jobs/', "
        f"'{settings.ray_jobs_url}/api/v0/nodes', '{settings.ray_jobs_url}/logs/'): "
        "print(httpx.get(url).status_code, httpx.post(url, json={'entrypoint': 'id'}).status_code)\n"
    )
    assert said_on_the_nodes_network(platform, tmp_path, ask).split() == ["401"] * 8
    token = settings.ray_token_path.read_text().strip()
    listed = httpx.get(f"{settings.ray_jobs_url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    assert listed.status_code == 200, "the same question with the token is answered"

    for mode in ("disabled", "token"):
        said = said_on_the_nodes_network(
            platform,
            tmp_path,
            "from ray._raylet import GcsClient\n"
            f"print('keys:', GcsClient(address='127.0.0.1:{settings.ray_port}').internal_kv_keys(b'', None))\n",
            [f"RAY_AUTH_MODE={mode}", "RAY_AUTH_TOKEN=guess"],
        )
        assert "keys:" not in said
        assert "Unauthenticated" in said or "token" in said, said
