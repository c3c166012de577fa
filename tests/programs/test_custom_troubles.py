"""Bad input and hostile programs, each a whole job on a platform that runs: its end, what is said, what is left."""

import json
import os
import re
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support import galleries, jobs, programs
from tests.support.publishing import files_key, publish
from tests.support.ray_fixture import Running
from tests.support.waiting import until
from tunesmith import processes
from tunesmith.api.views import JobView
from tunesmith.errors import TunesmithError
from tunesmith.jobs.spec import TrainSpec

pytestmark = pytest.mark.ray

SLOW_S = 5.0
"""An answer of the door that takes longer counts as none."""
PARAMETERS = {
    "training_methods": [{"name": "full", "hyperparameters": [{"name": "code", "type": "str", "required": True}]}]
}
TRAIN = """
import json, mmap, os, pathlib, shutil, signal, socket, sys, time
env = os.environ
output = pathlib.Path(env["ENV_AG_TRAIN_OUTPUT_DIR"])
metrics = pathlib.Path(env["ENV_AG_USER_METRICS_LOG_PATH"])


def daemon(seconds):
    "In a session of its own, orphaned, without terminal, variables and ears."
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            os.closerange(0, 100)
            os.execve("/usr/bin/sleep", ["sleep", seconds], {})
        os._exit(0)
    os.wait()


exec(json.loads(env["ENV_AG_USER_PARAMS"])["code"])
"""

ORDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "killed": (
        """
        if env["ENV_AG_OUTPUT_RESTORED"] == "1":
            (output / "second.txt").write_text((output / "first.txt").read_text())
            sys.exit()
        (output / "first.txt").write_text("from before")
        daemon("98001")
        print("waiting", flush=True)
        time.sleep(98002)
        """,
        {},
    ),
    "deaf": (
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        daemon("98003")
        (output / "half.bin").write_bytes(b"half")
        print("waiting", flush=True)
        while True:
            time.sleep(1)
        """,
        {},
    ),
    "endless": (
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        daemon("98004")
        while True:
            pass
        """,
        {"max_run_time_s": 15},
    ),
    "noisy": (
        """
        metrics.write_text("a|b|c\\n1|nan|\\n7|0.5|10\\n")
        sys.stdout.buffer.write(bytes(range(256)) * 4096 + b"\\n")
        for _ in range(100):
            sys.stdout.buffer.write(b"x" * 1_000_000)
        print("\\nthe end")
        done = []
        for place in (env["ENV_AG_MODEL_DIR"], env["ENV_AG_DATASET_DIR"]):
            for path in [place, *(os.path.join(at, name) for at, _, names in os.walk(place) for name in names)]:
                for work in (
                    lambda: os.remove(path),
                    lambda: os.rename(path, path + "x"),
                    lambda: os.chmod(path, 0o777),
                    lambda: open(path, "r+").close(),
                    lambda: shutil.rmtree(path),
                ):
                    try:
                        work()
                        done.append(path)
                    except OSError:
                        pass
        held = bytearray(os.urandom(1 << 20) * 900)
        for _ in range(6):  # together they seem to hold more than the flavor has
            if os.fork() == 0:
                total = sum(held[::4096])
                time.sleep(3)
                os._exit(0)
        for _ in range(6):
            os.wait()
        daemon("98005")
        (output / "done.json").write_text(json.dumps(done))
        """,
        {},
    ),
    "ten million lines": (
        """
        with metrics.open("wb") as file:
            for begin in range(0, 10_000_000, 100_000):
                file.write(b"".join(b"%d|0.5|1650.25\\n" % number for number in range(begin, begin + 100_000)))
            file.write(b"10000000|0.25|1")
        """,
        {},
    ),
    "exits 3": (
        """
        daemon("98006")
        print("about to fail")
        sys.stdout.buffer.write(b"\\xff\\0\\x1b[2J\\n")
        sys.exit(3)
        """,
        {},
    ),
    "one big file": (
        """
        with open("/tmp/big", "wb") as file:
            for _ in range(10_000):
                file.write(b"1" * 1_000_000)
        """,
        {},
    ),
    "many big files": (
        """
        daemon("98007")
        for number in range(10_000):
            (output / str(number)).write_bytes(b"1" * 1_000_000)
        time.sleep(98000)
        """,
        {},
    ),
    "deleted files": (
        """
        held = []
        for number in range(200):
            file = open("/tmp/x", "wb")
            file.write(b"1" * 10_000_000)
            file.flush()
            os.remove("/tmp/x")
            held.append(file)
        time.sleep(98000)
        """,
        {},
    ),
    "many files": (
        """
        for number in range(11_000):
            (output / str(number)).touch()
        """,
        {},
    ),
    "sparse files": (
        """
        for number in range(3):
            with (output / str(number)).open("wb") as file:
                file.truncate(500 << 20)
        """,
        {},
    ),
    "memory": (
        """
        daemon("98008")
        held = []
        while True:
            held.append(b"1" * 100_000_000)
        """,
        {},
    ),
    "memory of many": (
        """
        for _ in range(20):
            if os.fork() == 0:
                held = b"1" * 300_000_000
                time.sleep(98000)
        time.sleep(98000)
        """,
        {},
    ),
    "memory of none": (
        """
        for _ in range(8):
            file = os.memfd_create("x")
            for _ in range(900):
                os.write(file, b"1" * 1_000_000)
        time.sleep(98000)
        """,
        {},
    ),
    "fork bomb": (
        """
        for _ in range(2000):  # not without end: where the guard is gone, the machine should stay
            try:
                if os.fork() == 0:
                    time.sleep(98000)
            except OSError:
                time.sleep(0.1)
        time.sleep(98000)
        """,
        {},
    ),
}


class Door:
    """Asks the door all the while, in a thread of its own."""

    def __init__(self, running: Running) -> None:
        self.answers, self.troubles = 0, list[str]()
        self._running, self._done = running, threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def end(self) -> None:
        self._done.set()
        self._thread.join()

    def _ask(self) -> None:
        token = self._running.settings.api_token_path.read_text()
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.Client(base_url=self._running.door_url, headers=headers, trust_env=False) as client:
            while not self._done.wait(0.2):
                for path in ("/healthz", "/v1/jobs"):
                    began = time.monotonic()
                    try:
                        said = str(client.get(path, timeout=SLOW_S).status_code)
                    except httpx.HTTPError as error:
                        said = repr(error)
                    took = time.monotonic() - began
                    self.answers += 1
                    if said != "200" or took > SLOW_S:
                        self.troubles.append(f"{path}: {said} after {took:.1f} s at {time.strftime('%H:%M:%S')}")


@pytest.fixture(scope="module")
def running(platform: Running) -> Running:
    return platform


@pytest.fixture(scope="module")
def door(running: Running) -> Iterator[Door]:
    door = Door(running)
    yield door
    door.end()


@pytest.fixture(autouse=True)
def the_door_answers(door: Door) -> Iterator[None]:
    """Whatever the programs of a test do, the door answers all the while."""
    before = door.answers
    yield
    until(lambda: door.answers > before, limit_s=SLOW_S)
    assert door.troubles == []


@pytest.fixture(scope="module")
def published(running: Running, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The model whose `train.py` runs the code of its order, and a dataset."""
    folder = tmp_path_factory.mktemp("sources")
    programs.publish_points(running, folder)
    publish(running, "model", "troubled", galleries.make(folder / "troubled", TRAIN, parameters=PARAMETERS))


@pytest.fixture(scope="module")
def ordered(running: Running, published: None) -> dict[str, JobView]:
    """All jobs, in the order in which they are waited for; two run at once."""
    return {
        name: order(running, "troubled", hyperparameters={"code": textwrap.dedent(code)}, **options)
        for name, (code, options) in ORDERS.items()
    }


def order(running: Running, model: str, **options: Any) -> JobView:
    given = {"model": model, "dataset": "points", "flavor": "cpu-small", "output_model": f"{model}-new", **options}
    return running.client.submit(TrainSpec(**given))


def wait(running: Running, job: JobView) -> JobView:
    """The job at its end, of which nothing is left on its node."""
    ended = running.client.wait(job.id)
    assert left_of(job) == []
    assert list((running.settings.home / "runs").glob(f"{job.id}*")) == []
    return ended


def left_of(job: JobView) -> list[psutil.Process]:
    """Living processes of the job's programs, by their output's folder or by the number of their sleep."""
    found, daemons = [], re.findall(r'"(98\d{3})"', job.job["hyperparameters"]["code"])
    for process in psutil.process_iter():
        try:
            command, variables = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        inside = f"{job.id}-a" in variables.get("ENV_AG_TRAIN_OUTPUT_DIR", "")
        hidden = command[:1] == ["sleep"] and command[-1] in daemons
        if (inside or hidden) and processes.is_alive(process):
            found.append(process)
    return found


def messages(running: Running, job: JobView) -> str:
    return "\n".join(event.message or "" for event in jobs.events(running, job.id))


def files_of(running: Running, ended: JobView) -> str:
    return files_key(running.storage, ended.output)


def inputs(running: Running) -> dict[str, bytes]:
    """The stored files that jobs are given."""
    entries = [entry for prefix in ("models/troubled", "datasets/points") for entry in running.storage.entries(prefix)]
    return {entry.key: running.storage.get(entry.key) for entry in entries}


def test_a_worker_that_is_killed_leaves_no_process_and_the_job_completes_once(
    running: Running, ordered: dict[str, JobView]
) -> None:
    job = ordered["killed"]
    while not running.storage.exists(f"jobs/{job.id}/attempts/1/output/first.txt"):
        assert running.client.job(job.id).state not in ("failed", "completed")
        time.sleep(0.2)
    tree = left_of(job)
    assert len(tree) >= 4, "bubblewrap twice, the program, its daemon"
    (worker,) = {p for process in tree for p in process.parents() if "ray::run_program" in " ".join(p.cmdline())}
    os.kill(worker.pid, 9)
    deadline = time.monotonic() + 10
    while alive := [process for process in tree if processes.is_alive(process)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
    ended = wait(running, job)
    assert (ended.state, ended.attempt) == ("completed", 2), ended
    assert "the output has 1 files that an earlier attempt left" in messages(running, job)
    assert running.storage.get(f"{files_of(running, ended)}/second.txt") == b"from before"
    assert [event.state for event in jobs.events(running, job.id)].count("completed") == 1


def test_a_program_that_is_deaf_to_sigterm_is_killed_at_a_stop(running: Running, ordered: dict[str, JobView]) -> None:
    job = ordered["deaf"]
    jobs.wait_for_log(running, job, "waiting")
    running.client.stop(job.id)
    ended = wait(running, job)
    assert (ended.state, ended.reason) == ("stopped", "stopped_by_user")
    assert "train.py was killed" in (ended.message or "")
    grace_s = running.settings.stop_grace_s / 2
    assert f"train.py was sent SIGTERM; after {grace_s:g} s it is killed" in messages(running, job)
    assert running.storage.get(f"jobs/{job.id}/attempts/1/output/half.bin") == b"half"


def test_a_program_that_hangs_is_killed_when_its_time_is_up(running: Running, ordered: dict[str, JobView]) -> None:
    ended = wait(running, ordered["endless"])
    assert (ended.state, ended.reason) == ("stopped", "time_limit")
    assert "train.py was killed" in (ended.message or "")


def test_a_noisy_program_completes_with_its_bad_lines_quoted_and_its_inputs_untouched(
    running: Running, ordered: dict[str, JobView]
) -> None:
    job, before = ordered["noisy"], inputs(running)
    ended = wait(running, job)
    assert ended.state == "completed", (ended, jobs.log(running, job.id, "driver"))
    said = messages(running, job)
    assert "a malformed line of the metrics file, line 1: 'a|b|c'" in said
    assert "a malformed line of the metrics file, line 2: '1|nan|'" in said
    assert [(line.step, line.value) for line in jobs.metrics(running, job.id, "loss")] == [(7, 0.5)]
    log = jobs.log(running, job.id, "0")
    assert f"{'x' * 100} [{100_000_000 - (16 << 10)} bytes of this line are left out]\nthe end\n" in log
    assert len(log) < 5_000_000
    assert json.loads(running.storage.get(f"{files_of(running, ended)}/done.json")) == []
    assert inputs(running) == before


def test_of_ten_million_metric_lines_some_are_kept_and_the_last_one(
    running: Running, ordered: dict[str, JobView]
) -> None:
    job = ordered["ten million lines"]
    ended = wait(running, job)
    assert ended.state == "completed", (ended, jobs.log(running, job.id, "driver"))
    points = jobs.metrics(running, job.id, "loss")
    assert (points[-1].step, points[-1].value) == (10_000_000, 0.25)
    assert 1000 < len(points) < 50_000
    assert [line.step for line in points] == sorted(line.step for line in points)


OUT_OF_MEMORY = r"worker 0 (takes \d{4,5} MiB of|took more) memory.* flavor cpu-small has 4096"
"""Seen by the look twice a second, or where that comes too late by the kernel."""


@pytest.mark.parametrize(
    ("name", "reason", "words"),
    [
        ("exits 3", "user_error", r"worker 0 ended with exit code 3; its last lines:\nabout to fail\n\ufffd+\[2J"),
        (
            "one big file",
            "user_error",
            r"(exit code 1; .*File too large|has written more than the 1024 MiB allowed)",
        ),
        ("many big files", "user_error", r"train.py of worker 0 has written more than the 1024 MiB allowed"),
        ("deleted files", "user_error", r"the 1024 MiB allowed, 1\d\d\d of them in files that it deleted and still"),
        ("many files", "user_error", r"train.py of worker 0 has written more than the 10000 files and folders"),
        ("sparse files", "user_error", r"train.py of worker 0 has written more than the 1024 MiB allowed"),
        ("memory", "out_of_memory", OUT_OF_MEMORY),
        ("memory of many", "out_of_memory", OUT_OF_MEMORY),
        ("memory of none", "out_of_memory", OUT_OF_MEMORY),
        ("fork bomb", "user_error", r"worker 0 has \d+ processes and threads; allowed are fewer than 500"),
    ],
)
def test_a_program_that_fails_or_takes_too_much_says_so(
    running: Running, ordered: dict[str, JobView], name: str, reason: str, words: str
) -> None:
    ended = wait(running, ordered[name])
    assert (ended.state, ended.reason, ended.attempt) == ("failed", reason, 1), ended
    assert re.search(words, ended.message or "", re.DOTALL), ended.message
    assert all(c.isprintable() or c == "\n" for c in ended.message or "")


SETUP = """
import json, os, pathlib, signal, socket, sys, zipfile
seen = {"read": [], "written": []}
for path in SECRETS:
    try:
        seen["read"].append(str(os.listdir(path) if os.path.isdir(path) else open(path).read()))
    except OSError:
        pass
for path in PLACES:
    try:
        pathlib.Path(path, "mine").write_text("mine")
        seen["written"].append(path)
    except OSError:
        pass
seen["variables"] = [name for name in os.environ if name.startswith(("AWS", "RAY", "TUNESMITH_"))]
seen["processes"] = [open(f"/proc/{p}/cmdline").read() for p in os.listdir("/proc") if p.isdecimal()]
for port in PORTS:
    try:
        connection = socket.create_connection(("127.0.0.1", port), timeout=2)
        connection.sendall(b"GET /v1/jobs HTTP/1.1\\r\\nHost: node\\r\\n\\r\\n")
        seen["read"] += [] if b" 401 " in connection.recv(1000) else [port]
    except OSError:
        pass
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.closerange(0, 100)
        os.execve("/usr/bin/sleep", ["sleep", "98101"], {})
    os._exit(0)
os.wait()


def build_wheel(folder, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(pathlib.Path(folder, "evil-1.0-py3-none-any.whl"), "w") as wheel:
        wheel.writestr("evil.py", f"SEEN = {json.dumps(seen)!r}")
        wheel.writestr("evil-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: evil\\nVersion: 1.0\\n")
        wheel.writestr("evil-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("evil-1.0.dist-info/RECORD", "")
    return "evil-1.0-py3-none-any.whl"
"""


def own_wheel(folder: Path) -> str:
    """Put a package in a model's `gallery_train/`; its line for requirements.txt."""
    with zipfile.ZipFile(folder / "gallery_train" / "thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing.py", "WORD = 'here'\n")
        wheel.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        wheel.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("thing-1.0.dist-info/RECORD", "")
    return "./thing-1.0-py3-none-any.whl\n"


def test_requirements_that_install_are_there_and_those_that_do_not_say_why(
    running: Running, published: None, tmp_path: Path
) -> None:
    train = TRAIN + "import thing; (output / 'word.txt').write_text(thing.WORD)\n"
    fine = galleries.make(tmp_path / "fine", train, parameters=PARAMETERS)
    (fine / "gallery_train" / "requirements.txt").write_text(own_wheel(fine))
    publish(running, "model", "fine", fine)
    bad = galleries.make(tmp_path / "bad", train, parameters=PARAMETERS, requirements_txt="./missing-1.0.tar.gz\n")
    publish(running, "model", "bad", bad)
    first, second = (order(running, name, hyperparameters={"code": "pass"}) for name in ("fine", "bad"))
    ended = wait(running, first)
    assert ended.state == "completed", (ended, jobs.log(running, first.id, "0"))
    assert running.storage.get(f"{files_of(running, ended)}/word.txt") == b"here"
    lock = running.storage.get(f"{files_of(running, ended)}/training_logs/requirements.lock").decode()
    assert lock.startswith("thing==1.0 --hash=sha256:")
    assert [event.phase for event in jobs.events(running, first.id) if event.phase] == [
        "fetch",
        "environment",
        "train",
        "publish",
    ]
    ended = wait(running, second)
    assert (ended.state, ended.reason, ended.attempt) == ("failed", "user_error", 1)
    assert "requirements.txt could not be installed (pip ended with exit code 1)" in (ended.message or "")
    assert "missing-1.0.tar.gz" in (ended.message or "")
    assert "missing-1.0.tar.gz" in jobs.log(running, second.id, "0")
    assert [event.phase for event in jobs.events(running, second.id) if event.phase] == ["fetch", "environment", "save"]


def test_a_setup_py_that_attacks_gets_nothing_and_leaves_nothing(
    running: Running, published: None, tmp_path: Path
) -> None:
    home, before = running.settings.home, inputs(running)
    hidden = [home / name for name in ("api_token", "ray_token", "records.db", "storage", "storage/models/troubled")]
    secrets = [*map(str, hidden), "/root/.ssh", "/root/.cache", "/root/.bashrc", "/etc/shadow"]
    assert hidden[0].exists()
    # The home's own path lies in the room's own /tmp.
    places = ["/root", "/usr", sys.prefix, "/dev", "/etc", str(home / "storage"), str(home / "cache"), str(home)]
    ports = [running.settings.port, running.settings.ray_dashboard_port]
    model = galleries.make(
        tmp_path / "evil",
        TRAIN + "import evil; (output / 'seen.json').write_text(evil.SEEN)\n",
        parameters=PARAMETERS,
        requirements_txt="./evil\n",
    )
    package = model / "gallery_train" / "evil"
    package.mkdir()
    # Its backend is its own: nothing is fetched to build it.
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "setup"\nbackend-path = ["."]\n'
    )
    text = SETUP.replace("SECRETS", repr(secrets)).replace("PLACES", repr(places)).replace("PORTS", repr(ports))
    (package / "setup.py").write_text(text)
    publish(running, "model", "evil", model)
    job = order(running, "evil", hyperparameters={"code": '"98101"'})
    ended = wait(running, job)
    assert ended.state == "completed", (ended, jobs.log(running, job.id, "0"))
    seen = json.loads(running.storage.get(f"{files_of(running, ended)}/seen.json"))
    inside = seen.pop("processes")
    assert len(inside) < 10 and not any("raylet" in command for command in inside)
    assert set(seen.pop("written")) <= {str(home), str(home / "cache")}
    assert not any(Path(place, "mine").exists() for place in places)
    assert seen == {"read": [], "variables": ["TUNESMITH_PROGRAM"]}
    assert inputs(running) == before
    (environment,) = [path for path in (home / "cache" / "environments").glob("*/*") if list(path.rglob("evil.py"))]
    assert sorted(path.name for path in environment.iterdir()) == ["packages", "requirements.lock"]


def test_a_model_with_a_link_is_refused_by_the_name_of_the_link(running: Running, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    links = {"weights.pt": tmp_path / "secret", "deep": tmp_path, "gallery_train/more.py": Path("train.py")}
    started = {}
    for number, (name, target) in enumerate(links.items()):
        folder = galleries.make(tmp_path / f"m{number}")
        (folder / name).symlink_to(target)
        started[name] = running.client.register_model(f"linked{number}", str(folder))
    for name, job in started.items():
        ended = running.client.wait(job.id)
        assert (ended.state, ended.reason) == ("failed", "data_error"), ended
        assert (ended.message or "").startswith(f"{name} is a link; only files and folders are taken")
        assert running.client.models(name=ended.output.partition("@")[0]).items == []


def test_a_bad_train_params_json_is_told_at_registration_by_file_line_and_key(
    running: Running, published: None, tmp_path: Path
) -> None:
    parameters = [
        {"name": "lr", "type": "float", "default": 0.1},
        {"name": "note", "type": "str"},
        {"name": "epochs", "type": "integer"},
        {"name": "rows", "type": "int", "default": 1.5},
        {"name": "name", "type": "str", "required": "yes"},
    ]
    folder = galleries.make(
        tmp_path / "m", parameters={"training_methods": [{"name": "a", "hyperparameters": parameters}]}
    )
    lines = (folder / "gallery_train" / "train_params.json").read_text().splitlines()
    ended = running.client.wait(running.client.register_model("malformed", str(folder)).id)
    assert ended.state == "completed", ended
    training = running.client.model("malformed").training
    assert training is not None and training.default is None

    def problem(number: int, key: str, text: str, why: str) -> str:
        line = next(at for at, each in enumerate(lines, 1) if text in each)
        where = f"training_methods[0].hyperparameters[{number}].{key}"
        return f"gallery_train/train_params.json:{line}: {where}: {why}"

    for expected in (
        problem(2, "type", '"integer"', "must be int, float, str, bool, got 'integer'"),
        problem(3, "default", "1.5", "must be of type int, got 1.5"),
        problem(4, "required", '"yes"', "must be true or false, got 'yes'"),
    ):
        assert expected in (ended.message or ""), ended.message
    with pytest.raises(TunesmithError, match=r"train_params\.json"):
        order(running, "malformed", hyperparameters={})
