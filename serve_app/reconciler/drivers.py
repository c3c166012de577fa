"""Whether the drivers of attempts live: by their heartbeats, and by their processes where those are on this node."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum

import psutil
from pydantic import ValidationError

from tunesmith import processes
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import DriverProcess, Heartbeat, attempt_name
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage

Key = tuple[str, int]
"""Job and attempt."""


class Life(Enum):
    """What is known of a driver."""

    LIVES = "lives"
    SILENT = "silent"
    """Its heartbeat stands still: it hangs, is cut off from storage, or is gone."""
    GONE = "gone"
    """Its process is proven dead, or it has been silent for as long as it would go on at most."""


@dataclass
class _Watched:
    beat: Heartbeat | None
    looked_at: float
    unchanged_s: float = 0.0
    """For how long the heartbeat was seen unchanged, while storage answered."""


class Drivers:
    """Judges by this process's own clock alone. What it forgets makes it wait longer, never less."""

    def __init__(
        self,
        storage: Storage,
        settings: Settings,
        now: Callable[[], float],
        *,
        ask: Callable[[DriverProcess], bool | None],
    ) -> None:
        """`ask`: whether a process on another node lives; None where nobody there can say so."""
        self._storage, self._settings, self._now, self._ask = storage, settings, now, ask
        self._pause_s = settings.heartbeat_s / 4
        """Between two looks at a heartbeat, or two questions to another node."""
        self._watched: dict[Key, _Watched] = {}
        self._asked: dict[Key, tuple[float, bool]] = {}
        """When another node was asked last, and whether it called the process dead."""
        self._node = processes.node()
        self._lock = threading.Lock()

    def life(self, key: Key, process: DriverProcess, *, in_doubt: bool) -> Life:
        """Look at a driver; StorageError where its heartbeat cannot be read. `in_doubt`: other nodes are asked too."""
        if self._is_dead(key, process, in_doubt=in_doubt):
            return Life.GONE
        watched = self._look(key)
        if watched.unchanged_s >= (watched.beat.lasts_s if watched.beat else self._settings.heartbeat_lasts_s):
            return Life.GONE
        return Life.SILENT if watched.unchanged_s >= self._settings.heartbeat_stale_s else Life.LIVES

    def end(self, key: Key, process: DriverProcess) -> bool:
        """Kill what is left of a fenced attempt on this node; whether its driver is gone."""
        if process.node == self._node:
            name = attempt_name(*key)
            processes.end(self._own(process, name), attempts.MARK, name, limit_s=5.0)
        return self.life(key, process, in_doubt=True) is Life.GONE

    def keep(self, job_ids: Collection[str]) -> None:
        """Forget all jobs but these."""
        with self._lock:
            self._watched = {key: watched for key, watched in self._watched.items() if key[0] in job_ids}
            self._asked = {key: asked for key, asked in self._asked.items() if key[0] in job_ids}

    def forget(self, key: Key) -> None:
        with self._lock:
            self._watched.pop(key, None)
            self._asked.pop(key, None)

    def _is_dead(self, key: Key, process: DriverProcess, *, in_doubt: bool) -> bool:
        if process.node == self._node:
            return processes.find(process.pid, process.created) is None
        now = self._now()
        asked_at, dead = self._asked.get(key, (-math.inf, False))
        if in_doubt and not dead and not 0 <= now - asked_at < self._pause_s:
            dead = self._ask(process) is False
            with self._lock:
                self._asked[key] = now, dead
        return dead

    def _own(self, process: DriverProcess, name: str) -> psutil.Process | None:
        """The driver, where it bears the attempt's name itself: a claim is no reason to kill just any process."""
        found = processes.find(process.pid, process.created)
        try:
            return found if found is not None and found.environ().get(attempts.MARK) == name else None
        except psutil.Error:
            return None

    def _look(self, key: Key) -> _Watched:
        now, watched = self._now(), self._watched.get(key)
        if watched is not None and 0 <= now - watched.looked_at < self._pause_s:
            return watched
        try:
            beat = attempts.read_heartbeat(self._storage, *key)
        except ValidationError:
            beat = None
        if watched is None or watched.beat != beat:
            watched = _Watched(beat, now)
        else:
            # While storage was away nobody could renew it, nor was it looked at: a gap counts for one beat at most.
            gap_s = min(max(0.0, now - watched.looked_at), self._settings.heartbeat_s)
            watched = _Watched(beat, now, watched.unchanged_s + gap_s)
        with self._lock:
            self._watched[key] = watched
        return watched
