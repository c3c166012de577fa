"""The benchmark of checkpoints: what one costs is told apart from how fast the machine is at the moment."""

import pytest

from benchmarks.checkpoints import cost_of_checkpoints


def test_the_cost_is_what_steps_with_a_checkpoint_take_more_than_their_neighbours() -> None:
    assert cost_of_checkpoints([1.0, 1.5, 1.2, 1.9, 1.4]) == pytest.approx((0.5, 1.2))


def test_a_machine_that_becomes_slower_all_the_time_adds_nothing() -> None:
    cost, _ = cost_of_checkpoints([1.0 + 0.1 * step for step in range(21)])
    assert cost == pytest.approx(0.0, abs=1e-9)
