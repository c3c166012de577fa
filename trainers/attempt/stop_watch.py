"""Whether the job of an attempt is to stop, and why. The driver and every worker look for it beside their work."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tunesmith.clock import utc_text
from tunesmith.errors import LeaseLostError, TunesmithError
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import Result
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.storage.patience import PatientStorage

LOOK_S = 1.0
"""Between two looks at storage, seconds."""

FENCED = "worker_lost"
"""The reason of an attempt that was given up for lost: it must neither save nor publish."""

_WORDS = {
    "time_limit": "its time limit was reached",
    "stopped_by_user": "it was stopped",
    "balance": "the account's balance ran out",
    "preempted": "it had to make room for another job",
}

logger = logging.getLogger(__name__)


class StoppedError(Exception):
    """The job is to stop, for the reason `args[0]`."""


class StopWatch:
    """Knows why a job is to stop: its stop object, the end of its time, or a result that another wrote (`FENCED`).

    A storage that does not answer is no reason to stop, and none to go on beyond the job's time: whoever works asks
    for `reason`, which never waits; a thread looks at storage.
    """

    def __init__(
        self,
        storage: Storage,
        job_id: str,
        attempt: int,
        *,
        deadline: float | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`deadline`: when the job's time is used up, seconds since the epoch."""
        self.deadline = deadline
        self._storage = storage.impatient if isinstance(storage, PatientStorage) else storage
        self._job_id, self._attempt, self._clock = job_id, attempt, clock
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        """Why the job is to stop, one of states.REASONS; None while it may go on. Only FENCED replaces another."""
        if self._reason is None and self.deadline is not None and self._clock() >= self.deadline:
            self._reason = "time_limit"
        return self._reason

    def check(self) -> None:
        """Raise StoppedError where the job is to stop."""
        if (reason := self.reason) is not None:
            raise StoppedError(reason)

    def look(self) -> None:
        """Look at storage once."""
        self._reason = self._seen()

    def _seen(self) -> str | None:
        try:
            if self._storage.exists(layout.result(self._job_id, self._attempt)):
                return FENCED
            if self.reason is None and (wish := attempts.read_stop(self._storage, self._job_id)) is not None:
                return wish.reason
        except (TunesmithError, OSError) as error:
            logger.warning("%s: the stop object could not be looked for: %s", self._job_id, error)
        return self.reason

    @contextmanager
    def watching(self) -> Iterator[StopWatch]:
        """Look again and again, in a thread."""
        done = threading.Event()

        def look() -> None:
            while self._reason != FENCED and not done.wait(LOOK_S):
                seen = self._seen()
                # A look may take minutes, and then finds the result that this attempt has written itself.
                if not done.is_set():
                    self._reason = seen

        thread = threading.Thread(target=look, name="stop", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            done.set()
            # A look at a storage that does not answer may take minutes.
            thread.join(LOOK_S)


def stopped(reason: str, where: str, summary: Mapping[str, Any] | None = None) -> Result:
    """The result of a stopped attempt. `where` says how far it got. LeaseLostError where the attempt was fenced."""
    if reason == FENCED:
        raise LeaseLostError("the attempt was given up for lost")
    message = f"{_WORDS.get(reason, reason)}{where}"
    return Result(outcome="stopped", reason=reason, message=message, time=utc_text(), summary=dict(summary or {}))
