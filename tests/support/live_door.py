"""A real front door over HTTP on loopback, with a token, a record store and a storage; no Ray and no reconciler."""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn

from serve_app.app import make_app
from tests.support.stage import publish_inputs
from tunesmith.jobs.attempts import MetricLine
from tunesmith.jobs.states import Change
from tunesmith.local.local_platform import prepare
from tunesmith.records.store import RecordStore
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.base import Storage


@dataclass(frozen=True)
class LiveDoor:
    settings: Settings
    store: RecordStore
    storage: Storage

    @property
    def url(self) -> str:
        return self.settings.door_url

    @property
    def token(self) -> str:
        return self.settings.api_token_path.read_text()

    def run(self, job_id: str) -> None:
        """Bring a pending job to where it trains, as the reconciler would."""
        self.store.change(job_id, Change(state="queued"))
        self.store.change(job_id, Change(state="preparing", attempt=1))
        data = {"total_steps": 4, "first_step": 1}
        self.store.change(job_id, Change(state="running", phase="train"), data=data)

    def end(self, job_id: str, state: str, **options: str) -> None:
        if state == "stopped":
            self.store.request_stop(job_id)
        self.store.change(job_id, Change(state=state, **options))

    def measure(self, job_id: str, segment: int, *lines: MetricLine) -> None:
        text = "".join(line.model_dump_json() + "\n" for line in lines)
        self.storage.put(f"{layout.metrics(job_id, 1)}/{segment:08d}", text.encode())

    def log(self, job_id: str, segment: int, text: str, rank: str = "driver") -> None:
        self.storage.put(f"{layout.logs(job_id, 1, rank)}/{segment:08d}", text.encode())


@pytest.fixture
def live_door(tmp_path: Path) -> Iterator[LiveDoor]:
    """The model `tiny` and the dataset `sums` are there."""
    listener = socket.create_server(("127.0.0.1", 0))
    home = {"TUNESMITH_HOME": str(tmp_path / "home"), "TUNESMITH_PORT": str(listener.getsockname()[1])}
    settings = Settings.from_env(home)
    prepare(settings)
    app = make_app(settings)
    publish_inputs(app.state.door.storage)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the door did not start"
            time.sleep(0.01)
        yield LiveDoor(settings, app.state.door.store, app.state.door.storage)
    finally:
        server.should_exit = True
        thread.join()


def figure(step: int, name: str = "loss", value: float = 2.0, *, rank: int | None = None) -> MetricLine:
    """One line of metrics, a second a step."""
    time = f"2026-01-01T00:00:{step:02d}.000Z"
    return MetricLine(time=time, attempt=1, step=step, rank=rank, name=name, value=value)
