"""A whole local platform as `tunesmith up` starts it (Ray, door, reconciler), in its own home and on its own ports."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from benchmarks.s3_server import free_ports
from tunesmith import caches
from tunesmith.api.client import Client
from tunesmith.local import local_platform
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage
from tunesmith.storage.urls import open_storage


@dataclass(frozen=True)
class Running:
    """A platform that runs."""

    settings: Settings
    started: local_platform.Platform
    client: Client
    storage: Storage

    @property
    def door_url(self) -> str:
        return self.settings.door_url


@pytest.fixture
def platform_settings() -> Iterator[Settings]:
    """Settings of a platform that does not run yet; what a test starts with them is ended."""
    with _own_settings({}) as settings:
        yield settings


SHARED = {
    "TUNESMITH_PROGRAM_DISK_GIB": "1",
    "TUNESMITH_PROGRAM_PROCESSES": "500",
    "TUNESMITH_STOP_GRACE_S": "20",
}
"""Bounds that a test reaches in seconds."""


@pytest.fixture(scope="session")
def platform() -> Iterator[Running]:
    """The platform that all tests of the session share: 2 CPUs, its storage a folder."""
    with running_platform(SHARED, door=True) as running:
        yield running


@contextmanager
def _own_settings(env: Mapping[str, str]) -> Iterator[Settings]:
    # Not pytest's folder: the path of a Unix socket must be short.
    home = Path(tempfile.mkdtemp(prefix="ts-", dir="/tmp"))
    ray_port, dashboard_port, door_port = free_ports(3)
    own = {
        "TUNESMITH_HOME": str(home),
        "TUNESMITH_RAY_PORT": str(ray_port),
        "TUNESMITH_RAY_DASHBOARD_PORT": str(dashboard_port),
        "TUNESMITH_PORT": str(door_port),
        "TUNESMITH_SEGMENT_S": "1",
    }
    settings = Settings.from_env(own | {name: text for name, text in env.items() if name.startswith("TUNESMITH_")})
    try:
        yield settings
    finally:
        local_platform.down(settings)
        caches.delete(home)


@contextmanager
def running_platform(env: Mapping[str, str], *, door: bool) -> Iterator[Running]:
    """A platform of one's own. `env`: more for its processes: `TUNESMITH_` settings, keys of S3."""
    with _own_settings(env) as settings, mock.patch.dict(os.environ, env):
        started = local_platform.up(settings, num_cpus=2, object_store_memory=200_000_000, door=door)
        with Client(settings.door_url, settings.api_token_path.read_text()) as client:
            yield Running(settings, started.platform, client, open_storage(settings.storage_url, settings))
