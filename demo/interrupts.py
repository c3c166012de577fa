"""Interruptions, which often come as several signals at once: from a terminal, from make, from a shell that closes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

LEAVE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt_on_leave() -> None:
    """Let each of these signals end the program as Ctrl-C does."""
    for number in LEAVE:
        signal.signal(number, signal.default_int_handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore these signals inside the context, so that what is done on leaving is done to its end."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in LEAVE}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
