"""The launcher speaks Ray's Jobs API through Ray's own client; here a small server answers in Ray's words."""

import json
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from serve_app.reconciler.launcher import RayJob, RayLauncher
from tests.support.stage import make_settings
from tunesmith.errors import UnavailableError
from tunesmith.settings import Settings


class JobsApi(ThreadingHTTPServer):
    """Remembers submissions; `fault` is answered to everything but the version."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.fault: int | None = None


class _Handler(BaseHTTPRequestHandler):
    server: JobsApi

    def do_GET(self) -> None:
        if self.path == "/api/version":
            self.answer(200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})
        else:
            self.find(self.path.rpartition("/")[2], lambda job: job)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        if self.path.endswith("/stop"):
            self.find(self.path.split("/")[-2], lambda job: {"stopped": job["status"] == "RUNNING"})
        elif self.server.fault is None and body["submission_id"] in self.server.jobs:
            self.answer(400, f"ValueError: Job with submission_id {body['submission_id']} already exists. Please use")
        elif self.server.fault is None:
            self.server.jobs[body["submission_id"]] = {"type": "SUBMISSION", "status": "RUNNING", "body": body, **body}
            self.answer(200, {"job_id": body["submission_id"], "submission_id": body["submission_id"]})
        else:
            self.answer(self.server.fault, "fault")

    def find(self, name: str, make: Any) -> None:
        job = self.server.jobs.get(name)
        if self.server.fault is not None:
            self.answer(self.server.fault, "fault")
        elif job is None:
            self.answer(404, f"Job {name} does not exist")
        else:
            self.answer(200, {key: value for key, value in make(job).items() if key != "body"})

    def answer(self, status: int, content: Any) -> None:
        text = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def api() -> Iterator[JobsApi]:
    with JobsApi() as api:
        thread = threading.Thread(target=api.serve_forever)
        thread.start()
        yield api
        api.shutdown()
        thread.join()


@pytest.fixture
def settings(api: JobsApi, tmp_path: Path) -> Settings:
    return make_settings(tmp_path, ray_dashboard_port=api.server_address[1], python="/venv with space/bin/python")


def test_an_attempt_is_a_ray_job_that_takes_no_cpu_and_brings_no_folder(api: JobsApi, settings: Settings) -> None:
    RayLauncher(settings).submit("job-1", 2, "s3://bucket/jobs/job-1/job.json", account="team")
    body = api.jobs["job-1-a2"]["body"]
    assert shlex.split(body["entrypoint"]) == [
        "/venv with space/bin/python",
        "-m",
        "trainers",
        "s3://bucket/jobs/job-1/job.json",
        "--attempt",
        "2",
    ]
    assert body["metadata"] == {"job_id": "job-1", "attempt": "2"}
    assert body["entrypoint_num_cpus"] == 0
    assert set(body["runtime_env"]) == {"env_vars"}
    own = settings.to_env()
    assert own.pop("TUNESMITH_DATABASE_URL"), "it may hold a password, and Ray shows it to all"
    assert body["runtime_env"]["env_vars"] == {
        **own,
        "TUNESMITH_ACCOUNT": "team",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "TUNESMITH_ATTEMPT_NAME": "job-1-a2",
    }


def test_an_attempt_that_was_submitted_before_is_left_alone(api: JobsApi, settings: Settings) -> None:
    launcher = RayLauncher(settings)
    launcher.submit("job-1", 1, "/first", account="operator")
    launcher.submit("job-1", 1, "/second", account="operator")
    assert "/first" in api.jobs["job-1-a1"]["entrypoint"]


def test_rays_word_is_told_without_the_log_it_quotes(api: JobsApi, settings: Settings) -> None:
    launcher = RayLauncher(settings)
    assert launcher.status("job-1-a1") is None
    launcher.submit("job-1", 1, "/x", account="operator")
    assert launcher.status("job-1-a1") == RayJob("RUNNING")
    quote = "Job entrypoint command failed with exit code 1, last available logs (truncated to 20,000 chars):\na row"
    api.jobs["job-1-a1"] |= {"status": "FAILED", "message": quote}
    assert launcher.status("job-1-a1") == RayJob("FAILED", "Job entrypoint command failed with exit code 1")


def test_to_stop_what_ended_or_never_was_does_nothing(api: JobsApi, settings: Settings) -> None:
    launcher = RayLauncher(settings)
    launcher.stop("job-1-a1")
    launcher.submit("job-1", 1, "/x", account="operator")
    launcher.stop("job-1-a1")
    api.jobs["job-1-a1"]["status"] = "SUCCEEDED"
    launcher.stop("job-1-a1")


@pytest.mark.parametrize("fault", [400, 401, 500])
def test_whatever_else_ray_answers_means_not_now(api: JobsApi, settings: Settings, fault: int) -> None:
    launcher = RayLauncher(settings)
    launcher.submit("job-1", 1, "/x", account="operator")
    api.fault = fault
    for call in (launcher.status, launcher.stop):
        with pytest.raises(UnavailableError):
            call("job-1-a1")
    with pytest.raises(UnavailableError):
        launcher.submit("job-1", 2, "/x", account="operator")


def test_a_ray_that_is_not_there_is_tried_again(tmp_path: Path) -> None:
    launcher = RayLauncher(make_settings(tmp_path, ray_dashboard_port=1))
    for _ in range(2):
        with pytest.raises(UnavailableError):
            launcher.status("job-1-a1")
    with pytest.raises(UnavailableError):
        launcher.capacity()
