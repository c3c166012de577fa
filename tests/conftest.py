"""Fixtures for all tests; each kind of server has its own module."""

import os

import pytest

# Models here are tiny: a second thread brings them nothing, and two that spin for each other on a busy machine take
# several times as long. Read by torch when it is imported, here and in what tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = [
    "tests.support.s3_fixture",
    "tests.support.pretrained",
    "tests.support.ray_fixture",
    "tests.support.door_fixture",
    "tests.support.live_door",
    "tests.support.image_fixture",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray take longest, so they begin first: two that run at once then end together."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
