"""The door and the reconciler as Serve applications: kill -9 of either loses no acknowledged job."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.ray_fixture import Running
from tunesmith.jobs.states import FINAL
from tunesmith.local.local_platform import token_environment

pytestmark = pytest.mark.ray

DEADLINE_S = 180.0

ASK_RAY = """
import sys, time
from serve_app.reconciler.launcher import ALIVE, RayLauncher
from tunesmith.settings import Settings

launcher, name = RayLauncher(Settings.from_env()), sys.argv[1]
assert launcher.status(f"{name}-a1") is None
launcher.stop(f"{name}-a1")
launcher.submit(name, 1, "/nowhere/jobs/none/job.json", account="operator")
launcher.submit(name, 1, "/nowhere/jobs/none/job.json", account="operator")
while (job := launcher.status(f"{name}-a1")) is None or job.status in ALIVE:
    time.sleep(0.1)
launcher.stop(f"{name}-a1")
print(job.message)
"""
"""In a process of its own, because Ray reads its token once a process."""


def wait_for(what: Callable[[], Any]) -> Any:
    """The first value of `what` that is true; requests that fail meanwhile are made again."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            if value := what():
                return value
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("the deadline is over")


def call(running: Running, method: str, path: str, **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {running.settings.api_token_path.read_text().strip()}"}
    headers |= options.pop("headers", {})
    url = f"{running.door_url}{path}"
    return httpx.request(method, url, headers=headers, timeout=60, trust_env=False, **options)


def applications(running: Running) -> dict[str, Any]:
    """Serve's own view, as the Ray dashboard shows it."""
    headers = {"Authorization": f"Bearer {running.settings.ray_token_path.read_text().strip()}"}
    url = f"{running.settings.ray_jobs_url}/api/serve/applications/"
    answer: dict[str, Any] = httpx.get(url, headers=headers, timeout=60, trust_env=False).json()["applications"]
    return answer


def pid(running: Running, name: str) -> int | None:
    """Process of the one replica of the application `name`, None while there is none."""
    replicas = applications(running)[name]["deployments"][name]["replicas"]
    return next((replica["pid"] for replica in replicas if replica["state"] == "RUNNING"), None)


def kill(running: Running, name: str) -> int:
    killed: int = wait_for(lambda: pid(running, name))
    os.kill(killed, signal.SIGKILL)
    return killed


@pytest.mark.parametrize("name", ["door", "reconciler"])
def test_a_killed_replica_comes_back_by_itself(platform: Running, name: str) -> None:
    killed = kill(platform, name)
    wait_for(lambda: pid(platform, name) not in (None, killed))
    wait_for(lambda: call(platform, "GET", "/v1/jobs").status_code == 200)


def test_serve_shows_both_applications(platform: Running) -> None:
    shown = applications(platform)
    assert {name: shown[name]["route_prefix"] for name in shown} == {"door": "/", "reconciler": None}


def test_ray_says_in_the_words_we_know_that_a_submission_exists_is_unknown_or_failed(platform: Running) -> None:
    # The launcher knows these answers by their text. Another Ray that says it otherwise is found here.
    environment = {**os.environ, **platform.settings.to_env(), **token_environment(platform.settings)}
    command = [sys.executable, "-c", ASK_RAY, uuid.uuid4().hex]
    asked = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    said = asked.stdout.splitlines()[-1:]
    assert said and re.fullmatch(r"Job entrypoint command failed with exit code \d+", said[0]), asked.stderr


def test_an_answer_carries_its_request_id_once(platform: Running) -> None:
    answer = call(platform, "GET", "/v1/nothing")
    assert answer.headers.get_list("x-request-id") == [answer.json()["error"]["request_id"]]


def test_every_acknowledged_job_is_done_once_whoever_is_killed(platform: Running, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4)

    def register(name: str) -> str:
        """Until it is acknowledged, as a client would: the same key again."""
        body = {"name": name, "source": str(tmp_path / "rows.jsonl")}
        options: dict[str, Any] = {"json": body, "headers": {"Idempotency-Key": f"{tmp_path}-{name}"}}
        answer = wait_for(
            lambda: (a := call(platform, "POST", "/v1/datasets", **options)).status_code in (200, 202) and a
        )
        return str(answer.json()["id"])

    before = {job["id"] for job in call(platform, "GET", "/v1/jobs?limit=1000").json()["items"]}
    ids = []
    for number, victim in enumerate(["door", "reconciler", "door", None]):
        ids.append(register(f"killed-{number}"))
        if victim is not None:
            kill(platform, victim)
    for job_id in ids:
        job = wait_for(
            lambda job_id=job_id: (j := call(platform, "GET", f"/v1/jobs/{job_id}").json())["state"] in FINAL and j
        )
        assert job["state"] == "completed", job
        events = call(platform, "GET", f"/v1/jobs/{job_id}/events").json()["items"]
        states = [event["state"] for event in events if event["state"]]
        assert states == ["pending", "queued", "preparing", "running", "completed"]
    after = {job["id"] for job in call(platform, "GET", "/v1/jobs?limit=1000").json()["items"]}
    assert after - before == set(ids)
    assert {job["version"] for job in call(platform, "GET", "/v1/datasets?name=killed-0").json()["items"]} == {1}
