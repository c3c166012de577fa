"""Serve's own ports: another user of the node is not talked to. That they are on loopback, test_exposure.py shows."""

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from uvicorn.config import HTTP_PROTOCOLS

from serve_app.inner_ports import OwnUserProtocol, guard_proxy

ASK = r"""
exec 3<>/dev/tcp/127.0.0.1/$1 || exit 1
printf 'GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n' >&3
cat <&3
"""
LISTEN = """
import grpc, psutil
from ray.serve._private import replica
from serve_app.inner_ports import keep_replica_on_loopback

keep_replica_on_loopback()
port = replica.add_port_to_grpc_server(grpc.aio.server(), "[::]:0")
print(*(found.laddr.ip for found in psutil.Process().net_connections("tcp") if found.laddr.port == port))
"""
OTHER = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.fixture
def port() -> Iterator[int]:
    """A server behind the guard, which says `inside` to whom it talks to."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("inside"))])
    server = uvicorn.Server(uvicorn.Config(app, http=OwnUserProtocol, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield int(listener.getsockname()[1])
    server.should_exit = True
    thread.join()


def ask(port: int, *before: str) -> str:
    command = [*before, "bash", "-c", ASK, "ask", str(port)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout


def test_a_process_of_the_same_user_is_answered(port: int) -> None:
    assert ask(port).endswith("inside")


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="only root may be somebody else")
def test_a_process_of_another_user_is_not(port: int) -> None:
    assert ask(port, *OTHER) == ""
    assert ask(port).endswith("inside")


def test_serve_takes_the_guard_by_its_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])
    assert guard_proxy() == []
    config = uvicorn.Config(Starlette())
    config.load()
    assert config.http_protocol_class is OwnUserProtocol


def test_a_replicas_server_listens_on_loopback() -> None:
    told = subprocess.run([sys.executable, "-c", LISTEN], capture_output=True, text=True, check=True, timeout=120)
    assert told.stdout.strip().removeprefix("::ffff:") == "127.0.0.1"
