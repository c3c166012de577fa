"""The reconciler over a real record store and real storage: the way of a job from its order to its end."""

from pathlib import Path

import pytest

from serve_app.reconciler.doorless_jobs import PAUSE_S as ADOPTION_S
from tests.support.stage import Stage, line
from tunesmith.jobs.spec import parse_job
from tunesmith.jobs.states import replay
from tunesmith.storage import layout


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_a_job_goes_from_its_order_to_ray_in_one_round(stage: Stage) -> None:
    record = stage.order()
    stage.rounds()
    assert stage.states(record) == ["pending", "queued", "preparing"]
    now = stage.store.get(record.id)
    assert (now.status.attempt, now.submission_id) == (1, f"{record.id}-a1")
    assert stage.launcher.jobs() == {
        f"{record.id}-a1": {
            "status": "RUNNING",
            "job_url": f"{stage.storage.url}/jobs/{record.id}/job.json",
            "account": "operator",
        }
    }
    assert parse_job(stage.storage.get(layout.job_json(record.id))) == record.job


def test_a_job_belongs_to_the_account_of_its_record_whatever_its_file_says(stage: Stage) -> None:
    job = stage.draft().model_copy(update={"account": "team"})
    stage.storage.put(layout.job_json(job.id), job.model_copy(update={"account": "mallory"}).model_dump_json().encode())
    record = stage.store.insert(job, respond=lambda record: {}).record
    stage.rounds()
    assert stage.launcher.jobs()[f"{record.id}-a1"]["account"] == "team"


def test_a_drivers_events_are_adopted_in_order_and_its_result_ends_the_job(stage: Stage) -> None:
    record, driver = stage.started()
    driver.say(line(phase="fetch", message="fetching"), line(phase="tokenize"))
    stage.rounds()
    assert stage.store.get(record.id).status.phase == "tokenize"
    driver.say(line(state="running", phase="train", data={"total_steps": 3, "first_step": 0}))
    stage.rounds()
    assert stage.status(record) == ("running", None, 1)
    driver.say(line(data={"checkpoint_step": 3}), line(phase="publish"))
    driver.publish()
    driver.finish("completed", summary={"steps": 3})
    stage.rounds(3)
    final = stage.store.get(record.id)
    events = stage.store.events(record.id)
    assert final.status.state == "completed"
    assert final.started_at == line().time
    assert final.ended_at == driver.finish("completed").time
    assert stage.states(record) == ["pending", "queued", "preparing", "running", "completed"]
    assert [event.data for event in events if event.data] == [
        {"total_steps": 3, "first_step": 0},
        {"checkpoint_step": 3},
        {"steps": 3},
    ]
    assert replay(event.change for event in events) == final.status


def test_lines_that_were_adopted_are_not_adopted_again_by_another_reconciler(stage: Stage) -> None:
    record, driver = stage.started()
    driver.say(line(phase="fetch"), line(message="two"))
    stage.rounds()
    stage.reconciler.close()
    stage.reconciler = stage.new_reconciler("second")
    driver.say(line(message="three"))
    stage.rounds(2)
    assert [event.change.message for event in stage.store.events(record.id)][-3:] == [None, "two", "three"]


def test_the_result_ends_a_job_however_little_was_seen_before(stage: Stage) -> None:
    record, driver = stage.started()
    driver.publish()
    driver.finish("completed")
    stage.rounds()
    assert stage.states(record)[-2:] == ["running", "completed"]


@pytest.mark.parametrize("say_running", [True, False])
def test_a_failure_is_told_with_its_reason_and_error(stage: Stage, say_running: bool) -> None:
    record, driver = stage.running() if say_running else stage.started()
    error = {"code": "missing_column", "message": "no column", "fields": [], "hint": None}
    driver.finish("failed", reason="data_error", message="no column", error=error)
    stage.rounds()
    assert stage.status(record) == ("failed", "data_error", 1)
    assert stage.store.events(record.id)[-1].data == {"error": error}


def test_a_driver_that_stops_by_itself_ends_the_job_as_stopped(stage: Stage) -> None:
    record, driver = stage.running()
    driver.finish("stopped", reason="time_limit", message="max_run_time_s is over")
    stage.rounds()
    assert stage.status(record) == ("stopped", "time_limit", 1)
    assert stage.states(record)[-2:] == ["stopping", "stopped"]


def test_a_result_that_cannot_be_read_fails_the_job(stage: Stage) -> None:
    record, _ = stage.running()
    stage.storage.put(layout.result(record.id, 1), b"{}")
    stage.rounds()
    assert stage.status(record) == ("failed", "platform_error", 1)


def test_an_event_that_cannot_be_read_is_left_out_alone(stage: Stage) -> None:
    record, _ = stage.started()
    stage.storage.put(
        f"{layout.events(record.id, 1)}/00000001", b"no event\n" + line(message="ok").model_dump_json().encode() + b"\n"
    )
    stage.rounds(2)
    assert [event.change.message for event in stage.store.events(record.id)][-1] == "ok"


@pytest.mark.parametrize("state", ["completed", "failed", "stopped", "stopping", "queued", "preparing", "nonsense"])
def test_a_drivers_word_moves_a_job_to_running_and_nowhere_else(stage: Stage, state: str) -> None:
    record, driver = stage.running()
    driver.say(line(state=state, message="so it says"))
    stage.rounds()
    status = stage.store.get(record.id).status
    assert (status.state, status.message, status.attempt) == ("running", "so it says", 1)
    assert stage.states(record)[-1] == "running"


def test_an_event_of_a_phase_that_there_is_not_is_left_out(stage: Stage) -> None:
    record, _ = stage.running()
    text = line(message="known").model_dump_json().replace('"phase":null', '"phase":"lunch"')
    stage.storage.put(f"{layout.events(record.id, 1)}/00000002", text.encode() + b"\n")
    stage.rounds()
    status = stage.store.get(record.id).status
    assert (status.phase, status.message) == ("train", None)


def test_a_deleted_job_takes_what_it_stored_and_did_not_publish_along(stage: Stage) -> None:
    record, driver = stage.running()
    mine = [layout.asset_files(*driver.job.output, layout.new_files_folder(record.id, attempt)) for attempt in (1, 2)]
    others = layout.asset_files(*driver.job.output, layout.new_files_folder("job-7", 1))
    for prefix in (*mine, others):
        stage.storage.put(f"{prefix}/weights", b"half")
    driver.finish("failed")
    stage.rounds()
    stage.store.delete(record.id)
    stage.rounds(2)
    assert [entry.key for entry in stage.storage.entries("models/tuned")] == [f"{others}/weights"]


def test_a_deleted_job_leaves_storage_and_its_model_stays(stage: Stage) -> None:
    record, driver = stage.running()
    driver.publish()
    driver.finish("completed")
    stage.rounds()
    stage.store.delete(record.id)
    stage.rounds()
    assert list(stage.storage.entries(layout.job(record.id))) == []
    assert stage.store.deleted_unpurged() == []
    assert stage.storage.exists("models/tuned/1/manifest.json")
    stage.rounds(2, seconds=ADOPTION_S)
    assert stage.store.page() == []
