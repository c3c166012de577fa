"""Which user of the node a user's program runs as.

Where the platform is root, every process of it has a user of its own for its programs: one that has no name, owns
nothing else on the node, and that no other process uses as long as this one lives. Else programs run as the platform's
own user, and only their namespaces keep them apart.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

FIRST = 1_900_000_000
"""Above what systems give to people, services and containers; with a process's id added it is still an id."""
_CAPABILITIES = {"CHOWN": 0, "DAC_OVERRIDE": 1, "KILL": 5, "SETGID": 6, "SETUID": 7, "SETPCAP": 8, "SYS_ADMIN": 21}
"""What it takes to make a room for another user, by name and bit."""


def own_user() -> int | None:
    """The user id, and the group id likewise, of this process's programs; None where they are the platform's own."""
    owner = FIRST + os.getpid()
    if os.geteuid() == 0 and _has_capabilities() and all(_is_mapped(owner, kind) for kind in ("uid", "gid")):
        return owner
    return None


def give(folders: Sequence[Path]) -> None:
    """Make folders, and all that lies in them, the property of this process's programs; links are not followed."""
    _change(folders, own_user())


def take_back(folders: Sequence[Path]) -> None:
    """Make folders that programs wrote to the platform's property again. None of the programs may live any more."""
    _change(folders, 0)


def _change(folders: Sequence[Path], owner: int | None) -> None:
    if owner is not None and own_user() is not None and folders:
        # However deep they are: a walk of Python's would hold one open file for each level.
        subprocess.run(["chown", "-RhP", f"{owner}:{owner}", "--", *folders], check=True, capture_output=True)


def _has_capabilities() -> bool:
    """Root in a container often has few rights, and less than these makes no room for another user."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            found = int(line.split()[1], 16)
            return all(found >> bit & 1 for bit in _CAPABILITIES.values())
    return False


def _is_mapped(owner: int, kind: str) -> bool:
    """Whether the id exists in this process's user namespace."""
    for line in Path(f"/proc/self/{kind}_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if first <= owner < first + count:
            return True
    return False
