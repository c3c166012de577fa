"""Waiting for what another process or thread does."""

import time
from collections.abc import Callable


def until(condition: Callable[[], bool], *, limit_s: float = 240.0) -> None:
    """Ask until the condition holds; fails where it does not within `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not come true within {limit_s:g} s"
        time.sleep(0.02)
