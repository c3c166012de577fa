"""A user's program as a child process: started in its room, sampled, and ended with all that it began.

It dies with the process that started it, whatever the moment: its launch holds a lifeline (`tunesmith.processes`).
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, cast

import psutil

from trainers.isolation.cgroups import Group
from tunesmith import processes
from tunesmith.jobs.attempts import attempt_name

MARK = "TUNESMITH_PROGRAM"
"""Variable that every process of a program carries."""


@dataclass(frozen=True)
class Launch:
    """How a program is started in its room."""

    command: Sequence[str]
    environment: Mapping[str, str]
    cwd: Path
    writable: Sequence[Path] = ()
    """Folders that it may fill."""
    temporary: Path | None = None
    """Its `/tmp`."""
    group: Group | None = None
    """The control group that it is in; it is removed after the program has ended."""
    is_contained: bool = True
    """Whether all that it begins ends with its first process."""
    mark: str = field(default_factory=lambda: secrets.token_hex(16))
    """Its processes are found by this mark, also after the process that started them has ended."""


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

    def __init__(self, launch: Launch, *, errors: int = subprocess.STDOUT) -> None:
        """`errors`: the descriptor that takes its stderr, which else comes with its stdout."""
        self.launch = launch
        # bubblewrap keeps the platform's mark from the program; its own processes have it.
        platform = {name: os.environ[name] for name in (processes.PLATFORM_MARK,) if name in os.environ}
        stdin, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                launch.command,
                cwd=launch.cwd,
                env={**launch.environment, **platform, MARK: launch.mark},
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(stdin)
        self._cpu: dict[int, psutil.Process] = {}
        self._memory_ran_out = False

    @property
    def output(self) -> IO[bytes]:
        """What it writes to stdout and stderr, as it writes it."""
        return cast("IO[bytes]", self._process.stdout)

    def exit_code(self) -> int | None:
        """The exit code as in a shell: 128 + N if signal N ended the program; None while it runs."""
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def wait(self, limit_s: float) -> int | None:
        """The exit code once it has ended, as `exit_code`; None where it still runs after `limit_s`."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(limit_s)
        return self.exit_code()

    def sample(self) -> Sample:
        """What its processes use now; the CPU's share is that since the previous sample."""
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

    def memory_bytes(self) -> int | None:
        """The memory that the kernel counts for it, wherever it holds it; None where the kernel does not count."""
        return self.launch.group.memory_bytes() if self.launch.group is not None else None

    def memory_ran_out(self) -> bool:
        """Whether the kernel has ended one of its processes because of its memory; known after its end as well."""
        group = self.launch.group
        return self._memory_ran_out or (group is not None and group.memory_ran_out())

    def tree(self) -> list[psutil.Process]:
        """Its processes, with bubblewrap's own."""
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.Error:
            return []

    def terminate(self) -> None:
        """Send SIGTERM to the program itself, so that it can save what it has and end."""
        with suppress(psutil.Error):
            main = psutil.Process(self._process.pid)
            # Around it lie bubblewrap's two processes, which would not pass a signal on; podman, the first that they
            # started, does.
            while main.name() in ("bwrap", "sh") and (below := main.children()):
                main = min(below, key=psutil.Process.create_time)
            main.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Kill it and all that it began."""
        tree = self.tree() if self._process.poll() is None else []
        if tree and self.launch.is_contained:
            # The room ends with bubblewrap, all in it at once, however fast it makes new processes.
            self._process.kill()
        processes.end(tree[0] if tree else None, MARK, self.launch.mark, also=tree)
        self._process.wait()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if self.launch.group is not None:
            self._memory_ran_out = self._memory_ran_out or self.launch.group.memory_ran_out()
            self.launch.group.remove()

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def program_mark(job_id: str, attempt: int, rank: int) -> str:
    """The mark of the program of one worker."""
    return f"{attempt_name(job_id, attempt)}-{rank}"


def end_earlier(job_id: str, attempt: int) -> int:
    """Kill the processes of earlier attempts of a job that still run on this node, and return how many there were."""
    marks = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            mark = process.environ().get(MARK, "")
            owner, _, number = mark.rpartition("-")[0].rpartition("-a")
            if owner == job_id and number.isdecimal() and int(number) < attempt:
                marks.add(mark)
    return sum(len(processes.end(None, MARK, mark)) for mark in marks)
