"""Ends a worker that makes no progress, and says where it stood."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

HUNG = 87
"""Exit code of a worker that made no progress."""

FAREWELL_S = 10.0
"""How long such a worker lives on: for its log to reach storage, and for its peers, which hang with it, to speak."""

logger = logging.getLogger(__name__)


class Watchdog:
    """Calls `hung` with the stacks of all threads once `timeout_s` seconds pass without a beat; a context manager.

    A worker hangs with its peers: each waits for the others in a collective, so each says where it stands.
    """

    def __init__(
        self, timeout_s: float, hung: Callable[[str], object], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._timeout_s, self._hung, self._clock = timeout_s, hung, clock
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.beat()

    def beat(self) -> None:
        """There is progress."""
        self._last = self._clock()

    def __enter__(self) -> Watchdog:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(max(0.0, self._last + self._timeout_s - self._clock())):
            if self._clock() - self._last >= self._timeout_s:
                self._hung(stacks())
                return


def end_hung(where: str, timeout_s: float, tell: Callable[[], object]) -> None:
    """Say `where` all threads stood, `tell` the driver that it was a hang, and end this process.

    Ray sees a lost worker, and the driver starts all again from the newest checkpoint. Nothing is waited for beyond
    FAREWELL_S: storage, and Ray too, may be what it hangs on; the process's stderr has it all the same.
    """
    text = f"no progress for {timeout_s:g} s, this worker ends; it stood here:\n{where}"
    logger.error("%s", text)
    for last in (tell, _flush_logs, lambda: sys.stderr.write(f"{text}\n")):
        threading.Thread(target=_try, args=(last,), name="farewell", daemon=True).start()
    time.sleep(FAREWELL_S)
    os._exit(HUNG)


def _flush_logs() -> None:
    for handler in logging.getLogger().handlers:
        handler.flush()


def _try(last: Callable[[], object]) -> None:
    with suppress(Exception):
        last()


def stacks() -> str:
    """Where every thread of this process stands, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}"
        for number, frame in sys._current_frames().items()
    ]
    return "\n".join(parts)
