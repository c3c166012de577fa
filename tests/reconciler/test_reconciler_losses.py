"""Drivers that are lost, and drivers that are stopped: no two at once, no late word, and every job ends."""

from pathlib import Path

import pytest

from serve_app.reconciler.attempt_supervisor import ENDED_S, FORCED_S
from serve_app.reconciler.launcher import STOP_WAIT_S
from tests.support.stage import FakeDriver, FakeLauncher, Stage, line
from tunesmith.clock import seconds
from tunesmith.jobs import attempts
from tunesmith.storage import layout


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_a_lost_attempt_is_followed_by_another(stage: Stage) -> None:
    record, driver = stage.running()
    stage.launcher.tell(driver.submission_id, "FAILED", "exit code -9")
    stage.rounds()
    assert stage.status(record)[0] == "running"  # its last writes may be under way
    stage.rounds(3, seconds=ENDED_S)
    assert stage.status(record) == ("preparing", None, 2)
    lost = next(event for event in stage.store.events(record.id) if event.change.reason == "worker_lost")
    assert lost.change.state == "queued"
    assert "attempt 1 was lost: Ray says FAILED: exit code -9" in str(lost.change.message)
    assert sorted(stage.launcher.jobs()) == [f"{record.id}-a1", f"{record.id}-a2"]


def test_a_lost_driver_cannot_come_back(stage: Stage) -> None:
    record, driver = stage.running()
    stage.launcher.tell(driver.submission_id, "FAILED")
    stage.rounds(3, seconds=ENDED_S)
    assert stage.status(record)[2] == 2
    assert driver.finish("failed", message="late").outcome == "lost"
    stage.rounds(3)
    assert stage.status(record) == ("preparing", None, 2)


def test_a_driver_that_never_claimed_cannot_begin_after_its_end(stage: Stage) -> None:
    record = stage.order()
    stage.rounds()
    stage.launcher.tell(f"{record.id}-a1", "FAILED", "no such interpreter")
    stage.rounds(3, seconds=ENDED_S)
    assert stage.status(record)[2] == 2
    assert not FakeDriver(stage.storage, record.job).claim()


@pytest.mark.parametrize("status", ["FAILED", "SUCCEEDED", "STOPPED", None])
def test_a_result_that_comes_just_after_rays_word_counts(stage: Stage, status: str | None) -> None:
    record, driver = stage.running()
    if status is None:
        stage.launcher.forget(driver.submission_id)
    else:
        stage.launcher.tell(driver.submission_id, status)
    stage.rounds()
    driver.publish()
    driver.finish("completed")
    stage.rounds(3, seconds=ENDED_S)
    assert stage.status(record) == ("completed", None, 1)


@pytest.mark.parametrize("status", ["FAILED", "SUCCEEDED", "STOPPED", None])
def test_a_model_that_was_published_completes_its_job(stage: Stage, status: str | None) -> None:
    record, driver = stage.running()
    driver.publish()
    if status is None:
        stage.launcher.forget(driver.submission_id)
    else:
        stage.launcher.tell(driver.submission_id, status)
    stage.rounds(3, seconds=ENDED_S)
    assert stage.status(record) == ("completed", None, 1)
    result = attempts.read_result(stage.storage, record.id, 1)
    assert result is not None
    assert result.outcome == "completed"


def test_attempts_follow_lost_ones_with_growing_pauses(stage: Stage) -> None:
    record = stage.order(advanced={"max_retries": 5})
    for attempt, pause_s in ((1, 0), (2, 1), (3, 3), (4, 7), (5, 15)):
        stage.rounds(2)
        assert stage.status(record) == ("preparing", None, attempt)
        stage.launcher.tell(f"{record.id}-a{attempt}", "FAILED")
        while stage.status(record)[0] != "queued":
            stage.rounds(seconds=ENDED_S)
        queued = stage.store.get(record.id)
        follows = f"attempt {attempt + 1} follows" + (f" in {pause_s} s" if pause_s else "")
        assert str(queued.status.message).endswith(f"; {follows}")
        # Another reconciler keeps to it as well.
        stage.reconciler.close()
        stage.reconciler = stage.new_reconciler(f"number {attempt}")
        while stage.status(record)[0] == "queued":
            stage.rounds(seconds=0.25)
        paused_s = seconds(stage.store.get(record.id).updated_at) - seconds(queued.updated_at)
        # The round that found it lost was followed by a step of the clock.
        assert max(pause_s, ENDED_S) <= paused_s < max(pause_s, ENDED_S) + 0.5


def test_a_job_that_loses_every_attempt_fails(stage: Stage) -> None:
    record = stage.order(advanced={"max_retries": 2})
    for attempt in (1, 2, 3):
        stage.rounds(4)
        assert stage.status(record) == ("preparing", None, attempt)
        stage.launcher.tell(f"{record.id}-a{attempt}", "FAILED")
        stage.rounds(2, seconds=ENDED_S)
    assert stage.status(record) == ("failed", "worker_lost", 3)
    assert "3 were lost, it was the last" in str(stage.store.get(record.id).status.message)


def test_a_registration_goes_the_same_way_with_one_retry(stage: Stage) -> None:
    record = stage.order(kind="register", name="new", source="/x")
    for attempt in (1, 2):
        stage.rounds(2)
        assert stage.status(record) == ("preparing", None, attempt)
        stage.launcher.tell(f"{record.id}-a{attempt}", "FAILED")
        stage.rounds(2, seconds=ENDED_S)
    assert stage.status(record) == ("failed", "worker_lost", 2)


def test_an_attempt_that_ray_forgot_before_it_was_claimed_is_submitted_again(stage: Stage) -> None:
    record = stage.order()
    stage.rounds()
    stage.launcher.forget(f"{record.id}-a1")
    stage.rounds()
    assert list(stage.launcher.jobs()) == [f"{record.id}-a1"]
    assert stage.status(record) == ("preparing", None, 1)


def test_a_job_that_is_stopped_in_ray_is_stopped(stage: Stage) -> None:
    record, driver = stage.running()
    stage.launcher.tell(driver.submission_id, "STOPPED")
    stage.rounds(3, seconds=ENDED_S)
    assert stage.status(record) == ("stopped", "stopped_by_user", 1)
    assert stage.store.get(record.id).status.message == "stopped through Ray"


def test_a_stop_is_handed_to_the_driver_and_its_result_ends_the_job(stage: Stage) -> None:
    record, driver = stage.running()
    stage.store.request_stop(record.id)
    stage.rounds()
    assert b"stopped_by_user" in stage.storage.get(layout.stop(record.id))
    driver.say(line(state="running", phase="save", message="saving"))
    stage.rounds(10)
    status = stage.store.get(record.id).status
    assert (status.state, status.phase, status.message) == ("stopping", "save", "saving")
    assert stage.launcher.jobs()[driver.submission_id]["status"] == "RUNNING"
    driver.finish("stopped", reason="stopped_by_user", message="saved at step 2")
    stage.rounds()
    assert stage.status(record) == ("stopped", "stopped_by_user", 1)


def test_a_job_that_was_done_when_it_was_stopped_completes(stage: Stage) -> None:
    record, driver = stage.running()
    stage.store.request_stop(record.id)
    driver.publish()
    driver.finish("completed")
    stage.rounds()
    assert stage.status(record) == ("completed", None, 1)


def test_a_stop_that_takes_too_long_is_left_to_ray(stage: Stage) -> None:
    record, driver = stage.running()
    stage.store.request_stop(record.id)
    stage.rounds(2)
    # A new reconciler does not begin the grace anew.
    stage.clock.seconds += stage.settings.stop_grace_s - 5
    stage.reconciler = stage.new_reconciler("second")
    stage.rounds()
    assert stage.launcher.jobs()[driver.submission_id]["status"] == "RUNNING"
    stage.rounds(2, seconds=10)
    assert stage.launcher.jobs()[driver.submission_id]["status"] == "STOPPED"
    stage.rounds(2, seconds=ENDED_S)
    assert stage.status(record) == ("stopped", "stopped_by_user", 1)
    assert driver.finish("completed").outcome == "stopped"


def test_a_stop_that_ray_does_not_manage_ends_all_the_same(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    record, driver = stage.running()
    monkeypatch.setattr(FakeLauncher, "stop", lambda self, submission_id: None)
    stage.store.request_stop(record.id)
    stage.rounds(2)
    stage.rounds(2, seconds=stage.settings.stop_grace_s + STOP_WAIT_S)
    assert stage.status(record)[0] == "stopping"
    stage.rounds(2, seconds=FORCED_S)
    assert stage.status(record) == ("stopped", "stopped_by_user", 1)
    assert not driver.claim()


def test_a_stopping_job_that_loses_its_driver_is_stopped(stage: Stage) -> None:
    record, driver = stage.running()
    stage.store.request_stop(record.id)
    stage.rounds()
    stage.launcher.tell(driver.submission_id, "FAILED")
    stage.rounds(3, seconds=ENDED_S)
    assert stage.status(record) == ("stopped", "stopped_by_user", 1)
    assert list(stage.launcher.jobs()) == [driver.submission_id]


def test_a_job_that_is_stopped_before_it_was_submitted_is_never_submitted(stage: Stage) -> None:
    record = stage.order()
    stage.launcher.away = True
    stage.rounds()
    stage.launcher.away = False
    assert stage.status(record)[0] == "queued"
    stage.store.request_stop(record.id)
    stage.rounds(2)
    assert stage.launcher.jobs() == {}
    assert stage.status(record) == ("stopped", "stopped_by_user", 0)
