"""The door's API in this process, over a real record store and storage; no Ray and no reconciler."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from serve_app.app import make_app
from serve_app.door import Door
from tests.support.stage import SPEC, make_settings, publish_inputs
from tunesmith.api.views import ErrorBody, JobView
from tunesmith.jobs.states import Change
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return make_settings(tmp_path / "home", import_roots=str(tmp_path / "data"))


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    """The model `tiny` and the dataset `sums` are there; there is no token, and the cluster has 2 CPUs alone."""
    app = make_app(settings, capacity=lambda: {"CPU": 2.0})
    app.state.door.store.migrate()
    publish_inputs(app.state.door.storage)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def door(client: TestClient) -> Door:
    door: Door = client.app.state.door  # type: ignore[attr-defined]
    return door


@pytest.fixture
def storage(door: Door) -> Storage:
    return door.storage


def order(client: TestClient, **options: Any) -> JobView:
    answer = client.post("/v1/jobs", json={**SPEC, **options})
    assert answer.status_code == 201, answer.text
    return JobView.model_validate_json(answer.content)


def end(door: Door, job_id: str, *states: str) -> None:
    """Bring a job through these states to the last."""
    for state in states:
        door.store.change(job_id, Change(state=state, attempt=1 if state == "preparing" else None))


def error_of(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error that was answered, which has the one shape, this status and this code."""
    assert answer.status_code == status, answer.text
    error = ErrorBody.model_validate_json(answer.content).error
    assert set(answer.json()) == {"error"}
    assert error.code == code, answer.text
    assert answer.headers["X-Request-Id"] == error.request_id
    shown: dict[str, Any] = answer.json()["error"]
    return shown
