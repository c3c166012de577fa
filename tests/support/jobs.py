"""A tiny model and dataset on a running platform, and orders for jobs over them."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.support import tiny
from tests.support.publishing import files_key, publish
from tests.support.ray_fixture import Running
from tests.support.waiting import until
from tunesmith.api.client import read_on
from tunesmith.api.views import EventView, JobView
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import MetricLine
from tunesmith.jobs.spec import TrainSpec
from tunesmith.local import local_platform

CARD = "---\ntask_type: text-question-answering\nlicense: apache-2.0\n---\n# tiny\n"


def make_sources(folder: Path) -> tuple[Path, Path]:
    """The folders of the tiny model, with its card, and of a dataset with training and held-out rows."""
    model = tiny.make_model(folder / "model")
    (model / "README.md").write_text(CARD)
    data = folder / "data"
    data.mkdir()
    rows = [json.dumps(row) + "\n" for row in tiny.sums(300)]
    (data / "train.jsonl").write_text("".join(rows[: tiny.TRAINED_ROWS]))
    (data / "held_out.jsonl").write_text("".join(rows[tiny.TRAINED_ROWS :]))
    return model, data


def publish_sources(running: Running, folder: Path) -> None:
    """Publish the tiny model and dataset, both by the name `tiny`."""
    for asset, source in zip(("model", "dataset"), make_sources(folder), strict=True):
        publish(running, asset, "tiny", source)


def spec(**given: Any) -> TrainSpec:
    """An order for 20 steps with a checkpoint every 5; `given` overrides fields, `hyperparameters` merges."""
    h = {
        "test_data_file": "held_out.jsonl",
        "max_seq_length": 64,
        "learning_rate": 0.01,
        "max_steps": 20,
        "save_steps": 5,
        **given.pop("hyperparameters", {}),
    }
    order = {"model": "tiny", "dataset": "tiny", "flavor": "cpu-small", "output_model": "tuned", **given}
    return TrainSpec(hyperparameters=h, **order)


def metrics(running: Running, job_id: str, *names: str) -> list[MetricLine]:
    return read_on(lambda after: running.client.metrics(job_id, names=names, after=after))[0]


def events(running: Running, job_id: str) -> list[EventView]:
    return read_on(lambda after: running.client.events(job_id, after=after))[0]


def log(running: Running, job_id: str, rank: str) -> str:
    return "".join(part.text for part in read_on(lambda after: running.client.logs(job_id, rank=rank, after=after))[0])


def wait_for_event(running: Running, job_id: str, wanted: Callable[[EventView], bool]) -> EventView:
    """The first event that is wanted; fails where the job ends without one."""
    for event in running.client.follow_events(job_id, poll_s=0.2):
        if wanted(event):
            return event
    raise AssertionError(f"{job_id} ended without the event: {running.client.job(job_id)}")


def wait_for_checkpoints(running: Running, job: JobView, count: int) -> int:
    """The step of the newest checkpoint, once the job has saved so many."""
    saved: set[int] = set()
    event = wait_for_event(
        running, job.id, lambda event: saved.add(event.data.get("checkpoint_step", 0)) or len(saved - {0}) >= count
    )
    return int(event.data["checkpoint_step"])


def wait_for_log(running: Running, job: JobView, text: str) -> None:
    """Until worker 0's log has the text; fails where the job ends without it."""

    def is_there() -> bool:
        ended = running.client.job(job.id).state in ("failed", "completed")
        there = text in log(running, job.id, "0")
        assert there or not ended, running.client.job(job.id)
        return there

    until(is_there)


def processes(running: Running, part: str) -> Iterator[psutil.Process]:
    """The platform's processes that have `part` in their command line: Ray names its actors there."""
    for process in local_platform.processes_of(running.started):
        with suppress(psutil.NoSuchProcess):
            if part in " ".join(process.cmdline()):
                yield process


def workers(running: Running, job_id: str, part: str) -> list[psutil.Process]:
    """The living processes of the job's newest attempt that Ray named after `part`, by their ids."""
    attempt = attempts.attempt_name(job_id, running.client.job(job_id).attempt)
    token = running.settings.ray_token_path.read_text().strip()
    answer = httpx.get(
        f"{running.settings.ray_jobs_url}/api/jobs/{attempt}",
        headers={"Authorization": f"Bearer {token}"},
        trust_env=False,
    )
    ray_job = answer.raise_for_status().json()["job_id"]
    found = []
    for process in processes(running, part):
        with suppress(psutil.Error):
            if process.environ().get("RAY_JOB_ID") == ray_job:
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def kill(running: Running, job_id: str, part: str) -> None:
    """kill -9 of the job's first worker that Ray named after `part`."""
    victim, *_ = workers(running, job_id, part)
    os.kill(victim.pid, 9)
    victim.wait(10)


def model_files(running: Running, job_id: str) -> Path:
    """The folder with the files of the model that the job made."""
    folder = running.storage.local_path(_model_key(running, job_id))
    assert folder is not None
    return folder


def driver(running: Running, job_id: str) -> psutil.Process:
    """The process that drives this job."""
    for process in local_platform.processes_of(running.started):
        with suppress(psutil.NoSuchProcess):
            command = process.cmdline()
            if command[1:3] == ["-m", "trainers"] and job_id in command[3]:
                return process
    raise AssertionError(f"{job_id} has no driver")


def model_file(running: Running, job_id: str, path: str) -> bytes:
    """One file of the model that the job made."""
    return running.storage.get(f"{_model_key(running, job_id)}/{path}")


def _model_key(running: Running, job_id: str) -> str:
    return files_key(running.storage, running.client.job(job_id).output)


def checkpoint_steps(running: Running, job_id: str) -> list[int]:
    return [checkpoint.step for checkpoint in attempts.checkpoints(running.storage, job_id)]
