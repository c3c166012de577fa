"""What tests of the door and the reconciler play on: a catalog, a clock, and a Ray that only remembers."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.reconciler.launcher import ALIVE, RayJob
from serve_app.reconciler.reconciler import Reconciler
from tunesmith.assets.catalog import Manifest, Table, publish
from tunesmith.assets.stored_files import File, describe_files
from tunesmith.clock import utc_text
from tunesmith.errors import UnavailableError
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import Claim, DriverProcess, EventLine, Result, attempt_name
from tunesmith.jobs.drafting import draft, new_job_id
from tunesmith.jobs.spec import RegisterJob, TrainJob, parse_spec
from tunesmith.records.record import Record
from tunesmith.records.store import RecordStore
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.layout import events

SPEC: dict[str, Any] = {
    "model": "tiny",
    "dataset": "sums",
    "flavor": "cpu-small",
    "output_model": "tuned",
    "hyperparameters": {"max_steps": 3},
}
NOW = 1_800_000_000.0


class Clock:
    """Time that goes on only when told to."""

    def __init__(self) -> None:
        self.seconds = NOW

    def __call__(self) -> float:
        return self.seconds


def make_settings(home: Path, **options: Any) -> Settings:
    return Settings(
        home=home, storage_url=str(home / "storage"), database_url=f"sqlite:///{home / 'records.db'}", **options
    )


def make_manifest(kind: Any, name: str, version: int = 1, **options: Any) -> Manifest:
    return Manifest(
        kind=kind,
        name=name,
        version=version,
        folder="files",
        files=options.pop("files", [File(path="a", size_bytes=3, sha256="0" * 64)]),
        created_at=utc_text(NOW),
        account="operator",
        job=options.pop("job", "job-0"),
        **options,
    )


def publish_folder(storage: Storage, kind: Any, name: str, folder: Path, **options: Any) -> None:
    """Put the files of a folder into storage as version 1, whatever a registration would say of them."""
    storage.upload_folder(folder, layout.asset_files(kind, name, 1, "files"))
    publish(storage, make_manifest(kind, name, files=describe_files(folder), **options))


def publish_inputs(storage: Storage) -> None:
    """The model `tiny` and the dataset `sums`."""
    publish(storage, make_manifest("model", "tiny", task_type="text-question-answering"))
    table = Table(format="jsonl", columns=["prompt", "response"], rows=8)
    publish(storage, make_manifest("dataset", "sums", tables={"train.jsonl": table}))


@dataclass
class FakeLauncher:
    """A Ray that remembers in a folder, so that it outlives who calls it. Jobs run until a test says otherwise."""

    folder: Path
    resources: Mapping[str, float]
    away: bool = False
    told_lives: bool | None = None
    """What it says of drivers on other nodes."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def submit(self, job_id: str, attempt: int, job_url: str, *, account: str) -> None:
        self._answer()
        name = attempt_name(job_id, attempt)
        partial = self.folder.with_name(name)
        partial.write_text(json.dumps({"status": "RUNNING", "job_url": job_url, "account": account}))
        with suppress(FileExistsError):
            self._path(name).hardlink_to(partial)
        partial.unlink()

    def status(self, submission_id: str) -> RayJob | None:
        self._answer()
        job = self._job(submission_id)
        return None if job is None else RayJob(job["status"], job.get("message"))

    def stop(self, submission_id: str) -> None:
        self._answer()
        job = self._job(submission_id)
        if job is not None and job["status"] in ALIVE:
            self.tell(submission_id, "STOPPED")

    def lives(self, process: DriverProcess) -> bool | None:
        self._answer()
        return self.told_lives

    def capacity(self) -> Mapping[str, float]:
        self._answer()
        return self.resources

    def jobs(self) -> dict[str, dict[str, Any]]:
        """All submissions there were, by id."""
        return {path.name: json.loads(path.read_text()) for path in sorted(self.folder.iterdir())}

    def tell(self, submission_id: str, status: str, message: str | None = None) -> None:
        job = {**(self._job(submission_id) or {}), "status": status, "message": message}
        partial = self.folder.with_name(submission_id)
        partial.write_text(json.dumps(job))
        partial.replace(self._path(submission_id))

    def forget(self, submission_id: str) -> None:
        self._path(submission_id).unlink()

    def _job(self, submission_id: str) -> dict[str, Any] | None:
        try:
            job: dict[str, Any] = json.loads(self._path(submission_id).read_text())
        except FileNotFoundError:
            return None
        return job

    def _path(self, submission_id: str) -> Path:
        return self.folder / submission_id

    def _answer(self) -> None:
        if self.away:
            raise UnavailableError("Ray is away")


class FakeDriver:
    """Does what a driver does to the job's folder, a step at a time."""

    def __init__(self, storage: Storage, job: TrainJob | RegisterJob, attempt: int = 1) -> None:
        self.storage = storage
        self.job = job
        self.attempt = attempt
        self._segments = 0

    @property
    def submission_id(self) -> str:
        return attempt_name(self.job.id, self.attempt)

    def claim(self, submitted_as: str | None = "", *, process: DriverProcess | None = None) -> bool:
        name = self.submission_id if submitted_as == "" else submitted_as
        return attempts.claim(
            self.storage,
            self.job.id,
            self.attempt,
            Claim(submission_id=name, time=utc_text(NOW), process=process),
        )

    def say(self, *lines: EventLine) -> None:
        """Close one segment of events."""
        self._segments += 1
        key = f"{events(self.job.id, self.attempt)}/{self._segments:08d}"
        self.storage.put(key, b"".join(line.model_dump_json().encode() + b"\n" for line in lines))

    def publish(self) -> None:
        kind, name, version = self.job.output
        publish(self.storage, make_manifest(kind, name, version, job=self.job.id))

    def finish(self, outcome: Any, **options: Any) -> Result:
        result = Result(outcome=outcome, time=utc_text(NOW + 60), **options)
        return attempts.finish(self.storage, self.job.id, self.attempt, result)


def line(**options: Any) -> EventLine:
    return EventLine(time=utc_text(NOW + 5), **options)


def play_round(reconciler: Reconciler) -> None:
    """A round, and all that its threads make of it."""
    reconciler.round()
    assert reconciler.settle(60)


class Stage:
    """One platform whose reconcilers, clock and Ray a test has in its hands."""

    def __init__(self, home: Path) -> None:
        self.settings = make_settings(home, stop_grace_s=60.0, lease_s=10.0)
        self.clock = Clock()
        self.store = RecordStore(self.settings.database_url, clock=self.clock)
        self.store.migrate()
        self.storage = FolderStorage(home / "storage")
        self.launcher = FakeLauncher(home / "ray", {"CPU": 2.0})
        publish_inputs(self.storage)
        self.reconciler = self.new_reconciler("first")

    def new_reconciler(self, holder: str, **parts: Any) -> Reconciler:
        given = {"store": self.store, "storage": self.storage, "launcher": self.launcher, **parts}
        return Reconciler(**given, settings=self.settings, holder=holder, clock=self.clock)

    def draft(self, **changes: Any) -> TrainJob | RegisterJob:
        self.clock.seconds += 0.001
        spec = parse_spec({"asset": "dataset", **changes} if "source" in changes else {**SPEC, **changes})
        return draft(
            spec,
            storage=self.storage,
            account="operator",
            job_id=new_job_id(),
            created_at=utc_text(self.clock()),
        )

    def order(self, **changes: Any) -> Record:
        return self.store.insert(self.draft(**changes), respond=lambda record: {}).record

    def rounds(self, count: int = 1, *, seconds: float = 0.5) -> None:
        for _ in range(count):
            play_round(self.reconciler)
            self.clock.seconds += seconds

    def started(self, **changes: Any) -> tuple[Record, FakeDriver]:
        """A job whose first attempt was submitted and claimed."""
        record = self.order(**changes)
        self.rounds()
        driver = FakeDriver(self.storage, self.store.get(record.id).job)
        assert driver.claim()
        return self.store.get(record.id), driver

    def running(self, **changes: Any) -> tuple[Record, FakeDriver]:
        record, driver = self.started(**changes)
        driver.say(line(state="running", phase="train"))
        self.rounds()
        return self.store.get(record.id), driver

    def status(self, record: Record) -> tuple[str, str | None, int]:
        status = self.store.get(record.id).status
        return status.state, status.reason, status.attempt

    def states(self, record: Record) -> list[str]:
        return [event.change.state for event in self.store.events(record.id) if event.change.state]
