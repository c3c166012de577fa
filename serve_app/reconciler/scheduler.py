"""Whose turn it is: which queued jobs start now, by priority, age and what the cluster has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tunesmith.jobs.spec import RegisterJob
from tunesmith.records.record import Record

REGISTRATIONS = 8
"""How many registrations run at once. Each has a driver on the head, which copies files; what it computes is a Ray task
that takes its place among the cluster's resources."""


@dataclass(frozen=True)
class Turns:
    start: list[Record] = field(default_factory=list)
    """The jobs that start now, in this order."""
    waiting: list[tuple[Record, str]] = field(default_factory=list)
    """The others, and what each waits for."""


def take_turns(queued: Iterable[Record], on_cluster: Iterable[Record], capacity: Mapping[str, float]) -> Turns:
    """Start jobs by priority, then age, as long as the next in line fits what is free of `capacity`.

    The first that does not fit holds back all behind it, so that small jobs cannot starve a big one. A job that the
    whole cluster could not hold is passed over.
    """
    turns = Turns()
    used: dict[str, float] = {}
    registrations = 0
    for record in on_cluster:
        _add(used, _needs(record))
        registrations += record.kind == "register"
    line_stands = False
    for record in sorted(queued, key=_place):
        needs = _needs(record)
        if record.kind == "register":
            if registrations < REGISTRATIONS:
                registrations += 1
                turns.start.append(record)
            else:
                turns.waiting.append((record, "waits for other registrations"))
        elif not _fits(needs, capacity, {}):
            turns.waiting.append((record, _never_fits(needs, capacity)))
        elif line_stands or not _fits(needs, capacity, used):
            line_stands = True
            turns.waiting.append((record, f"waits for its turn and {_text(needs)}"))
        else:
            _add(used, needs)
            turns.start.append(record)
    return turns


def _needs(record: Record) -> dict[str, float]:
    """Ray resources of all of a job's workers."""
    job = record.job
    if isinstance(job, RegisterJob):
        return {}
    return {name: amount * job.cards for name, amount in job.resources.items()}


def _add(used: dict[str, float], needs: Mapping[str, float]) -> None:
    for name, amount in needs.items():
        used[name] = used.get(name, 0) + amount


def _place(record: Record) -> tuple[int, str, str]:
    priority = 0 if isinstance(record.job, RegisterJob) else record.job.priority
    return -priority, record.created_at, record.id


def _fits(needs: Mapping[str, float], capacity: Mapping[str, float], used: Mapping[str, float]) -> bool:
    # Ray counts in units of 1e-4; sums of floats need some room.
    return all(used.get(name, 0) + amount <= capacity.get(name, 0) + 1e-6 for name, amount in needs.items())


def _never_fits(needs: Mapping[str, float], capacity: Mapping[str, float]) -> str:
    there = {name: capacity.get(name, 0) for name in needs}
    return f"needs {_text(needs)}; the whole cluster has {_text(there)}"


def _text(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())
