"""Whose turn it is: priority, age, and no big job starved by small ones."""

from pathlib import Path

import pytest

from serve_app.reconciler.scheduler import REGISTRATIONS
from tests.support.stage import FakeDriver, Stage


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def finish(stage: Stage, job_id: str) -> None:
    driver = FakeDriver(stage.storage, stage.store.get(job_id).job)
    driver.claim()
    driver.finish("failed", reason="user_error", message="over")


def test_jobs_start_as_far_as_the_cluster_has_room(stage: Stage) -> None:
    records = [stage.order() for _ in range(3)]
    stage.rounds()
    assert [stage.status(record)[0] for record in records] == ["preparing", "preparing", "queued"]
    waiting = stage.store.get(records[2].id).status
    assert waiting.message == "waits for its turn and 1 CPU"
    finish(stage, records[0].id)
    stage.rounds(2)
    assert stage.status(records[2])[0] == "preparing"
    assert stage.store.get(records[2].id).status.message is None


def test_a_higher_priority_goes_first_and_age_decides_among_equals(stage: Stage) -> None:
    first = stage.order(cards=2)
    stage.rounds()
    old, new, high = stage.order(cards=2), stage.order(cards=2), stage.order(cards=2, priority=1)
    for record in (first, high, old, new):
        stage.rounds(2)
        assert stage.status(record)[0] == "preparing"
        finish(stage, record.id)


def test_a_big_job_is_not_starved_by_small_ones(stage: Stage) -> None:
    running = stage.order()
    stage.rounds()
    big, small = stage.order(cards=2), stage.order()
    stage.rounds(2)
    assert [stage.status(record)[0] for record in (big, small)] == ["queued", "queued"]
    finish(stage, running.id)
    stage.rounds(2)
    assert [stage.status(record)[0] for record in (big, small)] == ["preparing", "queued"]


def test_a_job_that_never_fits_says_so_and_holds_nobody_back(stage: Stage) -> None:
    huge = stage.order(cards=3, priority=9)
    accelerated = stage.order(flavor="gpu-1", priority=9)
    small = stage.order()
    stage.rounds(3)
    assert stage.status(small)[0] == "preparing"
    assert stage.store.get(huge.id).status.message == "needs 3 CPU; the whole cluster has 2 CPU"
    assert stage.store.get(accelerated.id).status.message == "needs 4 CPU, 1 GPU; the whole cluster has 2 CPU, 0 GPU"
    assert len(stage.store.events(huge.id)) == 3  # said once, not in every round
    stage.launcher.resources = {"CPU": 4.0}
    stage.rounds()
    assert stage.status(huge)[0] == "preparing"


def test_registrations_wait_for_each_other_alone(stage: Stage) -> None:
    stage.order(cards=2)
    registrations = [
        stage.order(kind="register", name=f"d{number}", source="/x") for number in range(REGISTRATIONS + 1)
    ]
    stage.rounds()
    assert [stage.status(record)[0] for record in registrations] == [*["preparing"] * REGISTRATIONS, "queued"]
    finish(stage, registrations[0].id)
    stage.rounds(2)
    assert stage.status(registrations[-1])[0] == "preparing"
