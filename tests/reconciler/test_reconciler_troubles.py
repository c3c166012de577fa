"""One broken job, an outage or a lost lease: nothing fails for it, and nothing is done twice."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app.reconciler.attempt_supervisor import Supervisor
from serve_app.reconciler.lanes import Lanes
from tests.support.stage import Stage, play_round
from tests.support.waiting import until
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
    play_round(second)
    assert stage.status(record)[0] == "pending"
    stage.clock.seconds += stage.settings.lease_s + 1
    play_round(second)
    assert stage.status(record)[0] == "preparing"
    play_round(stage.reconciler)
    stage.store.request_stop(record.id)
    stage.rounds()
    assert not stage.storage.exists(layout.stop(record.id))


def test_a_lease_that_was_given_back_is_free_at_once(stage: Stage) -> None:
    stage.rounds()
    stage.reconciler.close()
    record = stage.order()
    play_round(stage.new_reconciler("second"))
    assert stage.status(record)[0] == "preparing"


def test_a_reconciler_that_slept_through_its_lease_changes_nothing_more(stage: Stage) -> None:
    second = stage.new_reconciler("second")

    class Sleepy(FolderStorage):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            stored = super().put_if_absent(key, data)
            if key.endswith("job.json") and stage.clock.seconds < slept_until:
                stage.clock.seconds = slept_until
                play_round(second)
            return stored

    slept_until = stage.clock.seconds + 100
    stage.reconciler = stage.new_reconciler("first", storage=Sleepy(stage.storage.root))
    records = [stage.order() for _ in range(2)]
    play_round(stage.reconciler)
    assert [stage.states(record) for record in records] == [["pending", "queued", "preparing"]] * 2
    assert len(stage.launcher.jobs()) == 2


class HangingStorage(FolderStorage):
    """Does not answer for keys that `hangs` picks, until it is released."""

    def __init__(self, root: Path, hangs: Callable[[str], bool]) -> None:
        super().__init__(root)
        self.hangs = hangs
        self.asked, self.released = threading.Event(), threading.Event()

    def _path(self, key: str) -> Path:
        if self.hangs(key):
            self.asked.set()
            assert self.released.wait(60)
        return super()._path(key)


def test_a_storage_that_hangs_costs_no_lease(stage: Stage) -> None:
    record = stage.order()
    storage = HangingStorage(stage.storage.root, lambda key: record.id in key)
    stage.reconciler, second = stage.new_reconciler("first", storage=storage), stage.new_reconciler("second")
    for _ in range(10):
        stage.reconciler.round()
        play_round(second)
        stage.clock.seconds += stage.settings.lease_s / 2
    assert storage.asked.wait(60)
    assert stage.status(record)[0] == "pending"
    stage.reconciler.round()
    storage.released.set()
    assert stage.reconciler.settle(60)
    assert stage.states(record) == ["pending", "queued", "preparing"]


def test_a_job_whose_storage_hangs_delays_no_other(stage: Stage) -> None:
    hanging, driver = stage.running()
    storage = HangingStorage(stage.storage.root, lambda key: hanging.id in key)
    stage.reconciler.close()
    stage.reconciler = stage.new_reconciler("second", storage=storage)
    stage.reconciler.round()
    assert storage.asked.wait(60)
    other = stage.order()
    until(lambda: stage.reconciler.round() or stage.status(other)[0] == "preparing", limit_s=60)
    assert not storage.released.is_set()
    driver.finish("stopped")
    storage.released.set()
    assert stage.reconciler.settle(60)
    assert stage.status(hanging)[0] == "stopped"


@pytest.mark.parametrize("what", ["the look for jobs without a record", "a deletion"])
def test_what_hangs_beside_the_jobs_delays_none_of_them(stage: Stage, what: str) -> None:
    deleted = stage.order()
    stage.store.request_stop(deleted.id)
    stage.store.delete(deleted.id)
    stage.storage.put(layout.job_json(deleted.id), b"{}")
    folder = layout.job(deleted.id) if what == "a deletion" else "jobs"
    storage = HangingStorage(stage.storage.root, lambda key: key == folder)
    stage.reconciler = stage.new_reconciler("first", storage=storage)
    stage.reconciler.round()
    assert storage.asked.wait(60)
    other = stage.order()
    until(lambda: stage.reconciler.round() or stage.status(other)[0] == "preparing", limit_s=60)
    assert not storage.released.is_set()
    storage.released.set()
    assert stage.reconciler.settle(60)
    assert stage.store.deleted_unpurged() == []


def test_nothing_is_remembered_of_jobs_that_left(stage: Stage) -> None:
    record, driver = stage.running()
    stage.launcher.tell(driver.submission_id, "FAILED")
    waiting = stage.order(flavor="gpu-1")
    stage.rounds()
    stage.store.request_stop(record.id)
    stage.rounds()
    stage.store.request_stop(waiting.id)
    assert remembered(stage) != []
    other = stage.new_reconciler("other")
    stage.clock.seconds += stage.settings.lease_s
    play_round(other)
    for _ in range(4):
        stage.clock.seconds += 2
        play_round(other)
    assert stage.status(record)[0] == "stopped"
    play_round(stage.reconciler)
    assert remembered(stage) == []


def remembered(stage: Stage) -> list[object]:
    """Every entry of every collection that the reconciler and its parts hold."""
    parts = [stage.reconciler, *vars(stage.reconciler).values()]
    ours = [part for part in parts if type(part).__module__.startswith("serve_app.reconciler")]
    ours += [part._lines for part in ours if isinstance(part, Supervisor)]
    held = [value for part in ours if not isinstance(part, Lanes) for value in vars(part).values()]
    return [entry for value in held if isinstance(value, dict | set | frozenset) for entry in value]
