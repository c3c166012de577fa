"""A real front door over HTTP on loopback, with a token, a record store and a storage; no Ray and no reconciler.

And the command line, run against it in the test's own process.
"""

import asyncio
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from serve_app.app import make_app
from tests.support.stage import publish_inputs
from tests.support.waiting import until
from tunesmith.cli import main
from tunesmith.jobs.attempts import MetricLine
from tunesmith.jobs.states import Change
from tunesmith.local import gate
from tunesmith.local.local_platform import door_answers, prepare
from tunesmith.local.ports import free
from tunesmith.records.store import RecordStore
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.storage.urls import open_storage


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
    with _serving(Settings.from_env(home), listener) as door:
        yield door


@pytest.fixture(scope="module")
def gated_door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveDoor]:
    """The same door behind its gate, which alone is asked; one for all tests of a module."""
    with _gated(tmp_path_factory.mktemp("gated")) as (settings, listener), _serving(settings, listener) as door:
        until(lambda: door_answers(settings), limit_s=30)
        yield door


@contextmanager
def echo(home: Path, *, go: threading.Event | None = None) -> Iterator[LiveDoor]:
    """A gate before what answers with the headers that it got; under /held/, once it may `go`."""

    async def answer(request: Request) -> JSONResponse:
        while go is not None and request.url.path.startswith("/held/") and not go.is_set():
            await asyncio.sleep(0.02)
        return JSONResponse(request.headers.items())

    app = Starlette(routes=[Route("/{path:path}", answer)])
    with _gated(home) as (settings, listener):
        prepare(settings)
        store, storage = RecordStore(settings.database_url), open_storage(settings.storage_url, settings)
        with _served(app, listener):
            until(lambda: door_answers(settings), limit_s=30)
            yield LiveDoor(settings, store, storage)


@contextmanager
def _gated(home: Path) -> Iterator[tuple[Settings, socket.socket]]:
    """Settings of a door, and the socket that its gate brings requests to."""
    settings = Settings.from_env({"TUNESMITH_HOME": str(home), "TUNESMITH_PORT": str(free(1)[0])})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        loop = gate.start(settings, proxy_port=listener.getsockname()[1], mark="tests")
        try:
            yield settings, listener
        finally:
            os.killpg(loop.pid, signal.SIGKILL)
            loop.wait()


@contextmanager
def _serving(settings: Settings, listener: socket.socket) -> Iterator[LiveDoor]:
    """The door of these settings, served on that socket by a thread."""
    prepare(settings)
    app = make_app(settings)
    publish_inputs(app.state.door.storage)
    with _served(app, listener):
        yield LiveDoor(settings, app.state.door.store, app.state.door.storage)


@contextmanager
def _served(app: ASGIApp, listener: socket.socket) -> Iterator[None]:
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive(), limit_s=30)
        assert server.started, "the door did not start"
        yield
    finally:
        server.should_exit = True
        thread.join()


def figure(step: int, name: str = "loss", value: float = 2.0, *, rank: int | None = None) -> MetricLine:
    """One line of metrics, a second a step."""
    time = f"2026-01-01T00:00:{step:02d}.000Z"
    return MetricLine(time=time, attempt=1, step=step, rank=rank, name=name, value=value)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def run(live_door: LiveDoor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command against a live door; `stdin` is what its user types."""
    for name in [name for name in os.environ if name.startswith("TUNESMITH_")]:
        monkeypatch.delenv(name)
    for name, text in live_door.settings.to_env().items():
        monkeypatch.setenv(name, text)

    def run(*arguments: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", StringIO(stdin))
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        out, err = capsys.readouterr()
        return Outcome(int(exit_.value.code or 0), out, err)

    return run
