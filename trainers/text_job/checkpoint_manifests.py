"""Checkpoints in storage, from the driver's side: their manifests, which make them count."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from tunesmith.jobs.attempts import EventWriter, checkpoints
from tunesmith.storage import layout
from tunesmith.storage.base import Storage

logger = logging.getLogger(__name__)


class CheckpointManifests:
    """Writes the manifest of each stored checkpoint of an attempt, once storage has all metrics up to its step.

    So whoever goes on from a checkpoint does no step before it again. It works in a thread, so that no worker waits for
    storage, and is a context manager: when it is left, all that it was told of is done. Of the attempt's checkpoints
    the newest `keep` stay.
    """

    def __init__(
        self,
        storage: Storage,
        job_id: str,
        attempt: int,
        *,
        keep: int,
        events: EventWriter,
        flush: Callable[[], object],
    ) -> None:
        """`flush` returns once all metrics that were reported are stored."""
        self._storage, self._job_id, self._attempt, self._keep = storage, job_id, attempt, keep
        self._events, self._flush = events, flush
        self._steps: queue.Queue[int | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)

    def add(self, step: int) -> None:
        """The files of the checkpoint of this step are stored, and the metrics up to it are reported."""
        self._steps.put(step)

    def settle(self, last_step: int) -> None:
        """Wait until all is done, of checkpoints too whose workers were lost before they could tell of them.

        `last_step` is the newest that was reported: the metrics of later ones are lost.
        """
        self._steps.join()
        for step in self._untold():
            if step <= last_step:
                self.add(step)
        self._steps.join()

    def __enter__(self) -> CheckpointManifests:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._steps.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            try:
                self._write(step)
            except Exception as error:  # a thread's border: whatever it is, the training goes on
                logger.exception("%s: the checkpoint of step %d does not count", self._job_id, step)
                self._events.write(f"checkpoint of step {step} could not be stored: {error}")
            else:
                self._events.write(f"checkpoint of step {step} saved", checkpoint_step=step)
            self._steps.task_done()

    def _write(self, step: int) -> None:
        prefix = layout.checkpoint(self._job_id, self._attempt, step)
        manifest = layout.checkpoint_manifest(prefix)
        if not self._storage.exists(manifest):
            self._flush()
            self._storage.put(manifest, self._storage.get(layout.checkpoint_list(prefix)))
        own = [each for each in checkpoints(self._storage, self._job_id) if each.attempt == self._attempt]
        for old in own[: -self._keep]:
            # Without its manifest it no longer counts, however far the deletion gets.
            self._storage.delete(layout.checkpoint_manifest(old.key))
            self._storage.delete_folder(old.key)

    def _untold(self) -> list[int]:
        """Steps whose files are all stored, and which do not count."""
        prefix = layout.checkpoints(self._job_id, self._attempt)
        there = {entry.key for entry in self._storage.entries(prefix)}
        steps = {int(name) for key in there if (name := key.removeprefix(f"{prefix}/").partition("/")[0]).isdecimal()}
        places = {step: layout.checkpoint(self._job_id, self._attempt, step) for step in sorted(steps)}
        return [
            step
            for step, place in places.items()
            if layout.checkpoint_list(place) in there and layout.checkpoint_manifest(place) not in there
        ]
