"""Follows an attempt on the cluster: starts it, takes in its events, and closes it from its result.

The attempt's own records say what happened. Of a driver without a result the heartbeat and the process say whether it
lives, whatever Ray says; Ray's word counts before the driver has claimed its attempt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from pydantic import ValidationError

from serve_app.reconciler.driver_events import DriverEvents
from serve_app.reconciler.drivers import Drivers, Life
from serve_app.reconciler.launcher import ALIVE, STOP_WAIT_S, Launcher, RayJob
from serve_app.reconciler.lease import LeasedRecords
from tunesmith import clock, taken_down
from tunesmith.assets.catalog import published
from tunesmith.errors import ConflictError
from tunesmith.jobs import attempts
from tunesmith.jobs.attempts import Claim, EventLine, Result
from tunesmith.jobs.spec import RegisterJob
from tunesmith.jobs.states import Change
from tunesmith.records.record import Line, Record
from tunesmith.records.store import RecordStore
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.base import Storage

ENDED_S = 2.0
"""How long Ray must have called an attempt ended before it is fenced: its last writes may be under way."""

FORCED_S = STOP_WAIT_S + 30.0
"""How long Ray's own stop may take before a stopping attempt is fenced all the same, seconds."""

REGISTER_RETRIES = 1
"""Further attempts of a registration after a lost one."""

_WAY = {
    ("preparing", "completed"): "running",
    ("preparing", "stopped"): "stopping",
    ("running", "stopped"): "stopping",
}
"""Ends that a state reaches in two moves, and the state between."""

logger = logging.getLogger(__name__)


class Supervisor:
    """One `step` a round for every job on the cluster. All it remembers can be lost and is found again.

    Several threads may call `step`, each for another job.
    """

    def __init__(
        self,
        records: LeasedRecords,
        *,
        storage: Storage,
        launcher: Launcher,
        settings: Settings,
        now: Callable[[], float],
    ) -> None:
        self._records = records
        self._storage = storage
        self._launcher = launcher
        self._settings = settings
        self._now = now
        self._lines = DriverEvents(storage)
        self._drivers = Drivers(storage, settings, now, ask=launcher.lives)
        self._claims: dict[tuple[str, int], Claim] = {}
        self._contradicted: set[tuple[str, int]] = set()
        """Attempts that live although Ray calls them ended, once that was said."""
        self._ended_since: dict[tuple[str, int], float] = {}
        self._stopping_since: dict[str, float] = {}

    def step(self, record: Record) -> None:
        """Take a job in one of states.ON_CLUSTER as far as it goes now."""
        # The result before the lines: a driver writes it last, so that no line is missed when it is there.
        result = self._result(record)
        record = self._take_events(record)
        if result is None:
            result = self._judge(record)
        if result is not None and self._ended(record, result):
            self._close(record, result)
            self._forget(record)

    def _result(self, record: Record) -> Result | None:
        try:
            return attempts.read_result(self._storage, record.id, record.status.attempt)
        except ValidationError as error:
            message = f"result.json cannot be read: {error}"
            return Result(outcome="failed", reason="platform_error", message=message, time=clock.utc_text(self._now()))

    def _take_events(self, record: Record) -> Record:
        attempt = record.status.attempt
        taken = self._records.store.taken_lines(record.id, attempt)
        for number, line in self._lines.unread(record.id, attempt, taken=taken):
            record = self._take_event(record, line, Line(attempt, number))
        return record

    def _take_event(self, record: Record, event: EventLine, line: Line) -> Record:
        # A driver says that it runs. Only result.json ends a job, and the other moves are ours.
        is_news = event.state == "running" and record.status.state == "preparing"
        state = "running" if is_news else None
        change = Change(state=state, phase=event.phase, message=event.message)
        return self._records.change(record, change, data=event.data, line=line, at=event.time)

    def _judge(self, record: Record) -> Result | None:
        """How an attempt without a result ended; None while it may go on. Starts it where it never was."""
        stopping = record.status.state == "stopping"
        if stopping and record.id not in self._stopping_since:
            attempts.request_stop(self._storage, record.id, record.status.reason or "stopped_by_user")
            self._stopping_since[record.id] = became(self._records.store, record, "stopping")
        claim = self._claim(record)
        # Who holds the claim is the driver, whoever started it.
        owner = claim.submission_id if claim else record.submission_id
        told = self._launcher.status(owner) if owner is not None else None
        if claim is None and told is None and not stopping:
            job_url = layout.join(self._storage.url, layout.job_json(record.id))
            self._launcher.submit(record.id, record.status.attempt, job_url, account=record.account)
            return None
        # A driver that was not started as a Ray Job has no owner: Ray cannot be asked after it, so it counts as alive.
        ended = owner is not None and (told is None or told.status not in ALIVE)
        if claim is not None and claim.process is not None:
            life = self._drivers.life(_key(record), claim.process, in_doubt=ended)
            if life is Life.SILENT:
                return self._bury(record, claim, None, f"no sign of life for {self._settings.heartbeat_stale_s:g} s")
            if life is Life.GONE and ended:
                return self._bury(record, claim, told, _words(told))
            if life is Life.LIVES and ended:
                self._contradict(record, told)
            ended = life is Life.GONE
        if not ended:
            self._ended_since.pop(_key(record), None)
            return self._hurry(record, owner) if stopping else None
        since = self._ended_since.setdefault(_key(record), self._now())
        if self._now() - since < ENDED_S:
            return None
        says = _words(told) if told is None or told.status not in ALIVE else "its driver is gone"
        return self._bury(record, claim, told, says)

    def _contradict(self, record: Record, told: RayJob | None) -> None:
        """Say once that Ray calls an attempt ended whose driver lives."""
        if _key(record) in self._contradicted:
            return
        self._contradicted.add(_key(record))
        message = f"{_words(told)}, but the driver of attempt {record.status.attempt} lives: it goes on"
        self._records.change(record, Change(message=message), data={"ray_status": told.status if told else None})
        logger.warning("%s: %s", record.id, message)

    def _ended(self, record: Record, result: Result) -> bool:
        """End what a fenced attempt has left on this node; whether nobody is at work for it any more."""
        claim = self._claim(record) if result.fenced else None
        if claim is None or claim.process is None or self._drivers.end(_key(record), claim.process):
            return True
        if claim.submission_id is not None:
            self._launcher.stop(claim.submission_id)
        return False

    def _claim(self, record: Record) -> Claim | None:
        key = _key(record)
        if key not in self._claims:
            claim = attempts.read_claim(self._storage, *key)
            if claim is None:
                return None
            self._claims[key] = claim
        return self._claims[key]

    def _hurry(self, record: Record, owner: str | None) -> Result | None:
        """Ray's stop for a stopping attempt that takes too long; after that, its end without it."""
        waited_s = self._now() - self._stopping_since.get(record.id, self._now())
        if waited_s < self._settings.stop_grace_s:
            return None
        if owner is not None:
            self._launcher.stop(owner)
            if waited_s < self._settings.stop_grace_s + FORCED_S:
                return None
        message = f"stopped without a last checkpoint: it had not ended after {waited_s:.0f} s"
        return self._fence(
            record, owner, outcome="stopped", reason=record.status.reason or "stopped_by_user", message=message
        )

    def _bury(self, record: Record, claim: Claim | None, told: RayJob | None, says: str) -> Result:
        """The end of an attempt whose driver is gone, or silent, without a result; `says` is how that is known."""
        owner = claim.submission_id if claim else record.submission_id
        process = claim.process if claim else None
        if self._is_published(record):
            return self._fence(
                record,
                owner,
                outcome="completed",
                reason=None,
                message=f"published, but its driver did not say so; {says}",
            )
        if told is not None and told.status == "STOPPED":
            reason = record.status.reason if record.status.state == "stopping" else None
            return self._fence(
                record, owner, outcome="stopped", reason=reason or "stopped_by_user", message="stopped through Ray"
            )
        if process is not None and taken_down.was_taken_down(self._settings, process.platform):
            return self._fence(record, owner, outcome="lost", reason="preempted", message="the platform was taken down")
        return self._fence(record, owner, outcome="lost", reason="worker_lost", message=says)

    def _fence(self, record: Record, owner: str | None, *, outcome: str, reason: str | None, message: str) -> Result:
        """Make sure that the attempt's driver does nothing more; how it ended: the driver's own result stands.

        The end is written down at once, so that a restart finds it. The claim names the driver, so that a restart
        between the two writes still asks Ray after it.
        """
        time = clock.utc_text(self._now())
        attempts.claim(self._storage, *_key(record), Claim(submission_id=owner, time=time))
        end = {"outcome": outcome, "reason": reason, "message": message, "time": time, "fenced": True}
        result = Result.model_validate(end)
        return attempts.finish(self._storage, *_key(record), result)

    def _is_published(self, record: Record) -> bool:
        try:
            return published(self._storage, *record.output, by=record.id) is not None
        except ConflictError:  # another job did: the next attempt will say so
            return False

    def _close(self, record: Record, result: Result) -> None:
        if result.outcome == "lost" and record.status.state != "stopping":
            self._close_lost(record, result)
            return
        state = "stopped" if result.outcome == "lost" else result.outcome
        way = _WAY.get((record.status.state, state))
        if way is not None:
            record = self._records.change(record, Change(state=way), at=result.time)
        data = {**result.summary, **({"error": result.error} if result.error else {})}
        change = Change(state=state, reason=_reason(record, result), message=result.message)
        self._records.change(record, change, data=data, at=result.time)
        logger.info("%s: %s", record.id, state)

    def _close_lost(self, record: Record, result: Result) -> None:
        attempt = record.status.attempt
        retries = REGISTER_RETRIES if isinstance(record.job, RegisterJob) else record.job.advanced.max_retries
        losses = attempts.losses(self._storage, record.id, up_to=attempt)
        what = f"attempt {attempt} was lost: {result.message}"
        if losses <= retries:
            pause_s = attempts.retry_pause_s(attempt)
            follows = f"attempt {attempt + 1} follows" + (f" in {pause_s:.0f} s" if pause_s else "")
            change = Change(state="queued", reason=result.reason or "worker_lost", message=f"{what}; {follows}")
        else:
            change = Change(
                state="failed", reason="worker_lost", message=f"{what}; {losses} were lost, it was the last"
            )
        self._records.change(record, change, data={"lost_attempt": attempt})
        logger.warning("%s: %s", record.id, change.message)

    def keep(self, job_ids: Collection[str]) -> None:
        """Forget all jobs but these."""
        self._lines.keep(job_ids)
        self._drivers.keep(job_ids)
        # The copies: other threads add to these meanwhile.
        self._contradicted -= {key for key in list(self._contradicted) if key[0] not in job_ids}
        for notes in (self._claims, self._ended_since):
            for key in list(notes):
                if key[0] not in job_ids:
                    notes.pop(key, None)
        for job_id in list(self._stopping_since):
            if job_id not in job_ids:
                self._stopping_since.pop(job_id, None)

    def _forget(self, record: Record) -> None:
        self._lines.forget(*_key(record))
        self._drivers.forget(_key(record))
        self._contradicted.discard(_key(record))
        self._claims.pop(_key(record), None)
        self._ended_since.pop(_key(record), None)
        self._stopping_since.pop(record.id, None)


def became(store: RecordStore, record: Record, state: str) -> float:
    """When the job last became `state`, seconds since the epoch. Its events say it, so a restart changes nothing."""
    return clock.seconds(store.last_entry(record.id, state) or record.updated_at)


def _words(told: RayJob | None) -> str:
    if told is None:
        return "Ray no longer knows its driver"
    return f"Ray says {told.status}" + (f": {told.message}" if told.message else "")


def _key(record: Record) -> tuple[str, int]:
    return record.id, record.status.attempt


def _reason(record: Record, result: Result) -> str | None:
    if result.outcome == "completed":
        return None
    if result.outcome == "failed":
        return result.reason or "platform_error"
    if result.outcome == "lost":
        return record.status.reason or "stopped_by_user"
    return result.reason or "stopped_by_user"
