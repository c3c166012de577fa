"""The HTTP client: every route typed, every refusal the error it was, and calls that may be repeated are."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.support.live_door import LiveDoor, figure
from tests.support.stage import SPEC
from tunesmith.api.client import Client, read_on
from tunesmith.errors import (
    AuthError,
    ConflictError,
    NotFoundError,
    SpecError,
    StorageError,
    TunesmithError,
    UnavailableError,
)
from tunesmith.jobs.spec import TrainSpec

ORDER = TrainSpec.model_validate(SPEC)


@pytest.fixture
def client(live_door: LiveDoor) -> Iterator[Client]:
    with Client(live_door.url, live_door.token) as client:
        yield client


def test_everything_there_is_comes_typed(client: Client) -> None:
    assert client.health().status == "ok"
    assert "cpu-small" in [flavor.name for flavor in client.flavors().items]
    assert [model.ref for model in client.models().items] == ["tiny@1"]
    assert client.models(name="other").items == []
    assert client.datasets().items[0].tables["train.jsonl"].rows == 8
    assert client.model("tiny").ref == client.model("tiny@1").ref == "tiny@1"
    assert client.dataset("sums@1").kind == "dataset"


def test_a_plan_records_nothing_and_an_order_does(client: Client) -> None:
    planned = client.plan(ORDER)
    assert (planned.model, planned.output_model) == ("tiny@1", "tuned@1")
    assert client.jobs().items == []
    job = client.submit(ORDER)
    assert (job.state, job.output) == ("pending", "tuned@1")
    assert client.job(job.id) == job
    assert client.jobs(kind="train", states=["pending", "queued"]).items == [job]
    assert client.jobs(states=["running"]).items == []


def test_pages_of_jobs_follow_each_other(client: Client) -> None:
    ids = [client.submit(ORDER).id for _ in range(3)]
    first = client.jobs(limit=2)
    second = client.jobs(limit=2, after=first.next)
    assert [job.id for job in (*first.items, *second.items)] == ids[::-1]
    assert second.next is None


def test_registrations_are_jobs(client: Client, live_door: LiveDoor) -> None:
    source = live_door.settings.home.with_name("rows.jsonl")
    source.write_text("{}\n")
    model = client.register_model("new", str(source), task_type="text-generation")
    dataset = client.register_dataset("rows", str(source))
    assert (model.kind, model.output_kind, model.job["task_type"]) == ("register", "model", "text-generation")
    assert (dataset.output_kind, dataset.output) == ("dataset", "rows@1")


def test_a_key_used_twice_orders_once_and_every_order_has_a_key_of_its_own(client: Client) -> None:
    assert client.submit(ORDER, idempotency_key="k").id == client.submit(ORDER, idempotency_key="k").id
    assert client.submit(ORDER).id != client.submit(ORDER).id
    with pytest.raises(ConflictError) as caught:
        client.submit(ORDER.model_copy(update={"cards": 2}), idempotency_key="k")
    assert caught.value.code == "idempotency_key_reused"


def test_a_job_is_stopped_and_deleted(client: Client) -> None:
    job = client.submit(ORDER)
    with pytest.raises(ConflictError):
        client.delete(job.id)
    assert client.stop(job.id).state == "stopped"
    client.delete(job.id)
    with pytest.raises(NotFoundError):
        client.job(job.id)


def test_a_refusal_is_the_error_it_was(client: Client) -> None:
    with pytest.raises(SpecError) as caught:
        client.plan(TrainSpec.model_validate({**SPEC, "hyperparameters": {"lora_rnak": 4}}))
    error = caught.value
    assert (error.code, error.status) == ("unknown_hyperparameter", 422)
    assert error.fields == ["hyperparameters.lora_rnak"]
    assert error.hint == "did you mean lora_rank?"
    with pytest.raises(NotFoundError) as missing:
        client.model("tinny")
    assert (missing.value.code, missing.value.status) == ("unknown_model", 404)


def test_a_word_of_the_user_stays_one_part_of_the_path(client: Client) -> None:
    for word in ("../../healthz", "..", "a/b", "a?limit=1", "a#b", ""):
        with pytest.raises(TunesmithError) as caught:
            client.job(word)
        assert 400 <= caught.value.status < 500


def test_a_wrong_token_is_refused_at_once(live_door: LiveDoor) -> None:
    for token in (None, "wrong"):
        with Client(live_door.url, token) as client, pytest.raises(AuthError):
            client.jobs()


def test_following_gives_everything_up_to_the_end(client: Client, live_door: LiveDoor) -> None:
    job = client.submit(ORDER)
    events = client.follow_events(job.id, poll_s=0)
    assert next(events).state == "pending"
    live_door.run(job.id)
    assert [next(events).state for _ in range(3)] == ["queued", "preparing", "running"]
    metrics = client.follow_metrics(job.id, names=["loss"], poll_s=0)
    live_door.measure(job.id, 1, figure(1), figure(1, "grad_norm"))
    assert next(metrics).step == 1
    logs = client.follow_logs(job.id, poll_s=0)
    live_door.log(job.id, 1, "one\n")
    assert next(logs).text == "one\n"
    live_door.measure(job.id, 2, figure(1, "grad_norm"))
    live_door.measure(job.id, 3, figure(2))
    live_door.log(job.id, 2, "two\n")
    live_door.end(job.id, "completed", message="done")
    assert [event.state for event in events] == ["completed"]
    assert [line.step for line in metrics] == [2]
    assert [part.text for part in logs] == ["two\n"]
    seen: list[Any] = []
    assert client.wait(job.id, on_event=seen.append).state == "completed"
    assert [event.state for event in seen] == ["pending", "queued", "preparing", "running", "completed"]


def test_reading_on_passes_pages_without_items(client: Client, live_door: LiveDoor) -> None:
    job = client.submit(ORDER)
    live_door.run(job.id)
    live_door.measure(job.id, 1, *(figure(n % 60, "grad_norm", rank=n) for n in range(10_000)))
    live_door.measure(job.id, 2, figure(7))
    lines, place = read_on(lambda after: client.metrics(job.id, names=["loss"], after=after))
    assert ([line.step for line in lines], place) == ([7], "1.2")


def test_a_door_that_does_not_answer_is_named_with_what_to_do() -> None:
    with Client("http://127.0.0.1:1", first_retry_s=0) as client, pytest.raises(UnavailableError) as caught:
        client.jobs()
    assert "http://127.0.0.1:1" in caught.value.message
    assert "tunesmith up" in str(caught.value.hint)


def test_what_met_no_answer_is_asked_again_under_the_same_key(live_door: LiveDoor) -> None:
    with Client(live_door.url, live_door.token) as direct:
        answer = direct.submit(ORDER).model_dump_json().encode()
    with _flaky([None, (502, b"bad gateway"), (503, b""), (201, answer)]) as (url, keys), Client(url) as client:
        client.submit(ORDER)
    assert len(keys) == 4
    assert len(set(keys)) == 1 and keys[0]


def test_a_refusal_is_not_asked_again() -> None:
    with _flaky([(422, b"{}"), (200, b"{}")]) as (url, asked), Client(url) as client:
        with pytest.raises(SpecError):
            client.jobs()
        assert len(asked) == 1


def test_a_404_that_is_not_the_doors_own_is_asked_again(live_door: LiveDoor) -> None:
    with Client(live_door.url, live_door.token) as direct:
        job = direct.submit(ORDER)
    proxys = (404, b"Path '/v1/jobs' not found. Ping http://.../-/routes for available routes.")
    answers = [(200, b'{"items": [], "next": null}'), proxys, proxys, (200, job.model_dump_json().encode())]
    with _flaky(answers) as (url, asked), Client(url) as client:
        client.jobs()
        assert client.job(job.id) == job
    assert len(asked) == 4


def test_a_404_of_what_is_no_door_is_told_in_the_end() -> None:
    with _flaky([(404, b"nothing here")]) as (url, _), Client(url, first_retry_s=0) as client:
        with pytest.raises(NotFoundError, match="nothing here") as caught:
            client.jobs()
        assert caught.value.hint == "is it a Tunesmith front door?"


def test_trying_again_has_an_end_and_keeps_the_doors_own_words() -> None:
    error = {"code": "storage_unavailable", "message": "away", "fields": [], "hint": None, "request_id": "r"}
    body = json.dumps({"error": error}).encode()
    with _flaky([(503, body)]) as (url, _), Client(url, first_retry_s=0) as client:
        with pytest.raises(StorageError) as caught:
            client.jobs()
        assert caught.value.message == "away"


@contextmanager
def _flaky(answers: list[tuple[int, bytes] | None]) -> Iterator[tuple[str, list[str | None]]]:
    """A server that gives these answers in turn (None: it hangs up); its URL and the keys it was asked with."""
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("Idempotency-Key"))
            answer = answers[min(len(keys), len(answers)) - 1]
            if answer is None:
                self.close_connection = True
                return
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", keys
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
