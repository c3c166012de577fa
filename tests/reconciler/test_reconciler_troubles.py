"""One broken job, an outage or a lost lease: nothing fails for it, and nothing is done twice."""

from pathlib import Path

import pytest

from tests.support.stage import Stage
from tunesmith.errors import StorageError
from tunesmith.storage import layout
from tunesmith.storage.folder import FolderStorage


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


class BrokenStorage(FolderStorage):
    """Fails for the keys that hold `word`."""

    word = ""
    error: Exception = StorageError("away")

    def get(self, key: str) -> bytes:
        if self.word and self.word in key:
            raise self.error
        return super().get(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self.word and self.word in key:
            raise self.error
        return super().put_if_absent(key, data)


@pytest.mark.parametrize("error", [StorageError("away"), PermissionError("no"), ZeroDivisionError()])
def test_a_job_that_cannot_be_handled_stops_no_other(stage: Stage, error: Exception) -> None:
    storage = BrokenStorage(stage.storage.root)
    broken, storage.error = stage.order(), error
    storage.word = broken.id
    stage.reconciler = stage.new_reconciler("first", storage=storage)
    other = stage.order()
    stage.rounds(3)
    assert stage.status(broken)[0] == "pending"
    assert stage.status(other)[0] == "preparing"
    storage.word = ""
    stage.rounds()
    assert stage.status(broken)[0] == "preparing"


def test_jobs_wait_while_ray_is_away_and_none_fails(stage: Stage) -> None:
    running, driver = stage.running()
    stage.launcher.away = True
    waiting = stage.order()
    stage.rounds(20, seconds=30)
    assert stage.status(running) == ("running", None, 1)
    assert stage.status(waiting)[0] == "queued"
    driver.publish()
    driver.finish("completed")
    stage.rounds()
    assert stage.status(running)[0] == "completed"
    stage.launcher.away = False
    stage.rounds()
    assert stage.status(waiting)[0] == "preparing"


def test_jobs_wait_while_storage_is_away_and_none_fails(stage: Stage) -> None:
    storage = BrokenStorage(stage.storage.root)
    stage.reconciler = stage.new_reconciler("first", storage=storage)
    running, driver = stage.running()
    storage.word = "jobs/"
    waiting = stage.order()
    stage.launcher.tell(driver.submission_id, "SUCCEEDED")
    driver.publish()
    driver.finish("completed")
    stage.rounds(20, seconds=30)
    assert (stage.status(running)[0], stage.status(waiting)[0]) == ("running", "pending")
    storage.word = ""
    stage.rounds()
    assert (stage.status(running)[0], stage.status(waiting)[0]) == ("completed", "preparing")


def test_of_two_reconcilers_one_acts(stage: Stage) -> None:
    stage.rounds()
    second = stage.new_reconciler("second")
    record = stage.order()
    second.round()
    assert stage.status(record)[0] == "pending"
    stage.clock.seconds += stage.settings.lease_s + 1
    second.round()
    assert stage.status(record)[0] == "preparing"
    stage.reconciler.round()
    stage.store.request_stop(record.id)
    stage.rounds()
    assert not stage.storage.exists(layout.stop(record.id))


def test_a_lease_that_was_given_back_is_free_at_once(stage: Stage) -> None:
    stage.rounds()
    stage.reconciler.close()
    record = stage.order()
    stage.new_reconciler("second").round()
    assert stage.status(record)[0] == "preparing"


def test_a_reconciler_that_slept_through_its_lease_changes_nothing_more(stage: Stage) -> None:
    second = stage.new_reconciler("second")

    class Sleepy(FolderStorage):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            stored = super().put_if_absent(key, data)
            if key.endswith("job.json") and stage.clock.seconds < slept_until:
                stage.clock.seconds = slept_until
                second.round()
            return stored

    slept_until = stage.clock.seconds + 100
    stage.reconciler = stage.new_reconciler("first", storage=Sleepy(stage.storage.root))
    records = [stage.order() for _ in range(2)]
    stage.reconciler.round()
    assert [stage.states(record) for record in records] == [["pending", "queued", "preparing"]] * 2
    assert len(stage.launcher.jobs()) == 2


def test_a_long_round_keeps_its_lease(stage: Stage) -> None:
    class Slow(FolderStorage):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            stage.clock.seconds += 4
            return super().put_if_absent(key, data)

    stage.reconciler = stage.new_reconciler("first", storage=Slow(stage.storage.root))
    records = [stage.order() for _ in range(8)]
    stage.reconciler.round()
    assert {stage.status(record)[0] for record in records} == {"queued", "preparing"}
