"""A checkpoint counts once the driver has made it: not before the metrics up to its step are stored."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.publishing import save_checkpoint
from tests.support.waiting import until
from trainers.attempt.report import Report
from trainers.attempt.report_writer import ReportWriter
from trainers.text_job.checkpoint_manifests import CheckpointManifests
from trainers.text_job.stored_checkpoints import checkpoint_copy, upload_checkpoint
from tunesmith.errors import DamagedError, StorageError
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import EventLine, EventWriter
from tunesmith.storage import layout
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.segments import read_segments


class UnsteadyStorage(FolderStorage):
    """A folder that takes no metrics while it is `away`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.away, self.refused = threading.Event(), threading.Event()

    def put(self, key: str, data: bytes) -> None:
        if self.away.is_set() and "/metrics/" in key:
            self.refused.set()
            raise StorageError("away")
        super().put(key, data)


class Driver:
    """What a driver has of one attempt."""

    def __init__(self, storage: FolderStorage, reports: ReportWriter, manifests: CheckpointManifests) -> None:
        self.storage, self.reports, self.manifests = storage, reports, manifests

    def upload(self, folder: Path, step: int) -> None:
        upload_checkpoint(self.storage, made(folder, step), job_id="job-1", attempt=1, step=step)

    def report(self, step: int) -> None:
        self.reports.write(Report("t", step, values={"loss": 1.0}), rank=0)

    def steps(self) -> list[int]:
        return steps(self.storage)


@pytest.fixture
def storage(tmp_path: Path) -> UnsteadyStorage:
    return UnsteadyStorage(tmp_path / "storage")


@pytest.fixture
def driver(storage: UnsteadyStorage) -> Iterator[Driver]:
    """One whose metrics reach storage when a checkpoint asks for them."""
    with ExitStack() as stack:
        events = stack.enter_context(EventWriter(storage, "job-1", 1))
        reports = stack.enter_context(ReportWriter(storage, "job-1", 1, events=events, segment_s=1000))
        manifests = CheckpointManifests(storage, "job-1", 1, keep=2, events=events, flush=reports.flush)
        yield Driver(storage, reports, stack.enter_context(manifests))


def made(folder: Path, step: int) -> Path:
    place = folder / f"made-{step}"
    (place / "adapter").mkdir(parents=True)
    (place / "adapter" / "weights").write_bytes(str(step).encode() * 1000)
    (place / "state.json").write_text(f'{{"step": {step}}}')
    return place


def steps(storage: FolderStorage) -> list[int]:
    return [checkpoint.step for checkpoint in attempts.checkpoints(storage, "job-1")]


def metric_steps(storage: FolderStorage) -> list[int]:
    segments = read_segments(storage, layout.metrics("job-1", 1))
    return [line.step for segment in segments for line in attempts.metric_lines(segment.data)]


def told(storage: FolderStorage) -> list[tuple[str | None, object]]:
    segments = read_segments(storage, layout.events("job-1", 1))
    said = [EventLine.model_validate_json(line) for segment in segments for line in segment.data.splitlines()]
    return [(event.message, event.data.get("checkpoint_step")) for event in said]


def test_a_checkpoint_counts_once_the_metrics_up_to_its_step_are_stored(
    driver: Driver, storage: UnsteadyStorage, tmp_path: Path
) -> None:
    for step in (1, 2, 3):
        driver.report(step)
    driver.upload(tmp_path, 3)
    assert (driver.steps(), metric_steps(storage)) == ([], [])
    driver.manifests.add(3)
    until(lambda: driver.steps() == [3])
    assert metric_steps(storage) == [1, 2, 3]
    driver.report(4)
    storage.away.set()
    driver.upload(tmp_path, 4)
    driver.manifests.add(4)
    assert storage.refused.wait(20)
    driver.manifests.settle(4)
    # Nothing of step 4 is stored: whoever went on from it would leave a gap.
    assert (driver.steps(), metric_steps(storage)) == ([3], [1, 2, 3])
    storage.away.clear()
    driver.manifests.settle(4)
    assert (driver.steps(), metric_steps(storage)) == ([3, 4], [1, 2, 3, 4])


def test_a_checkpoint_whose_worker_was_lost_before_it_could_tell_counts_all_the_same(
    driver: Driver, tmp_path: Path
) -> None:
    for step in (3, 6, 9):
        driver.upload(tmp_path, step)
    driver.report(6)
    driver.manifests.settle(6)
    # The metrics up to step 9 are lost.
    assert driver.steps() == [3, 6]


def test_all_that_was_told_counts_when_the_driver_ends(storage: UnsteadyStorage, tmp_path: Path) -> None:
    for step in (3, 6, 9):
        save_checkpoint(storage, made(tmp_path, step), step=step, keep=2)
    assert steps(storage) == [6, 9]
    assert not storage.children("jobs/job-1/attempts/1/checkpoints/3")
    assert told(storage) == [(f"checkpoint of step {step} saved", step) for step in (3, 6, 9)]
    (newest,) = attempts.checkpoints(storage, "job-1")[-1:]
    with checkpoint_copy(storage, newest) as folder:
        assert folder is not None and (folder / "adapter" / "weights").read_bytes() == b"9" * 1000


def test_half_a_checkpoint_is_none(driver: Driver, storage: UnsteadyStorage, tmp_path: Path) -> None:
    driver.upload(tmp_path, 3)
    storage.put(f"{layout.checkpoint('job-1', 1, 5)}/state.json", b"half")
    driver.manifests.settle(5)
    assert driver.steps() == [3]
    # Done again after a restart, its earlier list is no longer true while the files are stored.
    driver.manifests.settle(5)
    assert driver.steps() == [3]


def test_a_later_attempt_goes_on_from_an_earlier_ones_checkpoint_and_leaves_it(
    storage: UnsteadyStorage, tmp_path: Path
) -> None:
    save_checkpoint(storage, made(tmp_path, 8), attempt=1, step=8, keep=1)
    save_checkpoint(storage, made(tmp_path, 9), attempt=2, step=9, keep=1)
    assert [(found.attempt, found.step) for found in attempts.checkpoints(storage, "job-1")] == [(1, 8), (2, 9)]


def test_a_checkpoint_that_is_not_what_its_manifest_says_is_not_gone_on_from(
    storage: UnsteadyStorage, tmp_path: Path
) -> None:
    save_checkpoint(storage, made(tmp_path, 8), step=8)
    (checkpoint,) = attempts.checkpoints(storage, "job-1")
    storage.put(f"{checkpoint.key}/state.json", b'{"step": 7}')
    with (
        pytest.raises(DamagedError, match=r"checkpoints/8/state\.json has the sha256"),
        checkpoint_copy(storage, checkpoint),
    ):
        pass


def test_without_a_checkpoint_a_run_begins_with_nothing(storage: UnsteadyStorage) -> None:
    with checkpoint_copy(storage, None) as folder:
        assert folder is None
