"""A job's rows are ready, or refused, before any worker is taken."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny
from tests.support.stage import make_manifest
from trainers.attempt.context import Attempt
from trainers.attempt.stop_watch import StoppedError, StopWatch
from trainers.text import tokenized_data
from trainers.text_job.job_data import prepare
from trainers.text_job.training_run import run_training
from tunesmith.assets.catalog import publish
from tunesmith.assets.stored_files import describe_files
from tunesmith.assets.tables import describe
from tunesmith.clock import utc_text
from tunesmith.errors import DataError
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import EventLine, EventWriter
from tunesmith.jobs.drafting import draft
from tunesmith.jobs.spec import TextJob, TrainSpec
from tunesmith.jobs.stored_reports import read_audit
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.segments import read_segments

ROWS = tiny.sums(40)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"TUNESMITH_HOME": str(tmp_path / "home")})


def attempt_on(
    rows: list[Any], settings: Settings, *, deadline: float | None = None, **hyperparameters: Any
) -> tuple[Attempt, TextJob]:
    """The first attempt of a job over `rows`, with the model and the rows published."""
    storage = FolderStorage(Path(settings.storage_url))
    files = {kind: storage.root / layout.asset_files(kind, "tiny", 1, "files") for kind in ("model", "dataset")}
    tiny.make_model(files["model"])
    files["dataset"].mkdir(parents=True)
    (files["dataset"] / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, folder in files.items():
        tables = {"rows.jsonl": describe(folder / "rows.jsonl")} if kind == "dataset" else {}
        task_type = "text-question-answering" if kind == "model" else None
        publish(storage, make_manifest(kind, "tiny", files=describe_files(folder), task_type=task_type, tables=tables))
    spec = TrainSpec(
        model="tiny", dataset="tiny", flavor="cpu-small", output_model="tuned", hyperparameters=hyperparameters
    )
    job = draft(spec, storage=storage, account="operator", job_id="job-1", created_at=utc_text())
    assert isinstance(job, TextJob)
    stop = StopWatch(storage, job.id, 1, deadline=deadline)
    return Attempt(job, 1, storage, settings, EventWriter(storage, job.id, 1), stop), job


def test_rows_are_tokenised_with_progress_and_audited(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized_data, "PROGRESS_S", 0.0)
    attempt, job = attempt_on(ROWS, settings)
    with attempt.events:
        prepare(attempt, job)
    segments = read_segments(attempt.storage, layout.events(job.id, 1))
    events = [EventLine.model_validate_json(line) for segment in segments for line in segment.data.splitlines()]
    assert [event.phase for event in events if event.phase] == ["fetch", "tokenize", "audit"]
    assert [event.data for event in events if event.message] == [{"rows_read": 40, "rows_total": 40}]
    assert read_audit(attempt.storage, job.id).counts.rows == 40


def test_what_the_audit_refuses_never_gets_a_worker_and_its_report_is_kept(settings: Settings) -> None:
    attempt, job = attempt_on([{"prompt": "p", "response": "r" * 200}] * 3, settings, max_seq_length=16)
    with attempt.events, pytest.raises(DataError, match="the audit refuses the data"):
        prepare(attempt, job)
    refusal = read_audit(attempt.storage, job.id).refusal
    assert refusal is not None and refusal.code == "end_of_turn_untrained"


def test_a_job_stops_while_its_rows_are_tokenised(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized_data, "PROGRESS_S", 0.0)
    attempt, job = attempt_on(ROWS, settings, deadline=time.time() - 1)
    with pytest.raises(StoppedError, match="time_limit"):
        prepare(attempt, job)
    attempts.request_stop(attempt.storage, job.id, "balance")
    attempt = replace(attempt, stop=StopWatch(attempt.storage, job.id, 1, deadline=None))
    attempt.stop.look()
    with pytest.raises(StoppedError, match="balance"):
        prepare(attempt, job)
    assert not attempt.storage.exists(layout.audit(job.id, 1))


def test_a_run_that_is_stopped_before_its_first_step_says_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenized_data, "PROGRESS_S", 0.0)
    attempt, job = attempt_on(ROWS, settings)
    attempts.request_stop(attempt.storage, job.id)
    attempt.stop.look()
    result = run_training(attempt, job)
    assert (result.outcome, result.reason, result.message) == (
        "stopped",
        "stopped_by_user",
        "it was stopped before its first step",
    )
