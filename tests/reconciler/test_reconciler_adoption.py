"""Jobs that were started without a door are taken in where they are."""

import logging
from pathlib import Path

import pytest

from serve_app.reconciler.attempt_supervisor import ENDED_S
from serve_app.reconciler.doorless_jobs import PAUSE_S as ADOPTION_S
from tests.support.stage import FakeDriver, Stage, line
from tunesmith.clock import utc_text
from tunesmith.jobs import attempts
from tunesmith.storage import layout


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def started_by_hand(stage: Stage, submitted_as: str | None = "raysubmit_1") -> FakeDriver:
    job = stage.draft(output_model="by-hand")
    stage.storage.put(layout.job_json(job.id), job.model_dump_json().encode())
    driver = FakeDriver(stage.storage, job)
    assert driver.claim(submitted_as)
    if submitted_as is not None:
        stage.launcher.tell(submitted_as, "RUNNING")
    return driver


def test_a_job_that_was_started_without_a_door_is_adopted(stage: Stage) -> None:
    driver = started_by_hand(stage)
    driver.say(line(state="running", phase="train"))
    stage.rounds()
    record = stage.store.get(driver.job.id)
    assert (record.status.state, record.status.attempt, record.submission_id) == ("running", 1, "raysubmit_1")
    driver.publish()
    driver.finish("completed")
    stage.rounds()
    assert stage.status(record) == ("completed", None, 1)
    assert list(stage.launcher.jobs()) == ["raysubmit_1"]


def test_a_job_that_ended_without_a_door_is_adopted_with_its_end(stage: Stage) -> None:
    stage.rounds()
    driver = started_by_hand(stage)
    driver.publish()
    driver.finish("completed")
    stage.launcher.forget("raysubmit_1")
    stage.rounds(2, seconds=ADOPTION_S)
    record = stage.store.get(driver.job.id)
    assert stage.states(record) == ["pending", "queued", "preparing", "running", "completed"]


def test_an_adopted_job_needs_no_turn(stage: Stage) -> None:
    stage.running(cards=2)
    driver = started_by_hand(stage)
    stage.rounds(2, seconds=ADOPTION_S)
    assert stage.store.get(driver.job.id).status.state == "preparing"


def test_an_adopted_job_that_is_lost_goes_on_under_the_platform(stage: Stage) -> None:
    driver = started_by_hand(stage)
    stage.rounds()
    stage.launcher.tell("raysubmit_1", "FAILED")
    stage.rounds(3, seconds=ENDED_S)
    record = stage.store.get(driver.job.id)
    assert stage.status(record) == ("preparing", None, 2)
    assert record.submission_id == f"{record.id}-a2"


def test_a_driver_that_ray_does_not_know_counts_as_alive_until_it_is_stopped(stage: Stage) -> None:
    driver = started_by_hand(stage, submitted_as=None)
    stage.rounds(5, seconds=60)
    record = stage.store.get(driver.job.id)
    assert stage.status(record) == ("preparing", None, 1)
    stage.store.request_stop(record.id)
    stage.rounds(3, seconds=stage.settings.stop_grace_s)
    assert stage.status(record) == ("stopped", "stopped_by_user", 1)
    assert driver.finish("completed").outcome == "stopped"


def test_a_rendered_job_that_nobody_claimed_is_left_alone(stage: Stage) -> None:
    job = stage.draft()
    stage.storage.put(layout.job_json(job.id), job.model_dump_json().encode())
    stage.rounds(3, seconds=ADOPTION_S)
    assert stage.store.page() == []
    assert FakeDriver(stage.storage, job).claim()
    stage.rounds(2, seconds=ADOPTION_S)
    assert [record.id for record in stage.store.page()] == [job.id]


def test_an_adopted_job_is_the_operators_whatever_its_file_says(stage: Stage) -> None:
    driver = started_by_hand(stage)
    text = driver.job.model_copy(update={"account": "another"}).model_dump_json()
    stage.storage.put(layout.job_json(driver.job.id), text.encode())
    stage.rounds()
    assert stage.store.get(driver.job.id).account == "operator"


@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_a_broken_folder_does_not_stop_the_others_and_is_said_once(
    stage: Stage, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    other = stage.draft()
    attempts.claim(stage.storage, "job-broken", 1, attempts.Claim(submission_id=None, time=utc_text(0)))
    stage.storage.put(layout.job_json("job-broken"), other.model_dump_json().encode() if content is None else content)
    record = stage.order()
    with caplog.at_level(logging.ERROR):
        stage.rounds(3, seconds=ADOPTION_S)
    assert stage.status(record)[0] == "preparing"
    complaints = [entry for entry in caplog.records if "job-broken" in entry.getMessage()]
    assert len(complaints) == 1
    assert complaints[0].exc_info
