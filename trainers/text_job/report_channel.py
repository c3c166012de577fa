"""The channel from workers to the driver: every report of theirs, through Ray Train and a Unix socket.

Ray Train calls back in its controller, an actor on the driver's node. The callback sends the reports to the driver and
waits for the answer, which comes once they are written.
"""

from __future__ import annotations

import logging
import secrets
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from ray.train.v2.api.callback import UserCallback

from trainers.attempt.report import Report

KEY = "tunesmith"
"""Under which a Report lies in the metrics of ray.train.report."""

logger = logging.getLogger(__name__)


class ForwardReports(UserCallback):  # type: ignore[misc]
    """Runs in Ray Train's controller; passes reports on to the driver."""

    def __init__(self, address: str, secret: bytes) -> None:
        self._address = address
        self._secret = secret
        self._connection: Connection | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if self._connection is None:
            self._connection = Client(self._address, "AF_UNIX", authkey=self._secret)
        self._connection.send([each[KEY] for each in metrics])
        # Once it is answered, it is written: no report is lost when the run ends.
        self._connection.recv()


class ReportSocket:
    """Hands the reports of all workers of a step on. A context manager; when it is left, no more are taken."""

    def __init__(self, take: Callable[[list[Report]], object]) -> None:
        """`take` gets them in the order of the workers' ranks."""
        self._take = take
        self._folder = tempfile.TemporaryDirectory(prefix="tunesmith-")
        self._secret = secrets.token_bytes(32)
        self._listener = Listener(str(Path(self._folder.name) / "reports"), "AF_UNIX", authkey=self._secret)
        self._closed = False
        threading.Thread(target=self._accept, name="reports", daemon=True).start()

    def callback(self) -> ForwardReports:
        """For RunConfig(callbacks=[…]) of one run of the workers."""
        return ForwardReports(str(self._listener.address), self._secret)

    def __enter__(self) -> ReportSocket:
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed = True
        self._listener.close()
        self._folder.cleanup()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except (EOFError, OSError, AuthenticationError) as error:
                if not self._closed:
                    logger.warning("a caller of the report socket was sent away: %r", error)
                continue
            threading.Thread(target=self._read, args=(connection,), name="reports", daemon=True).start()

    def _read(self, connection: Connection) -> None:
        with connection:
            while True:
                try:
                    self._take(connection.recv())
                    connection.send(None)
                except (EOFError, OSError):
                    return  # the controller is gone
