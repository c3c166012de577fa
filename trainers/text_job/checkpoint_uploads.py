"""Checkpoints and evaluations on their way to storage, beside the training, which never waits for them."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainers.text_job.stored_checkpoints import upload_checkpoint
from tunesmith.clock import utc_text
from tunesmith.jobs.attempts import EventLine, attempt_name
from tunesmith.jobs.evaluation_record import Evaluation
from tunesmith.storage import layout
from tunesmith.storage.base import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Upload:
    what: str
    store: Callable[[], None]
    step: int | None = None
    """A checkpoint's."""


class Uploads:
    """Stores what one attempt leaves on its way, in order, in a thread; a context manager, which waits for the last.

    At most `keep` checkpoints wait on the disk: an older one would be deleted as soon as it was stored. What `storage`,
    a patient one, does not take in the end is said and left.
    """

    def __init__(self, storage: Storage, *, job_id: str, attempt: int, keep: int) -> None:
        self._storage, self._job_id, self._attempt, self._keep = storage, job_id, attempt, keep
        self._folder = Path(tempfile.gettempdir()) / f"tunesmith-{attempt_name(job_id, attempt)}-checkpoints"
        self._changed = threading.Condition()
        self._waiting: list[_Upload] = []
        self._events: list[EventLine] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._uploaded: list[int] = []

    def add_checkpoint(self, step: int, folder: Path) -> None:
        """Take the files of a whole checkpoint away from `folder`, and return."""
        place = self._folder / str(step)
        shutil.move(folder, place)

        def store() -> None:
            upload_checkpoint(self._storage, place, job_id=self._job_id, attempt=self._attempt, step=step)

        self._add(_Upload(f"checkpoint of step {step}", store, step))

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Take an evaluation, and return."""
        key = layout.evaluation(self._job_id, self._attempt, evaluation.step)
        data = evaluation.model_dump_json(indent=2).encode()
        self._add(_Upload(f"evaluation of step {evaluation.step}", lambda: self._storage.put(key, data)))

    def uploaded(self) -> list[int]:
        """Steps of the checkpoints whose files were stored since the last call."""
        with self._changed:
            steps, self._uploaded = self._uploaded, []
        return steps

    def troubles(self) -> list[EventLine]:
        """What could not be stored since the last call."""
        with self._changed:
            events, self._events = self._events, []
        return events

    def __enter__(self) -> Uploads:
        # A worker of this attempt that was killed may have left some.
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _add(self, upload: _Upload) -> None:
        with self._changed:
            self._waiting.append(upload)
            steps = [waiting.step for waiting in self._waiting if waiting.step is not None]
            late = set(steps[: -self._keep])
            self._waiting = [waiting for waiting in self._waiting if waiting.step not in late]
            self._changed.notify()
        for step in late:
            logger.info("%s: the checkpoint of step %d is passed over: newer ones wait", self._job_id, step)
            shutil.rmtree(self._folder / str(step))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                upload = self._waiting.pop(0)
            try:
                upload.store()
            except Exception as error:  # a thread's border: whatever it is, the training goes on
                logger.exception("%s: the %s could not be stored", self._job_id, upload.what)
                with self._changed:
                    self._events.append(
                        EventLine(time=utc_text(), message=f"{upload.what} could not be stored: {error}")
                    )
            else:
                if upload.step is not None:
                    with self._changed:
                        self._uploaded.append(upload.step)
            if upload.step is not None:
                shutil.rmtree(self._folder / str(upload.step), ignore_errors=True)
