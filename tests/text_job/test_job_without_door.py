"""A job on an S3 server, started by `ray job submit` with no door; a door that comes up later finds it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from ruamel.yaml import YAML
from safetensors import safe_open

from tests.support import jobs
from tests.support.publishing import publish
from tests.support.ray_fixture import Running, running_platform
from tests.support.s3_fixture import S3Server
from tunesmith.local import local_platform

pytestmark = [pytest.mark.ray, pytest.mark.s3]


@pytest.fixture(scope="module")
def running(s3_server: S3Server) -> Iterator[Running]:
    """Ray alone, with its storage on the S3 server."""
    env = {
        **s3_server.env,
        "TUNESMITH_S3_ENDPOINT": s3_server.endpoint,
        "TUNESMITH_S3_ADDRESSING_STYLE": "path",
        "TUNESMITH_STORAGE_URL": s3_server.url("without-door"),
    }
    with running_platform(env, door=False) as running:
        yield running


def environment(running: Running) -> dict[str, str]:
    """What a user of `ray job submit` needs: where Ray is, and its token."""
    return {
        **os.environ,
        **running.settings.to_env(),
        "RAY_ADDRESS": running.settings.ray_jobs_url,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(running.settings.ray_token_path),
    }


def render(running: Running, order: dict[str, object], folder: Path) -> str:
    """`tunesmith jobs render`; the URL of the job.json."""
    YAML(typ="safe").dump(order, folder / "order.yaml")
    tunesmith = Path(sys.executable).with_name("tunesmith")
    command = [tunesmith, "jobs", "render", folder / "order.yaml", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(running), check=False)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["url"])


def submit(running: Running, url: str, folder: Path) -> str:
    """`ray job submit -- python -m trainers URL` from another working directory; what it prints."""
    ray = Path(sys.executable).with_name("ray")
    command = [ray, "job", "submit", "--", sys.executable, "-m", "trainers", url]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(running), cwd=folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_job_without_a_door_leaves_the_same_and_is_adopted(
    running: Running, tmp_path: Path, s3_server: S3Server
) -> None:
    model, data = jobs.make_sources(tmp_path)
    publish(running, "model", "tiny", model)
    order: dict[str, object] = {"kind": "register", "asset": "dataset", "name": "tiny", "source": str(data)}
    submit(running, render(running, order, tmp_path), tmp_path)
    url = render(running, jobs.spec().model_dump(exclude_none=True), tmp_path)
    job_id = url.split("/")[-2]
    printed = submit(running, url, tmp_path)
    submission = re.search(r"raysubmit_\w+", printed)
    assert submission

    keys = {entry.key: entry.size_bytes for entry in running.storage.entries()}
    own = sorted(key.removeprefix(f"jobs/{job_id}/") for key in keys if key.startswith(f"jobs/{job_id}/"))
    assert {key for key in own if "attempts" not in key} == {"job.json"}
    attempt = [key.removeprefix("attempts/1/") for key in own if key.startswith("attempts/1/")]
    grows = {"logs", "metrics", "events", "checkpoints", "evaluations"}
    assert {key.partition("/")[0] for key in attempt} == {"claim", "heartbeat", "result.json", "audit.json", *grows}
    evaluated = {key.removeprefix("evaluations/") for key in attempt if key.startswith("evaluations/")}
    assert evaluated == {f"{step}.json" for step in (0, 5, 10, 15, 20)}
    for kind in ("logs/driver", "logs/0", "metrics", "events"):
        numbers = sorted(int(key.rpartition("/")[2]) for key in attempt if key.rpartition("/")[0] == kind)
        assert numbers == list(range(1, len(numbers) + 1)), kind
        assert numbers, kind
    # The newest two are kept.
    steps = {key.split("/")[1] for key in attempt if key.startswith("checkpoints/")}
    assert steps == {"15", "20"}
    assert {f"checkpoints/{step}/manifest.json" for step in steps} <= set(attempt)
    assert len([key for key in own if key.startswith("attempts/")]) == len(attempt), "one attempt"
    manifest = json.loads(running.storage.get("models/tuned/1/manifest.json"))
    files = f"models/tuned/1/{manifest['folder']}/"
    assert manifest["folder"].startswith(f"files-{job_id}-a1-")
    stored = {key.removeprefix(files): size for key, size in keys.items() if key.startswith(files)}
    assert {file["path"]: file["size_bytes"] for file in manifest["files"]} == stored
    assert manifest["job"] == job_id
    assert {key.split("/")[0] for key in keys} == {"models", "datasets", "jobs", "cache"}

    running.storage.download_file(f"{files}adapter/adapter_model.safetensors", tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert any("lora_A" in name for name in file.keys())  # noqa: SIM118 - it is no dict

    with mock.patch.dict(os.environ, s3_server.env):
        local_platform.up(running.settings)
    adopted = running.client.wait(job_id) if running.client.health() else None
    assert adopted is not None
    assert (adopted.state, adopted.account, adopted.submission_id) == ("completed", "operator", submission[0])
    assert running.client.model("tuned").job == job_id
    assert [event.state for event in jobs.events(running, job_id) if event.state] == [
        "pending",
        "queued",
        "preparing",
        "running",
        "completed",
    ]
