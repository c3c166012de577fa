"""A user's program as a child process: started in its room, sampled, and ended with all that it began."""

from __future__ import annotations

import secrets
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, cast

import psutil

from trainers import cgroups, sandbox
from trainers.sandbox import Room
from tunesmith import processes
from tunesmith.settings import Settings

MARK = "TUNESMITH_PROGRAM"
"""Variable that every process of a program carries."""


@dataclass(frozen=True)
class Sample:
    """What the processes of a program use together."""

    cpu_percent: float
    """Of one CPU."""
    rss_bytes: int
    """A page that several of them share counts several times."""
    tasks: int
    """Processes and threads."""


class Program:
    """A running program. A context manager: when it is left, none of the program's processes lives.

    Made in a thread that lasts: bubblewrap dies with the thread that started it.
    """

    def __init__(
        self, command: Sequence[str], *, cwd: Path, room: Room, variables: Mapping[str, str], settings: Settings
    ) -> None:
        self.room = room
        self._mark = secrets.token_hex(16)
        self._isolated = settings.isolation != "none"
        self._group = cgroups.make(self._mark, tasks=settings.program_processes)
        python = Path(command[0])
        self._process = subprocess.Popen(
            sandbox.command_line(command, cwd=cwd, room=room, settings=settings, group=self._group),
            cwd=cwd,
            env=sandbox.environment(room, python, {**variables, MARK: self._mark}, settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._cpu: dict[int, psutil.Process] = {}

    @property
    def output(self) -> IO[bytes]:
        """What it writes to stdout and stderr, as it writes it."""
        return cast("IO[bytes]", self._process.stdout)

    def exit_code(self) -> int | None:
        """None while it runs; as a shell has it: 128 + N for one that signal N ended."""
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def sample(self) -> Sample:
        """Of now; the CPU's since the sample before."""
        found = {}
        for process in self.tree():
            # The same object is asked again, for it remembers what it said before.
            found[process.pid] = self._cpu.get(process.pid, process)
        self._cpu = found
        cpu, rss, tasks = 0.0, 0, 0
        for process in found.values():
            with suppress(psutil.Error), process.oneshot():
                tasks += process.num_threads()
                cpu += process.cpu_percent()
                rss += process.memory_info().rss
        return Sample(cpu, rss, tasks)

    def tree(self) -> list[psutil.Process]:
        """Its processes, with bubblewrap's own."""
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.Error:
            return []

    def terminate(self) -> None:
        """SIGTERM to the program itself, which may then save what it has and end."""
        with suppress(psutil.Error):
            main = psutil.Process(self._process.pid)
            # Around it lie bubblewrap's two processes, which would not pass a signal on.
            # Of what the inner one has below it, all but the first are orphans of the program.
            while main.name() in ("bwrap", "sh") and (below := main.children()):
                main = min(below, key=lambda process: process.create_time())
            main.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Kill it and all that it began."""
        root = psutil.Process(self._process.pid) if self._process.poll() is None else None
        if root is not None and self._isolated:
            # The room ends with bubblewrap, all in it at once, however fast it makes new processes.
            self._process.kill()
        processes.end(root, MARK, self._mark)
        self._process.wait()
        if self._group is not None:
            cgroups.remove(self._group)

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
