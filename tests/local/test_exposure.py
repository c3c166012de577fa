"""What a running platform shows to others on its node and its network is what docs/security.md says, and no more."""

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import psutil
import pytest

from tests.support.ray_fixture import Running, running_platform
from tunesmith.local import local_platform
from tunesmith.local.local_platform import Platform
from tunesmith.settings import Settings

DOCUMENT = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
OTHER = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]

needs_root = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="only root may be somebody else"
)
pytestmark = pytest.mark.ray


def rows(title: str) -> list[tuple[str, ...]]:
    """The rows of the first table under a title of the document."""
    section = DOCUMENT.split(f"## {title}\n")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table]


@pytest.fixture(scope="module")
def own() -> Iterator[Running]:
    """A platform that is started where everything would be open, if it did not see to that itself."""
    before = os.umask(0)
    try:
        with running_platform({}, door=True) as running:
            yield running
    finally:
        os.umask(before)


@pytest.fixture(scope="module")
def used(own: Running, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """The same after a job."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4)
    job = own.client.register_dataset("rows", str(folder / "rows.jsonl"))
    assert own.client.wait(job.id).state == "completed"
    return own


@pytest.fixture(scope="module")
def restarted(used: Running) -> Running:
    """The same after the end of the platform and another start."""
    local_platform.down(used.settings)
    started = local_platform.up(used.settings, num_cpus=2, object_store_memory=200_000_000).platform
    return Running(used.settings, started, used.client, used.storage)


@pytest.fixture(scope="module", params=["own", "used", "restarted"])
def running(request: pytest.FixtureRequest) -> Running:
    running: Running = request.getfixturevalue(request.param)
    return running


def kind(process: psutil.Process) -> str:
    """What the document calls a process: Ray's own name of it, its script, its module or its program."""
    command = process.cmdline()
    if title := re.match(r"ray::\w+", command[0]):
        return title[0]
    program = Path(command[0]).name
    if not program.startswith("python"):
        return program
    if "-m" in command:
        return command[command.index("-m") + 1]
    return next((Path(word).name for word in command[1:] if word.endswith(".py")), program)


def listening(started: Platform) -> Iterator[tuple[str, str, int]]:
    """Kind, address and port of each socket that waits for others."""
    for process in local_platform.processes_of(started):
        with suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN or (connection.type == 2 and not connection.raddr):
                    yield kind(process), connection.laddr[0].removeprefix("::ffff:"), connection.laddr[1]


def test_what_listens_is_in_the_document(running: Running) -> None:
    told = {row[0].strip("`"): row[1] for row in rows("What listens")}
    found = set(listening(running.started))
    assert {"haproxy", "gcs_server", "raylet", "ray::ProxyActor"} <= {name for name, _, _ in found}
    for name, address, port in found:
        assert name in told or name.startswith("ray::"), (name, address, port)
        if (where := told.get(name, told["ray::"])) == "loopback":
            assert address == "127.0.0.1", (name, address, port)
        elif "TUNESMITH_HOST" in where:
            assert (address, port) == (running.settings.host, running.settings.port)


def test_unix_sockets_lie_where_nobody_else_enters(running: Running) -> None:
    guarded = (str(running.settings.ray_folder), str(running.settings.home))
    paths = {
        connection.laddr
        for process in local_platform.processes_of(running.started)
        for connection in process.net_connections("unix")
        if connection.laddr
    }
    assert paths
    assert {path for path in paths if not str(path).startswith(guarded)} == set()


def test_files_have_the_modes_of_the_document(running: Running) -> None:
    modes = {name.strip("` "): row[1] for row in rows("Files") for name in row[0].split(",")}
    roots = {"home": running.settings.home, "ray": running.settings.ray_folder}
    for name, root in roots.items():
        found = {f"{name}/{path.name}": path for path in root.iterdir()} | {name: root}
        assert found.keys() <= modes.keys()
        assert {each: f"{path.stat().st_mode & 0o7777:04o}" for each, path in found.items()} == {
            each: modes[each] for each in found
        }
        # All that lies below is its user's alone; in Ray's sessions the folder above is what guards.
        for path in root.rglob("*"):
            status = path.lstat()
            assert status.st_uid == os.getuid(), path
            if not stat.S_ISLNK(status.st_mode) and not path.is_relative_to(running.started.temp_dir):
                assert status.st_mode & 0o077 == 0, (path, oct(status.st_mode))


def test_nothing_of_the_platform_lies_in_the_shared_temporary_folder(running: Running) -> None:
    opened = {
        Path(file.path)
        for process in local_platform.processes_of(running.started)
        for file in process.open_files()
        if file.mode != "r"
    }
    guarded = (running.settings.home, running.settings.ray_folder, Path("/dev"), Path("/proc"))
    assert {path for path in opened if not any(path.is_relative_to(each) for each in guarded)} == set()


LOCAL = {
    "the door's token": "cat {home}/api_token",
    "Ray's token": "cat {home}/ray_token",
    "the database": "cat {home}/records.db",
    "the database's journal": "cat {home}/records.db-wal",
    "what runs": "cat {home}/platform.json",
    "the door's log": "cat {home}/door.log",
    "the gate's log": "cat {home}/gate.log",
    "Ray's log": "cat {home}/ray.log",
    "the home's list": "ls {home}",
    "the storage": "ls {home}/storage",
    "the storage's data": "cat {home}/storage/datasets/operator/rows/1/manifest.json",
    "the caches": "ls {home}/cache",
    "the home by way of dots": "cat {home}/storage/../api_token",
    "the home by way of a process": "ls /proc/{haproxy}/cwd/",
    "the token by an open file": "cat /proc/{haproxy}/fd/*",
    "the gate's environment": "cat /proc/{haproxy}/environ",
    "the replica's environment": "cat /proc/{replica}/environ",
    "the replica's memory": "head -c 1 /proc/{replica}/mem",
    "the replica's map": "cat /proc/{replica}/maps",
    "the replica's root": "ls /proc/{replica}/root/",
    "Ray's folder": "ls {ray}",
    "Ray's sessions": "ls {ray}/r/session_latest/logs",
    "Ray's logs": "cat {ray}/r/session_latest/logs/gcs_server.out",
    "Ray's temporary files": "ls {ray}/tmp",
    "Ray's sockets": "curl -sf --max-time 20 --unix-socket {ray}/r/session_latest/sockets/raylet http://x/",
    "a file in the home": "touch {home}/planted",
    "another token": "echo mine > {home}/api_token",
    "a longer database": "echo >> {home}/records.db",
    "a home by another name": "mv {home} {home}-gone",
    "the home's mode": "chmod 0777 {home}",
    "the home's removal": "rm -r {home}",
    "a file in Ray's folder": "touch {ray}/r/planted",
    "Ray's folder by another name": "mv {ray} {ray}-gone",
    "a link in a session": "ln -s /etc/passwd {ray}/r/session_latest/logs/planted",
    "a hard link to the token": "ln {home}/api_token /tmp/planted-$$",
    "the end of the gate": "kill -9 {haproxy}",
    "the end of the replica": "kill -9 {replica}",
    "a stop of the replica": "kill -STOP {replica}",
    "Serve's proxy": "curl -sf --max-time 20 http://127.0.0.1:{proxy}/v1/jobs",
    "Serve's routes": "curl -sf --max-time 20 http://127.0.0.1:{proxy}/-/routes",
    "Serve's health": "curl -sf --max-time 20 http://127.0.0.1:{proxy}/-/healthz",
    "the door": "curl -sf --max-time 20 {door}/v1/jobs",
    "the door's documents": "curl -sf --max-time 20 {door}/openapi.json",
    "Ray's jobs": "curl -sf --max-time 20 {jobs}/api/jobs/",
    "Ray's nodes": "curl -sf --max-time 20 {jobs}/api/v0/nodes",
    "Ray's logs over HTTP": "curl -sf --max-time 20 {jobs}/api/v0/logs",
    "Ray's Serve": "curl -sf --max-time 20 {jobs}/api/serve/applications/",
    "a job of Ray's": 'curl -sf --max-time 20 -d \'{{"entrypoint": "id"}}\' {jobs}/api/jobs/',
}
"""Tries of a local user, each a command for a shell, and none of them allowed."""


@needs_root
@pytest.mark.parametrize("name", LOCAL)
def test_a_local_user_gets_nowhere(used: Running, name: str) -> None:
    assert shutil.which("curl")
    settings, started = used.settings, local_platform.running(used.settings)
    assert started is not None
    pids = {kind(process): process.pid for process in local_platform.processes_of(started)}
    before = _state(settings)
    command = LOCAL[name].format(
        home=settings.home,
        ray=settings.ray_folder,
        haproxy=pids["haproxy"],
        replica=pids["ray::ServeReplica"],
        proxy=started.proxy_port,
        door=settings.door_url,
        jobs=settings.ray_jobs_url,
    )
    done = subprocess.run([*OTHER, "sh", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0, done.stdout
    assert done.stdout == ""
    assert _state(settings) == before
    assert used.client.flavors().items
    assert {process.pid for process in local_platform.processes_of(started)} >= {pids["haproxy"]}


def _state(settings: Settings) -> list[object]:
    tokens = [settings.api_token_path.read_text(), settings.ray_token_path.read_text()]
    names = sorted(path.name for path in settings.home.iterdir() if not fnmatch(path.name, "records.db-*"))
    modes = [path.stat().st_mode for path in (settings.home, settings.ray_folder, settings.api_token_path)]
    return [tokens, names, modes]


def test_the_log_of_a_platform_names_no_token(restarted: Running) -> None:
    tokens = [
        path.read_text().strip() for path in (restarted.settings.api_token_path, restarted.settings.ray_token_path)
    ]
    for process in local_platform.processes_of(restarted.started):
        with suppress(psutil.Error):
            assert not any(token in " ".join(process.cmdline()) for token in tokens)
    logs = [*restarted.settings.home.glob("*.log"), *Path(restarted.started.temp_dir).rglob("*.log")]
    assert len(logs) > 5
    assert [path for path in logs if any(token.encode() in path.read_bytes() for token in tokens)] == []
