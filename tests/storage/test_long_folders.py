"""What a folder of thousands of objects costs on a real S3 server: few requests, counted by a proxy before it."""

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.s3_fixture import S3Server
from tests.support.stalling_proxy import StallingProxy, stalling_proxy
from tunesmith.errors import StorageError
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage
from tunesmith.storage.s3 import Waiting
from tunesmith.storage.segments import SegmentWriter, read_segments
from tunesmith.storage.urls import open_storage

pytestmark = pytest.mark.s3

PREFIX = "jobs/a/attempts/1/metrics"
COUNT = 1100
"""More than one page of a listing holds."""


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[StallingProxy]:
    with stalling_proxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def storage(s3_server: S3Server, proxy: StallingProxy, tmp_path: Path) -> Storage:
    env = {"TUNESMITH_S3_ENDPOINT": proxy.url, "TUNESMITH_S3_REGION": "us-east-1", "TUNESMITH_HOME": str(tmp_path)}
    waiting = Waiting(connect_s=5, read_s=5, tries=1)
    return open_storage(s3_server.url(f"test-{uuid.uuid4().hex}"), Settings.from_env(env), waiting=waiting)


def fill(storage: Storage, count: int) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: storage.put(f"{PREFIX}/{n:08d}", b"%d\n" % n), range(1, count + 1)))


def methods(proxy: StallingProxy) -> list[str]:
    """The requests since the last call, as methods."""
    found = [line.partition(" ")[0] for line in proxy.lines]
    proxy.lines.clear()
    return found


def test_a_long_record_is_read_on_and_written_on_by_few_requests(storage: Storage, proxy: StallingProxy) -> None:
    fill(storage, COUNT)
    methods(proxy)
    assert [segment.number for segment in read_segments(storage, PREFIX, after=COUNT - 2)] == [COUNT - 1, COUNT]
    assert methods(proxy) == ["GET"] * 3  # a listing, and the two
    assert list(read_segments(storage, PREFIX, after=COUNT)) == []
    assert methods(proxy) == ["GET"]
    with SegmentWriter(storage, PREFIX) as writer:
        asked = methods(proxy)
        writer.write(b"next\n")
    assert set(asked) == {"HEAD"}
    assert len(asked) < 25
    assert [segment.number for segment in read_segments(storage, PREFIX, after=COUNT)] == [COUNT + 1]


def test_a_folder_is_deleted_by_thousands(storage: Storage, proxy: StallingProxy) -> None:
    fill(storage, COUNT)
    storage.put("jobs/b", b"")
    methods(proxy)
    storage.delete_folder("jobs/a")
    assert methods(proxy).count("POST") == 2
    assert [entry.key for entry in storage.entries()] == ["jobs/b"]


def test_a_service_that_does_not_delete_in_bulk_is_asked_for_each_object(
    storage: Storage, proxy: StallingProxy
) -> None:
    fill(storage, 30)
    proxy.refuses = lambda line: line.startswith("POST")
    methods(proxy)
    storage.delete_folder("jobs/a")
    assert methods(proxy).count("DELETE") == 30
    assert list(storage.entries()) == []


def test_a_service_that_hangs_is_given_up_after_the_time_to_wait(storage: Storage, proxy: StallingProxy) -> None:
    storage.put("jobs/a", b"")
    proxy.hold(lambda line: "jobs/a" in line)
    with pytest.raises(StorageError, match="does not answer"):
        storage.get("jobs/a")
    assert storage.exists("jobs/b") is False
