"""The front door: orders, jobs, and what they say while they run."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serve_app.door import Door
from tests.support.door_fixture import end, error_of, order
from tests.support.stage import SPEC
from tunesmith.api.views import JobView
from tunesmith.jobs.attempts import MetricLine
from tunesmith.jobs.states import Change
from tunesmith.storage import layout
from tunesmith.storage.base import Storage


def test_an_order_is_recorded_and_answered_with_the_job(client: TestClient, door: Door) -> None:
    answer = client.post("/v1/jobs", json=SPEC)
    job = JobView.model_validate(answer.json())
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/jobs/{job.id}"
    assert (job.state, job.attempt, job.output) == ("pending", 0, "tuned@1")
    assert job.job["hyperparameters"]["max_steps"] == 3
    assert job.job["hyperparameters"]["lora_rank"] == 8
    assert client.get(f"/v1/jobs/{job.id}").json() == answer.json()
    assert door.store.get(job.id).job.model_dump(mode="json") == job.job


def test_a_plan_records_nothing(client: TestClient) -> None:
    answer = client.post("/v1/plans", json=SPEC)
    assert answer.status_code == 200
    assert answer.json()["resources"] == {"CPU": 1}
    assert client.get("/v1/jobs").json() == {"items": [], "next": None}


def test_two_orders_for_one_name_make_two_versions(client: TestClient) -> None:
    assert [order(client).output for _ in range(2)] == ["tuned@1", "tuned@2"]


def test_jobs_are_listed_newest_first_page_by_page(client: TestClient) -> None:
    ids = [order(client).id for _ in range(5)]
    seen: list[str] = []
    after, pages = "", 0
    while after is not None:
        page = client.get(f"/v1/jobs?limit=2{'&after=' + after if after else ''}").json()
        seen += [job["id"] for job in page["items"]]
        after, pages = page["next"], pages + 1
    assert seen == ids[::-1]
    assert pages == 3
    assert client.get("/v1/jobs?limit=5").json()["next"] is None


def test_jobs_are_listed_by_kind_and_states(client: TestClient, door: Door) -> None:
    ids = [order(client).id for _ in range(3)]
    registration = client.post("/v1/datasets", json={"name": "d", "source": "s3://b/d"}).json()["id"]
    end(door, ids[0], "queued")
    end(door, ids[1], "stopped")

    def listed(query: str) -> set[str]:
        return {job["id"] for job in client.get(f"/v1/jobs?{query}").json()["items"]}

    assert listed("kind=register") == {registration}
    assert listed("state=queued&state=stopped") == {ids[0], ids[1]}
    assert listed("state=pending&kind=train") == {ids[2]}


def test_stopping_a_finished_job_changes_nothing(client: TestClient, door: Door) -> None:
    job = order(client)
    stopped = client.post(f"/v1/jobs/{job.id}/stop").json()
    assert (stopped["state"], stopped["reason"]) == ("stopped", "stopped_by_user")
    assert client.post(f"/v1/jobs/{job.id}/stop").json() == stopped
    running = order(client)
    end(door, running.id, "queued", "preparing", "running")
    assert client.post(f"/v1/jobs/{running.id}/stop").json()["state"] == "stopping"


def test_only_a_final_job_is_deleted(client: TestClient) -> None:
    job = order(client)
    error_of(client.delete(f"/v1/jobs/{job.id}"), 409, "job_not_final")
    client.post(f"/v1/jobs/{job.id}/stop")
    answer = client.delete(f"/v1/jobs/{job.id}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert client.delete(f"/v1/jobs/{job.id}").status_code == 204
    error_of(client.get(f"/v1/jobs/{job.id}"), 404, "unknown_job")
    assert client.get("/v1/jobs").json()["items"] == []


def test_events_are_read_on_from_where_a_reader_was(client: TestClient, door: Door) -> None:
    job = order(client)
    end(door, job.id, "queued", "preparing", "running")
    first = client.get(f"/v1/jobs/{job.id}/events?limit=2").json()
    assert [event["state"] for event in first["items"]] == ["pending", "queued"]
    rest = client.get(f"/v1/jobs/{job.id}/events?after={first['next']}").json()
    assert [event["state"] for event in rest["items"]] == ["preparing", "running"]
    end_of_list = client.get(f"/v1/jobs/{job.id}/events?after={rest['next']}").json()
    assert end_of_list == {"items": [], "next": rest["next"]}
    error_of(client.get(f"/v1/jobs/{job.id}/events?after={10**30}"), 422, "invalid_spec")


def put_log(storage: Storage, job: JobView, attempt: int, segment: int, text: str, rank: str = "driver") -> None:
    storage.put(f"{layout.logs(job.id, attempt, rank)}/{segment:08d}", text.encode())


def read_log(client: TestClient, job: JobView, after: str | None = None, rank: str = "driver") -> tuple[list[Any], str]:
    params = {"rank": rank, **({"after": after} if after else {})}
    page = client.get(f"/v1/jobs/{job.id}/logs", params=params).json()
    return [(item["attempt"], item["text"]) for item in page["items"]], page["next"]


def test_a_log_is_followed_over_attempts(client: TestClient, door: Door, storage: Storage) -> None:
    job = order(client)
    assert read_log(client, job) == ([], "1.0")
    end(door, job.id, "queued", "preparing")
    put_log(storage, job, 1, 1, "one\n")
    put_log(storage, job, 1, 2, "two\n")
    put_log(storage, job, 1, 1, "worker\n", rank="0")
    assert read_log(client, job) == ([(1, "one\n"), (1, "two\n")], "1.2")
    assert read_log(client, job, "1.1") == ([(1, "two\n")], "1.2")
    assert read_log(client, job, "1.2") == ([], "1.2")
    assert read_log(client, job, rank="0") == ([(1, "worker\n")], "1.1")
    put_log(storage, job, 1, 3, "late\n")
    end(door, job.id, "queued")
    door.store.change(job.id, Change(state="preparing", attempt=2))
    put_log(storage, job, 2, 1, "again\n")
    assert read_log(client, job, "1.2") == ([(1, "late\n"), (2, "again\n")], "2.1")
    assert read_log(client, job, "2.1") == ([], "2.1")
    assert read_log(client, job, "3.1") == ([], "3.1")


def test_a_page_of_a_log_is_bounded_and_nothing_is_left_out(client: TestClient, door: Door, storage: Storage) -> None:
    job = order(client)
    end(door, job.id, "queued", "preparing")
    texts = [f"{number}" * (400 << 10) + "\n" for number in range(8)]
    for number, text in enumerate(texts, start=1):
        put_log(storage, job, 1, number, text)
    seen: list[str] = []
    pages, after = 0, None
    while True:
        items, after = read_log(client, job, after)
        if not items:
            break
        assert sum(len(text) for _, text in items) < 2 << 20
        seen, pages = seen + [text for _, text in items], pages + 1
    assert seen == texts
    assert pages == 3


@pytest.mark.parametrize("query", ["after=1", "after=0.1", "after=1.x", "after=-1.2", "after=1.٣", "rank=../claim"])
def test_a_cursor_or_rank_that_is_none_is_refused(client: TestClient, query: str) -> None:
    job = order(client)
    error_of(
        client.get(f"/v1/jobs/{job.id}/logs?{query}"), 422, "invalid_cursor" if "after" in query else "invalid_spec"
    )


def test_a_metrics_line_that_cannot_be_read_is_left_out_and_logged(
    client: TestClient, door: Door, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    job = order(client)
    end(door, job.id, "queued", "preparing")
    line = {"time": "2026-01-01T00:00:00.000Z", "attempt": 1, "step": 1, "rank": None, "name": "loss", "value": 1.5}
    text = json.dumps(line) + "\nno line\n" + json.dumps({**line, "step": 2}) + "\n"
    storage.put(f"{layout.metrics(job.id, 1)}/00000001", text.encode())
    items = client.get(f"/v1/jobs/{job.id}/metrics").json()["items"]
    assert [item["step"] for item in items] == [1, 2]
    assert any("line 2" in message for message in caplog.messages)


def test_metrics_are_read_by_name_and_a_loss_that_is_no_number_is_shown(
    client: TestClient, door: Door, storage: Storage
) -> None:
    job = order(client)
    end(door, job.id, "queued", "preparing")
    lines = [
        MetricLine(time="t", attempt=1, step=step, rank=None, name=name, value=value)
        for step, name, value in [(1, "loss", 2.5), (1, "grad_norm", 1.0), (2, "loss", float("nan"))]
    ]
    text = "".join(each.model_dump_json() + "\n" for each in lines)
    storage.put(f"{layout.metrics(job.id, 1)}/00000001", text.encode())
    page = client.get(f"/v1/jobs/{job.id}/metrics?name=loss").json()
    assert [(item["step"], item["value"]) for item in page["items"]] == [(1, 2.5), (2, "NaN")]
    assert page["next"] == "1.1"
    assert len(client.get(f"/v1/jobs/{job.id}/metrics").json()["items"]) == 3
    assert len(client.get(f"/v1/jobs/{job.id}/metrics?name=loss&name=grad_norm").json()["items"]) == 3
    assert client.get(f"/v1/jobs/{job.id}/metrics?after=1.1").json() == {"items": [], "next": "1.1"}
