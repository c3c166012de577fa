"""`up` heals what a killed process leaves, whichever it was."""

from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from tests.support.ray_fixture import Running, running_platform
from tunesmith.api.client import Client
from tunesmith.local import gate, local_platform


@pytest.fixture(scope="module")
def own() -> Iterator[Running]:
    """A platform of this module's own: healing it may start it anew."""
    with running_platform({}, door=True) as running:
        yield running


@pytest.mark.ray
@pytest.mark.parametrize(
    "parts",
    [
        ["ray::DashboardAgent"],
        pytest.param(["ray::ProxyActor", "ray::ServeReplica:door", "ray::ServeReplica:reconciler"]),
        pytest.param([gate.LOOP, gate.CONFIGURATION], id="gate"),
        pytest.param(["/gcs_server "], marks=pytest.mark.soak),
        pytest.param(["/raylet "], marks=pytest.mark.soak),
        pytest.param(["/dashboard.py "], marks=pytest.mark.soak),
        pytest.param(["ray-dashboard-JobHead"], marks=pytest.mark.soak),
        pytest.param(["ray::RuntimeEnvAgent"], marks=pytest.mark.soak),
        pytest.param(["ray::ServeController"], marks=pytest.mark.soak),
    ],
)
def test_up_heals_what_a_killed_process_leaves(own: Running, parts: list[str]) -> None:
    settings = own.settings
    started = local_platform.running(settings)
    assert started is not None
    for part in parts:
        for process in local_platform.processes_of(started):
            with suppress(psutil.Error):
                if part in " ".join(process.cmdline()):
                    process.kill()
                    process.wait(20)
    healed = local_platform.up(settings).platform
    assert local_platform.is_ray_whole(settings, healed)
    assert local_platform.is_door_whole(settings, healed)
    assert healed.num_cpus == started.num_cpus
    with Client(settings.door_url, settings.api_token_path.read_text()) as client:
        assert client.jobs().items is not None
