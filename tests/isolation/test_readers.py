"""What a user brought is read in a child: it ends in time and within its memory, and nothing it says is believed."""

import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.isolation import hostile_reader
from tests.isolation.hostile_reader import Answer, Question
from tests.support.waiting import until
from trainers.isolation import bubblewrap, outputs, readers
from trainers.isolation.bubblewrap import IsolationError
from trainers.isolation.readers import Limits, Reading
from tunesmith import processes
from tunesmith.errors import DataError, OutOfMemoryError, TunesmithError
from tunesmith.settings import Settings

pytestmark = pytest.mark.slow

LIMITS = Limits(memory_bytes=512 << 20, time_s=300, silence_s=300, file_bytes=8 << 20)
SHORT = Limits(memory_bytes=512 << 20, time_s=2, silence_s=2)
NOT_MINE_MIB = 96
"""How much the memory of the process that asks may grow; what it reads would take gigabytes."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"TUNESMITH_HOME": str(tmp_path / "home")})


def reading(reader: str, limits: Limits = LIMITS, path: Path = Path("/"), readable: list[Path] | None = None) -> Any:
    return Reading(
        name="the try",
        place=f"{hostile_reader.__name__}:{reader}",
        request=Question(path=path),
        answer=Answer,
        readable=readable or [],
        limits=limits,
        fault=DataError,
    )


def drained(said: Generator[tuple[Answer, bytes], None, Answer]) -> str:
    """What a reader answers at its end."""
    while True:
        try:
            next(said)
        except StopIteration as end:
            return str(end.value.text)


def read(settings: Settings, reader: str, limits: Limits = LIMITS, **given: Any) -> str:
    """What the reader answers; afterwards nothing is left of it, and nothing was taken from this process."""
    before, own = psutil.Process().memory_info().rss, {child.pid for child in psutil.Process().children()}
    try:
        return drained(readers.stream(reading(reader, limits, **given), Answer, settings=settings))
    finally:
        grown = psutil.Process().memory_info().rss - before
        assert grown >> 20 < NOT_MINE_MIB
        assert [*(settings.home / "tmp").iterdir()] == []
        assert {child.pid for child in psutil.Process().children()} <= own


@pytest.mark.parametrize("isolation", ["bubblewrap", "none"])
def test_a_reader_answers_with_or_without_walls(settings: Settings, isolation: str) -> None:
    settings = settings.model_copy(update={"isolation": isolation})
    assert read(settings, "answers") == "well"


def test_what_is_told_comes_in_order_with_its_bytes(settings: Settings) -> None:
    said = readers.stream(reading("tells"), Answer, settings=settings)
    told = []
    with pytest.raises(StopIteration) as end:
        while True:
            told.append(next(said))
    assert [(item.text, payload) for item, payload in told] == [(str(n), b"x" * n) for n in range(5)]
    assert end.value.value.text == "told"


@pytest.mark.parametrize(
    ("reader", "kind", "code"),
    [
        ("takes_memory", DataError, "too_much_memory"),
        ("takes_memory_at_once", DataError, "too_much_memory"),
        ("takes_memory_in_a_library", DataError, "too_much_memory"),
        ("dies_of_memory_in_rust", DataError, "too_much_memory"),
        ("aborts", DataError, "unreadable"),
        ("crashes", DataError, "unreadable"),
        ("is_killed", OutOfMemoryError, "out_of_memory"),
        ("exits", DataError, "unreadable"),
        ("panics", DataError, "unreadable"),
        ("recurses", DataError, "unreadable"),
        ("refuses", DataError, "bad_file"),
        ("accuses_the_platform", DataError, "unreadable"),
        ("raises_escapes", DataError, "invalid_data"),
        ("answers_another_shape", DataError, "unreadable"),
        ("tells_another_shape", DataError, "unreadable"),
        ("answers_too_much", DataError, "unreadable"),
        ("says_garbage", DataError, "unreadable"),
        ("says_a_line_without_an_end", DataError, "unreadable"),
        ("claims_endless_bytes", DataError, "unreadable"),
        ("claims_negative_bytes", DataError, "unreadable"),
        ("claims_no_number_of_bytes", DataError, "unreadable"),
        ("claims_more_bytes_than_come", DataError, "unreadable"),
        ("answers_deep_json", DataError, "unreadable"),
        ("raises_an_unknown_kind", DataError, "unreadable"),
        ("raises_with_a_bad_code", DataError, "unreadable"),
    ],
)
def test_whatever_a_reader_does_it_is_an_error_of_what_it_reads(
    settings: Settings, reader: str, kind: type[TunesmithError], code: str
) -> None:
    with pytest.raises(TunesmithError) as caught:
        read(settings, reader)
    error = caught.value
    assert (type(error), error.code) == (kind, code), error.message
    shown = " ".join([error.message, error.hint or "", *error.fields])
    assert len(shown) < 20_000
    assert all(character.isprintable() or character == "\n" for character in shown)


@pytest.mark.parametrize("isolation", ["bubblewrap", "none"])
@pytest.mark.parametrize("reader", ["loops", "sleeps", "tells_without_end", "leaves_processes_and_loops"])
def test_a_reader_without_an_end_is_ended(settings: Settings, reader: str, isolation: str) -> None:
    settings = settings.model_copy(update={"isolation": isolation})
    with pytest.raises(DataError, match=r"has not ended|made no progress") as caught:
        read(settings, reader, SHORT)
    assert caught.value.code == "takes_too_long"


@pytest.mark.parametrize("isolation", ["bubblewrap", "none"])
@pytest.mark.parametrize("reader", ["loops", "tells_without_end", "leaves_processes_and_loops"])
def test_a_stop_is_heard_while_a_reader_works(settings: Settings, reader: str, isolation: str) -> None:
    settings = settings.model_copy(update={"isolation": isolation})
    calls = 0

    def listen() -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        drained(readers.stream(reading(reader), Answer, settings=settings, listen=listen))
    assert [*(settings.home / "tmp").iterdir()] == []
    assert not _sleepers()


def test_a_reader_ends_with_the_process_that_asks(settings: Settings) -> None:
    worker = os.fork()
    if worker == 0:
        readers.read(reading("leaves_processes_and_loops"), settings=settings)
        os._exit(1)
    until(_sleepers, limit_s=60)
    os.kill(worker, 9)
    os.waitpid(worker, 0)
    until(lambda: not _sleepers(), limit_s=20)


@pytest.mark.parametrize(
    "reader",
    ["fills_stderr", "leaves_processes", "reaches_the_network", "writes_a_large_file"],
)
def test_what_a_reader_tries_beside_its_work_comes_to_nothing(settings: Settings, reader: str) -> None:
    assert read(settings, reader) == "well"
    assert not _sleepers()


def test_a_reader_sees_what_it_is_to_read_and_can_change_none_of_it(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "file").write_text("given")
    assert read(settings, "reads_a_path", path=folder / "file", readable=[folder]) == "it was done"
    assert read(settings, "writes_a_path", path=folder / "file", readable=[folder]) == "well"
    assert read(settings, "writes_a_path", path=folder / "new", readable=[folder]) == "well"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"file": "given"}


@pytest.mark.parametrize("name", ["api_token", "ray_token", "records.db", "storage/jobs/job-1/job.json"])
def test_a_reader_sees_nothing_of_the_home(settings: Settings, name: str) -> None:
    secret = settings.home / name
    secret.parent.mkdir(parents=True, exist_ok=True)
    secret.write_text("secret")
    assert read(settings, "reads_a_path", path=secret) == "well"
    read(settings, "writes_a_path", path=secret)
    assert secret.read_text() == "secret"


@pytest.mark.parametrize("path", ["/home", "/etc/gshadow", "/etc/shadow", "/var/log", "/run", "/sys"])
def test_a_reader_sees_nothing_of_the_nodes_own_files(settings: Settings, path: str) -> None:
    assert read(settings, "lists_a_path" if Path(path).is_dir() else "reads_a_path", path=Path(path)) == "well"


def test_a_reader_has_no_variable_of_the_platform(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "TUNESMITH_TOKEN", "RAY_AUTH_TOKEN", "HF_TOKEN", "TUNESMITH_S3_ENDPOINT"):
        monkeypatch.setenv(name, "s3cret")
    said = read(settings, "shows_its_variables")
    assert "s3cret" not in said and str(settings.home) not in said.replace(f"{settings.home}/tmp/read-", "")


def test_only_who_asks_takes_what_a_reader_leaves_and_follows_no_link(settings: Settings) -> None:
    taken: list[str] = []

    def take(own: Path) -> None:
        taken.extend(outputs.walk(own).files)
        assert not _sleepers()

    readers.read(reading("leaves_links"), settings=settings, take=take)
    assert taken == []
    assert [*(settings.home / "tmp").iterdir()] == []


def test_a_node_that_cannot_isolate_says_so(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    bubblewrap.find_bubblewrap.cache_clear()
    monkeypatch.setattr(bubblewrap, "_bundled", lambda: None)
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)
    try:
        with pytest.raises(IsolationError, match="cannot be isolated on this node"):
            read(settings, "answers")
    finally:
        bubblewrap.find_bubblewrap.cache_clear()


def test_the_time_that_others_take_is_not_the_readers(settings: Settings) -> None:
    said = readers.stream(reading("tells", SHORT), Answer, settings=settings)
    next(said)
    time.sleep(SHORT.time_s + 0.5)
    with pytest.raises(StopIteration):
        while True:
            next(said)


def _sleepers() -> list[psutil.Process]:
    """What `leaves_processes` starts, of this process's readers."""
    return [process for process in psutil.process_iter() if _is_sleeper(process)]


def _is_sleeper(process: psutil.Process) -> bool:
    try:
        return process.cmdline() == ["/bin/sleep", "4000"] and processes.is_alive(process)
    except psutil.Error:
        return False
