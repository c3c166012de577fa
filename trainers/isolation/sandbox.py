"""A user's program in a room of its own: bubblewrap shows it its folders and nothing else of the node."""

from __future__ import annotations

import os
import platform
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainers.isolation import cgroups
from trainers.isolation.bubblewrap import NAMESPACES, find_bubblewrap
from trainers.isolation.networks import LOOPBACK, OwnNetwork
from trainers.isolation.program import Launch
from tunesmith import processes
from tunesmith.settings import Settings

_SYSTEM = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/bin",
    "/sbin",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/alternatives",
    "/etc/localtime",
    "/etc/ssl",
    "/etc/pki",
    "/etc/ca-certificates",
)
_NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/host.conf")
_SHARED_MEMORY_BYTES = 8 << 30
_DEVICES = {
    "GPU": ("nvidia*", "kfd", "dri"),
    "NPU": ("davinci*", "devmm_svm", "hisi_hdc"),
}
_PASSED_ON = (
    "CUDA_VISIBLE_DEVICES",
    "ASCEND_RT_VISIBLE_DEVICES",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
)
"""Variables of the node that a program inside needs; none of them holds a secret."""
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
"""Further ones, for programs that see the node's system."""


Network = Literal["none", "node"] | OwnNetwork
"""What a program can reach; `node` means everything that the node itself reaches, its own ports included."""


@dataclass(frozen=True)
class Room:
    """What a program sees."""

    readable: Sequence[Path]
    writable: Sequence[Path]
    temporary: Path
    """Its `/tmp`."""
    network: Network
    resources: Mapping[str, float]
    """Ray's resources, which say what accelerators the program sees."""
    largest_file_bytes: int


def launch(
    command: Sequence[str], *, cwd: Path, room: Room, variables: Mapping[str, str], settings: Settings
) -> Launch:
    """How `command`, which begins with the path of its Python, is started in the room with `variables`."""
    group = cgroups.make(secrets.token_hex(8), tasks=settings.program_processes)
    return Launch(
        command_line(command, cwd=cwd, room=room, settings=settings, group=group),
        environment(room, Path(command[0]), variables, settings),
        cwd,
        writable=room.writable,
        temporary=room.temporary,
        group=group,
        is_contained=settings.isolation != "none",
    )


def command_line(
    command: Sequence[str], *, cwd: Path, room: Room, settings: Settings, group: Path | None = None
) -> list[str]:
    """The command that runs `command` in the room; alone with its limits where the operator has said `none`.

    `group`: the control group that it enters first.
    Raises IsolationError where this node has no bubblewrap that works.
    """
    blocks = str(max(1, room.largest_file_bytes // 512))
    procs = str(group / "cgroup.procs") if group is not None else "/dev/null"
    script = 'ulimit -c 0; ulimit -f "$1"; echo $$ > "$2" || exit; shift 2; exec "$@"'
    limited = ["/bin/sh", "-c", script, "sh", blocks, procs]
    if settings.isolation == "none":
        return [*limited, *processes.with_lifeline(command)]
    options = [
        *NAMESPACES,
        "--die-with-parent",
        "--unsetenv",
        processes.PLATFORM_MARK,
        "--proc",
        "/proc",
        "--dev",
        "/dev",
    ]
    options += ["--size", str(_SHARED_MEMORY_BYTES), "--tmpfs", "/dev/shm", "--bind", str(room.temporary), "/tmp"]
    options += ["--unshare-net"] if room.network == "none" else []
    for path in (*_SYSTEM, *(_NETWORK if room.network != "none" else ())):
        options += ["--ro-bind-try", path, path]
    for path in (*_interpreter(), *room.readable):
        options += ["--ro-bind", str(path), str(path)]
    for path in room.writable:
        options += ["--bind", str(path), str(path)]
    if found := devices(room):
        options += ["--ro-bind-try", "/sys", "/sys"]
        for device in found:
            options += ["--dev-bind-try", str(device), str(device)]
    options += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", str(cwd), "--"]
    entrance = room.network.entrance() if isinstance(room.network, OwnNetwork) else []
    inside = processes.with_lifeline([*_few_processes(settings), *command], kills="namespace")
    return [*limited, *entrance, find_bubblewrap(), *options, *inside]


def environment(room: Room, python: Path, given: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """The variables of a program in the room: `given` and those that any program needs, but none of the platform's."""
    home = "/tmp" if settings.isolation != "none" else str(room.temporary)
    passed_on = {name: os.environ[name] for name in CERTIFICATES if name in os.environ}
    path = f"{python.parent}:/usr/local/bin:/usr/bin:/bin"
    return {"PATH": path, **passed_on, **common_variables(room, home=home), **given}


def common_variables(room: Room, *, home: str) -> dict[str, str]:
    """What any program in a room has."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {
        "HOME": home,
        "TMPDIR": home,
        "USER": "job",
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": str(max(1, int(room.resources.get("CPU", 1)))),
        **passed_on,
        **(LOOPBACK if isinstance(room.network, OwnNetwork) else {}),
    }


def devices(room: Room) -> list[Path]:
    """The node's device files of the accelerators that the room has."""
    patterns = [pattern for kind in _DEVICES if room.resources.get(kind) for pattern in _DEVICES[kind]]
    return sorted(found for pattern in patterns for found in Path("/dev").glob(pattern))


def _few_processes(settings: Settings) -> list[str]:
    """What limits the processes of the room, run inside it: the system counts them by user and user namespace.

    It holds for an ordinary user alone, for root is never refused a process by it: there a control group does. Before
    Linux 5.14 all processes of the user on the node would count.
    """
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    if version is None or (int(version[1]), int(version[2])) < (5, 14):
        return []
    # dash calls -p what the other shells call -u.
    script = 'ulimit -u "$1" 2>/dev/null || ulimit -p "$1" 2>/dev/null; shift; exec "$@"'
    return ["/bin/sh", "-c", script, "sh", str(settings.program_processes)]


def _interpreter() -> list[Path]:
    """The folders of Python and of the platform's packages, torch among them."""
    return list(dict.fromkeys(Path(prefix).resolve() for prefix in (sys.base_prefix, sys.prefix)))
