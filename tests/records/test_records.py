"""The record store: what was acknowledged stays, moves are legal, and nothing is done twice."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateTable

from tunesmith.errors import ConflictError, LeaseLostError, NotFoundError
from tunesmith.jobs.drafting import new_job_id
from tunesmith.jobs.spec import RegisterJob
from tunesmith.jobs.states import Change, replay
from tunesmith.records.idempotency import KEEP_S
from tunesmith.records.record import Line, Record
from tunesmith.records.schema import METADATA
from tunesmith.records.store import RecordStore


class Clock:
    """Time that goes on only when told to."""

    def __init__(self) -> None:
        self.seconds = 1_800_000_000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> RecordStore:
    store = RecordStore(f"sqlite:///{tmp_path / 'records.db'}", clock=clock)
    store.migrate()
    return store


def make_job(name: str = "data", version: int = 1, created_at: str = "2026-01-01T00:00:00.000Z") -> RegisterJob:
    job_id = new_job_id()
    return RegisterJob(
        id=job_id,
        account="operator",
        name="register",
        asset="dataset",
        source="/x",
        output_asset=f"{name}@{version}",
        created_at=created_at,
    )


def answer(record: Record) -> dict[str, Any]:
    return {"id": record.id, "state": record.status.state}


def insert(store: RecordStore, **options: Any) -> Record:
    return store.insert(make_job(**options), respond=answer).record


def run_to(store: RecordStore, record: Record, *states: str) -> Record:
    for state in states:
        record = store.change(record.id, Change(state=state))
    return record


def test_replaying_a_jobs_events_gives_its_record(store: RecordStore) -> None:
    record = run_to(store, insert(store), "queued")
    store.change(record.id, Change(state="preparing", attempt=1), submission_id=f"{record.id}-a1")
    store.change(record.id, Change(phase="fetch"))
    store.change(record.id, Change(state="running", phase="train", message="step 1"), data={"total_steps": 3})
    store.change(record.id, Change(state="failed", reason="data_error", message="no rows"))
    events = store.events(record.id)
    final = store.get(record.id)
    assert replay(event.change for event in events) == final.status
    assert [event.seq for event in events] == sorted({event.seq for event in events})
    assert events[4].data == {"total_steps": 3}
    assert (final.submission_id, final.status.attempt) == (f"{record.id}-a1", 1)
    assert final.started_at is not None
    assert final.ended_at is not None
    assert store.events(record.id, after=events[2].seq) == events[3:]


def test_an_illegal_move_changes_nothing(store: RecordStore) -> None:
    record = insert(store)
    with pytest.raises(ConflictError):
        store.change(record.id, Change(state="completed"))
    with pytest.raises(ConflictError):
        store.change(record.id, Change(state="queued"), expect=["running"])
    assert store.get(record.id) == record
    assert len(store.events(record.id)) == 1


def test_the_same_key_and_body_give_the_first_answer_again(store: RecordStore) -> None:
    first = store.insert(make_job(), respond=answer, idempotency_key="k", body_hash="a")
    run_to(store, first.record, "queued")
    again = store.insert(make_job(), respond=answer, idempotency_key="k", body_hash="a")
    assert (first.replayed, again.replayed) == (False, True)
    assert again.response == first.response
    assert len(store.page()) == 1


def test_the_same_key_with_another_body_is_refused(store: RecordStore) -> None:
    store.insert(make_job(), respond=answer, idempotency_key="k", body_hash="a")
    with pytest.raises(ConflictError) as caught:
        store.insert(make_job(), respond=answer, idempotency_key="k", body_hash="b")
    assert caught.value.code == "idempotency_key_reused"
    assert len(store.page()) == 1


def test_a_refused_order_leaves_no_key_behind(store: RecordStore) -> None:
    def fail(record: Record) -> dict[str, Any]:
        raise RuntimeError("the answer could not be made")

    with pytest.raises(RuntimeError):
        store.insert(make_job(), respond=fail, idempotency_key="k", body_hash="a")
    assert store.page() == []
    assert not store.insert(make_job(), respond=answer, idempotency_key="k", body_hash="b").replayed


def test_keys_are_forgotten_by_age_and_by_number(
    store: RecordStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.records.idempotency.MOST", 3)

    def is_known(key: str) -> bool:
        return store.first_answer("operator", idempotency_key=key, body_hash="a") is not None

    for number in range(5):
        clock.seconds += 1
        store.insert(make_job(), respond=answer, idempotency_key=f"k{number}", body_hash="a")
    assert [is_known(f"k{number}") for number in range(5)] == [False, False, True, True, True]
    clock.seconds += KEEP_S - 1
    store.insert(make_job(), respond=answer, idempotency_key="new", body_hash="a")
    assert [is_known(key) for key in ("k2", "k3", "k4", "new")] == [False, False, True, True]


def test_many_orders_at_once_share_neither_key_nor_version(store: RecordStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        keyed = list(
            pool.map(
                lambda _: store.insert(make_job("one"), respond=answer, idempotency_key="k", body_hash="a"), range(24)
            )
        )
        free = list(pool.map(lambda _: insert(store, name="two"), range(24)))
    assert len({insertion.record.id for insertion in keyed}) == 1
    assert [insertion.replayed for insertion in keyed].count(False) == 1
    versions = sorted(record.job.output.version for record in free)
    assert versions == list(range(1, 25))


def test_a_version_is_above_those_in_storage_and_in_the_records(store: RecordStore) -> None:
    insert(store, version=7)
    job = insert(store, version=3).job
    assert job.output == ("dataset", "data", 8)


def test_a_lease_has_one_holder_and_an_old_holder_writes_nothing(store: RecordStore, clock: Clock) -> None:
    record = insert(store)
    old = store.acquire_lease("reconciler", "a", duration_s=10)
    assert old is not None
    assert store.acquire_lease("reconciler", "b", duration_s=10) is None
    clock.seconds += 9
    assert store.acquire_lease("reconciler", "a", duration_s=10) == old
    clock.seconds += 11
    with pytest.raises(LeaseLostError):
        store.change(record.id, Change(state="queued"), lease=old)
    new = store.acquire_lease("reconciler", "b", duration_s=10)
    assert new is not None
    assert new.epoch > old.epoch
    with pytest.raises(LeaseLostError):
        store.change(record.id, Change(state="queued"), lease=old)
    assert store.change(record.id, Change(state="queued"), lease=new).status.state == "queued"
    store.release_lease(old)
    assert store.acquire_lease("reconciler", "c", duration_s=10) is None
    store.release_lease(new)
    assert store.acquire_lease("reconciler", "c", duration_s=10) is not None


def test_a_line_that_was_adopted_is_not_adopted_again(store: RecordStore) -> None:
    record = run_to(store, insert(store), "queued", "preparing")
    for _ in range(2):
        for number, phase in enumerate(("fetch", "tokenize")):
            store.change(record.id, Change(phase=phase, attempt=1), line=Line(1, number))
    assert store.taken_lines(record.id, 1) == 2
    assert store.taken_lines(record.id, 2) == 0
    assert [event.change.phase for event in store.events(record.id)[3:]] == ["fetch", "tokenize"]


def test_a_stop_is_asked_for_once_and_a_final_job_stays_as_it_is(store: RecordStore) -> None:
    waiting, running = insert(store), run_to(store, insert(store), "queued", "preparing", "running")
    assert store.request_stop(waiting.id).status.state == "stopped"
    assert store.request_stop(running.id).status.state == "stopping"
    for record in (waiting, running):
        before = store.events(record.id)
        store.request_stop(record.id)
        assert store.events(record.id) == before


def test_only_a_final_job_is_deleted_and_its_key_and_version_stay_taken(store: RecordStore) -> None:
    insertion = store.insert(make_job(), respond=answer, idempotency_key="k", body_hash="a")
    job_id = insertion.record.id
    with pytest.raises(ConflictError) as caught:
        store.delete(job_id)
    assert caught.value.code == "job_not_final"
    store.request_stop(job_id)
    store.delete(job_id)
    store.delete(job_id)
    with pytest.raises(NotFoundError):
        store.get(job_id)
    assert store.page() == []
    assert [record.id for record in store.deleted_unpurged()] == [job_id]
    lease = store.acquire_lease("reconciler", "a", duration_s=10)
    assert lease is not None
    store.mark_purged(job_id, lease=lease)
    assert store.deleted_unpurged() == []
    assert store.known_ids() == {job_id}
    assert store.insert(make_job(), respond=answer, idempotency_key="k", body_hash="a").replayed


def test_pages_follow_each_other_without_gap_or_repeat(store: RecordStore) -> None:
    records = [insert(store, name=f"d{n}", created_at=f"2026-01-01T00:00:0{n // 3}.000Z") for n in range(9)]
    for newest_first in (True, False):
        seen: list[str] = []
        while page := store.page(limit=2, after=seen[-1] if seen else None, newest_first=newest_first):
            seen += [record.id for record in page]
        ordered = sorted(((r.created_at, r.id) for r in records), reverse=newest_first)
        assert seen == [job_id for _, job_id in ordered]
    run_to(store, records[0], "queued")
    assert [r.id for r in store.page(states=["queued"])] == [records[0].id]


def test_a_job_started_without_a_door_is_adopted_once(store: RecordStore) -> None:
    lease = store.acquire_lease("reconciler", "a", duration_s=10)
    assert lease is not None
    job = make_job()
    adopted = store.adopt(job, lease=lease)
    assert adopted is not None
    assert adopted.job == job
    assert store.adopt(job, lease=lease) is None


def test_the_migrations_make_exactly_the_tables_of_the_schema(store: RecordStore) -> None:
    with store.database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []
        made = "\n".join(connection.scalars(sa.text("SELECT sql FROM sqlite_master WHERE name = 'events'")))
    # What compare_metadata does not look at.
    assert "AUTOINCREMENT" in made
    assert "AUTOINCREMENT" in str(CreateTable(METADATA.tables["events"]).compile(dialect=sqlite.dialect()))


def test_a_job_is_parsed_when_it_is_asked_for(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    record = insert(store)
    monkeypatch.setattr("tunesmith.records.record.parse_job", lambda text: pytest.fail("it was parsed"))
    run_to(store, record, "queued", "preparing", "running")
    assert [(r.id, r.output.name) for r in store.page()] == [(record.id, "data")]
    assert [job.id for job in store.unfinished()] == [record.id]


def test_what_a_change_gives_back_is_what_is_stored(store: RecordStore) -> None:
    record = insert(store)
    assert store.get(record.id) == record
    for state in ("queued", "preparing", "running", "failed"):
        at = "2026-01-02T00:00:00.000Z" if state == "running" else None
        submission_id = "a1" if state == "preparing" else None
        record = store.change(record.id, Change(state=state), at=at, submission_id=submission_id)
        assert store.get(record.id) == record
    assert (record.submission_id, record.started_at) == ("a1", "2026-01-02T00:00:00.000Z")


def test_several_processes_migrate_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}"
    code = f"from tunesmith.records.store import RecordStore; RecordStore({url!r}).migrate()"
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    store = RecordStore(url)
    store.migrate()
    assert store.page() == []


def test_what_was_acknowledged_survives_the_death_of_the_process(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}"
    store = RecordStore(url)
    store.migrate()
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("cases", {str(Path(__file__))!r})
cases = importlib.util.module_from_spec(spec)
sys.modules["cases"] = cases
spec.loader.exec_module(cases)
store = cases.RecordStore({url!r})
while True:
    print(cases.insert(store).id, flush=True)
"""
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    acknowledged = [writer.stdout.readline().strip() for _ in range(20)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += [line.strip() for line in writer.stdout.read().splitlines() if len(line.strip()) == 24]
    writer.wait()
    assert set(acknowledged) <= store.known_ids()
    for job_id in acknowledged:
        assert replay(event.change for event in store.events(job_id)) == store.get(job_id).status
