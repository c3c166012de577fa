"""What the front door works with, and how its routes get it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from tunesmith.records.store import RecordStore
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage


@dataclass(frozen=True)
class Door:
    """What the routes work with. A door has no state of its own, so any number may run side by side."""

    settings: Settings
    store: RecordStore
    storage: Storage
    capacity: Callable[[], Mapping[str, float]] | None
    """Gives all resources of the cluster; None where there is no cluster to ask."""


def _door(request: Request) -> Door:
    door: Door = request.app.state.door
    return door


DoorDep = Annotated[Door, Depends(_door)]
