"""The local platform: up and down, whole and again, and nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.live_door import LiveDoor
from tests.support.ray_fixture import Running
from tests.support.waiting import until
from tunesmith import processes, taken_down
from tunesmith.errors import ConflictError, SpecError
from tunesmith.local import local_platform, ports
from tunesmith.local.local_platform import Platform
from tunesmith.settings import Settings

SMALL = {"num_cpus": 1, "object_store_memory": 100_000_000}

ESCAPE = """
import subprocess, sys, time
away = "import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(600)"
subprocess.run([sys.executable, "-c", f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {away!r}])"])
time.sleep(600)
"""
"""A child of a child that leaves the session, and whose parent is gone."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"TUNESMITH_HOME": str(tmp_path / "home")})


def test_tokens_are_made_once_and_only_their_owner_reads_them(settings: Settings) -> None:
    local_platform.prepare(settings)
    paths = (settings.api_token_path, settings.ray_token_path)
    tokens = [path.read_text() for path in paths]
    paths[0].chmod(0o644)
    local_platform.prepare(settings)
    assert [path.read_text() for path in paths] == tokens
    assert len(set(tokens)) == 2
    assert [path.stat().st_mode & 0o777 for path in (*paths, settings.home)] == [0o600, 0o600, 0o700]


@pytest.mark.parametrize("planted", ["a home of another's", "a folder that anybody may rename in"])
def test_a_home_that_others_could_swap_or_enter_is_refused(tmp_path: Path, planted: str) -> None:
    folder = tmp_path / "open"
    (folder / "home").mkdir(parents=True)
    if planted == "a home of another's":
        if os.getuid() != 0:
            pytest.skip("only root may give a folder away")
        os.chown(folder / "home", 65534, 65534)
    else:
        folder.chmod(0o777)
    with pytest.raises(SpecError) as caught:
        local_platform.prepare(Settings.from_env({"TUNESMITH_HOME": str(folder / "home")}))
    assert caught.value.code == "home_open"
    assert list((folder / "home").iterdir()) == []


def test_a_gate_that_was_killed_is_back_by_itself(gated_door: LiveDoor) -> None:
    (found,) = [
        psutil.Process(connection.pid)
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (gated_door.settings.port,)
    ]
    found.kill()
    until(lambda: local_platform.door_answers(gated_door.settings))


def test_down_where_nothing_runs_is_no_error_and_makes_nothing(settings: Settings) -> None:
    assert local_platform.down(settings) == 0
    assert not settings.home.exists()


def test_a_port_in_use_is_refused_with_its_number_and_its_user(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = Settings.from_env({"TUNESMITH_HOME": str(settings.home), "TUNESMITH_RAY_PORT": str(port)})
        with pytest.raises(SpecError) as caught:
            local_platform.up(settings)
    assert caught.value.code == "port_in_use"
    assert str(port) in caught.value.message
    assert f"pid {os.getpid()}" in caught.value.message
    assert "TUNESMITH_RAY_PORT" in str(caught.value.hint)
    assert not local_platform.running(settings)


def test_free_ports_are_different_and_can_be_had() -> None:
    found = ports.free(5)
    assert len(set(found)) == 5
    assert all(ports.obstacle("127.0.0.1", port) is None for port in found)


def test_a_later_process_with_the_pid_of_a_dead_one_is_not_taken_for_it() -> None:
    me = psutil.Process()
    assert processes.find(me.pid, me.create_time()) == me
    assert processes.find(me.pid, me.create_time() - 60) is None


def test_a_child_that_left_the_tree_is_ended_too() -> None:
    mark = os.urandom(8).hex()
    environment = {**os.environ, "TUNESMITH_TEST_MARK": mark}
    root = subprocess.Popen([sys.executable, "-c", ESCAPE], env=environment, stdout=subprocess.PIPE, text=True)
    assert root.stdout is not None
    away = psutil.Process(int(root.stdout.readline()))
    assert os.getsid(away.pid) == away.pid
    ended = processes.end(psutil.Process(root.pid), "TUNESMITH_TEST_MARK", mark)
    assert {root.pid, away.pid} <= {process.pid for process in ended}
    assert not processes.is_alive(away)


def test_a_state_file_of_a_platform_that_is_gone_counts_for_nothing(settings: Settings) -> None:
    settings.home.mkdir()
    gone = local_platform.Platform(
        pid=os.getpid(), created=1.0, mark="gone", ray_address="127.0.0.1:1", temp_dir=str(settings.home / "ray"),
        settings=settings.to_env(), started_at="2026-01-01T00:00:00.000Z", proxy_port=1,
    )  # fmt: skip
    (settings.home / "platform.json").write_text(gone.model_dump_json())
    assert local_platform.running(settings) is None
    assert local_platform.down(settings) == 0
    assert not (settings.home / "platform.json").exists()


def assert_rays_folder_is_shut(settings: Settings, platform: Platform) -> None:
    """Nobody else reads or writes Ray's folder."""
    temp_dir = Path(platform.temp_dir)
    assert (temp_dir / "session_latest").exists()
    assert settings.ray_folder in temp_dir.parents
    assert (settings.ray_folder.stat().st_mode & 0o777, settings.ray_folder.stat().st_uid) == (0o700, os.getuid())


@pytest.mark.ray
def test_up_down_and_up_again_leaves_no_process_behind(platform_settings: Settings) -> None:
    settings = platform_settings
    settings.ray_folder.mkdir(mode=0o777)
    started = local_platform.up(settings, door=False, **SMALL)
    assert started.ray
    assert_rays_folder_is_shut(settings, started.platform)
    assert not local_platform.up(settings, door=False, **SMALL).ray
    with pytest.raises(ConflictError):
        local_platform.up(Settings.from_env({**settings.to_env(), "TUNESMITH_ACCOUNT": "other"}))
    members = local_platform.processes_of(started.platform)
    assert len(members) > 5
    assert not taken_down.was_taken_down(settings, started.platform.mark)
    assert local_platform.down(settings) >= len(members)
    assert taken_down.was_taken_down(settings, started.platform.mark)
    assert not [process for process in members if processes.is_alive(process)]
    assert not Path(started.platform.temp_dir).exists()
    assert not settings.ray_folder.exists()
    again = local_platform.up(settings, door=False, **SMALL)
    assert again.ray
    assert_rays_folder_is_shut(settings, again.platform)
    assert local_platform.down(settings)


@pytest.mark.ray
def test_what_a_killed_ray_left_is_ended_by_the_next_up(platform_settings: Settings) -> None:
    first = local_platform.up(platform_settings, door=False, **SMALL).platform
    members = local_platform.processes_of(first)
    os.kill(first.pid, signal.SIGKILL)
    os.waitpid(first.pid, 0)
    second = local_platform.up(platform_settings, door=False, **SMALL).platform
    assert second.mark != first.mark
    assert not [process for process in members if processes.is_alive(process)]


def test_a_ray_folder_that_is_a_link_is_refused(settings: Settings, tmp_path: Path) -> None:
    settings = settings.model_copy(update={"ray_temp_dir": "/tmp"})
    (tmp_path / "theirs").mkdir()
    settings.ray_folder.symlink_to(tmp_path / "theirs")
    try:
        with pytest.raises(SpecError) as caught:
            local_platform._make_ray_folder(settings)
    finally:
        settings.ray_folder.unlink()
    assert caught.value.code == "ray_folder_open"


@pytest.mark.ray
def test_rays_jobs_and_the_door_ask_for_their_tokens(platform: Running) -> None:
    jobs = f"{platform.settings.ray_jobs_url}/api/jobs/"
    assert httpx.get(jobs).status_code == 401
    assert httpx.get(jobs, headers={"Authorization": "Bearer wrong"}).status_code == 403
    flavors = f"{platform.door_url}/v1/flavors"
    assert httpx.get(flavors).status_code == 401
    assert platform.client.health().status == "ok"
    assert platform.client.flavors().items


@pytest.mark.ray
def test_up_starts_the_door_again_when_it_alone_is_missing(platform: Running) -> None:
    address = platform.started.ray_address
    away = f"import ray; ray.init({address!r}); from ray import serve; serve.shutdown()"
    environment = {**os.environ, **local_platform.ray_environment(platform.settings)}
    subprocess.run([sys.executable, "-c", away], env=environment, check=True, timeout=120)
    assert not local_platform.door_answers(platform.settings)
    again = local_platform.up(platform.settings)
    assert (again.ray, again.door) == (False, True)
    assert local_platform.door_answers(platform.settings)
    again = local_platform.up(platform.settings)
    assert (again.ray, again.door) == (False, False)
