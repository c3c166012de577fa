"""Which earlier results a job may go on from, told at the order."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import stage
from tunesmith.assets import catalog
from tunesmith.assets.stored_files import describe_files
from tunesmith.errors import SpecError
from tunesmith.jobs import adapters, attempts
from tunesmith.jobs.attempts import CheckpointManifest, Result
from tunesmith.jobs.drafting import draft
from tunesmith.jobs.spec import TextJob, TrainSpec
from tunesmith.storage import layout
from tunesmith.storage.folder import FolderStorage


@pytest.fixture
def storage(tmp_path: Path) -> FolderStorage:
    """With the models tiny@1, tiny@2 and, tuned from the first, tuned@1 and whole@1; the last holds no adapter."""
    storage = FolderStorage(tmp_path / "storage")
    stage.publish_inputs(storage)
    tuned = {"task_type": "text-question-answering", "base": "tiny@1", "dataset": "sums@1"}
    catalog.publish(storage, stage.make_manifest("model", "tiny", 2, task_type="text-question-answering"))
    folder = adapter_folder(tmp_path / "tuned", rank=4)
    storage.upload_folder(folder, "models/tuned/1/files")
    files = describe_files(folder)
    catalog.publish(storage, stage.make_manifest("model", "tuned", **tuned, files=files, details={"adapter": True}))
    catalog.publish(storage, stage.make_manifest("model", "whole", **tuned))
    return storage


def adapter_folder(folder: Path, *, rank: int) -> Path:
    """What a model or a checkpoint holds of an adapter's settings."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 32}))
    return folder


def order(storage: FolderStorage, finetuned_model: Any, *, model: str = "tiny@1", **given: Any) -> TextJob:
    spec = TrainSpec(
        model=model,
        dataset="sums",
        output_model="next",
        flavor="cpu-small",
        hyperparameters={"finetuned_model": finetuned_model, **given},
    )
    made = draft(spec, storage=storage, account="a", job_id="job-1", created_at="t")
    assert isinstance(made, TextJob)
    return made


@pytest.mark.parametrize("given", ["tuned", "tuned@1", "{root}/models/tuned/1", "{root}/models/tuned/1/files/adapter"])
def test_rank_and_scale_are_the_adapters(storage: FolderStorage, given: str) -> None:
    made = order(storage, given.format(root=storage.url)).hyperparameters
    assert (made.finetuned_model, made.lora_rank, made.lora_alpha) == ("tuned@1", 4, 32)
    assert order(storage, "tuned", lora_rank=4).hyperparameters == made


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ("tuned", {"lora_rank": 8}, "lora_rank must be 4, got 8"),
        ("tuned", {"lora_alpha": 16}, "lora_alpha must be 32, got 16"),
        ("tuned", {"model": "tiny@2"}, "tuned@1 is an adapter for tiny@1, not for tiny@2"),
        ("tuned", {"model": "tuned"}, "tuned@1 is an adapter for tiny@1, not for tuned@1"),
        ("whole", {}, "whole@1 holds no adapter"),
        ("tuend", {}, "there is no model 'tuend'"),
        ("tuned@2", {}, "there is no model 'tuned@2'"),
        ("s3://elsewhere/models/tuned/1", {}, "finetuned_model must be NAME@VERSION"),
        ("{root}/../models/tuned/1", {}, "finetuned_model must be NAME@VERSION"),
        (7, {}, "finetuned_model must be of type str"),
    ],
)
def test_what_does_not_fit_is_refused(storage: FolderStorage, given: Any, options: dict[str, Any], said: str) -> None:
    given = given.format(root=storage.url) if isinstance(given, str) else given
    with pytest.raises(SpecError) as caught:
        order(storage, given, **options)
    assert said in caught.value.message
    assert adapters.FIELD in caught.value.fields
    assert caught.value.hint


def leave_checkpoints(storage: FolderStorage, *, ended: bool = True) -> None:
    """Job job-0 with the checkpoints of step 5 of attempt 1 and step 9 of attempt 2, and half of one of step 12."""
    job = order(storage, None).model_copy(update={"id": "job-0"})
    storage.put(layout.job_json("job-0"), job.model_dump_json().encode())
    for attempt, step in ((1, 5), (2, 9), (2, 12)):
        key = layout.checkpoint("job-0", attempt, step)
        folder = adapter_folder(storage.root.parent / str(step), rank=step)
        storage.upload_folder(folder, key)
        if step != 12:
            manifest = CheckpointManifest(step=step, files=describe_files(folder))
            storage.put(layout.checkpoint_manifest(key), manifest.model_dump_json().encode())
    attempts.finish(storage, "job-0", 1, Result(outcome="lost", time="t"))
    if ended:
        attempts.finish(storage, "job-0", 2, Result(outcome="stopped", time="t"))


@pytest.mark.parametrize(
    ("given", "key", "rank"),
    [
        ("job-0", "jobs/job-0/attempts/2/checkpoints/9", 9),
        ("{root}/jobs/job-0/attempts/1/checkpoints/5", "jobs/job-0/attempts/1/checkpoints/5", 5),
        ("{root}/jobs/job-0/attempts/2/checkpoints/9/adapter", "jobs/job-0/attempts/2/checkpoints/9", 9),
        ("jobs/job-0/attempts/2/checkpoints/9", "jobs/job-0/attempts/2/checkpoints/9", 9),
    ],
)
def test_a_stopped_jobs_checkpoint_is_gone_on_from(storage: FolderStorage, given: str, key: str, rank: int) -> None:
    leave_checkpoints(storage)
    made = order(storage, given.format(root=storage.url)).hyperparameters
    assert (made.finetuned_model, made.lora_rank, made.lora_alpha) == (key, rank, 32)
    assert adapters.adapter_files(storage, key).prefix == f"{key}/adapter"
    # A clone of that order means the same.
    assert order(storage, key).hyperparameters == made


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ("job-0", {"lora_rank": 8}, "lora_rank must be 9, got 8"),
        ("job-0", {"model": "tiny@2"}, "checkpoints/9 is an adapter for tiny@1, not for tiny@2"),
        ("{root}/jobs/job-0/attempts/2/checkpoints/12", {}, "job job-0 has no whole checkpoint of step 12"),
        ("{root}/jobs/job-0/attempts/3/checkpoints/5", {}, "job job-0 has no whole checkpoint of step 5"),
        ("{root}/jobs/job-7/attempts/1/checkpoints/5", {}, "job job-7 has no whole checkpoint of step 5"),
        ("{root}/jobs/job-0/attempts/2/audit.json", {}, "finetuned_model must be NAME@VERSION"),
        ("job-7", {}, "there is no model 'job-7'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    storage: FolderStorage, given: str, options: dict[str, Any], said: str
) -> None:
    leave_checkpoints(storage)
    with pytest.raises(SpecError) as caught:
        order(storage, given.format(root=storage.url), **options)
    assert said in caught.value.message
    assert adapters.FIELD in caught.value.fields
    assert caught.value.hint


def test_checkpoints_of_a_job_at_work_are_refused(storage: FolderStorage) -> None:
    leave_checkpoints(storage, ended=False)
    with pytest.raises(SpecError, match="job job-0 is at work on attempt 2") as caught:
        order(storage, "job-0")
    assert caught.value.code == "job_not_ended"
