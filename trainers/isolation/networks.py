"""The network of a job on one node: the programs of its workers reach each other there, and nothing else is on it."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO

import psutil

from trainers.isolation.bubblewrap import IsolationError, find_bubblewrap, find_program
from trainers.isolation.owner import own_user
from tunesmith import processes

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "HCCL_SOCKET_IFNAME": "lo"}
"""Variables for a program on a network that has nothing but loopback."""


@dataclass(frozen=True)
class OwnNetwork:
    """Where the namespaces of a network are found, as files, while the context that gave it lasts."""

    user: Path
    """The user namespace that owns the network."""
    network: Path

    def entrance(self) -> list[str]:
        """The words before a command that run it on this network."""
        # Named in full: the search path of a program begins with folders that its packages have filled.
        entrance = [find_program("nsenter"), f"--net={self.network}"]
        if own_user() is None:
            entrance += [f"--user={self.user}", "--preserve-credentials"]
        return [*entrance, "--"]


@contextmanager
def own_network(file: Path) -> Iterator[OwnNetwork]:
    """The network that all workers with the same `file` share. The first of them makes it; it has only loopback.

    Where those before have ended it is a new one: there is nobody left to talk to.
    """
    with ExitStack() as stack:
        with file.open("a+") as told:
            fcntl.flock(told, fcntl.LOCK_EX)
            namespaces = _namespaces(_told_holder(told))
            if namespaces is None:
                holder = stack.enter_context(_new_holder())
                told.truncate(0)
                told.write(f"{holder.pid} {holder.create_time()}")
                namespaces = _namespaces(holder)
                if namespaces is None:
                    raise IsolationError("the process that holds the network of a job ended at once")
        # A namespace stays while somebody has it open, also once its holder has ended.
        user, network = (Path(f"/proc/{os.getpid()}/fd/{stack.enter_context(each).fileno()}") for each in namespaces)
        yield OwnNetwork(user, network)


def _told_holder(told: IO[str]) -> psutil.Process | None:
    told.seek(0)
    pid, _, created = told.read().partition(" ")
    return processes.find(int(pid), float(created)) if created else None


def _namespaces(holder: psutil.Process | None) -> list[BufferedReader] | None:
    """The user and network namespace of the holder, opened; None where the holder has ended."""
    if holder is None:
        return None
    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(Path(f"/proc/{holder.pid}/ns/{kind}").open("rb")) for kind in ("user", "net")]
        except OSError:
            return None
        stack.pop_all()
        return opened


@contextmanager
def _new_holder() -> Iterator[psutil.Process]:
    """A process in a new network."""
    options = ["--unshare-user", "--unshare-net", "--die-with-parent", "--ro-bind", "/", "/"]
    # It ends with its stdin, so it cannot outlive this process.
    command = [find_bubblewrap(), *options, "--", "/bin/sh", "-c", "echo $$; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            # Said from inside, once the network is there.
            yield psutil.Process(int(process.stdout.readline()))
        finally:
            process.kill()
