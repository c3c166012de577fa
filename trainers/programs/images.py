"""A user's program in an image of its own, run by podman.

Around podman lies a room of bubblewrap's: the node's files read only but for podman's own folder, processes, `/run` and
mounts of its own. So nothing of podman, of its helpers or of the container outlives the program, however that ends, and
podman never meets what else it may run on the node. Images are kept once a node; a container's own folder holds next to
nothing, for its root is read only. Where the node's user is not root, podman works as the root of a user namespace that
knows that one user; then there are no control groups, and memory is looked at alone.

`python -m trainers.programs.images` says what to give `ray start --resources` on this node.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from trainers.isolation import node_files, sandbox
from trainers.isolation.bubblewrap import IsolationError, find_bubblewrap, find_program
from trainers.isolation.cgroups import MEMORY_MARGIN
from trainers.isolation.networks import OwnNetwork
from trainers.isolation.program import Launch, Program
from trainers.isolation.sandbox import Room
from trainers.isolation.system_calls import NEW_NAMESPACES, REFUSED
from trainers.programs.environments import locked
from trainers.programs.program_log import ProgramLog
from tunesmith import caches, processes
from tunesmith.assets.image_references import RESOURCE, parse_image
from tunesmith.assets.sources import check_path
from tunesmith.errors import SpecError
from tunesmith.settings import Settings
from tunesmith.visible_text import visible

MAX_PROCESSES = 16384

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CGROUPS = Path("/sys/fs/cgroup")
_ORDERS = ("run.oci.", "module.wasm.", "org.criu.", "org.systemd.", "io.podman.", "io.containers.")
"""How annotations begin that crun, runc or podman act on."""
_SECCOMP = ("/etc/containers/seccomp.json", "/usr/share/containers/seccomp.json")
_SHARED_MEMORY = "8g"
_FETCHING = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
"""Variables of the node that podman itself needs to fetch an image; no program gets them."""


@dataclass(frozen=True)
class Image:
    """An image that this node has."""

    url: str
    """The URL as it stands in the model's card."""
    id: str
    """The id of its configuration."""
    digest: str
    """The digest of its manifest."""

    @property
    def lock(self) -> str:
        """The text that is kept with the job."""
        return json.dumps({"url": self.url, "id": self.id, "digest": self.digest}, indent=2) + "\n"


@dataclass(frozen=True)
class Podman:
    """How podman works on this node."""

    path: str
    runtime: str
    """The program that makes containers: runc or crun."""
    cgroups: bool
    """Whether it may limit memory and processes by control groups."""


def program_command(path: str) -> list[str]:
    """The command that runs a `.py` or `.sh` in an image."""
    if path.endswith(".py"):
        return ["python3", path]
    return ["/bin/sh", "-c", 'if command -v bash >/dev/null; then exec bash "$0"; else exec sh "$0"; fi', path]


def fetch_image(
    url: str, *, model: Path, settings: Settings, log: ProgramLog, watch: Callable[[Program], None]
) -> Image:
    """The image of a card's `Train_image_url`, fetched where this node does not have it.

    `model`: the folder of the model's files. `watch` waits for podman's end and raises what keeps it from going on.
    SpecError with podman's last lines where the image cannot be had, IsolationError where there is no podman.
    """
    podman = find_podman(settings)
    folder = _store(settings)
    caches.hold(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    source = _source(url, model, settings)
    with locked(folder / "lock"), tempfile.TemporaryDirectory(dir=folder) as scratch:
        said = Path(scratch) / "image.json"
        script = 'image=$("$0" pull -- "$1") && exec "$0" image inspect "$image" >"$2"'
        command = ["/bin/sh", "-c", script, podman.path, source, str(said)]
        program = Program(_launch(command, podman, folder, variables=_fetching(settings)))
        with log.following(program):
            watch(program)
            code = program.exit_code()
        if code != 0:
            raise SpecError(
                f"the image {url} could not be fetched (podman ended with exit code {code}); "
                f"its last lines:\n{log.tail()}",
                hint="the log of the worker has all that podman said",
                code="image_failed",
            )
        (found,) = json.loads(said.read_bytes())
    _check_annotations(url, found.get("Annotations") or {})
    caches.keep_bounds(settings)
    return Image(url, id=found["Id"], digest=found["Digest"])


def _check_annotations(url: str, annotations: Mapping[str, str]) -> None:
    """SpecError for annotations that podman hands on to the runtime as orders, the filter of system calls among it."""
    orders = sorted(name for name in annotations if name.startswith(_ORDERS))
    if orders:
        raise SpecError(
            f"the image {url} has the annotation {visible(orders[0], limit=100)}, which would steer the program that "
            "makes its container",
            hint=f"make the image without annotations that begin with {', '.join(_ORDERS)}",
            code="image_failed",
        )


def launch(
    command: Sequence[str],
    *,
    cwd: Path,
    room: Room,
    variables: Mapping[str, str],
    image: Image,
    folder: Path,
    memory_bytes: int,
    settings: Settings,
) -> Launch:
    """How `command` is started in the image and the room, with `variables`.

    `folder` becomes the container's own; its name tells it from all others of the node. IsolationError where there is
    no podman.
    """
    podman = find_podman(settings)
    own = {"memory": f"{int(memory_bytes * MEMORY_MARGIN)}b", "cgroup-parent": f"/{_cgroup(folder)}"}
    options = [f"--{name}={text}" for name, text in own.items() if podman.cgroups]
    # By name alone: values stay out of the command line, which all of the node's users see.
    options += [f"--env={name}" for name in variables]
    run = _run(podman, folder, room, cwd, options, target=[f"--entrypoint={command[0]}", image.id, *command[1:]])
    prefix = _entrance(podman, room)
    writable = [*room.writable, room.temporary]
    launched = _launch(
        run, podman, folder, readable=room.readable, writable=writable, variables=variables, images=_store(settings)
    )
    started = [*prefix, *launched.command]
    return replace(launched, command=started, writable=room.writable, temporary=room.temporary)


def remove_cgroups(folder: Path) -> None:
    """Remove what a container with this folder leaves where podman is killed: empty control groups."""
    if not _CGROUPS.is_dir():
        return
    for place in (_CGROUPS, *(path for path in _CGROUPS.iterdir() if path.is_dir())):
        group = place / _cgroup(folder)
        for path in (*sorted((each for each in group.rglob("*") if each.is_dir()), reverse=True), group):
            with suppress(OSError):
                path.rmdir()


@cache
def find_podman(settings: Settings) -> Podman:
    """How podman works on this node, found by running a container of the node's own programs.

    IsolationError where it does not work.
    """
    path = shutil.which("podman", path=_PATH)
    if path is None:
        raise _no_podman("there is no podman")
    may_limit = os.geteuid() == 0 and os.access(_CGROUPS, os.W_OK)
    # runc makes no container without control groups.
    ways = [("runc", True), ("crun", True)] if may_limit else []
    said = []
    for runtime, cgroups in [*ways, ("crun", False)]:
        if shutil.which(runtime, path=_PATH) is None:
            said.append(f"there is no {runtime}")
            continue
        podman = Podman(path, runtime, cgroups)
        why = _try_out(podman, settings)
        if why is None:
            return podman
        said.append(f"with {runtime}{'' if cgroups else ', without control groups'}: {why}")
    raise _no_podman("; ".join(said))


def main() -> None:
    """Write this node's resource as JSON, `{}` where podman does not work; why goes to stderr."""
    try:
        find_podman(Settings.from_env())
    except IsolationError as error:
        sys.stderr.write(f"{error.message}\n")
        sys.stdout.write("{}\n")
    else:
        sys.stdout.write(json.dumps({RESOURCE: 1}) + "\n")


def _no_podman(why: str) -> IsolationError:
    return IsolationError(
        f"no image can be run on this node: {why}",
        hint="install podman, runc (or crun) and catatonit; docs/custom-models.md says more",
        code="no_podman",
    )


def _try_out(podman: Podman, settings: Settings) -> str | None:
    """Why podman does not make a container here; None where it does."""
    (settings.home / "tmp").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.home / "tmp", prefix="podman-") as name:
        folder = Path(name)
        root, system = folder / "root", [Path("/usr")]
        (root / "run").mkdir(parents=True)
        for path in map(Path, ("/bin", "/sbin", "/lib", "/lib32", "/lib64")):
            if path.is_symlink():
                (root / path.name).symlink_to(path.readlink())
            elif path.is_dir():
                system.append(path)
        room = Room(
            readable=system, writable=[], temporary=folder, network="none", resources={}, largest_file_bytes=1 << 30
        )
        options = [f"--cgroup-parent=/{_cgroup(folder)}"] if podman.cgroups else []
        run = _run(podman, folder, room, Path("/"), options, target=["--rootfs", str(root), "/usr/bin/true"])
        launched = _launch(run, podman, folder, readable=system)
        try:
            with processes.lifeline() as stdin:
                done = subprocess.run(
                    launched.command, env=launched.environment, cwd=launched.cwd, stdin=stdin,
                    capture_output=True, text=True, errors="replace", check=False, timeout=60,
                )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "it did not answer within 60 s"
        finally:
            remove_cgroups(folder)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:500]


def _run(
    podman: Podman, folder: Path, room: Room, cwd: Path, options: Sequence[str], *, target: Sequence[str]
) -> list[str]:
    """podman's command line for a container that has only what the room has."""
    fixed = {
        "rm": "true",
        "init": "true",
        "pull": "never",
        "read-only": "true",
        "read-only-tmpfs": "false",
        "image-volume": "ignore",
        "cap-drop": "all",
        "user": "0:0",
        "hostname": "job",
        "pid": "private",
        "ipc": "private",
        "uts": "private",
        "shm-size": _SHARED_MEMORY,
        "http-proxy": "false",
        "systemd": "false",
        "no-healthcheck": "true",
        # Its output is the program's own, as it writes it.
        "log-driver": "passthrough",
        "workdir": str(cwd),
    }
    if podman.cgroups:
        # The same users in a namespace of their own: there, root is nobody to the node's kernel.
        fixed |= {"uidmap": "0:0:65536", "gidmap": "0:0:65536", "pids-limit": str(MAX_PROCESSES)}
    else:
        # The runtime would show an empty folder in place of the groups, which the program could fill with memory.
        fixed |= {"cgroups": "disabled", "security-opt": f"mask={_CGROUPS}"}
    run = [podman.path, "run", *(f"--{name}={text}" for name, text in fixed.items())]
    run += ["--security-opt=no-new-privileges", f"--security-opt=seccomp={folder / 'seccomp.json'}"]
    run += [f"--ulimit={text}" for text in _limits(room)]
    run += ["--network=none" if room.network == "none" else "--network=host"]
    run += [f"--volume={path}:{path}:ro,nosuid,nodev" for path in room.readable]
    run += [f"--volume={path}:{path}:rw,nosuid,nodev" for path in room.writable]
    run += [f"--volume={room.temporary}:/tmp:rw,nosuid,nodev"]
    run += [f"--device={path}" for path in node_files.devices(room.resources)]
    run += [f"--env={name}={text}" for name, text in sandbox.common_variables(room, home="/tmp").items()]
    return [*run, *options, *target]


def _entrance(podman: Podman, room: Room) -> list[str]:
    """The words before the whole command that run it on the room's network, which is then the container's host's."""
    if not isinstance(room.network, OwnNetwork):
        return []
    # Where podman is root on the node, it stays so.
    return (
        [find_program("nsenter"), f"--net={room.network.network}", "--"] if podman.cgroups else room.network.entrance()
    )


def _launch(
    command: Sequence[str],
    podman: Podman,
    folder: Path,
    *,
    readable: Sequence[Path] = (),
    writable: Sequence[Path] = (),
    variables: Mapping[str, str] | None = None,
    images: Path | None = None,
) -> Launch:
    """podman, or what calls it, in a room around it; `folder`: its own, `images`: a store that it reads as well."""
    (folder / "tmp").mkdir(mode=0o700, parents=True, exist_ok=True)
    configuration = _configure(podman, folder, images)
    options = [
        "--die-with-parent",
        "--unsetenv",
        processes.PLATFORM_MARK,
        "--cap-add",
        "ALL",
        "--unshare-pid",
        "--unshare-ipc",
    ]
    options += [] if podman.cgroups else ["--unshare-user", "--uid", "0", "--gid", "0"]
    options += ["--ro-bind", "/", "/", "--dev-bind", "/dev", "/dev"]
    # Without control groups the runtime is not to find any.
    options += ["--bind", str(_CGROUPS), str(_CGROUPS)] if podman.cgroups else ["--tmpfs", str(_CGROUPS)]
    # What /etc/resolv.conf may point to.
    options += ["--tmpfs", "/run", "--ro-bind-try", "/run/systemd/resolve", "/run/systemd/resolve"]
    options += ["--tmpfs", "/dev/shm"]
    for path in readable:
        options += ["--ro-bind", str(path), str(path)]
    for path in (*writable, folder):
        options += ["--bind", str(path), str(path)]
    # bubblewrap's own /proc has parts that are covered, and under such a one the kernel lets nobody mount another.
    inside = ["/bin/sh", "-c", 'mount -t proc proc /proc && exec "$@"', "sh"]
    inside += processes.with_lifeline(command, kills="namespace")
    environment = {"PATH": _PATH, "HOME": str(folder / "tmp"), "TMPDIR": str(folder / "tmp"), "LANG": "C.UTF-8"}
    if not podman.cgroups:
        # podman takes itself for rootless, and asks for no more users than there are.
        environment |= {"_CONTAINERS_USERNS_CONFIGURED": "done", "_CONTAINERS_ROOTLESS_UID": "0"}
        environment |= {"_CONTAINERS_ROOTLESS_GID": "0", "XDG_RUNTIME_DIR": "/run"}
    full = [find_bubblewrap(), *options, "--chdir", str(folder), "--", *inside]
    return Launch(full, {**environment, **configuration, **(variables or {})}, folder)


def _configure(podman: Podman, folder: Path, images: Path | None) -> dict[str, str]:
    """Write podman's configuration into its folder, in place of the node's; the variables that name it."""
    containers: dict[str, dict[str, Any]] = {
        "containers": {"default_ulimits": [], "base_hosts_file": "none"},
        "engine": {
            "runtime": podman.runtime,
            "cgroup_manager": "cgroupfs",
            "events_logger": "none",
            "image_copy_tmp_dir": str(folder / "tmp"),
        },
    }
    storage: dict[str, dict[str, Any]] = {
        "storage": {"driver": "overlay", "graphroot": str(folder / "store"), "runroot": "/run/containers/storage"},
        "storage.options": {"additionalimagestores": [str(images / "store")] if images is not None else []},
        "storage.options.overlay": {} if podman.cgroups else {"ignore_chown_errors": "true"},
    }
    for name, tables in (("containers.conf", containers), ("storage.conf", storage)):
        (folder / name).write_text(_toml(tables))
    (folder / "seccomp.json").write_text(json.dumps(_seccomp()))
    return {
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
    }


def _toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    # Texts and lists of texts look the same in TOML and JSON.
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for name, table in tables.items()
    ]
    return "\n".join(lines)


def _seccomp() -> dict[str, Any]:
    """The node's profile of system calls for containers, without what other programs are refused as well."""
    path = next((Path(each) for each in _SECCOMP if Path(each).is_file()), None)
    if path is None:
        raise _no_podman(f"there is none of {', '.join(_SECCOMP)}")
    profile: dict[str, Any] = json.loads(path.read_bytes())
    for rule in profile["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name not in (*REFUSED, "clone", "unshare")]
    profile["syscalls"] = [rule for rule in profile["syscalls"] if rule["names"]]
    no_new = {"index": 0, "value": NEW_NAMESPACES & ~0xFF, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
    profile["syscalls"] += [
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [no_new]},
        {"names": ["unshare"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
        # Its flags lie in memory, where a filter cannot look: a C library then takes clone.
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
    ]
    return profile


def _limits(room: Room) -> list[str]:
    """The limits as podman's options; without one of the room, this process's own: podman would ask for more."""
    found = ["core=0:0", f"fsize={room.largest_file_bytes}:{room.largest_file_bytes}"]
    for name, kind in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        soft, hard = resource.getrlimit(kind)
        found.append(f"{name}={soft}:{hard}")
    return found


def _source(url: str, model: Path, settings: Settings) -> str:
    """The source that podman pulls from. SpecError where it is not allowed."""
    reference = parse_image(url)
    if not reference.is_archive:
        return f"docker://{reference.name}"
    path = Path(os.path.realpath(model / reference.name))
    if not reference.is_in_model:
        check_path(str(path), settings, what=f"the image {url}")
    elif not path.is_relative_to(model.resolve()):
        raise SpecError(
            f"the image {url} must lie below {model}, among the model's files",
            hint="put the archive among the model's files",
            code="source_not_allowed",
        )
    if not path.is_file():
        raise SpecError(
            f"there is no file for the image {url} on the node that runs the job",
            hint="put the archive among the model's files, or the image into a registry",
            code="image_failed",
        )
    return f"{reference.transport}:{path}"


def _fetching(settings: Settings) -> dict[str, str]:
    """The variables that podman gets while it fetches an image."""
    given = {name: os.environ[name] for name in (*_FETCHING, *node_files.CERTIFICATES) if name in os.environ}
    keys = settings.home / "registries.json"
    return {**given, **({"REGISTRY_AUTH_FILE": str(keys)} if keys.is_file() else {})}


def _store(settings: Settings) -> Path:
    """podman's folder with all images of this node."""
    return settings.home / "cache" / "images"


def _cgroup(folder: Path) -> str:
    """The control group of a container with this folder, which lies in that of its run."""
    return f"tunesmith-{folder.parent.name}-{folder.name}"


if __name__ == "__main__":
    main()
