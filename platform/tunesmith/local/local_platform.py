"""The local platform: `up` starts Ray and the front door on this machine, `down` ends exactly what `up` started.

Everything asks for a token and listens on loopback, except one port of each Serve replica, whose address cannot be
chosen. `home/platform.json` says what runs; logs are `home/ray.log` and `home/door.log`. Several platforms
live side by side when their homes and ports differ.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tunesmith import caches, processes, taken_down
from tunesmith.clock import utc_text
from tunesmith.errors import ConflictError, SpecError, UnavailableError
from tunesmith.frozen import Tolerant
from tunesmith.local import gate, ports
from tunesmith.settings import Settings

HEAL_S = 20.0
"""How long `up` waits for missing processes of a platform that runs to be started again by themselves, in seconds."""
ANSWER_S = 120.0
"""How long `up` waits for the answers of a platform all of whose processes live, in seconds."""
RAY_PARTS = (
    "/gcs_server ",
    "/raylet ",
    "/dashboard.py ",
    "ray-dashboard-JobHead",
    "ray-dashboard-NodeHead",
    "ray-dashboard-ServeHead",
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
    "/log_monitor.py ",
)
"""What the command lines of Ray's processes hold on a node that is whole."""
SERVE_PARTS = ("ray::ServeController", "ray::ProxyActor", "ray::ServeReplica:door", "ray::ServeReplica:reconciler")
"""Likewise of Serve's, its controller first."""


class Platform(Tolerant):
    """`platform.json`: a local platform that was started."""

    pid: int
    """The process `ray start`, from which all others come."""
    created: float
    """When that process was created, in seconds since the epoch: a later one may have the same pid."""
    mark: str
    ray_address: str
    temp_dir: str
    settings: dict[str, str]
    started_at: str
    proxy_port: int = 0
    """Port on loopback of Serve's proxy, which the gate stands before; 0 where an earlier version wrote the file."""
    num_cpus: int | None = None
    object_store_memory: int | None = None


@dataclass(frozen=True)
class Started:
    """What a call of `up` came to."""

    platform: Platform
    ray: bool
    """Whether this call started Ray."""
    door: bool
    """Whether this call started the front door."""


def up(
    settings: Settings,
    *,
    num_cpus: int | None = None,
    object_store_memory: int | None = None,
    door: bool = True,
    on_step: Callable[[str], None] = lambda _: None,
) -> Started:
    """Start Ray and the front door, or whichever of them is missing; return when both are whole.

    What a killed process leaves is healed: where Ray is not whole and does not become so by itself, all of the platform
    is ended and started anew; jobs then go on from their last checkpoint.

    `object_store_memory` in bytes; None leaves it and `num_cpus` to Ray. `door=False` starts Ray alone. Raises
    UnavailableError with the last lines of the log when one does not come up (then what this call started is ended
    again), SpecError for a port in use, ConflictError when it runs with other settings.
    """
    with _locked(settings):
        platform = running(settings)
        if platform is not None:
            _check_settings(settings, platform)
            if healed := _heal(settings, platform, door=door, on_step=on_step):
                return healed
            on_step("it is not whole: ending what is left of it")
            # The jobs that still run are ended on purpose, and count against no job.
            taken_down.note(settings, platform.mark)
            num_cpus = num_cpus or platform.num_cpus
            object_store_memory = object_store_memory or platform.object_store_memory
        return _start(settings, num_cpus, object_store_memory, door=door, on_step=on_step)


def _heal(settings: Settings, platform: Platform, *, door: bool, on_step: Callable[[str], None]) -> Started | None:
    """Start what is missing of a platform that runs; None where it must be ended and started anew."""
    # What is there may be slow to answer on a busy machine; what is not there does not come by itself.
    if not _until(lambda: _has_parts(platform, RAY_PARTS), limit_s=HEAL_S):
        return None
    if not _until(lambda: is_ray_whole(settings, platform), limit_s=ANSWER_S):
        return None
    if not door:
        return Started(platform, ray=False, door=False)
    # Where its controller lives, Serve itself starts a replica or a proxy again that was killed.
    limit_s = 0.0
    if _has_parts(platform, SERVE_PARTS[:1]):
        limit_s = HEAL_S
        _start_gate(settings, platform)
    if _until(lambda: is_door_whole(settings, platform), limit_s=limit_s):
        return Started(platform, ray=False, door=False)
    on_step("starting the front door")
    try:
        _start_door(settings, platform)
    except UnavailableError:
        return None
    return Started(platform, ray=False, door=True)


def _start(
    settings: Settings,
    num_cpus: int | None,
    object_store_memory: int | None,
    *,
    door: bool,
    on_step: Callable[[str], None],
) -> Started:
    """Start a platform, after the end of what is left of an earlier one."""
    with ExitStack() as undo:
        _end_leftovers(settings)
        _check_ports(settings, door=door)
        prepare(settings)
        on_step("starting Ray")
        platform = _start_ray(settings, num_cpus, object_store_memory)
        undo.callback(_end, settings, platform)
        _wait_for_ray(settings, platform)
        _check_ray_folder(settings)
        if door:
            on_step("starting the front door")
            _start_door(settings, platform)
        undo.pop_all()
        return Started(platform, ray=True, door=door)


def down(settings: Settings) -> int:
    """Kill everything that `up` started, and return how many processes that were: 0 where nothing ran.

    Nothing needs to be shut down in order: records and storage stay whole wherever their writers end, and jobs that
    ran go on from their last checkpoint after the next `up`.
    """
    if not settings.home.exists():
        return 0
    with _locked(settings):
        platform = _read(settings)
        if platform is None:
            return 0
        if processes.find(platform.pid, platform.created) is not None:
            # Its jobs' attempts are ended on purpose, and count against no job.
            taken_down.note(settings, platform.mark)
        return _end(settings, platform)


def running(settings: Settings) -> Platform | None:
    """The platform of these settings, if its Ray lives."""
    platform = _read(settings)
    return platform if platform and processes.find(platform.pid, platform.created) else None


def processes_of(platform: Platform) -> list[psutil.Process]:
    """All of the platform's living processes."""
    return processes.members(processes.find(platform.pid, platform.created), processes.PLATFORM_MARK, platform.mark)


def door_answers(settings: Settings) -> bool:
    """Whether the door that listens on the settings' port is this platform's and works."""
    return _answers(f"{settings.door_url}/v1/flavors", settings.api_token_path) is not None


def is_door_whole(settings: Settings, platform: Platform) -> bool:
    """Whether the door answers, and every process lives that it and the reconciler need: the gate, and Serve's."""
    return _has_parts(platform, (gate.LOOP, *SERVE_PARTS)) and door_answers(settings)


def is_ray_whole(settings: Settings, platform: Platform) -> bool:
    """Whether every process lives that Ray needs, its node is registered, and it takes jobs."""
    if not _has_parts(platform, RAY_PARTS):
        return False
    nodes = _answers(f"{settings.ray_jobs_url}/api/v0/nodes", settings.ray_token_path)
    jobs = _answers(f"{settings.ray_jobs_url}/api/jobs/", settings.ray_token_path)
    return nodes is not None and "ALIVE" in nodes.text and jobs is not None


def _has_parts(platform: Platform, parts: Sequence[str]) -> bool:
    """Whether each of the parts stands in the command line of a living process of the platform."""
    said = "\n".join(_command(process) for process in processes_of(platform))
    return all(part in said for part in parts)


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _until(condition: Callable[[], bool], *, limit_s: float) -> bool:
    """Ask until the condition holds, at least once; whether it does within `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)
    return True


def prepare(settings: Settings) -> None:
    """Make what a platform needs before its first start: home, tokens, the record store's schema. Again: no change.

    Raises StorageError or SpecError when the storage cannot be read: Ray Serve would say so only in a log of its own.
    """
    from tunesmith.records.store import RecordStore
    from tunesmith.storage.urls import open_storage

    with processes.private_files():
        settings.home.mkdir(parents=True, exist_ok=True)
        _check_home(settings)
        settings.home.chmod(0o700)
        for path in (settings.api_token_path, settings.ray_token_path):
            with suppress(FileExistsError):
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(file, "w") as out:
                    out.write(secrets.token_hex(32))
            path.chmod(0o600)
        RecordStore(settings.database_url).migrate()
        open_storage(settings.storage_url, settings).children("jobs")
        caches.keep_bounds(settings)


def token_environment(settings: Settings) -> dict[str, str]:
    """What a process needs in its environment to be let in by this platform's Ray."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(settings.ray_token_path)}


def ray_environment(settings: Settings) -> dict[str, str]:
    """What a process needs for `ray.init` with this platform's address."""
    # Without the second Ray turns 127.0.0.1 into the machine's outer address, and listens or asks there.
    return token_environment(settings) | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def _start_ray(settings: Settings, num_cpus: int | None, object_store_memory: int | None) -> Platform:
    temp_dir = _make_ray_folder(settings)
    mark = secrets.token_hex(16)
    client_port, monitor_port, dashboard_port, proxy_port = ports.free(4)
    environment = _environment(settings, mark) | {
        "AUTOSCALER_METRIC_PORT": str(monitor_port),
        "DASHBOARD_METRIC_PORT": str(dashboard_port),
    }
    options: dict[str, object] = {
        "port": settings.ray_port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": settings.ray_dashboard_port,
        "node-ip-address": "127.0.0.1",
        "temp-dir": temp_dir,
        "ray-client-server-port": client_port,
    }
    # Port 0: the process that listens takes a free one itself.
    options |= dict.fromkeys(("node-manager-port", "object-manager-port", "min-worker-port", "max-worker-port"), 0)
    options |= dict.fromkeys(("dashboard-agent-listen-port", "dashboard-agent-grpc-port"), 0)
    options |= dict.fromkeys(("runtime-env-agent-port", "metrics-export-port"), 0)
    if num_cpus is not None:
        options["num-cpus"] = num_cpus
    if object_store_memory is not None:
        options["object-store-memory"] = object_store_memory
    options["resources"] = _find_podman(environment)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with (settings.home / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
            umask=processes.PRIVATE_UMASK,
        )  # fmt: skip
    platform = Platform(
        pid=process.pid,
        created=psutil.Process(process.pid).create_time(),
        mark=mark,
        ray_address=f"127.0.0.1:{settings.ray_port}",
        temp_dir=str(temp_dir),
        settings=settings.to_env(),
        started_at=utc_text(),
        proxy_port=proxy_port,
        num_cpus=num_cpus,
        object_store_memory=object_store_memory,
    )
    _write(settings, platform)
    return platform


def _find_podman(environment: Mapping[str, str]) -> str:
    """Ray's resources, as JSON, by which a node says that podman works there."""
    if shutil.which("podman") is None:
        return "{}"
    command = [sys.executable, "-m", "trainers.programs.images"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else "{}"


def _start_door(settings: Settings, platform: Platform) -> None:
    log = settings.home / "door.log"
    environment = _environment(settings, platform.mark)
    command = [sys.executable, "-m", "serve_app", "--address", platform.ray_address]
    command += ["--proxy-port", str(platform.proxy_port)]
    with log.open("wb") as out:
        try:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=180, check=False,
                env=environment, umask=processes.PRIVATE_UMASK,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
    if code != 0:
        how = "did not end within 180 s" if code is None else f"ended with code {code}"
        raise UnavailableError(f"the front door did not start: {' '.join(command[1:])} {how}", hint=_tail(log))
    _start_gate(settings, platform)
    deadline = time.monotonic() + 60
    while not door_answers(settings):
        if time.monotonic() > deadline:
            raise UnavailableError(f"the front door does not answer at {settings.door_url}", hint=_tail(log))
        time.sleep(0.1)


def _start_gate(settings: Settings, platform: Platform) -> None:
    """Start the door's gate, unless the loop lives that keeps it running."""
    left = {
        process: command for process in processes_of(platform) if gate.CONFIGURATION in (command := _command(process))
    }
    if any(gate.LOOP in command for command in left.values()):
        return
    for process in left:
        process.kill()
    gate.start(settings, proxy_port=platform.proxy_port, mark=platform.mark)


def _wait_for_ray(settings: Settings, platform: Platform, *, limit_s: float = 120.0) -> None:
    """Until the Jobs API answers and the node is registered."""
    log = settings.home / "ray.log"
    deadline = time.monotonic() + limit_s
    while True:
        nodes = _answers(f"{settings.ray_jobs_url}/api/v0/nodes", settings.ray_token_path)
        if nodes is not None and "ALIVE" in nodes.text:
            return
        if processes.find(platform.pid, platform.created) is None:
            raise UnavailableError("Ray ended while it was starting", hint=_tail(log))
        if time.monotonic() > deadline:
            raise UnavailableError(f"Ray did not come up within {limit_s:.0f} s", hint=_tail(log))
        time.sleep(0.1)


def _answers(url: str, token_path: Path) -> httpx.Response | None:
    """The answer 200 to a GET with the token in that file, or None."""
    try:
        headers = {"Authorization": f"Bearer {token_path.read_text().strip()}"}
        response = httpx.get(url, headers=headers, timeout=5, trust_env=False)
    except (httpx.HTTPError, FileNotFoundError):
        return None
    return response if response.status_code == 200 else None


def _environment(settings: Settings, mark: str) -> dict[str, str]:
    """Environment of all that is started: this process's, the settings, Ray's token, the mark."""
    environment = {
        name: value for name, value in os.environ.items() if name != "RAY_ADDRESS" and not name.startswith("TUNESMITH_")
    }
    # The interpreter's own programs first: a job's `python` is looked up on the PATH that Ray was started with.
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    return environment | settings.to_env() | ray_environment(settings) | {
        "PATH": path,
        # In a folder that others write to, they may have made what a process means to make.
        "TMPDIR": str(settings.ray_folder / "tmp"),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.inner_ports.guard_proxy",
        processes.PLATFORM_MARK: mark,
    }  # fmt: skip


def _make_ray_folder(settings: Settings) -> Path:
    """Ray's own folder, below one that nobody else may enter: Ray lets everybody read and write in its own.

    At a short path of this home's own, because a Unix socket's path has at most 107 characters.
    """
    if len(settings.ray_temp_dir) > 28:
        raise SpecError(f"TUNESMITH_RAY_TEMP_DIR has at most 28 characters, got {settings.ray_temp_dir!r}")
    settings.ray_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if settings.ray_folder.lstat().st_uid == os.getuid() and not settings.ray_folder.is_symlink():
        settings.ray_folder.chmod(0o700)
    _check_ray_folder(settings)
    (settings.ray_folder / "tmp").mkdir(exist_ok=True)
    return settings.ray_folder / "r"


def _check_home(settings: Settings) -> None:
    """SpecError where the home is somebody else's, or lies where anybody may put another in its place."""
    if settings.home.stat().st_uid != os.getuid():
        raise SpecError(f"the home {settings.home} belongs to somebody else", code="home_open", fields=["home"])
    for folder in settings.home.parents:
        mode = folder.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise SpecError(
                f"the home {settings.home} lies in {folder}, where anybody may rename it",
                hint="choose another home by TUNESMITH_HOME, or take the right to write from others",
                code="home_open",
                fields=["home"],
            )


def _check_ray_folder(settings: Settings) -> None:
    """SpecError where somebody else could read or write what Ray keeps."""
    status = settings.ray_folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise SpecError(
            f"{settings.ray_folder} belongs to somebody else, or is open to others",
            hint="choose another folder by TUNESMITH_RAY_TEMP_DIR",
            code="ray_folder_open",
        )


def _check_ports(settings: Settings, *, door: bool) -> None:
    """SpecError unless all ports of the settings are free."""
    wanted = [("127.0.0.1", "ray_port"), ("127.0.0.1", "ray_dashboard_port")]
    for host, name in wanted + [(settings.host, "port")] * door:
        port = getattr(settings, name)
        why = ports.obstacle(host, port)
        if why is not None:
            raise SpecError(
                f"port {port} of {host} cannot be used: {why}",
                fields=[name],
                hint=f"end what uses it, or set TUNESMITH_{name.upper()} to another port",
                code="port_in_use",
            )


def _check_settings(settings: Settings, platform: Platform) -> None:
    now = settings.to_env()
    changed = sorted(name for name in now | platform.settings if now.get(name) != platform.settings.get(name))
    if changed:
        raise ConflictError(
            f"the platform runs with other settings: {', '.join(changed)}",
            hint="`tunesmith down` ends it; `tunesmith up` starts it with the new ones",
        )


def _end_leftovers(settings: Settings) -> None:
    """End what is left of a platform whose Ray was killed."""
    platform = _read(settings)
    if platform is not None:
        _end(settings, platform)


def _end(settings: Settings, platform: Platform) -> int:
    root = processes.find(platform.pid, platform.created)
    ended = processes.end(root, processes.PLATFORM_MARK, platform.mark)
    left = processes_of(platform)
    if left:
        raise UnavailableError(f"processes that could not be ended: {', '.join(str(process.pid) for process in left)}")
    for folder in (Path(platform.temp_dir), settings.ray_folder / "tmp"):
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        settings.ray_folder.rmdir()
    _state_file(settings).unlink(missing_ok=True)
    return len(ended)


def _state_file(settings: Settings) -> Path:
    return settings.home / "platform.json"


def _read(settings: Settings) -> Platform | None:
    try:
        return Platform.model_validate_json(_state_file(settings).read_bytes())
    except FileNotFoundError:
        return None


def _write(settings: Settings, platform: Platform) -> None:
    partial = settings.home / ".platform.json.partial"
    partial.write_text(platform.model_dump_json(indent=2) + "\n")
    partial.replace(_state_file(settings))


def _tail(log: Path, lines: int = 15) -> str:
    text = log.read_text(errors="replace").rstrip()
    return f"the end of {log}:\n" + "\n".join(text.splitlines()[-lines:])


@contextmanager
def _locked(settings: Settings) -> Iterator[None]:
    """One `up` or `down` of a home at a time; what it writes is its user's alone."""
    with processes.private_files():
        settings.home.mkdir(parents=True, exist_ok=True)
        with (settings.home / "platform.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
