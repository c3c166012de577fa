"""What a program has written stays with its attempt until the new model is published."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import galleries
from tests.support.publishing import publish_in
from trainers.programs.program_output import drop_output, keep_output, publish_output, restore_output
from trainers.programs.program_task import ProgramTask
from tunesmith.clock import utc_text
from tunesmith.jobs.drafting import draft, new_job_id
from tunesmith.jobs.spec import CustomJob, TrainSpec
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.folder import FolderStorage

PARAMETERS = {"training_methods": [{"name": "full", "hyperparameters": []}]}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    return Settings.from_env()


@pytest.fixture
def storage(settings: Settings) -> FolderStorage:
    return FolderStorage(Path(settings.storage_url))


@pytest.fixture
def worker(settings: Settings, storage: FolderStorage, tmp_path: Path) -> ProgramTask:
    """Worker 0 of a job whose program has ended, and left one file."""
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / "rows.csv").write_text("x,y\n1,2\n")
    publish_in(storage, settings, "dataset", "points", tmp_path / "points")
    publish_in(storage, settings, "model", "m", galleries.make(tmp_path / "m", parameters=PARAMETERS))
    spec = TrainSpec(model="m", dataset="points", flavor="cpu-small", output_model="new")
    job = draft(spec, storage=storage, account="operator", job_id=new_job_id(), created_at=utc_text())
    assert isinstance(job, CustomJob)
    task = ProgramTask(
        job=job, attempt=1, storage_url=storage.url, deadline=None, rank=0, local_rank=0, master_addr="",
        master_port=0, alone_on_node=True,
    )  # fmt: skip
    (task.folder(settings) / "output").mkdir(parents=True)
    (task.folder(settings) / "output" / "weights.bin").write_bytes(b"learnt")
    storage.put(f"{layout.program_output(job.id, 1)}/weights.bin", b"learnt")
    return task


def test_the_kept_output_goes_only_after_the_manifest(
    worker: ProgramTask, storage: FolderStorage, settings: Settings, tmp_path: Path
) -> None:
    made, left_out, language_model = publish_output(worker)
    assert "weights.bin" in [file.path for file in made.files]
    assert (left_out, language_model) == ([], False)
    # The manifest is not written yet: an attempt that is lost now leaves the output to the next one.
    (tmp_path / "next").mkdir()
    assert restore_output(_next(worker), storage, tmp_path / "next") == 1
    assert (tmp_path / "next" / "weights.bin").read_bytes() == b"learnt"
    drop_output(worker)
    assert list(storage.entries(layout.program_output(worker.job.id, 1))) == []
    assert not worker.folder(settings).exists()


def test_the_output_of_a_run_that_made_no_model_is_kept_with_the_job(
    worker: ProgramTask, storage: FolderStorage, settings: Settings
) -> None:
    assert keep_output(worker) == ["weights.bin"]
    assert not worker.folder(settings).exists()
    assert storage.get(f"{layout.program_output(worker.job.id, 1)}/weights.bin") == b"learnt"


def _next(worker: ProgramTask) -> ProgramTask:
    """The same worker in the next attempt."""
    return replace(worker, attempt=2)
