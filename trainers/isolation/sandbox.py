"""A user's program in a room of its own: bubblewrap shows it its folders and nothing else of the node."""

from __future__ import annotations

import base64
import json
import os
import platform
import re
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainers.isolation import cgroups, node_files, owner, threshold
from trainers.isolation.bubblewrap import find_bubblewrap, find_program, namespaces
from trainers.isolation.cgroups import Group
from trainers.isolation.networks import LOOPBACK, OwnNetwork
from trainers.isolation.node_files import CERTIFICATES, Content, Word
from trainers.isolation.program import Launch
from trainers.isolation.system_calls import assemble_filter
from tunesmith import processes
from tunesmith.settings import Settings

_SHARED_MEMORY_BYTES = 8 << 30
_PASSED_ON = (
    "CUDA_VISIBLE_DEVICES",
    "ASCEND_RT_VISIBLE_DEVICES",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
)
"""Variables of the node that a program inside needs; none of them holds a secret."""
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
    memory_bytes: int | None = None
    """What the kernel lets it hold, where it can; None where only the look limits it."""


def launch(
    command: Sequence[str], *, cwd: Path, room: Room, variables: Mapping[str, str], settings: Settings
) -> Launch:
    """How `command`, which begins with the path of its Python, is started in the room with `variables`.

    What may be written to becomes the property of the program's user.
    Raises IsolationError where this node has no bubblewrap that works.
    """
    group = cgroups.make(secrets.token_hex(8), tasks=settings.program_processes, memory_bytes=room.memory_bytes)
    is_isolated = settings.isolation != "none"
    if is_isolated:
        owner.give([*room.writable, room.temporary])
    return Launch(
        command_line(command, cwd=cwd, room=room, settings=settings, group=group),
        environment(room, Path(command[0]), variables, settings),
        cwd,
        writable=room.writable,
        temporary=room.temporary,
        group=group,
        is_contained=is_isolated,
    )


def command_line(
    command: Sequence[str], *, cwd: Path, room: Room, settings: Settings, group: Group | None = None
) -> list[str]:
    """The command that runs `command` in the room; alone with its limits where the operator has said `none`.

    `group`: the control group that it enters first.
    Raises IsolationError where this node has no bubblewrap that works.
    """
    user = owner.own_user() if settings.isolation != "none" else None
    words: list[Word | Sequence[Word]] = [*processes.with_lifeline(command)]
    if settings.isolation != "none":
        found = find_bubblewrap()
        entrance = room.network.entrance() if isinstance(room.network, OwnNetwork) else []
        inside = [*(_become(user, room) if user is not None else _few_processes(settings)), *_begin_in(cwd), *command]
        # Told through a file: the options are long, and every user of the node reads command lines.
        words = [*entrance, found, "--args", list(_options(room, cwd, user)), "--"]
        words += processes.with_lifeline(inside, kills="namespace")
    given = {
        "groups": [str(folder) for folder in group.folders] if group is not None else [],
        "largest_file_bytes": max(1, room.largest_file_bytes),
        "tasks": settings.program_processes,
        "owner": user,
        "home": str(settings.home.resolve()),
        "readable": [str(path) for path in _shown(room)],
        "command": [_as_json(word) for word in words],
    }
    return [sys.executable, "-I", "-S", str(threshold.__file__), json.dumps(given)]


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


def _options(room: Room, cwd: Path, user: int | None) -> Iterator[Word]:
    """bubblewrap's options: what the program sees, and what it may do."""
    yield from (*namespaces(user), "--die-with-parent", "--unsetenv", processes.PLATFORM_MARK)
    if room.network == "none":
        yield "--unshare-net"
    found = node_files.devices(room.resources)
    yield from node_files.proc_options(has_accelerators=bool(found))
    yield from ("--dev", "/dev", "--perms", "1777", "--size", str(_SHARED_MEMORY_BYTES), "--tmpfs", "/dev/shm")
    yield from ("--bind", str(room.temporary), "/tmp")
    yield from node_files.system_options(has_network=room.network != "none")
    yield from node_files.users_options(*((user, user) if user is not None else (os.geteuid(), os.getegid())))
    for path in _shown(room):
        yield from node_files.bind("--ro-bind", path)
    for path in room.writable:
        yield from node_files.bind("--bind", path)
    yield from node_files.device_options(found)
    refused = assemble_filter()
    if refused is not None:
        yield from ("--seccomp", Content(refused))
    yield from ("--remount-ro", "/", "--chdir", "/")


def _begin_in(cwd: Path) -> list[str]:
    """What changes to the folder. Only the program's user may enter it, so bubblewrap could not."""
    return ["/bin/sh", "-c", 'cd "$1" || exit; shift; exec "$@"', "sh", str(cwd)]


def _become(user: int, room: Room) -> list[str]:
    """What makes the process inside that user's, without any right of root's."""
    groups = {
        str(status.st_gid)
        for status in (device.stat() for device in node_files.devices(room.resources))
        # Some accelerators are for a group. Root's own group reads much else.
        if status.st_gid != 0 and status.st_mode & 0o006 != 0o006
    }
    return [
        find_program("setpriv"),
        f"--reuid={user}",
        f"--regid={user}",
        f"--groups={','.join(sorted(groups))}" if groups else "--clear-groups",
        "--inh-caps=-all",
        "--ambient-caps=-all",
        "--bounding-set=-all",
        "--no-new-privs",
        "--",
    ]


def _as_json(word: Word | Sequence[Word]) -> Any:
    """A word as `trainers.isolation.threshold` reads it."""
    if isinstance(word, str):
        return word
    if isinstance(word, Content):
        return {"bytes": base64.b64encode(word.data).decode()}
    return {"words": [_as_json(each) for each in word]}


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


def _shown(room: Room) -> list[Path]:
    """What the room shows besides the system's folders: Python, the platform's packages with torch, the room's own."""
    python = [Path(prefix).resolve() for prefix in (sys.base_prefix, sys.prefix)]
    return [path for path in dict.fromkeys((*python, *room.readable)) if not node_files.is_shown(path.resolve())]
