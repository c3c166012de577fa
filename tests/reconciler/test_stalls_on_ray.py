"""On a whole platform whose S3 server stalls: a job goes from its order to its first step all the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.s3_server import BUCKET
from tests.support import jobs, programs
from tests.support.ray_fixture import Running, running_platform
from tests.support.s3_fixture import S3Server, fill
from tests.support.stalling_proxy import StallingProxy, stalling_proxy
from tests.support.waiting import until
from tunesmith.storage import layout
from tunesmith.storage.segments import read_segments

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow]

OBJECTS = 20_000
PREFIX = "stalls-on-ray"


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[StallingProxy]:
    with stalling_proxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def running(proxy: StallingProxy, s3_server: S3Server) -> Iterator[Running]:
    env = {
        **s3_server.env,
        "TUNESMITH_STORAGE_URL": f"s3://{BUCKET}/{PREFIX}",
        "TUNESMITH_S3_ENDPOINT": proxy.url,
        "TUNESMITH_S3_ADDRESSING_STYLE": "path",
    }
    with running_platform(env, door=True) as running:
        yield running


TRAIN = """
for step in range(3):
    print(f"LOSS {step}", flush=True)
    time.sleep(1)
"""


def test_a_job_comes_to_its_first_step_while_anothers_storage_hangs_and_a_third_is_deleted(
    running: Running, proxy: StallingProxy, s3_server: S3Server, tmp_path: Path
) -> None:
    order = programs.Start(running, tmp_path, programs.publish_points(running, tmp_path))
    deleted = order(TRAIN)
    running.client.stop(deleted.id)
    assert running.client.wait(deleted.id).state == "stopped"
    fill(s3_server.filer_port, OBJECTS, f"{PREFIX}/{layout.metrics(deleted.id, 1)}")
    hanging = order(TRAIN)
    proxy.lines.clear()

    def is_deletion(line: str) -> bool:
        return line.startswith("POST") and line.endswith("?delete")

    def stalls(line: str) -> bool:
        # The deletion is held after its first thousand, so that it surely lasts.
        return hanging.id in line or (is_deletion(line) and sum(map(is_deletion, proxy.lines)) > 1)

    proxy.hold(stalls)
    running.client.delete(deleted.id)
    until(lambda: any(hanging.id in line for line in proxy.held) and any(map(is_deletion, proxy.held)))
    third = order(TRAIN)
    until(lambda: any(jobs.metrics(running, third.id, "loss")))
    # Nothing was released before.
    assert any(True for _ in read_segments(running.storage, layout.metrics(deleted.id, 1), after=OBJECTS - 2))
    proxy.hold(lambda line: False)
    running.client.stop(hanging.id)
    until(lambda: next(iter(running.storage.entries(layout.job(deleted.id))), None) is None)
    assert running.client.wait(third.id).state == "completed"
