"""A real S3 server that stalls holds up the one job whose keys it hangs on, and no other."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve_app.reconciler.reconciler import Reconciler
from tests.support.s3_fixture import S3Server, fill
from tests.support.stage import Stage, publish_inputs
from tests.support.stalling_proxy import StallingProxy, stalling_proxy
from tests.support.waiting import until
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.s3 import Waiting
from tunesmith.storage.urls import open_storage

pytestmark = [pytest.mark.s3, pytest.mark.slow]

OBJECTS = 20_000


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[StallingProxy]:
    with stalling_proxy(s3_server.endpoint) as proxy:
        yield proxy


@contextmanager
def rounds(reconciler: Reconciler) -> Iterator[None]:
    """Rounds as the platform makes them, in a thread of their own."""
    ending = threading.Event()

    def run() -> None:
        while not ending.wait(0.1):
            reconciler.round()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def test_a_job_starts_while_anothers_storage_hangs_and_a_third_is_deleted(
    tmp_path: Path, s3_server: S3Server, proxy: StallingProxy
) -> None:
    stage = Stage(tmp_path)
    env = {"TUNESMITH_S3_ENDPOINT": proxy.url, "TUNESMITH_S3_REGION": "us-east-1", "TUNESMITH_HOME": str(tmp_path)}
    # What hangs is not given up, so that nothing here depends on how fast the machine is.
    waiting = Waiting(read_s=600, tries=1)
    stage.storage = open_storage(s3_server.url("stalls"), Settings.from_env(env), waiting=waiting)
    publish_inputs(stage.storage)
    stage.reconciler = stage.new_reconciler("first", storage=stage.storage)
    stage.launcher.resources = {"CPU": 8.0}
    hanging, _ = stage.running()
    deleted, driver = stage.running()
    driver.finish("stopped")
    stage.rounds()
    fill(s3_server.filer_port, OBJECTS, f"stalls/{layout.metrics(deleted.id, 1)}")
    proxy.lines.clear()

    def is_deletion(line: str) -> bool:
        return line.startswith("POST")

    def stalls(line: str) -> bool:
        # The deletion is held after its first thousand, so that it surely lasts.
        return hanging.id in line or (is_deletion(line) and sum(map(is_deletion, proxy.lines)) > 1)

    def both_stall() -> bool:
        return any(hanging.id in line for line in proxy.held) and any(map(is_deletion, proxy.held))

    proxy.hold(stalls)
    stage.store.delete(deleted.id)
    with rounds(stage.reconciler):
        until(both_stall)
        third = stage.order()
        until(lambda: f"{third.id}-a1" in stage.launcher.jobs())
        assert both_stall()
        assert [record.id for record in stage.store.deleted_unpurged()] == [deleted.id]
        proxy.hold(lambda line: False)
        until(lambda: stage.store.deleted_unpurged() == [])
    assert stage.reconciler.settle(60)
    assert list(stage.storage.entries(layout.job(deleted.id))) == []
    assert OBJECTS // 1000 <= sum(map(is_deletion, proxy.lines)) < OBJECTS // 1000 + 5
    assert not [line for line in proxy.lines if line.startswith("DELETE")]
