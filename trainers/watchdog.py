"""Ends a worker that makes no progress, and says where it stood."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable


class Watchdog:
    """Calls `hung` with the stacks of all threads once `timeout_s` seconds pass without a beat; a context manager.

    A worker hangs with its peers: each waits for the others in a collective, so each says where it stands.
    """

    def __init__(self, timeout_s: float, hung: Callable[[str], object]) -> None:
        self._timeout_s, self._hung = timeout_s, hung
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.beat()

    def beat(self) -> None:
        """There is progress."""
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(max(0.0, self._last + self._timeout_s - time.monotonic())):
            if time.monotonic() - self._last >= self._timeout_s:
                self._hung(stacks())
                return


def stacks() -> str:
    """Where every thread of this process stands, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}"
        for number, frame in sys._current_frames().items()
    ]
    return "\n".join(parts)
