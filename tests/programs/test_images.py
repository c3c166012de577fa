"""Images that models are trained in, without Ray: what may name one, and what a program in one sees and leaves."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from tests.isolation import hostile_program
from tests.isolation.hostile_rooms import SYSTEM_CALLS
from tests.support import galleries
from trainers.isolation.bubblewrap import IsolationError
from trainers.isolation.networks import own_network
from trainers.isolation.program import Program
from trainers.isolation.sandbox import Network, Room
from trainers.programs import images
from trainers.programs.images import Image, Podman
from trainers.programs.program_log import ProgramLog
from tunesmith import caches, processes
from tunesmith.assets.cards import read_card
from tunesmith.assets.gallery import read_gallery
from tunesmith.assets.image_references import parse_image
from tunesmith.errors import SpecError
from tunesmith.settings import Settings
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.segments import SegmentWriter

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "transport", "name"),
    [
        ("registry/train:1", "docker", "docker.io/registry/train:1"),
        ("debian", "docker", "docker.io/library/debian"),
        ("docker://quay.io/a/b", "docker", "quay.io/a/b"),
        ("swr.cn-north-4.myhuaweicloud.com/org/img:v1", "docker", "swr.cn-north-4.myhuaweicloud.com/org/img:v1"),
        (f"localhost:5000/a@sha256:{'0' * 64}", "docker", f"localhost:5000/a@sha256:{'0' * 64}"),
        ("docker-archive:images/train.tar", "docker-archive", "images/train.tar"),
        ("oci-archive:/srv/train.tar", "oci-archive", "/srv/train.tar"),
    ],
)
def test_an_image_is_named_by_a_registry_or_an_archive(text: str, transport: str, name: str) -> None:
    reference = parse_image(text)
    assert (reference.transport, reference.name) == (transport, name)


@pytest.mark.parametrize(
    "text",
    [
        "docker-archive:../train.tar",
        "docker-archive:train.tar:name",
        "docker-archive:",
        "oci:/etc",
        "dir:/etc",
        "docker-daemon:train:1",
        "https://quay.io/a/b",
        "Registry/Train",
        "host.org/Train",
        "--privileged",
        "a b",
        "train:",
        "train:1:2",
        f"train:1@sha256:{'0' * 64}",
        "train@sha256:abc",
        "a" * 600,
    ],
)
def test_what_names_no_image_is_refused_with_what_would(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError, match="must be HOST/NAME:TAG, HOST/NAME@sha256:DIGEST, docker-archive:PATH"):
        parse_image(text)
    folder = galleries.make(tmp_path / "model", card=f"Train_image_url: '{text}'\nTrain_command_path: /train.py\n")
    gallery = read_gallery(folder, read_card(folder))
    assert gallery is not None
    assert gallery.problems[0].startswith("README.md:4: Train_image_url must be HOST/NAME:TAG"), gallery.problems


def test_an_archive_among_the_models_files_must_be_there_and_goes_on_to_the_new_model(tmp_path: Path) -> None:
    card = "Train_image_url: docker-archive:image.tar\nTrain_command_path: run.sh\n"
    folder = galleries.make(tmp_path / "model", card=card)
    (folder / "run.sh").touch()
    gallery = read_gallery(folder, read_card(folder))
    assert gallery is not None
    assert gallery.problems == ["README.md:4: Train_image_url names no file of the model: 'image.tar'"]
    (folder / "image.tar").touch()
    gallery = read_gallery(folder, read_card(folder))
    assert gallery is not None
    assert (gallery.problems, gallery.needed_files) == ([], ["image.tar", "run.sh"])


def test_an_archive_that_is_not_copied_yet_counts_as_there(tmp_path: Path) -> None:
    card = "Train_image_url: docker-archive:./big/image.tar\nTrain_command_path: ./run.sh\n"
    folder = galleries.make(tmp_path / "model", card=card)
    gallery = read_gallery(folder, read_card(folder), present=["README.md", "big/image.tar", "run.sh"])
    assert gallery is not None
    assert gallery.problems == []


class Place:
    """A home, and a room with a model, a dataset and an output."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.settings = Settings.from_env({"TUNESMITH_HOME": str(folder / "home"), **settings})
        self.model, self.output, self.temporary = folder / "model", folder / "output", folder / "tmp"
        for path in (self.model, self.output, self.temporary):
            path.mkdir(exist_ok=True)
        (self.model / "weights.bin").write_bytes(b"weights")
        self.container = folder / "runs" / f"run-{folder.name}" / "container"

    def fetch(self, url: str) -> tuple[Image, str]:
        """The image, and the log of its fetching."""

        def watch(program: Program) -> None:
            while program.exit_code() is None:
                time.sleep(0.01)

        with SegmentWriter(FolderStorage(self.folder / "storage"), "log") as segments:
            log = ProgramLog(segments)
            image = images.fetch_image(url, model=self.model, settings=self.settings, log=log, watch=watch)
            return image, log.tail()

    def launch(
        self, command: list[str], image: Image, *, memory_bytes: int = 1 << 30, network: Network = "none"
    ) -> images.Launch:
        room = Room([self.model], [self.output], self.temporary, network, {"CPU": 2}, 100 * MIB)
        return images.launch(
            command,
            cwd=self.model,
            room=room,
            variables={"GIVEN": "a\nb"},
            image=image,
            folder=self.container,
            memory_bytes=memory_bytes,
            settings=self.settings,
        )

    @contextmanager
    def running(self, code: str, image: Image, **options: Any) -> Iterator[Program]:
        """Python's `code` in the image."""
        with Program(self.launch(["python3", "-c", textwrap.dedent(code)], image, **options)) as program:
            yield program
        images.remove_cgroups(self.container)


@pytest.fixture(scope="module")
def store(debian_image: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Image]:
    """A place whose home has the Debian image."""
    place = Place(tmp_path_factory.mktemp("place"))
    return place, place.fetch(f"docker-archive:{debian_image}")[0]


def cgroups(place: Place) -> list[Path]:
    """Control groups of the place's containers."""
    return list(Path("/sys/fs/cgroup").glob(f"**/tunesmith-{place.container.parent.name}-*"))


def test_podmans_command_line_gives_nothing_but_the_room(tmp_path: Path) -> None:
    place, image = Place(tmp_path), Image("train:1", "0" * 64, "sha256:1")
    with (
        mock.patch("trainers.programs.images.find_podman", return_value=Podman("/usr/bin/podman", "runc", True)),
        mock.patch("trainers.programs.images._seccomp", return_value={}),
        mock.patch.dict(os.environ, {"AWS_SECRET_ACCESS_KEY": "s3cret", "https_proxy": "http://me:s3cret@proxy"}),
    ):
        launch = place.launch(images.program_command("/opt/train.py"), image)
    command = list(launch.command)
    run = command[command.index("/usr/bin/podman") :]
    assert {
        "--network=none",
        "--read-only=true",
        "--cap-drop=all",
        "--security-opt=no-new-privileges",
        "--pull=never",
        "--http-proxy=false",
        "--uidmap=0:0:65536",
        f"--memory={int(1.1 * (1 << 30))}b",
        "--pids-limit=16384",
    } <= set(run)
    assert [text for text in run if text.startswith("--volume")] == [
        f"--volume={place.model}:{place.model}:ro,nosuid,nodev",
        f"--volume={place.output}:{place.output}:rw,nosuid,nodev",
        f"--volume={place.temporary}:/tmp:rw,nosuid,nodev",
    ]
    assert run[-3:] == ["--entrypoint=python3", "0" * 64, "/opt/train.py"]
    assert "--env=GIVEN" in run
    assert "s3cret" not in str(command) + str(launch.environment)
    assert launch.environment["GIVEN"] == "a\nb"


def test_a_program_in_an_image_sees_its_room_and_nothing_of_the_node(store: tuple[Place, Image]) -> None:
    place, image = store
    code = """
    import json, os, subprocess
    def may(path):
        try:
            open(path, "w"); return True
        except OSError:
            return False
    def runs(*command):
        return subprocess.run(command, capture_output=True).returncode == 0
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    model, output = os.getcwd(), os.path.dirname(os.getcwd()) + "/output"
    print(json.dumps({
        "env": dict(os.environ),
        "root": sorted(os.listdir("/")),
        "beside": sorted(os.listdir(os.path.dirname(model))),
        "written": {p: may(p) for p in ("/x", "/usr/x", "/run/x", "/var/tmp/x", "/proc/sys/kernel/hostname",
                                        model + "/x", output + "/x", "/tmp/x", "/dev/shm/x")},
        "read": open(model + "/weights.bin").read(),
        "caps": {name: status[name].strip() for name in ("CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")},
        "uid": [os.getuid(), open("/proc/self/uid_map").read().split()],
        "pids": len([p for p in os.listdir("/proc") if p.isdecimal()]),
        "interfaces": [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line],
        "hostname": os.uname().nodename,
        "namespaces": [runs("unshare", "-U", "true"), runs("unshare", "-Ur", "mount", "-t", "tmpfs", "x", "/tmp")],
        "mounts": runs("mount", "-t", "tmpfs", "x", "/mnt"),
        "devices": sorted(d for d in os.listdir("/dev") if not d.startswith(("std", "fd", "tty"))),
    }))
    """
    with (
        mock.patch.dict(os.environ, {"AWS_SECRET_ACCESS_KEY": "s3cret", "HTTPS_PROXY": "http://me:s3cret@proxy"}),
        place.running(code, image) as program,
    ):
        text = program.output.read().decode()
        assert _ended(program) == 0, text
    seen = json.loads(text)
    assert (seen["env"]["FROM_IMAGE"], seen["env"]["GIVEN"], seen["env"]["HOME"]) == ("yes", "a\nb", "/tmp")
    assert "s3cret" not in text
    assert [name for name in seen["env"] if name.startswith(("AWS", "TUNESMITH", "RAY", "CONTAINERS"))] == []
    assert seen["beside"] == ["model", "output"]
    assert {path for path, may in seen["written"].items() if may} == {f"{place.output}/x", "/tmp/x", "/dev/shm/x"}
    assert (place.temporary / "x").exists()
    assert seen["read"] == "weights"
    none = "0" * 16
    assert seen["caps"] == {"CapEff": none, "CapBnd": none, "CapAmb": none, "NoNewPrivs": "1", "Seccomp": "2"}
    # Its root is all users of a namespace, or the platform's own user where that is no root.
    assert seen["uid"] == [0, ["0", "0", "65536"] if os.geteuid() == 0 else ["0", str(os.getuid()), "1"]]
    assert seen["pids"] < 5
    assert seen["interfaces"] == ["lo"]
    assert seen["hostname"] == "job"
    assert (seen["namespaces"], seen["mounts"]) == ([False, False], False)
    assert not {"vda", "sda", "kmsg", "mem", "fuse", "kvm"} & set(seen["devices"])


def test_files_are_as_big_and_memory_as_much_as_the_room_allows(store: tuple[Place, Image]) -> None:
    place, image = store
    code = """
    try:
        with open("/tmp/big", "wb") as file:
            for _ in range(200):
                file.write(b"1" * (1 << 20))
    except OSError as error:
        print(error.strerror, flush=True)
    held = []
    while True:
        held.append(b"1" * (1 << 20))
    """
    with place.running(code, image, memory_bytes=200 * MIB) as program:
        said = program.output.read().decode()
        assert said == "File too large\n"
        # Its processes are killed by the kernel, long before the node's memory is used up.
        assert _ended(program) == 137
    assert (place.temporary / "big").stat().st_size == 100 * MIB


def test_sigterm_reaches_a_program_in_an_image_and_its_memory_is_seen(store: tuple[Place, Image]) -> None:
    code = """
    import signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    held = b"1" * (300 << 20)
    print("up", flush=True)
    time.sleep(1000)
    """
    place, image = store
    with place.running(code, image) as program:
        assert program.output.readline() == b"up\n"
        assert program.sample().rss_bytes > 300 * MIB
        program.terminate()
        assert _ended(program) == 7


HOSTILE = ("call ", "write /proc/sys", "write /sys", "unshare", "clone into", "input: ")
"""Tries that mean in an image what they mean in other rooms; an image has its own files of the system, and its root."""


def test_hostile_programs_in_an_image_are_refused_what_others_are(store: tuple[Place, Image]) -> None:
    place, image = store
    shutil.copyfile(hostile_program.__file__, place.model / "tries.py")
    told = {
        "inputs": str(place.model),
        "output": str(place.output),
        "paths": [str(place.settings.home)] * 6,
        "system_calls": SYSTEM_CALLS,
        "port": 1,
        "abstract": "none",
        "shm": "none",
        "pid": os.getpid(),
        "largest": 100 * MIB,
    }
    before = (place.model / "weights.bin").stat(), Path("/proc/sys/kernel/core_pattern").read_bytes()
    with Program(place.launch(["python3", str(place.model / "tries.py"), json.dumps(told)], image)) as program:
        said = program.output.read().decode()
    assert said.startswith("{"), said
    results = json.loads(said)
    images.remove_cgroups(place.container)
    tried = {name: came for name, came in results.items() if name.startswith(HOSTILE)}
    assert len(tried) > 100
    assert {name: came for name, came in tried.items() if came.startswith("got")} == {}
    assert ((place.model / "weights.bin").stat(), Path("/proc/sys/kernel/core_pattern").read_bytes()) == before


def test_sigterm_ends_a_program_that_does_not_care_for_it(store: tuple[Place, Image]) -> None:
    place, image = store
    with place.running("import time; print('up', flush=True); time.sleep(1000)", image) as program:
        assert program.output.readline() == b"up\n"
        program.terminate()
        assert _ended(program) == 143


def _ended(program: Program) -> int | None:
    deadline = time.monotonic() + 10
    while program.exit_code() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return program.exit_code()


def test_a_program_in_an_image_ends_with_all_it_began_and_leaves_nothing(store: tuple[Place, Image]) -> None:
    place = store[0]
    with place.running(DAEMON, store[1]) as program:
        assert program.output.readline() == b"up\n"
        belonging = _container(program.tree()[0].pid)
        assert cgroups(place) or os.geteuid() != 0
    assert [process for process in belonging if processes.is_alive(process)] == []
    assert cgroups(place) == []
    assert str(place.folder) not in Path("/proc/mounts").read_text()
    caches.delete(place.container)
    assert not place.container.exists()


DAEMON = """
import os, subprocess
subprocess.Popen(["sleep", "4321"], start_new_session=True)
print("up", flush=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "4321"])
    os._exit(0)
os.wait()
subprocess.run(["sleep", "4321"])
"""


def _container(pid: int) -> list[psutil.Process]:
    """All processes below one, once all of DAEMON's are there."""
    root, deadline = psutil.Process(pid), time.monotonic() + 10
    names: list[str] = []
    while names.count("sleep") != 3:
        assert time.monotonic() < deadline, names
        time.sleep(0.01)
        found = [root, *root.children(recursive=True)]
        with suppress(psutil.NoSuchProcess):  # one that has ended since
            names = [process.name() for process in found]
    assert {"podman", "conmon", "podman-init"} <= set(names)
    return found


def test_a_killed_worker_takes_the_container_with_it(store: tuple[Place, Image], tmp_path: Path) -> None:
    place, image = store
    launch = place.launch(["python3", "-c", DAEMON], image)
    started = tmp_path / "launch.json"
    started.write_text(json.dumps([list(launch.command), dict(launch.environment), str(launch.cwd)]))
    worker = """
    import json, pathlib, sys, time
    from trainers.isolation.program import Launch, Program
    command, environment, cwd = json.loads(pathlib.Path(sys.argv[1]).read_text())
    program = Program(Launch(command, environment, pathlib.Path(cwd)))
    time.sleep(1000)
    """
    command = [sys.executable, "-c", textwrap.dedent(worker), str(started)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            belonging = _container(process.pid)
        finally:
            process.kill()
    deadline = time.monotonic() + 10
    while left := [each for each in belonging if processes.is_alive(each)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
    images.remove_cgroups(place.container)
    assert cgroups(place) == []


def test_an_image_is_fetched_once_and_has_a_digest(store: tuple[Place, Image], debian_image: Path) -> None:
    place, image = store
    again, said = place.fetch(f"docker-archive:{debian_image}")
    assert again == image
    assert image.digest.startswith("sha256:")
    assert json.loads(image.lock) == {"url": image.url, "id": image.id, "digest": image.digest}
    assert image.id in said or "Copying" in said


@pytest.mark.usefixtures("podman")
def test_an_image_that_cannot_be_had_says_what_podman_said(tmp_path: Path) -> None:
    place = Place(tmp_path, TUNESMITH_IMPORT_ROOTS=str(tmp_path / "archives"))
    (place.model / "broken.tar").write_bytes(b"no archive")
    with pytest.raises(
        SpecError, match=r"(?s)could not be fetched \(podman ended with exit code 125\).*Error: "
    ) as caught:
        place.fetch("docker-archive:broken.tar")
    assert caught.value.code == "image_failed"
    (tmp_path / "elsewhere.tar").touch()
    for url in (f"docker-archive:{tmp_path}/elsewhere.tar", "oci-archive:/etc/shadow"):
        with pytest.raises(SpecError, match="must lie below"):
            place.fetch(url)
    with pytest.raises(SpecError, match="there is no file for the image"):
        place.fetch("docker-archive:none.tar")
    unreachable = "localhost:9/train:1"
    with pytest.raises(SpecError, match="localhost:9/train:1 could not be fetched"):
        place.fetch(unreachable)


@pytest.mark.parametrize(
    "name", ["run.oci.seccomp_bpf_data", "run.oci.handler", "org.systemd.property.X", "io.podman.x"]
)
def test_an_image_gives_no_orders_to_what_makes_its_container(name: str) -> None:
    images._check_annotations("x", {"org.opencontainers.image.title": "fine"})
    with pytest.raises(SpecError, match=re.escape(name)) as caught:
        images._check_annotations("x", {"org.opencontainers.image.title": "fine", name: "BgAAAAAA/38="})
    assert caught.value.code == "image_failed"


def test_a_node_without_podman_says_so(tmp_path: Path) -> None:
    with (
        mock.patch("trainers.programs.images.shutil.which", return_value=None),
        pytest.raises(IsolationError, match="no image can be run on this node: there is no podman") as caught,
    ):
        images.find_podman(Settings.from_env({"TUNESMITH_HOME": str(tmp_path)}))
    assert caught.value.code == "no_podman"


@pytest.mark.usefixtures("podman")
def test_a_node_tells_ray_that_podman_works(tmp_path: Path) -> None:
    environment = {**os.environ, "TUNESMITH_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "trainers.programs.images"], env=environment, capture_output=True, text=True, check=True
    )
    assert (json.loads(done.stdout), done.stderr) == ({"podman": 1}, "")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_container_on_the_network_of_its_job_reaches_its_peers_and_no_port_of_the_node(
    store: tuple[Place, Image], tmp_path: Path
) -> None:
    place, image = store
    serve = (
        "import socket\n"
        "server = socket.create_server(('127.0.0.1', 7001))\n"
        "print(1, flush=True)\n"
        "server.accept()[0].send(b'hello')\n"
    )
    meet = """
    import os, socket
    print(socket.create_connection(("127.0.0.1", 7001)).recv(5).decode())
    try:
        socket.create_connection(("127.0.0.1", PORT), timeout=2)
    except OSError as error:
        print(type(error).__name__)
    print(os.environ["GLOO_SOCKET_IFNAME"])
    """
    with socket.create_server(("127.0.0.1", 0)) as own, own_network(tmp_path / "network") as network:
        peer = [*network.entrance(), sys.executable, "-c", serve]
        with subprocess.Popen(peer, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            server.stdout.readline()
            code = meet.replace("PORT", str(own.getsockname()[1]))
            try:
                with place.running(code, image, network=network) as program:
                    assert program.output.read().split() == [b"hello", b"ConnectionRefusedError", b"lo"]
            finally:
                server.kill()
