"""What a worker reports at a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.jobs.attempts import EventLine


@dataclass(frozen=True)
class Report:
    """What every worker of a step says at once. The job's own values are rank 0's; `sampled` are each worker's."""

    time: str
    step: int
    values: Mapping[str, float] = field(default_factory=dict)
    """Of the whole job: loss, throughput and the like."""
    sampled: Mapping[str, float] = field(default_factory=dict)
    """Of this worker: utilisation and memory."""
    phase: str | None = None
    """A phase that begins."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What belongs to the phase, for its event."""
    events: Sequence[EventLine] = ()
    """What else is to be said."""
    uploaded: Sequence[int] = ()
    """Steps of checkpoints whose files storage has since the last report."""
    products: Mapping[str, Any] | None = None
    """At the end: how the run ended, and the files of the new model."""
