"""Idempotency keys: one promise for one key, however often and from wherever it is sent."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve_app.door import Door
from tests.support.door_fixture import end, error_of
from tests.support.stage import SPEC
from tunesmith.storage.base import Storage


def test_the_same_key_and_body_again_gives_the_first_answer(client: TestClient, door: Door) -> None:
    headers = {"Idempotency-Key": "k-1"}
    first = client.post("/v1/jobs", json=SPEC, headers=headers)
    assert "idempotent-replay" not in first.headers
    end(door, first.json()["id"], "queued", "stopped")
    # The same document in another order and spacing.
    text = json.dumps(dict(reversed(SPEC.items())), indent=3)
    again = client.post("/v1/jobs", content=text, headers={**headers, "Content-Type": "application/json"})
    assert (again.status_code, again.headers["idempotent-replay"]) == (200, "true")
    assert again.content == first.content
    assert len(client.get("/v1/jobs").json()["items"]) == 1


def test_a_replay_succeeds_when_what_was_ordered_is_gone(client: TestClient, storage: Storage, door: Door) -> None:
    headers = {"Idempotency-Key": "k-1"}
    first = client.post("/v1/jobs", json=SPEC, headers=headers)
    storage.delete_folder("datasets/sums")
    end(door, first.json()["id"], "stopped")
    assert client.delete(first.headers["location"]).status_code == 204
    assert client.post("/v1/jobs", json=SPEC, headers=headers).content == first.content
    error_of(client.post("/v1/jobs", json=SPEC), 422, "unknown_dataset")


def test_a_used_key_with_another_body_is_a_conflict(client: TestClient) -> None:
    headers = {"Idempotency-Key": "k-1"}
    client.post("/v1/jobs", json=SPEC, headers=headers)
    error = error_of(client.post("/v1/jobs", json={**SPEC, "cards": 2}, headers=headers), 409, "idempotency_key_reused")
    assert error["fields"] == ["Idempotency-Key"]


def test_one_key_does_not_serve_two_routes(client: TestClient) -> None:
    headers = {"Idempotency-Key": "k-1"}
    body = {"name": "thing", "source": "s3://bucket/thing"}
    assert client.post("/v1/models", json=body, headers=headers).status_code == 202
    error_of(client.post("/v1/datasets", json=body, headers=headers), 409, "idempotency_key_reused")


def test_a_refused_body_leaves_no_key(client: TestClient) -> None:
    headers = {"Idempotency-Key": "k-1"}
    assert client.post("/v1/jobs", json={**SPEC, "model": "gone"}, headers=headers).status_code == 422
    assert client.post("/v1/jobs", json=SPEC, headers=headers).status_code == 201


@pytest.mark.parametrize("key", ["", "a b", "ü", "x" * 256, "\t"])
def test_a_key_that_is_not_visible_ascii_is_refused(client: TestClient, key: str) -> None:
    answer = client.post("/v1/jobs", json=SPEC, headers={"Idempotency-Key": key.encode("latin-1")})
    error = error_of(answer, 422, "invalid_idempotency_key")
    assert error["fields"] == ["Idempotency-Key"]
    assert client.get("/v1/jobs").json()["items"] == []


def test_a_key_of_255_characters_is_taken(client: TestClient) -> None:
    headers = {"Idempotency-Key": "~" * 255}
    assert client.post("/v1/jobs", json=SPEC, headers=headers).status_code == 201


def test_posts_of_one_key_at_once_make_one_job(client: TestClient) -> None:
    def post(_: int) -> Any:
        return client.post("/v1/jobs", json=SPEC, headers={"Idempotency-Key": "k-1"})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, range(16)))
    assert sorted(answer.status_code for answer in answers) == [200] * 15 + [201]
    assert len({answer.content for answer in answers}) == 1
    assert len(client.get("/v1/jobs").json()["items"]) == 1
