"""What passes between a driver and the rest of the platform: the records of one attempt in the job's folder.

A driver claims its attempt, appends events and metrics, and ends with one result. Whoever must be sure that a driver is
gone (the reconciler) fences the attempt: it takes the claim, or the result, before the driver can.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError

from tunesmith.assets.stored_files import File, StoredFiles
from tunesmith.clock import seconds, utc_text
from tunesmith.errors import NotFoundError, TunesmithError
from tunesmith.frozen import Frozen, Tolerant
from tunesmith.jobs.states import PHASES, REASONS
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.storage.segments import SegmentWriter

logger = logging.getLogger(__name__)


def _one_of(words: tuple[str, ...]) -> Callable[[str], str]:
    def check(word: str) -> str:
        if word not in words:
            raise ValueError(f"it must be one of {', '.join(words)}, got {word!r}")
        return word

    return check


Phase = Annotated[str, AfterValidator(_one_of(PHASES))]
"""One of states.PHASES, checked."""

Reason = Annotated[str, AfterValidator(_one_of(REASONS))]
"""One of states.REASONS, checked."""

MARK = "TUNESMITH_ATTEMPT_NAME"
"""Variable that the driver of an attempt and all that it starts carry, with the attempt's name."""


class DriverProcess(Tolerant):
    """The process of a driver, so that another on its node can see whether it lives."""

    host: str
    node: str
    """As processes.node: where `pid` means this process."""
    pid: int
    created: float
    """When it was created, seconds since the epoch."""
    platform: str | None = None
    """The mark of the local platform that it belongs to."""


class Claim(Tolerant):
    """`claim`: who runs an attempt."""

    submission_id: str | None
    """Ray's id of the driver's job; None where Ray does not know the driver as a job."""
    time: str
    process: DriverProcess | None = None
    """None where the attempt was claimed so that no driver can."""


class Heartbeat(Tolerant):
    """`heartbeat`: that the attempt's driver lives."""

    count: int
    """Grows with every beat."""
    time: str
    lasts_s: float
    """A driver that cannot renew it for so long has ended itself, and all that it started."""


class Result(Tolerant):
    """`result.json`: how an attempt ended."""

    outcome: Literal["completed", "failed", "stopped", "lost"]
    """`lost` is written for a driver that is gone without a result of its own."""
    reason: Reason | None = None
    """None for `completed`."""
    message: str | None = None
    error: dict[str, Any] | None = None
    """`failed`: the error (TunesmithError.as_dict)."""
    time: str
    summary: dict[str, Any] = Field(default={})
    """Steps done, held-out losses and the like."""
    fenced: bool = False
    """Not written by the attempt's driver, which may still live: see its heartbeat."""


class StopWish(Tolerant):
    """`stop`: that a job is to stop."""

    time: str
    reason: str
    """One of states.REASONS."""


class EventLine(Tolerant):
    """One line of an attempt's events: a change of the job's status as its driver tells it."""

    time: str
    state: str | None = None
    """A driver may say `running`; how its attempt ended is said by its result alone."""
    phase: Phase | None = None
    message: str | None = None
    data: dict[str, Any] = Field(default={})


class MetricLine(Tolerant):
    """One line of an attempt's metrics (docs/contracts.md, section 7)."""

    # JSON has no NaN: a loss that is not a number is written as the text "NaN", and read as a number again.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    time: str
    attempt: int
    step: int
    rank: int | None
    """The worker it was measured on; None for the whole job."""
    name: str
    value: float


class Checkpoint(Frozen):
    """A whole checkpoint, found by its manifest."""

    attempt: int
    step: int
    key: str
    """Its prefix in storage."""


class CheckpointManifest(Tolerant):
    """`manifest.json` of a checkpoint: what makes it whole."""

    step: int
    files: list[File]


class EventWriter:
    """Appends events of one attempt. One writer an attempt; a context manager."""

    def __init__(self, storage: Storage, job_id: str, attempt: int, *, segment_s: float = 5.0) -> None:
        self._segments = SegmentWriter(storage, layout.events(job_id, attempt), max_age_s=segment_s)

    def write(
        self,
        message: str | None = None,
        *,
        state: str | None = None,
        phase: str | None = None,
        **data: Any,
    ) -> None:
        self.append(EventLine(time=utc_text(), state=state, phase=phase, message=message, data=data))

    def append(self, line: EventLine) -> None:
        """An event that happened at its own time, elsewhere."""
        self._segments.write(line.model_dump_json().encode() + b"\n")

    def flush(self) -> None:
        self._segments.flush()

    def close(self) -> None:
        self._segments.close()

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def attempt_name(job_id: str, number: int) -> str:
    """The name of an attempt outside of storage; Ray's id of its driver. Ray refuses a used one."""
    return f"{job_id}-a{number}"


def attempt_numbers(storage: Storage, job_id: str) -> list[int]:
    """Numbers of the attempts that have left anything, in their order."""
    names = storage.children(layout.attempts(job_id))
    return sorted(int(name) for name in names if re.fullmatch(r"[1-9][0-9]{0,8}", name))


def used_s(storage: Storage, job_id: str, *, before: int) -> float:
    """Seconds that the attempts before this one took in all, from claim to result, or to the last sign of life."""
    total = 0.0
    for number in range(1, before):
        claimed = read_claim(storage, job_id, number)
        last = read_result(storage, job_id, number) or read_heartbeat(storage, job_id, number)
        if claimed is not None and last is not None:
            total += max(0.0, seconds(last.time) - seconds(claimed.time))
    return total


def losses(storage: Storage, job_id: str, *, up_to: int) -> int:
    """How many of the attempts were lost by chance: one that was ended with its platform is no loss."""
    results = (read_result(storage, job_id, number) for number in range(1, up_to + 1))
    return sum(result is None or result.reason != "preempted" for result in results)


def claim(storage: Storage, job_id: str, attempt: int, claimed_by: Claim) -> bool:
    """Take the attempt; False where it was taken before."""
    return storage.put_if_absent(layout.claim(job_id, attempt), claimed_by.model_dump_json().encode())


def read_claim(storage: Storage, job_id: str, attempt: int) -> Claim | None:
    text = _get(storage, layout.claim(job_id, attempt))
    return None if text is None else Claim.model_validate_json(text)


def write_heartbeat(storage: Storage, job_id: str, attempt: int, beat: Heartbeat) -> None:
    storage.put(layout.heartbeat(job_id, attempt), beat.model_dump_json().encode())


def read_heartbeat(storage: Storage, job_id: str, attempt: int) -> Heartbeat | None:
    text = _get(storage, layout.heartbeat(job_id, attempt))
    return None if text is None else Heartbeat.model_validate_json(text)


def finish(storage: Storage, job_id: str, attempt: int, result: Result) -> Result:
    """Write the attempt's result once; the one that counts, which another may have written before."""
    storage.put_if_absent(layout.result(job_id, attempt), result.model_dump_json(indent=2).encode())
    return Result.model_validate_json(storage.get(layout.result(job_id, attempt)))


def read_result(storage: Storage, job_id: str, attempt: int) -> Result | None:
    text = _get(storage, layout.result(job_id, attempt))
    return None if text is None else Result.model_validate_json(text)


def failure(error: BaseException) -> Result:
    """The result of an attempt that ended with `error`."""
    if isinstance(error, TunesmithError):
        message = f"{error.message}; {error.hint}" if error.hint else error.message
        return Result(outcome="failed", reason=error.reason, message=message, error=error.as_dict(), time=utc_text())
    message = f"{type(error).__name__}: {error}"
    return Result(outcome="failed", reason="platform_error", message=message, time=utc_text())


def retry_pause_s(retry: int) -> float:
    """Seconds before the `retry`-th try after a loss, from 1: none, then growing ones, at most a minute."""
    return float(min(60, 2 ** min(retry - 1, 6) - 1))


def request_stop(storage: Storage, job_id: str, reason: str = "stopped_by_user") -> None:
    """Leave the stop object, at which the job's driver looks on step borders. The first one stands."""
    wish = StopWish(time=utc_text(), reason=reason)
    storage.put_if_absent(layout.stop(job_id), wish.model_dump_json().encode())


def read_stop(storage: Storage, job_id: str) -> StopWish | None:
    """The stop object; one that cannot be read, or gives no known reason, is the user's."""
    text = _get(storage, layout.stop(job_id))
    if text is None:
        return None
    try:
        wish = StopWish.model_validate_json(text)
    except ValidationError:
        wish = StopWish(time=utc_text(), reason="")
    return wish if wish.reason in REASONS else wish.model_copy(update={"reason": "stopped_by_user"})


def metric_lines(data: bytes) -> Iterator[MetricLine]:
    """The metrics in one segment; a line that is none is left out and logged."""
    for number, line in enumerate(data.splitlines(), 1):
        try:
            yield MetricLine.model_validate_json(line)
        except ValidationError as error:
            what = error.errors(include_url=False, include_input=False)[0]["msg"]
            logger.warning("line %d of a segment of metrics cannot be read and is left out: %s", number, what)


def checkpoint_files(storage: Storage, key: str) -> StoredFiles:
    """The files of the whole checkpoint at `key` (Checkpoint.key). NotFoundError where there is none."""
    text = _get(storage, layout.checkpoint_manifest(key))
    if text is None:
        raise NotFoundError(f"there is no whole checkpoint {key}", hint="was it deleted meanwhile?")
    return StoredFiles(key, CheckpointManifest.model_validate_json(text).files)


def checkpoints(storage: Storage, job_id: str) -> list[Checkpoint]:
    """All whole checkpoints of a job over its attempts, oldest first (by step, then attempt)."""
    found = []
    for attempt in attempt_numbers(storage, job_id):
        prefix = layout.checkpoints(job_id, attempt)
        for entry in storage.entries(prefix):
            step, _, name = entry.key.removeprefix(f"{prefix}/").partition("/")
            if name == "manifest.json" and step.isdecimal():
                key = layout.checkpoint(job_id, attempt, int(step))
                found.append(Checkpoint(attempt=attempt, step=int(step), key=key))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.attempt))


def _get(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.get(key)
    except NotFoundError:
        return None
