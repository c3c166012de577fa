"""A table of what hostile programs try, in every kind of room: each is refused, and outside nothing changes."""

import errno
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.isolation import hostile_program
from tests.isolation.hostile_rooms import SYSTEM_CALLS, Outside, outside, run_in_room, settings_of
from trainers.isolation.networks import own_network
from trainers.isolation.program import Program
from trainers.isolation.system_calls import REFUSED
from trainers.programs.environments import own_environment
from trainers.programs.program_log import ProgramLog
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.segments import SegmentWriter

pytestmark = pytest.mark.slow

NOT_ON_THE_NODES_NETWORK = {"a port of the node", "an abstract socket of the node"}
"""Workers on several nodes, and pip, have the nodes' network; what listens there asks for tokens."""
NOT_FOR_AN_ORDINARY_USER = {
    # The first process of the room is the program's own user there, and has no more than it: bubblewrap's.
    "trace the first process",
}


BACKEND = """
import json, pathlib, shutil, subprocess, sys
def build_wheel(folder, *_):
    told = {**json.loads(pathlib.Path("told.json").read_text()), "output": sys.prefix}
    told["results"] = sys.prefix + "/results.json"
    subprocess.run([sys.executable, "tries.py", json.dumps(told)], check=True)
    return shutil.copy("thing-1.0-py3-none-any.whl", folder).rpartition("/")[2]
"""


def run_in_pips_room(place: Outside, patch: pytest.MonkeyPatch) -> dict[str, str]:
    """What comes of all tries in a package that pip builds; its input is a folder that pip's settings name."""
    source = place.folder / "gallery_train" / "own"
    source.mkdir(parents=True)
    (source.parent / "requirements.txt").write_text("./own\n")
    build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (source / "pyproject.toml").write_text(build)
    (source / "backend.py").write_text(BACKEND)
    (source / "told.json").write_text(json.dumps(place.told()))
    shutil.copyfile(hostile_program.__file__, source / "tries.py")
    with zipfile.ZipFile(source / "thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        wheel.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("thing-1.0.dist-info/RECORD", "")
    patch.setenv("PIP_FIND_LINKS", str(place.folder / "inputs"))

    def watch(program: Program) -> None:
        while program.exit_code() is None:
            time.sleep(0.01)

    with SegmentWriter(FolderStorage(place.folder / "storage"), "log") as segments:
        environment = own_environment(
            source.parent / "requirements.txt",
            account="a",
            settings=settings_of(place.folder),
            log=ProgramLog(segments),
            watch=watch,
        )
    assert environment.folder is not None
    assert not [path for path in environment.folder.rglob("*") if path.lstat().st_uid != os.getuid()]
    results: dict[str, str] = json.loads((environment.folder / "results.json").read_bytes())
    return results


ORDINARY = """
import json, pathlib, sys
from tests.isolation.hostile_rooms import Outside, run_in_room
print(json.dumps(run_in_room(Outside(pathlib.Path(sys.argv[1]), *json.loads(sys.argv[2])), "none")))
"""


def run_as_an_ordinary_user(place: Outside) -> dict[str, str]:
    """What comes of all tries where the platform itself is no root."""
    if os.geteuid() != 0:
        pytest.skip("all of them are tried as an ordinary user")
    root = Path(__file__).parents[2]
    packages = sysconfig.get_paths()["purelib"]
    path = {"PYTHONPATH": f"{root}:{root / 'platform'}:{packages}", "PATH": "/usr/bin:/bin", "TMPDIR": "/tmp"}
    # The shell in between has lost what lets root find a Python in a folder of its own.
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/bin/sh", "-c", 'exec "$@"', "sh"]
    for python in (sys.executable, "/usr/bin/python3"):
        ask = [*become, python, "-c", "import psutil, pydantic_core"]
        if subprocess.run(ask, env=path, cwd="/", capture_output=True, check=False).returncode == 0:
            break
    else:
        pytest.skip("no Python of this machine can be run by an ordinary user")
    for above in (place.folder, *place.folder.parents[:-2]):
        above.chmod(0o755)
    subprocess.run(["chown", "-R", "65534:65534", *place.folder.iterdir()], check=True)
    told = json.dumps([place.port, place.abstract, place.shm])
    command = [*become, python, "-c", ORDINARY, str(place.folder), told]
    done = subprocess.run(command, env=path, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, str] = json.loads(done.stdout)
    return results


@dataclass(frozen=True)
class Outcome:
    """What came of all tries in a room."""

    results: dict[str, str]
    before: dict[str, Any]
    after: dict[str, Any]


_outcomes: dict[str, Outcome] = {}
ROOMS = ("train", "gang", "pip", "ordinary user")


@pytest.fixture
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What came of all tries in the room that the test names; it is run once."""
    kind = request.param
    if kind not in _outcomes:
        folder = tmp_path_factory.mktemp(kind.replace(" ", "-"))
        with outside(folder) as place, pytest.MonkeyPatch.context() as patch:
            for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "TUNESMITH_PLATFORM", "MY_PASSWORD"):
                patch.setenv(name, "s3cret")
            before = place.state()
            match kind:
                case "train":
                    results = run_in_room(place, "none")
                case "gang":
                    with own_network(folder / "network") as network:
                        results = run_in_room(place, network)
                case "pip":
                    results = run_in_pips_room(place, patch)
                case _:
                    results = run_as_an_ordinary_user(place)
            _outcomes[kind] = Outcome(results, before, place.state())
    return _outcomes[kind]


NAMES = [*hostile_program.TRIES, *(f"call {name}" for name in SYSTEM_CALLS)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("outcome", ROOMS, indirect=True)
def test_a_try_is_refused(outcome: Outcome, name: str, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["outcome"]
    if kind == "pip" and name in NOT_ON_THE_NODES_NETWORK:
        pytest.skip("pip has the node's network")
    if (kind == "ordinary user" or os.geteuid() != 0) and name in NOT_FOR_AN_ORDINARY_USER:
        pytest.skip("an ordinary user's room has no other user in it")
    came = outcome.results[name]
    assert not came.startswith("got"), came
    if name.startswith("call "):
        assert came == errno.errorcode[REFUSED[name.removeprefix("call ")][2]]


@pytest.mark.parametrize("outcome", ROOMS, indirect=True)
def test_after_all_tries_nothing_is_changed_outside(outcome: Outcome) -> None:
    assert len(outcome.before) > 8
    assert outcome.after == outcome.before
