"""Threads that work side by side, each subject in one of them at a time."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

Task = Callable[[], object]


class Lanes:
    """Lanes of some threads each. Only one thread at a time works on a subject.

    A task that hangs holds up no other subject, as long as its lane has another thread. Threads live while there is
    work, and keep no process alive.
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        """`widths`: how many threads each lane may have."""
        self._widths = dict(widths)
        self._threads = dict.fromkeys(widths, 0)
        self._waiting: dict[str, deque[tuple[str, Task]]] = {lane: deque() for lane in widths}
        self._under_way: dict[tuple[str, str], Task | None] = {}
        """The subjects that wait or are worked on, and the task that came meanwhile, which follows."""
        self._changed = threading.Condition()
        self._closed = False

    def hand(self, lane: str, subject: str, task: Task) -> None:
        """Have a task done soon. Of tasks that come while the subject is worked on, the newest is kept."""
        with self._changed:
            if self._closed:
                return
            if (lane, subject) in self._under_way:
                self._under_way[lane, subject] = task
                return
            self._under_way[lane, subject] = None
            self._waiting[lane].append((subject, task))
            if self._threads[lane] < self._widths[lane]:
                self._threads[lane] += 1
                threading.Thread(target=self._work, args=(lane,), name=lane, daemon=True).start()

    def is_busy(self, lane: str, subject: str) -> bool:
        return (lane, subject) in self._under_way

    def wait(self, timeout_s: float) -> bool:
        """Wait until nothing is under way, not even what tasks have handed on; False when the time is over first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._under_way, timeout_s)

    def close(self) -> None:
        """Begin no more tasks. Those under way go on."""
        with self._changed:
            self._closed = True
            for lane, waiting in self._waiting.items():
                for subject, _ in waiting:
                    del self._under_way[lane, subject]
                waiting.clear()
            self._changed.notify_all()

    def _work(self, lane: str) -> None:
        while (taken := self._take(lane)) is not None:
            subject, task = taken
            try:
                task()
            except Exception:
                logger.exception("%s: a task of the lane %s failed", subject, lane)
            self._end(lane, subject)

    def _take(self, lane: str) -> tuple[str, Task] | None:
        with self._changed:
            if not self._waiting[lane]:
                self._threads[lane] -= 1
                return None
            return self._waiting[lane].popleft()

    def _end(self, lane: str, subject: str) -> None:
        with self._changed:
            following = self._under_way.pop((lane, subject))
            if following is not None and not self._closed:
                self._under_way[lane, subject] = None
                self._waiting[lane].append((subject, following))
            self._changed.notify_all()


class Countdown:
    """Calls `then` once `begin` was called and every task that was added is done."""

    def __init__(self, then: Task) -> None:
        self._then = then
        self._left = 1
        self._lock = threading.Lock()

    def add(self, task: Task) -> Task:
        """The same task, counted."""
        with self._lock:
            self._left += 1

        def counted() -> None:
            try:
                task()
            finally:
                self.begin()

        return counted

    def begin(self) -> None:
        """From now on, no task is added."""
        with self._lock:
            self._left -= 1
            is_over = self._left == 0
        if is_over:
            self._then()
