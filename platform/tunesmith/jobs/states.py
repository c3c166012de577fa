"""States of a job, the legal moves between them, and what events add up to (docs/contracts.md, section 6)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tunesmith.errors import ConflictError

MOVES: dict[str, frozenset[str]] = {
    "pending": frozenset({"queued", "failed", "stopped"}),
    "queued": frozenset({"preparing", "stopped", "failed"}),
    "preparing": frozenset({"running", "queued", "stopping", "failed"}),
    "running": frozenset({"completed", "queued", "stopping", "failed"}),
    "stopping": frozenset({"stopped", "completed", "failed"}),
    "completed": frozenset(),
    "failed": frozenset(),
    "stopped": frozenset(),
}
FINAL = frozenset(state for state, to in MOVES.items() if not to)
ON_CLUSTER = frozenset({"preparing", "running", "stopping"})
"""States in which an attempt may be alive."""

PHASES = ("fetch", "environment", "tokenize", "audit", "train", "evaluate", "save", "publish")
REASONS = (
    "user_error",
    "data_error",
    "out_of_memory",
    "worker_lost",
    "preempted",
    "time_limit",
    "balance",
    "stopped_by_user",
    "platform_error",
)


@dataclass(frozen=True)
class Status:
    """Where a job is (`state`), what it does there (`phase`), why it ended (`reason`), in words (`message`)."""

    state: str = "pending"
    phase: str | None = None
    reason: str | None = None
    message: str | None = None
    attempt: int = 0


@dataclass(frozen=True)
class Change:
    """What one event says of a job's status; None leaves a part as it is."""

    state: str | None = None
    phase: str | None = None
    reason: str | None = None
    message: str | None = None
    attempt: int | None = None


def apply(status: Status, change: Change) -> Status:
    """The status after `change`; the only function by which a status ever changes.

    A new state clears phase, reason and message before the change's own are set. Raises ConflictError for an illegal
    move.
    """
    if change.state is not None and change.state != status.state:
        if change.state not in MOVES[status.state]:
            allowed = ", ".join(sorted(MOVES[status.state])) or "none: it is final"
            raise ConflictError(
                f"a job that is {status.state} cannot become {change.state}; allowed: {allowed}", code="illegal_move"
            )
        status = replace(status, state=change.state, phase=None, reason=None, message=None)
    given = {name: getattr(change, name) for name in ("phase", "reason", "message", "attempt")}
    return replace(status, **{name: value for name, value in given.items() if value is not None})


def replay(changes: Iterable[Change]) -> Status:
    """The status that a job's events, oldest first, add up to."""
    status = Status()
    for change in changes:
        status = apply(status, change)
    return status
