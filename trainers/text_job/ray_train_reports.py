"""Reports on their way through Ray Train, from the workers to the driver."""

from __future__ import annotations

from multiprocessing.connection import Client, Connection
from typing import Any

from ray.train.v2.api.callback import UserCallback

KEY = "tunesmith"
"""Under which a Report lies in the metrics of ray.train.report."""


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
