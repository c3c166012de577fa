"""As root, programs have a user of their own that owns nothing on the node and reads inputs whatever their modes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainers.isolation import outputs, owner, sandbox
from trainers.isolation.networks import own_network
from trainers.isolation.program import Program
from trainers.isolation.sandbox import Room
from tunesmith import caches
from tunesmith.settings import Settings

pytestmark = [
    pytest.mark.skipif(owner.own_user() is None, reason="the platform is no root here"),
    pytest.mark.slow,
]


def run(folder: Path, code: str, *, readable: list[Path]) -> str:
    settings = Settings.from_env({"TUNESMITH_HOME": str(folder / "home")})
    for name in ("out", "tmp"):
        (folder / name).mkdir(mode=0o700, exist_ok=True)
    room = Room(readable, [folder / "out"], folder / "tmp", "none", {"CPU": 1}, 1 << 30)
    launch = sandbox.launch(
        [sys.executable, "-c", code], cwd=folder / "out", room=room, variables={}, settings=settings
    )
    with Program(launch) as program:
        return program.output.read().decode()


def test_a_program_runs_as_a_user_of_its_process(tmp_path: Path) -> None:
    code = "import json, os; print(json.dumps([*os.getresuid(), *os.getresgid(), *os.getgroups()]))"
    assert set(json.loads(run(tmp_path, code, readable=[]))) == {owner.FIRST + os.getpid()}


def test_inputs_of_any_mode_are_read_and_keep_owner_and_mode(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    paths = [model / name for name in ("a", "deep/b", "deep/c")]
    for path, mode in zip(paths, (0o600, 0o400, 0o640), strict=True):
        path.write_text(path.name)
        path.chmod(mode)
    for folder in (model, model / "deep", tmp_path):
        folder.chmod(0o700)
    before = [path.stat() for path in (*paths, model)]
    code = f"import pathlib; print(*[pathlib.Path(path).read_text() for path in {[str(path) for path in paths]}])"
    assert run(tmp_path, code, readable=[model]) == "a b c\n"
    assert [path.stat() for path in (*paths, model)] == before
    assert str(model) not in Path("/proc/self/mountinfo").read_text()


def test_an_input_that_is_a_file_or_lies_in_another_is_read(tmp_path: Path) -> None:
    (tmp_path / "model" / "inner").mkdir(parents=True, mode=0o700)
    file, inner = tmp_path / "file", tmp_path / "model" / "inner"
    (inner / "x").write_text("x")
    file.write_text("f")
    for path in (file, inner / "x"):
        path.chmod(0o600)
    code = f"print(open('{file}').read() + open('{inner}/x').read())"
    assert run(tmp_path, code, readable=[tmp_path / "model", inner, file]) == "fx\n"


def test_where_a_file_system_cannot_show_files_as_anothers_their_own_modes_count(tmp_path: Path) -> None:
    # /proc is such a file system.
    place = Path("/proc/sys/kernel/random")
    assert run(tmp_path, f"print(len(open('{place}/boot_id').read()))", readable=[place]) == "37\n"
    closed = Path("/proc/sys/vm")
    said = run(tmp_path, "print('ran')", readable=[closed])
    assert "the program was not started" in said and f"chmod -R o+rX {closed}" in said, said


def test_where_its_own_file_system_cannot_the_home_lets_programs_read(tmp_path: Path) -> None:
    parts = {name: tmp_path / name for name in ("lower", "upper", "work", "mounted")}
    for part in parts.values():
        part.mkdir()
    given = f"lowerdir={parts['lower']},upperdir={parts['upper']},workdir={parts['work']}"
    if subprocess.run(["mount", "-t", "overlay", "-o", given, "overlay", parts["mounted"]], check=False).returncode:
        pytest.skip("this system mounts no overlayfs")
    try:
        home = parts["mounted"] / "home"
        (home / "model" / "deep").mkdir(parents=True, mode=0o700)
        (home / "model" / "deep" / "x").write_text("x")
        (home / "model" / "deep" / "x").chmod(0o600)
        for folder in (home, home / "model"):
            folder.chmod(0o700)
        code = f"print(open('{home}/model/deep/x').read())"
        assert run(parts["mounted"], code, readable=[home / "model"]) == "x\n"
        assert home.stat().st_mode & 0o777 == 0o700
    finally:
        subprocess.run(["umount", parts["mounted"]], check=True)


def test_what_a_program_makes_is_its_own_and_the_platform_reads_and_removes_it(tmp_path: Path) -> None:
    code = (
        "import os\n"
        "os.mkdir('d'); open('d/x', 'w').write('1'); open('y', 'w').write('2')\n"
        "os.chmod('d/x', 0); os.chmod('d', 0); os.chmod('y', 0o6777)\n"
    )
    assert run(tmp_path, code, readable=[]) == ""
    out = tmp_path / "out"
    assert (out / "y").stat().st_uid == owner.FIRST + os.getpid()
    found: dict[str, bytes] = {}
    outputs.store(out, lambda local, path: found.setdefault(path, local.read_bytes()))
    assert found == {"d/x": b"1", "y": b"2"}
    caches.delete(out)
    assert not out.exists()


def test_taking_back_follows_no_link_and_leaves_no_setuid_file(tmp_path: Path) -> None:
    other, folder = tmp_path / "other", tmp_path / "folder"
    other.write_text("x")
    os.chown(other, 1234, 1234)
    folder.mkdir()
    (folder / "link").symlink_to(other)
    (folder / "links").symlink_to(tmp_path)
    (folder / "setuid").write_text("")
    owner.give([folder])
    assert (folder / "setuid").stat().st_uid == owner.FIRST + os.getpid()
    (folder / "setuid").chmod(0o6755)
    owner.take_back([folder])
    assert (other.stat().st_uid, (folder / "link").lstat().st_uid) == (1234, 0)
    assert (folder / "setuid").stat().st_mode & 0o7777 == 0o755


def test_a_program_of_the_packages_is_not_run_in_place_of_the_nodes(tmp_path: Path) -> None:
    """`bin` of an environment is first in the search path, and its packages have filled it."""
    for name in ("nsenter", "setpriv", "bwrap", "sh", "chown"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho {name} > {tmp_path}/was-run\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    settings = Settings.from_env({"TUNESMITH_HOME": str(tmp_path / "home")})
    (tmp_path / "tmp").mkdir()
    with own_network(tmp_path / "network") as network:
        room = Room([tmp_path / "bin"], [], tmp_path / "tmp", network, {"CPU": 1}, 1 << 30)
        command = [str(tmp_path / "bin" / "python"), "-c", "print('ran')"]
        launch = sandbox.launch(command, cwd=Path("/"), room=room, variables={}, settings=settings)
        with Program(launch) as program:
            assert program.output.read() == b"ran\n"
    assert not (tmp_path / "was-run").exists()


def test_torch_and_its_workers_work_in_a_room(tmp_path: Path) -> None:
    code = """
import os, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.utils.data import DataLoader, TensorDataset

def work(rank):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    data = TensorDataset(torch.ones(16, 4), torch.ones(16, 1))
    for x, y in DataLoader(data, batch_size=4, num_workers=2, persistent_workers=False):
        assert x.is_shared()
        (model(x) - y).pow(2).mean().backward()
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, nprocs=2)
    print("trained", torch.ones(3).numpy().sum())
"""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.py").write_text(code)
    start = "import os, sys; os.execv(sys.executable, [sys.executable, 'train.py'])"
    said = run(tmp_path, start, readable=[])
    assert said.endswith("trained 3.0\n"), said
