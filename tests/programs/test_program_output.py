"""What a program has written stays with its attempt until the new model is published."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import galleries
from tests.support.publishing import publish_in
from trainers.programs.program_output import Published, drop_output, keep_output, publish_output, restore_output
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
    made = publish_output(worker)
    assert "weights.bin" in [file.path for file in made.files.files]
    assert (made.overridden, made.left_out, made.language_model) == ([], [], False)
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


def test_of_a_run_that_made_no_model_and_too_much_output_nothing_is_kept(
    worker: ProgramTask, storage: FolderStorage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_PROGRAM_DISK_GIB", "1")
    with (worker.folder(settings) / "output" / "hole").open("wb") as file:
        file.truncate((1 << 30) + 1)
    assert keep_output(worker) == []
    assert not worker.folder(settings).exists()
    assert list(storage.entries(layout.program_output(worker.job.id, 1))) == []


HONEST = {
    "README.md",
    "gallery_train/dataset_readme.md",
    "gallery_train/train.py",
    "gallery_train/train_params.json",
    "training_logs/user_params.json",
    "weights.bin",
}


def publish_all(worker: ProgramTask, storage: FolderStorage) -> tuple[Published, dict[str, bytes]]:
    """What became of the output, and what the new model holds, by path."""
    made = publish_output(worker)
    prefix = layout.asset_files(*worker.job.output, made.files.folder)
    files = {file.path: storage.get(f"{prefix}/{file.path}") for file in made.files.files}
    assert [entry.key.removeprefix(f"{prefix}/") for entry in storage.entries(prefix)] == sorted(files)
    return made, files


FORGED = [
    "training_logs",
    "training_logs/user_params.json",
    "training_logs/requirements.lock",
    "training_logs/image.json",
    "Training_Logs/requirements.lock",
    "TRAINING_LOGS",
    "training_logs/a/b",
    "README.md",
    "readme.MD",
    "README.md/x",
    "manifest.json",
    "Manifest.JSON",
    "manifest.json/x",
    "gallery_train",
    "gallery_train/train.py",
    "gallery_train/more.py",
    "GALLERY_TRAIN/train.py",
]
"""Names by which a program would speak for the platform, or change what the next training runs."""


@pytest.mark.parametrize("name", FORGED)
def test_a_program_cannot_forge_what_the_platform_says(
    worker: ProgramTask, storage: FolderStorage, settings: Settings, name: str
) -> None:
    place = worker.folder(settings) / "output" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("forged")
    made, files = publish_all(worker, storage)
    assert files.keys() == HONEST and b"forged" not in files.values()
    assert (made.overridden, made.left_out) == ([name], [])


@pytest.mark.parametrize("name", ["training_logs", "gallery_train", "README.md", "manifest.json", "weights.pt"])
@pytest.mark.parametrize("kind", ["link", "pipe", "link to a folder"])
def test_what_is_no_file_takes_no_name_of_the_platform(
    worker: ProgramTask, storage: FolderStorage, settings: Settings, name: str, kind: str
) -> None:
    place = worker.folder(settings) / "output" / name
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/etc/passwd" if kind == "link" else "/etc")
    made, files = publish_all(worker, storage)
    assert files.keys() == HONEST
    assert [*made.overridden, *made.left_out] == [name]


UNSTORABLE = [
    b"back\\slash",
    b"line\nfeed",
    b"\x1b[2J",
    b"\xff\xfe",
    b".partial-0",
    b"a\xe2\x80\xaeb",
    b"tab\t",
    b"\x7f",
]


@pytest.mark.parametrize("name", UNSTORABLE)
def test_a_name_that_storage_has_no_key_for_is_left_out_by_name(
    worker: ProgramTask, storage: FolderStorage, settings: Settings, name: bytes
) -> None:
    (worker.folder(settings) / "output" / os.fsdecode(name)).write_text("x")
    made, files = publish_all(worker, storage)
    assert files.keys() == HONEST
    assert made.left_out == [os.fsdecode(name)]


def test_a_file_beside_those_of_the_platform_is_taken(
    worker: ProgramTask, storage: FolderStorage, settings: Settings
) -> None:
    names = {"training_logs.txt", "docs/README.md", "sub/manifest.json", "README.md.old", "gallery_train2"}
    for name in names:
        place = worker.folder(settings) / "output" / name
        place.parent.mkdir(exist_ok=True)
        place.write_text("its own")
    assert publish_all(worker, storage)[1].keys() == HONEST | names


def _next(worker: ProgramTask) -> ProgramTask:
    """The same worker in the next attempt."""
    return replace(worker, attempt=2)
