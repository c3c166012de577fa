"""The benchmark of floods: each runs, is measured, and ends when it is told to."""

from collections.abc import Callable

import pytest

from benchmarks import door_floods
from benchmarks.door_floods import FLOODS, Flood
from tests.support.live_door import LiveDoor


@pytest.mark.parametrize("flood", [door_floods.garbage, door_floods.slow_headers])
def test_a_good_client_is_answered_while_a_flood_runs(gated_door: LiveDoor, flood: Callable[[Flood], None]) -> None:
    with door_floods._running(flood, gated_door.settings):
        waits, failed, memory = door_floods.measure(gated_door.settings, 1.0, lambda: 7)
    assert (failed, memory) == (0, 7)
    assert len(waits) > 1


def test_every_kind_of_flood_is_run_once() -> None:
    assert len({flood.__name__ for flood in FLOODS}) == len(FLOODS) >= 10
