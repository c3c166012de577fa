"""Ports of this machine: what is in the way of using one, and which are free."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import psutil


def obstacle(host: str, port: int) -> str | None:
    """Why the port cannot be used now, with the program that uses it where that is known; None if it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return _listener(port) or error.strerror or str(error)
    return None


def free(count: int) -> list[int]:
    """Ports of loopback that are free now, all different."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _listener(port: int) -> str | None:
    try:
        for connection in psutil.net_connections("tcp"):
            # (host, port): a pair of psutil's own in fact, which its types do not tell
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid}) listens on it"
    except psutil.Error:
        return None
    return None
