"""A driver's sign of life, and its end where it can no longer give one: two attempts of a job never live at once.

A thread renews the heartbeat in storage. Another ends this process, and all that it started, where the heartbeat was
not renewed for as long as it promises, where the attempt was given up for lost, or where Ray is gone. Behind both
stands a timer of the kernel, which also ends a process whose interpreter hangs in a call, or that was stopped for too
long and is woken: before it does anything else.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from trainers.attempt.stop_watch import FENCED, StopWatch
from tunesmith import processes
from tunesmith.clock import utc_text
from tunesmith.errors import TunesmithError
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import Heartbeat, attempt_name
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage
from tunesmith.storage.s3 import Waiting

RAY_GONE_S = 15.0
"""A driver whose Ray takes no connection for so many seconds ends itself."""

WATCH_S = 0.5
"""Between two looks at what ends a driver, seconds."""

KERNEL_S = 2.0
"""The kernel's timer ends a process so many seconds after its own thread should have done it."""

WAITING = Waiting(connect_s=2, read_s=5, tries=1)
"""How long a heartbeat waits for storage: after an outage the next one must come before the old one is stale."""

_ASK_S = 2.0
"""Between two questions to Ray, seconds."""

_CONNECT_S = 2.0
_RETRY_S = 2.0
"""Pause after a heartbeat that storage did not take, seconds."""

logger = logging.getLogger(__name__)


class Pulse:
    """The heartbeat of this process's attempt, from the attempt's claim to its result."""

    def __init__(
        self,
        storage: Storage,
        job_id: str,
        attempt: int,
        *,
        settings: Settings,
        stop: StopWatch,
        end: Callable[[str, str], object] | None = None,
    ) -> None:
        """`storage` is one that says soon that it does not answer.

        `end` is called with the attempt's name and the reason; by default it ends this process.
        """
        self._storage = storage
        self._job_id, self._attempt, self._stop = job_id, attempt, stop
        self._every_s, self._lasts_s = settings.heartbeat_s, settings.heartbeat_lasts_s
        self._end = end or end_driver
        self._done = threading.Event()
        self._count = 0
        self._renewed_at = time.monotonic()
        self._ray = _Ray()

    @contextmanager
    def beating(self) -> Iterator[Pulse]:
        threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("heartbeat", self._beat), ("heartbeat-watch", self._watch))
        ]
        self._arm(self._lasts_s)
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._done.set()
            self._disarm()
            threads[1].join(WATCH_S)

    def check(self) -> None:
        """End this process where it may work no longer; asked before whatever counts is written."""
        if (why := self._why_to_end()) is not None:
            self._end(attempt_name(self._job_id, self._attempt), why)

    def ray_is_gone(self) -> bool:
        """Whether the Ray that this process is connected to takes no connection now."""
        return not self._ray.answers()

    def _beat(self) -> None:
        while True:
            pause_s = self._every_s if self._renew() else min(_RETRY_S, self._every_s)
            if self._done.wait(pause_s):
                return

    def _renew(self) -> bool:
        self.check()
        # The promise counts from before the write: whoever reads it counts from after.
        began = time.monotonic()
        self._count += 1
        beat = Heartbeat(count=self._count, time=utc_text(), lasts_s=self._lasts_s)
        try:
            attempts.write_heartbeat(self._storage, self._job_id, self._attempt, beat)
        except (TunesmithError, OSError) as error:
            logger.warning("%s: the heartbeat could not be renewed: %s", self._job_id, error)
            return False
        if not self._done.is_set():
            self._renewed_at = began
            self._arm(self._lasts_s - (time.monotonic() - began))
        return True

    def _watch(self) -> None:
        while not self._done.wait(WATCH_S):
            self.check()

    def _why_to_end(self) -> str | None:
        silent_s = time.monotonic() - self._renewed_at
        if silent_s > self._lasts_s:
            return f"its heartbeat could not be renewed for {silent_s:.0f} s"
        if self._stop.reason == FENCED:
            return "its attempt was given up for lost"
        if self._ray.silent_s() > RAY_GONE_S:
            return f"its Ray takes no connection for {RAY_GONE_S:.0f} s"
        return None

    def _arm(self, seconds: float) -> None:
        # Its default action ends the process. Where somebody handles the signal, the timer is theirs.
        if signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
            signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds + KERNEL_S))

    def _disarm(self) -> None:
        if signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
            signal.setitimer(signal.ITIMER_REAL, 0)


class _Ray:
    """Whether Ray's GCS takes connections, asked only once this process is connected to it."""

    def __init__(self) -> None:
        self._address: tuple[str, int] | None = None
        self._asked_at = time.monotonic()
        self._silent_since: float | None = None

    def silent_s(self) -> float:
        """For how many seconds it has not answered; where this process uses no Ray, it always does."""
        now = time.monotonic()
        if now - self._asked_at >= _ASK_S:
            self._asked_at = now
            if self.answers():
                self._silent_since = None
            elif self._silent_since is None:
                self._silent_since = now
        return 0.0 if self._silent_since is None else now - self._silent_since

    def answers(self) -> bool:
        self._address = self._address or _gcs_address()
        if self._address is None:
            return True
        try:
            socket.create_connection(self._address, timeout=_CONNECT_S).close()
        except OSError:
            return False
        return True


def _gcs_address() -> tuple[str, int] | None:
    ray: Any = sys.modules.get("ray")
    # It is None while Ray is being imported by another thread.
    if not getattr(ray, "is_initialized", lambda: False)():
        return None
    host, _, port = str(ray.get_runtime_context().gcs_address).rpartition(":")
    return host.strip("[]"), int(port)


def end_driver(name: str, why: str) -> None:
    """Kill everything that carries the attempt's name and everything below this process, then this process itself."""
    # Straight to the file: a log's lock may be held by whatever hangs.
    with suppress(OSError):
        os.write(2, f"{name}: this driver ends itself: {why}\n".encode())
    try:
        processes.end(psutil.Process(), attempts.MARK, name, limit_s=5.0)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)
