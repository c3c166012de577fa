"""A storage that waits out an outage. A job's own processes use it, so that an outage costs them only time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tunesmith.errors import STORAGE_FULL, StorageError
from tunesmith.storage.base import Entry, Storage

LONGEST_PAUSE_S = 15.0
"""Pauses between two tries grow from one second to this."""

FULL_PATIENCE_S = 60.0
"""How long a storage without room is waited for: it seldom gets some by itself."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class PatientStorage(Storage):
    """Another storage, whose calls are tried again after a StorageError, with growing pauses.

    An outage is given up once it has lasted `patience_s` seconds, a full storage after FULL_PATIENCE_S at most: then
    the StorageError is raised, and every later call tries once, until one goes through. Thread-safe; the threads of a
    process share what they know of an outage.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        patience_s: float,
        pause: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = storage.url
        self.impatient = storage
        """The storage itself, for what must not wait."""
        self._patience_s, self._pause, self._clock = patience_s, pause, clock
        self._lock = threading.Lock()
        self._away_since: float | None = None

    def get(self, key: str) -> bytes:
        return self.patiently(lambda: self.impatient.get(key))

    def put(self, key: str, data: bytes) -> None:
        self.patiently(lambda: self.impatient.put(key, data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        tries = 0

        def put() -> bool:
            nonlocal tries
            tries += 1
            # A try that was not answered may have gone through; a later one then meets its own write.
            return self.impatient.put_if_absent(key, data) or (tries > 1 and self.impatient.get(key) == data)

        return self.patiently(put)

    def exists(self, key: str) -> bool:
        return self.patiently(lambda: self.impatient.exists(key))

    def entries(self, prefix: str = "", *, after: str = "") -> Iterator[Entry]:
        return iter(self.patiently(lambda: list(self.impatient.entries(prefix, after=after))))

    def children(self, prefix: str = "") -> list[str]:
        return self.patiently(lambda: self.impatient.children(prefix))

    def delete(self, key: str) -> None:
        self.patiently(lambda: self.impatient.delete(key))

    def delete_folder(self, prefix: str) -> None:
        self.patiently(lambda: self.impatient.delete_folder(prefix))

    def upload_file(self, path: Path, key: str) -> None:
        self.patiently(lambda: self.impatient.upload_file(path, key))

    def download_file(self, key: str, path: Path) -> None:
        self.patiently(lambda: self.impatient.download_file(key, path))

    def local_path(self, key: str) -> Path | None:
        return self.impatient.local_path(key)

    def patiently(self, call: Callable[[], T]) -> T:
        """What `call` returns. It may be called several times. Raises StorageError at the end of patience."""
        pause_s = 1.0
        while True:
            try:
                result = call()
            except StorageError as error:
                if not self._is_worth_waiting(pause_s, is_full=error.code == STORAGE_FULL):
                    raise
                logger.warning("tried again in %.0f s: %s", pause_s, error.message)
            else:
                with self._lock:
                    self._away_since = None
                return result
            self._pause(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    def _is_worth_waiting(self, pause_s: float, *, is_full: bool) -> bool:
        patience_s = min(self._patience_s, FULL_PATIENCE_S) if is_full else self._patience_s
        with self._lock:
            now = self._clock()
            if self._away_since is None:
                self._away_since = now
            return now + pause_s - self._away_since <= patience_s
