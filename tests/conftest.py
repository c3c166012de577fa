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


# First, since pytest-xdist reads the groups in the same hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What two processes that test at once share out: a file each, but all that use the one platform go to one of them.

    Files that start Ray take longest, so they begin first: both processes then end together.
    """
    shared = {item.path for item in items if "platform" in getattr(item, "fixturenames", ())}
    with_ray = {item.path for item in items if item.get_closest_marker("ray") is not None}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("platform" if item.path in shared else item.path.stem))
    # A file stays whole: what starts no Ray in it comes before what does.
    items.sort(key=lambda item: (item.path not in with_ray, item.path not in shared))
