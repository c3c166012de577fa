"""The ports that Serve opens by itself, kept to this machine and to the platform's own user.

Serve gives no say in either. Its proxy listens on loopback, where any user of the node could keep it from its work; the
gate (tunesmith.local.gate) is its one client. Each replica has a gRPC server for calls of other deployments, which
listens on every address.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from ray.serve._private import replica
from starlette.middleware import Middleware
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.auto import AutoHTTPProtocol

_CONNECTIONS = Path("/proc/self/net/tcp")
_ESTABLISHED = "01"

_add_port = replica.add_port_to_grpc_server


def guard_proxy() -> list[Middleware]:
    """Have Serve's proxy talk to processes of its own user alone.

    Serve calls it in its proxy's process before that listens: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it.
    """
    if _CONNECTIONS.exists():  # on Linux
        HTTP_PROTOCOLS["auto"] = f"{__name__}:OwnUserProtocol"
    return []


def keep_replica_on_loopback() -> None:
    """Have the gRPC server of this process's replica listen on loopback. Call it in the deployment's `__init__`."""
    replica.add_port_to_grpc_server = _add_port_of_loopback


class OwnUserProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """HTTP for connections whose other end belongs to a process of this user; others end before a byte is read."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if not is_own(transport):
            transport.abort()


def is_own(transport: asyncio.Transport) -> bool:
    """Whether a process of this user holds the other end of a connection over loopback; never where that is unsure."""
    socket = transport.get_extra_info("socket")
    try:
        mine, theirs = (_as_proc_has_it(name) for name in (socket.getsockname(), socket.getpeername()))
        rows = [line.split() for line in _CONNECTIONS.read_text().splitlines()[1:]]
    except OSError:  # it is gone already
        return False
    # A closed end has no owner any more, and is shown as root's.
    return any(row[1:4] == [theirs, mine, _ESTABLISHED] and int(row[7]) == os.getuid() for row in rows)


def _as_proc_has_it(name: tuple[str, int]) -> str:
    """ADDRESS:PORT in the form of /proc/net/tcp: the address's bytes backwards, on all machines that Ray runs on."""
    numbers = [int(part) for part in name[0].split(".")]
    return f"{bytes(reversed(numbers)).hex().upper()}:{name[1]:04X}"


def _add_port_of_loopback(server: Any, address: str) -> int:
    port: int = _add_port(server, address.replace("[::]", "127.0.0.1"))
    return port
