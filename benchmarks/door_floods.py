"""How long a good client waits while another floods the door, what memory the door takes then, and how a job goes on.

`python -m benchmarks.door_floods [--seconds 20]`: a platform is started, and each flood runs against its door from
another address of loopback, as from another machine. Meanwhile a client with a token asks for its jobs, each time over
a connection of its own, and one of these jobs trains SmolLM2-135M-Instruct on the demo's rows all the while.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.own_platform import register, settings_in
from benchmarks.results_file import figure, say, write_results
from tunesmith.api.client import Client, read_on
from tunesmith.api.request_bounds import MAX_BODY_BYTES
from tunesmith.jobs.spec import TrainSpec
from tunesmith.local import gate, local_platform
from tunesmith.settings import Settings

DATA = Path(__file__).parents[1] / "demo" / "data"
FLOODING = "127.0.0.9"
"""Address that floods come from."""
THREADS = 8
CONNECTIONS = 1000
"""Connections that a slow flood holds open, where it may."""


class Flood:
    """Where a flood is sent, and whether it goes on."""

    def __init__(self, settings: Settings, ended: Event) -> None:
        self.address = (settings.host, settings.port)
        self.token = settings.api_token_path.read_text().strip()
        self.ended = ended

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=5, source_address=(FLOODING, 0))

    def head(self, line: str, *headers: str, token: str = "") -> bytes:
        rows = [f"{line} HTTP/1.1", "Host: door", *([f"Authorization: Bearer {token}"] if token else []), *headers]
        return "".join(f"{row}\r\n" for row in rows).encode()


def endless_header(flood: Flood) -> None:
    _send(flood, b"GET / HTTP/1.1\r\nHost: door\r\nX: ", b"a" * 65536)


def header_lines(flood: Flood) -> None:
    _send(flood, b"GET / HTTP/1.1\r\nHost: door\r\n", b"X: a\r\n" * 10_000)


def garbage(flood: Flood) -> None:
    _send(flood, flood.head("GET /v1/flavors") + b"\r\n", bytes(range(256)) * 256)


def large_body_without_token(flood: Flood) -> None:
    _send(flood, flood.head("POST /v1/jobs", "Content-Length: 10000000000") + b"\r\n", b" " * 65536)


def endless_body_with_token(flood: Flood) -> None:
    lines = ("Transfer-Encoding: chunked",)
    _send(
        flood, flood.head("POST /v1/jobs", *lines, token=flood.token) + b"\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"
    )


def large_body_with_token(flood: Flood) -> None:
    head = flood.head("POST /v1/plans", f"Content-Length: {MAX_BODY_BYTES}", token=flood.token) + b"\r\n"
    while not flood.ended.is_set():
        with suppress(OSError), flood.connect() as connection:
            connection.sendall(head + b" " * MAX_BODY_BYTES)
            connection.recv(65536)


def requests_without_token(flood: Flood) -> None:
    while not flood.ended.is_set():
        with suppress(OSError), flood.connect() as connection:
            while not flood.ended.is_set() and connection.send(flood.head("GET /v1/jobs") + b"\r\n"):
                if not connection.recv(65536):
                    break


def slow_headers(flood: Flood) -> None:
    _trickle(flood, b"GET / HTTP/1.1\r\nHost: door\r\nX: ")


def slow_body_with_token(flood: Flood) -> None:
    _trickle(flood, flood.head("POST /v1/plans", "Content-Length: 1000", token=flood.token) + b"\r\n")


def slow_large_body_with_token(flood: Flood) -> None:
    head = flood.head("POST /v1/plans", f"Content-Length: {MAX_BODY_BYTES}", token=flood.token) + b"\r\n"
    _trickle(flood, head + b" " * 20_000)


def slow_body_without_token(flood: Flood) -> None:
    _trickle(flood, flood.head("POST /v1/plans", "Content-Length: 1000") + b"\r\n")


def connections_that_say_nothing(flood: Flood) -> None:
    _trickle(flood, b"")


def half_a_tls_hello(flood: Flood) -> None:
    _trickle(flood, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc")


FLOODS: tuple[Callable[[Flood], None], ...] = (
    endless_header,
    header_lines,
    garbage,
    large_body_without_token,
    endless_body_with_token,
    large_body_with_token,
    requests_without_token,
    slow_headers,
    slow_body_with_token,
    slow_large_body_with_token,
    slow_body_without_token,
    connections_that_say_nothing,
    half_a_tls_hello,
)


def _send(flood: Flood, begin: bytes, more: bytes) -> None:
    """One connection after the other, each sent as much as it takes."""
    while not flood.ended.is_set():
        with suppress(OSError), flood.connect() as connection:
            connection.sendall(begin)
            while not flood.ended.is_set():
                connection.sendall(more)


def _trickle(flood: Flood, begin: bytes) -> None:
    """Many connections, each sent a byte a second; one that is ended is begun anew."""
    held: list[socket.socket] = []
    try:
        while not flood.ended.is_set():
            while len(held) < CONNECTIONS // THREADS and not flood.ended.is_set():
                with suppress(OSError):
                    held.append(flood.connect())
                    held[-1].sendall(begin)
            flood.ended.wait(1)
            held = [connection for connection in held if _is_open(connection, b"a" if begin else b"")]
    finally:
        for connection in held:
            connection.close()


def _is_open(connection: socket.socket, more: bytes) -> bool:
    """Whether the connection takes `more`, and has been told nothing yet; one that was is closed."""
    try:
        connection.setblocking(False)
        connection.send(more)
        connection.recv(1)
    except BlockingIOError:
        return True
    except OSError:
        pass
    connection.close()
    return False


@contextmanager
def _running(kind: Callable[[Flood], None], settings: Settings) -> Iterator[None]:
    """The flood, in a process of its own, so that the client that is measured waits for the door alone."""
    context = multiprocessing.get_context("spawn")
    ended = context.Event()
    process = context.Process(target=_flood, args=(kind, settings, ended))
    process.start()
    try:
        yield
    finally:
        ended.set()
        process.join()


def _flood(kind: Callable[[Flood], None], settings: Settings, ended: Event) -> None:
    # As from another machine: it takes no more of this one's processors than the door leaves.
    os.nice(10)
    threads = [threading.Thread(target=kind, args=(Flood(settings, ended),)) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(settings: Settings, seconds: float, watched: Callable[[], int]) -> tuple[list[float], int, int]:
    """Waits of a good client in seconds, how many of its requests failed, and the most memory of the door in bytes."""
    headers = {"Authorization": f"Bearer {settings.api_token_path.read_text().strip()}"}
    url = f"{settings.door_url}/v1/jobs"
    waits: list[float] = []
    failed, memory = 0, watched()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        began = time.monotonic()
        try:
            # verify: making ready for TLS, which is not spoken here, would take more time than the answer.
            answer = httpx.get(url, headers=headers, timeout=30, trust_env=False, verify=False)
            failed += answer.status_code != 200
        except httpx.HTTPError:
            failed += 1
        waits.append(time.monotonic() - began)
        memory = max(memory, watched()) if len(waits) % 20 == 0 else memory
        time.sleep(0.02)
    return waits, failed, memory


def _memory(platform: local_platform.Platform) -> int:
    """What the gate, Serve's proxy and the door's replica hold, in bytes."""
    parts = (gate.CONFIGURATION, "ray::ProxyActor", "ray::ServeReplica:door")
    total = 0
    for process in local_platform.processes_of(platform):
        with suppress(psutil.Error):
            if any(part in " ".join(process.cmdline()) for part in parts):
                total += process.memory_info().rss
    return total


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.door_floods", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="of each flood")
    arguments = parser.parse_args()
    lines: list[str] = []
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="ts-", dir="/tmp") as name:
        settings = settings_in(Path(name), SEGMENT_S="1")
        platform = local_platform.up(settings, num_cpus=2, object_store_memory=200_000_000).platform
        try:
            with Client(settings.door_url, settings.api_token_path.read_text().strip()) as client:
                _measure_all(settings, platform, arguments.seconds, _Training(client), figures=figures, lines=lines)
        finally:
            local_platform.down(settings)
    worst = max(figures[name]["value"] for name in figures if name.endswith("_p99_s"))
    figures["worst_p99_s"] = figure([worst], "s")
    say(lines, f"worst 99th percentile: {worst:.3f} s")
    say(lines, str(write_results("door_floods", figures, "\n".join(lines) + "\n")))


class _Training:
    """A job that trains until it is stopped."""

    def __init__(self, client: Client) -> None:
        """Register what it needs, order it, and wait for its first step."""
        register(client, DATA)
        order = TrainSpec(
            model="model",
            dataset="rows",
            flavor="cpu-small",
            output_model="trained-under-floods",
            hyperparameters={"train_data_file": "train.jsonl", "max_seq_length": 256},
            advanced={"num_train_epochs": 1000},
        )
        self._client, self._job = client, client.submit(order).id
        self._read: str | None = None
        while not self.new_steps():
            self._check("pending", "queued", "preparing", "running")
            time.sleep(1)

    def new_steps(self) -> int:
        """How many steps it has made since the last call."""
        lines, self._read = read_on(
            lambda after: self._client.metrics(self._job, names=["loss"], after=after), self._read
        )
        return len(lines)

    def stop(self) -> None:
        """It has gone on to the end, and is stopped with a checkpoint."""
        self._check("running")
        self._client.stop(self._job)
        self._client.wait(self._job)
        self._check("stopped")

    def _check(self, *states: str) -> None:
        job = self._client.job(self._job)
        if job.state not in states:
            raise SystemExit(f"{job.id} {job.state}: {job.message}")


def _measure_all(
    settings: Settings,
    platform: local_platform.Platform,
    seconds: float,
    training: _Training,
    *,
    figures: dict[str, dict[str, Any]],
    lines: list[str],
) -> None:
    memory_before = _memory(platform)
    for kind in (None, *FLOODS):
        name = "no_flood" if kind is None else kind.__name__
        training.new_steps()
        with _running(kind, settings) if kind else nullcontext():
            waits, failed, memory = measure(settings, seconds, lambda: _memory(platform))
        steps = training.new_steps()
        p99 = statistics.quantiles(waits, n=100)[98]
        grown = (memory - memory_before) / 1e6
        figures[f"{name}_p99_s"] = figure([p99], "s")
        figures[f"{name}_failed"] = figure([failed], "requests")
        figures[f"{name}_steps"] = figure([steps], "steps")
        figures[f"{name}_memory_growth_mb"] = figure([grown], "MB")
        say(
            lines,
            f"{name}: {len(waits)} requests, {failed} failed; median {statistics.median(waits) * 1000:.0f} ms, 99th "
            f"percentile {p99 * 1000:.0f} ms, longest {max(waits) * 1000:.0f} ms; memory {grown:+.0f} MB; "
            f"{steps} steps of the training",
        )
    training.stop()


if __name__ == "__main__":
    main()
