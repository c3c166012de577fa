"""A place with things that hostile programs look for, and what comes of all that they try from a room beside it."""

import json
import os
import platform
import secrets
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.isolation import hostile_program
from trainers.isolation import sandbox
from trainers.isolation.program import Program
from trainers.isolation.sandbox import Network, Room
from trainers.isolation.system_calls import MACHINES, REFUSED
from tunesmith.settings import Settings

MACHINE = platform.machine()
KERNEL_FILES = [path for path in hostile_program.WRITE_FILES if path.startswith("/proc/sys/")]
LARGEST = 1 << 30
SYSTEM_CALLS = {
    name: numbers[MACHINES[MACHINE].column]
    for name, numbers in REFUSED.items()
    if numbers[MACHINES[MACHINE].column] is not None
}


@dataclass(frozen=True)
class Outside:
    """A place outside of the room, with things that a program looks for."""

    folder: Path
    port: int
    abstract: str
    shm: str

    def told(self) -> dict[str, Any]:
        """What a program is told of it."""
        home = self.folder / "home"
        return {
            "inputs": str(self.folder / "inputs"),
            "output": str(self.folder / "output"),
            "paths": [
                str(path)
                for path in (home / "api_token", home / "storage", self.folder / "other", Path.home() / ".bashrc")
            ]
            + ["/boot", "/srv"],
            "port": self.port,
            "abstract": self.abstract,
            "shm": self.shm,
            "pid": os.getpid(),
            "largest": LARGEST,
            "system_calls": SYSTEM_CALLS,
        }

    def state(self) -> dict[str, Any]:
        """What no program may change."""
        # Environments of jobs are made in the home's caches.
        names = ("inputs", "home/storage", "other")
        files = sorted(path for name in names for path in (self.folder / name, *(self.folder / name).rglob("*")))
        files.append(self.folder / "home" / "api_token")
        found: dict[str, Any] = {
            str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns, path.is_file() and path.read_bytes())
            for path in files
        }
        for path in map(Path, KERNEL_FILES):
            if path.exists() and os.access(path, os.R_OK) and path.stat().st_mode & stat.S_IRUSR:
                found[str(path)] = path.read_bytes()
        return {**found, "hostname": socket.gethostname(), "oom": Path("/proc/self/oom_score_adj").read_text()}


@contextmanager
def outside(folder: Path) -> Iterator[Outside]:
    for name in ("inputs", "output", "tmp", "home", "home/storage", "other"):
        (folder / name).mkdir(mode=0o700)
    for path in ("inputs/weights.bin", "home/api_token", "other/secret"):
        (folder / path).write_text("s3cret")
        (folder / path).chmod(0o600)
    name = f"tunesmith-{secrets.token_hex(8)}"
    shared = Path("/dev/shm", name)
    shared.touch()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind(f"\0{name}")
        abstract.listen()
        try:
            yield Outside(folder, server.getsockname()[1], name, name)
        finally:
            shared.unlink()


def settings_of(folder: Path) -> Settings:
    return Settings.from_env({"TUNESMITH_HOME": str(folder / "home"), "TUNESMITH_PROGRAM_DISK_GIB": "1"})


def run_in_room(place: Outside, network: Network) -> dict[str, str]:
    """What comes of all tries in the room of a train.py."""
    folder = place.folder
    program = Path(hostile_program.__file__)
    room = Room([folder / "inputs", program], [folder / "output"], folder / "tmp", network, {"CPU": 1}, LARGEST)
    command = [sys.executable, str(program), json.dumps(place.told())]
    launch = sandbox.launch(command, cwd=folder / "inputs", room=room, variables={}, settings=settings_of(folder))
    with Program(launch) as running:
        said = running.output.read().decode()
    assert said.startswith("{"), said
    results: dict[str, str] = json.loads(said)
    return results
