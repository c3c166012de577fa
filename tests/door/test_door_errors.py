"""Whatever goes wrong at the door, the answer has the one shape and says what to do."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from starlette.types import Message

from serve_app.app import make_app
from serve_app.door import Door
from serve_app.middleware import MAX_BODY_BYTES, _read_body, _read_body_in_time
from tests.support.door_fixture import error_of
from tests.support.stage import SPEC
from tunesmith.errors import SlowRequestError, TooLargeError
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.base import Storage


@pytest.mark.parametrize(
    ("body", "code", "field", "hint"),
    [
        ({"model": "tiney"}, "unknown_model", "model", "did you mean tiny?"),
        ({"model": "tiny@7"}, "unknown_model", "model", "tiny has version 1"),
        ({"dataset": "sum"}, "unknown_dataset", "dataset", "did you mean sums?"),
        ({"flavor": "cpu-smal"}, "unknown_flavor", "flavor", "did you mean cpu-small?"),
        (
            {"hyperparameters": {"lora_rnak": 4}},
            "unknown_hyperparameter",
            "hyperparameters.lora_rnak",
            "did you mean lora_rank?",
        ),
        (
            {"hyperparameters": {"response_field": "reply"}},
            "missing_column",
            "hyperparameters.response_field",
            "set response_field to one of the file's columns",
        ),
        ({"output_model": "No Spaces"}, "invalid_spec", "output_model", None),
        ({"cards": 0}, "invalid_spec", "cards", None),
        ({"kind": "register"}, "invalid_spec", "kind", None),
        ({"flavour": "cpu-small"}, "invalid_spec", "flavour", "did you mean flavor?"),
    ],
)
def test_a_bad_order_says_what_is_wrong_and_leaves_nothing(
    client: TestClient, body: dict[str, Any], code: str, field: str, hint: str | None
) -> None:
    for path in ("/v1/jobs", "/v1/plans"):
        error = error_of(client.post(path, json={**SPEC, **body}), 422, code)
        assert error["fields"] == [field]
        assert error["hint"] == hint or hint is None
    assert client.get("/v1/jobs").json()["items"] == []


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        ("GET", "/v1/nothing", {}, 404, "not_found"),
        ("GET", "/v1/jobs/", {}, 404, "not_found"),
        ("PUT", "/v1/jobs", {}, 405, "method_not_allowed"),
        ("POST", "/v1/jobs", {"content": b'{"model": '}, 400, "invalid_json"),
        ("POST", "/v1/jobs", {"content": b'{"model": "\xff"}'}, 400, "invalid_json"),
        ("POST", "/v1/jobs", {"content": b"[" * 100_000}, 400, "invalid_json"),
        ("POST", "/v1/jobs", {"content": b"[]"}, 422, "invalid_spec"),
        ("POST", "/v1/jobs", {"content": b""}, 422, "invalid_spec"),
        ("POST", "/v1/jobs", {"data": {"model": "tiny"}}, 422, "invalid_spec"),
        ("POST", "/v1/jobs", {"json": {**SPEC, "name": "\ud800"}}, 422, "invalid_spec"),
        ("POST", "/v1/jobs", {"json": {**SPEC, "flavor": "\ud800"}}, 422, "invalid_spec"),
        ("POST", "/v1/jobs", {"json": {**SPEC, "cards": "\ud800"}}, 422, "invalid_spec"),
        ("POST", "/v1/jobs", {"json": {**SPEC, "\ud800": 1}}, 422, "invalid_spec"),
        ("GET", "/v1/jobs?limit=0", {}, 422, "invalid_spec"),
        ("GET", "/v1/jobs?limit=1001", {}, 422, "invalid_spec"),
        ("GET", "/v1/jobs?limit=many", {}, 422, "invalid_spec"),
        ("GET", "/v1/jobs?state=gone", {}, 422, "invalid_spec"),
        ("GET", "/v1/jobs?kind=quote", {}, 422, "invalid_spec"),
        ("GET", "/v1/jobs?after=job-9", {}, 404, "unknown_job"),
        ("GET", "/v1/jobs/job-9", {}, 404, "unknown_job"),
        ("POST", "/v1/jobs/job-9/stop", {}, 404, "unknown_job"),
        ("DELETE", "/v1/jobs/job-9", {}, 404, "unknown_job"),
        ("GET", "/v1/jobs/job-9/events", {}, 404, "unknown_job"),
        ("GET", "/v1/jobs/job-9/logs", {}, 404, "unknown_job"),
        ("GET", "/v1/jobs/job-9/metrics", {}, 404, "unknown_job"),
        ("GET", "/v1/models/tinny", {}, 404, "unknown_model"),
        ("GET", "/v1/models/tiny@2", {}, 404, "unknown_model"),
        ("GET", "/v1/models/..", {}, 404, "not_found"),
        ("GET", "/v1/models/%2e%2e%2fjobs", {}, 404, "not_found"),
        ("GET", "/v1/models/Tiny", {}, 422, "invalid_spec"),
        ("GET", "/v1/models?name=../jobs", {}, 422, "invalid_spec"),
        ("GET", "/v1/datasets/sums@x", {}, 422, "invalid_spec"),
        ("GET", "/v1/datasets/sum", {}, 404, "unknown_dataset"),
        ("POST", "/v1/models", {"json": {"name": "m", "source": "s3://b/m", "files": 1}}, 422, "invalid_spec"),
        ("POST", "/v1/datasets", {"json": {"name": "Big", "source": "s3://b/m"}}, 422, "invalid_spec"),
    ],
)
def test_every_refusal_has_the_one_shape(
    client: TestClient, method: str, path: str, options: dict[str, Any], status: int, code: str
) -> None:
    if "json" in options:
        # httpx would refuse what a client in another language can send.
        options = {"content": json.dumps(options["json"]).encode()}
    if "content" in options:
        options["headers"] = {"Content-Type": "application/json"}
    error_of(client.request(method, path, **options), status, code)


def test_a_body_that_is_not_sent_as_json_is_told_how(client: TestClient) -> None:
    error = error_of(client.post("/v1/jobs", data={"model": "tiny"}), 422, "invalid_spec")
    assert "application/json" in error["hint"]


def test_an_unexpected_fault_is_logged_and_answered_without_its_details(
    client: TestClient, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    storage.put(layout.asset_manifest("model", "broken", 1), b"no manifest")
    with caplog.at_level(logging.ERROR):
        error = error_of(client.get("/v1/models/broken"), 500, "platform_error")
    assert "manifest" not in error["message"]
    record = next(record for record in caplog.records if error["request_id"] in record.getMessage())
    assert record.exc_info is not None


def test_a_database_that_does_not_answer_is_said_to_be_away(settings: Settings) -> None:
    app = make_app(settings)
    Path(settings.home / "records.db").mkdir()
    with TestClient(app) as client:
        answer = client.get("/v1/jobs")
    error_of(answer, 503, "unavailable")
    assert answer.headers["retry-after"] == "1"


def test_a_request_keeps_the_id_it_came_with_where_that_is_one(client: TestClient) -> None:
    assert client.get("/healthz", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/healthz", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"
    error = error_of(client.get("/v1/nothing", headers={"X-Request-Id": "mine-2"}), 404, "not_found")
    assert error["request_id"] == "mine-2"


def test_behind_serves_proxy_the_id_is_written_once(settings: Settings) -> None:
    with TestClient(make_app(settings, proxied=True)) as client:
        answer = client.get("/v1/nothing", headers={"X-Request-Id": "serve-1"})
    assert "x-request-id" not in answer.headers
    assert answer.json()["error"]["request_id"] == "serve-1"


def test_all_but_health_needs_the_token(client: TestClient, settings: Settings) -> None:
    settings.api_token_path.write_text("secret\n")
    assert client.get("/healthz").status_code == 200
    refused: list[dict[str, str]] = [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"Authorization": "Basic secret"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer s\xe9cret".encode("latin-1").decode("latin-1")},
    ]
    for headers in refused:
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        for path in ("/v1/jobs", "/v1/nothing", "/openapi.json", "/docs"):
            answer = client.get(path, headers=encoded)
            error_of(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/jobs", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/v1/jobs", headers={"Authorization": "bearer secret"}).status_code == 200


def test_the_token_is_asked_for_before_the_body_is_looked_at(client: TestClient, settings: Settings) -> None:
    settings.api_token_path.write_text("secret")
    error_of(client.post("/v1/jobs", content=b"{"), 401, "unauthorized")


@pytest.mark.parametrize("make", [lambda path: path.write_text(""), lambda path: path.mkdir()])
def test_a_token_file_that_holds_no_token_lets_nobody_in(client: TestClient, settings: Settings, make: Any) -> None:
    make(settings.api_token_path)
    assert client.get("/v1/jobs", headers={"Authorization": "Bearer "}).status_code in (401, 503)


@pytest.mark.parametrize("is_told", [True, False], ids=["told", "counted"])
def test_a_body_that_is_too_large_is_refused_whether_its_length_is_told_or_not(
    client: TestClient, is_told: bool
) -> None:
    content = b" " * (2 * MAX_BODY_BYTES) if is_told else iter([b" " * MAX_BODY_BYTES] * 2)
    error_of(client.post("/v1/jobs", content=content), 413, "body_too_large")
    content = json.dumps(SPEC).ljust(MAX_BODY_BYTES).encode()
    assert client.post("/v1/plans", content=content, headers={"Content-Type": "application/json"}).status_code == 200


def test_a_body_is_read_no_further_than_the_bound() -> None:
    read = 0

    async def receive() -> Message:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b" " * (MAX_BODY_BYTES // 10), "more_body": True}

    with pytest.raises(TooLargeError):
        asyncio.run(_read_body(receive))
    assert read == 11


def test_a_body_that_does_not_come_in_its_time_is_refused() -> None:
    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError("it waited for ever")

    with pytest.raises(SlowRequestError) as caught:
        asyncio.run(_read_body_in_time(receive, limit_s=0.01))
    assert (caught.value.status, caught.value.code) == (408, "request_timeout")


def test_connections_that_are_all_in_use_are_no_fault_of_the_request(client: TestClient, door: Door) -> None:
    door.store.database.engine = sa.create_engine(
        door.settings.database_url, pool_size=1, max_overflow=0, pool_timeout=0.1
    )
    with door.store.database.engine.connect():
        error_of(client.get("/v1/jobs"), 503, "unavailable")
    assert client.get("/v1/jobs").status_code == 200
