"""Programs of one job are on a network of their own, and reach each other there and nobody else."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from trainers.isolation import sandbox
from trainers.isolation.networks import OwnNetwork, own_network
from trainers.isolation.program import Program
from trainers.isolation.sandbox import Room
from tunesmith import processes
from tunesmith.settings import Settings


def program(folder: Path, network: OwnNetwork, code: str) -> Program:
    settings = Settings.from_env({"TUNESMITH_HOME": str(folder / "home")})
    folder.mkdir()
    room = Room([], [folder], folder, network, {"CPU": 1}, 1 << 30)
    command = [sys.executable, "-c", code]
    return Program(sandbox.launch(command, cwd=folder, room=room, variables={}, settings=settings))


def test_programs_of_a_job_reach_each_other_and_no_port_of_the_node(tmp_path: Path) -> None:
    serve = (
        "import socket\n"
        "server = socket.create_server(('127.0.0.1', 7001))\n"
        "print(1, flush=True)\n"
        "server.accept()[0].send(b'hello')\n"
    )
    meet = (
        "import json, os, socket\n"
        "said = [socket.create_connection(('localhost', 7001)).recv(5).decode()]\n"
        "try: socket.create_connection(('127.0.0.1', {port}), timeout=2); said.append('reached')\n"
        "except OSError as error: said.append(type(error).__name__)\n"
        "print(json.dumps([*said, os.environ['GLOO_SOCKET_IFNAME']]))\n"
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as own,
        own_network(tmp_path / "network") as first,
        own_network(tmp_path / "network") as second,
        program(tmp_path / "first", first, serve) as server,
    ):
        server.output.readline()
        with program(tmp_path / "second", second, meet.format(port=own.getsockname()[1])) as client:
            assert json.loads(client.output.read()) == ["hello", "ConnectionRefusedError", "lo"]


def test_a_network_outlives_the_worker_that_made_it_and_not_its_last_one(tmp_path: Path) -> None:
    file = tmp_path / "network"

    def network_of(network: OwnNetwork) -> str:
        return str(network.network.readlink())

    with own_network(file) as second:
        pass
    maker = own_network(file)
    first = maker.__enter__()
    holder = psutil.Process(int(file.read_text().split()[0]))
    with own_network(file) as second:
        assert network_of(second) == network_of(first) != str(Path("/proc/self/ns/net").readlink())
        maker.__exit__(None, None, None)
        holder.wait(10)
        command = [*second.entrance(), "readlink", "/proc/self/ns/net"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == network_of(second)
    assert not processes.is_alive(holder)


def test_a_file_that_names_another_process_is_not_believed(tmp_path: Path) -> None:
    file = tmp_path / "network"
    file.write_text(f"{os.getpid()} 1.0")
    with own_network(file) as network:
        assert str(network.network.readlink()) != str(Path("/proc/self/ns/net").readlink())
