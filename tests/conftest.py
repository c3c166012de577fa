"""Fixtures for all tests; each kind of server has its own module."""

pytest_plugins = [
    "tests.s3_fixture",
    "tests.pretrained",
    "tests.ray_fixture",
    "tests.door_fixture",
    "tests.live_door",
    "tests.image_fixture",
]
