"""Where the platform may make control groups, the kernel itself counts and limits a program's memory."""

import os
import sys
from pathlib import Path

import pytest

from tests.support.waiting import until
from trainers.isolation import cgroups, sandbox
from trainers.isolation.program import Program
from trainers.isolation.sandbox import Room
from trainers.isolation.usage import Limits, Usage
from tunesmith.errors import OutOfMemoryError
from tunesmith.settings import Settings

pytestmark = pytest.mark.slow

MIB = 1 << 20
LIMIT = 128 * MIB


@pytest.fixture(autouse=True)
def counting() -> None:
    """A group that counts memory can be made here, as the system says and not the code that makes it."""
    version_1, version_2 = cgroups.ROOT / "memory", cgroups.ROOT / "cgroup.subtree_control"
    limits = version_1.is_dir() or (version_2.exists() and "memory" in version_2.read_text().split())
    if not limits or not os.access(version_1 if version_1.is_dir() else cgroups.ROOT, os.W_OK):
        pytest.skip("no control group for memory can be made here")


def start(folder: Path, code: str) -> Program:
    settings = Settings.from_env({"TUNESMITH_HOME": str(folder / "home")})
    for name in ("out", "tmp"):
        (folder / name).mkdir()
    room = Room([], [folder / "out"], folder / "tmp", "none", {"CPU": 1}, 1 << 30, LIMIT)
    code = f"import mmap, os, socket, sys, time\ndata = b'1' * (1 << 20)\n{code}"
    command = [sys.executable, "-c", code]
    return Program(sandbox.launch(command, cwd=folder / "out", room=room, variables={}, settings=settings))


def usage(program: Program) -> Usage:
    return Usage(program, Limits("it", "cpu-small", LIMIT, 1 << 40, tasks=1000, files=3000))


HIDING = {
    "its own memory": "held = [bytes(data) + b'2' for _ in range(400)]",
    "a file in memory": "f = os.memfd_create('x')\nfor _ in range(400): os.write(f, data)",
    "a file in memory on its way": (
        "a, b = socket.socketpair()\nf = os.memfd_create('x')\nsocket.send_fds(a, [b'x'], [f])\n"
        "for _ in range(400): os.write(f, data)"
    ),
    "/dev/shm": "f = open('/dev/shm/x', 'wb')\nfor _ in range(400): f.write(data)",
    "/dev/shm, deleted": "f = open('/dev/shm/x', 'wb'); os.remove('/dev/shm/x')\nfor _ in range(400): f.write(data)",
    "memory that is shared": "m = mmap.mmap(-1, 400 << 20)\nfor _ in range(400): m.write(data)",
    "many processes": (
        "for _ in range(8):\n    if os.fork() == 0: held = [bytes(data) + b'2' for _ in range(50)]; time.sleep(1000)\n"
        "time.sleep(1000)"
    ),
}


@pytest.mark.parametrize("where", HIDING)
def test_a_program_that_takes_more_memory_is_ended_wherever_it_hides_it(tmp_path: Path, where: str) -> None:
    with start(tmp_path, f"{HIDING[where]}\nprint('survived', flush=True)") as program:
        until(program.memory_ran_out, limit_s=60)
        with pytest.raises(OutOfMemoryError, match="took more memory than the kernel lets it have"):
            usage(program).check_memory()
        group = program.launch.group
    assert b"survived" not in program.output.read()
    with pytest.raises(OutOfMemoryError):
        usage(program).check_memory()
    assert group is not None and not group.exists()


def test_each_page_counts_once_and_copies_of_files_do_not(tmp_path: Path) -> None:
    code = (
        "held = [bytes(data) + b'2' for _ in range(60)]\n"
        "f = open('x', 'wb')\nfor _ in range(200): f.write(data)\n"
        "f.flush()\n"
        "for _ in range(3):\n    if os.fork() == 0: time.sleep(1000)\n"
        "print('up', flush=True); time.sleep(1000)"
    )
    with start(tmp_path, code) as program:
        assert program.output.readline() == b"up\n"
        taken = program.memory_bytes()
        assert taken is not None and 60 * MIB < taken < 100 * MIB
        usage(program).check()
        assert not program.memory_ran_out()


def test_a_group_lies_below_that_of_the_process_that_makes_it() -> None:
    group = cgroups.make("below", tasks=10, memory_bytes=LIMIT)
    assert group is not None
    try:
        own = {
            line.split(":", 2)[1]: line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()
        }
        for kind in ("memory", "pids"):
            if kind in own and (cgroups.ROOT / kind / own[kind].lstrip("/")).is_dir():
                parent = cgroups.ROOT / kind / own[kind].lstrip("/")
                assert any(folder.parent == parent for folder in group.folders)
    finally:
        group.remove()


def test_what_a_killed_worker_has_left_is_removed() -> None:
    group = cgroups.make("left", tasks=10, memory_bytes=LIMIT)
    assert group is not None
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    left = [folder.rename(folder.with_name(f"tunesmith-program-{gone}-left")) for folder in group.folders]
    again = cgroups.make("again", tasks=10, memory_bytes=LIMIT)
    assert again is not None
    again.remove()
    assert not any(folder.exists() for folder in left)
