"""The files of a registration are looked at before they are copied, and nothing is copied but what was looked at."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from tests.support.s3_fixture import BUCKET, S3Server
from trainers.registration import sources
from trainers.registration.sources import Bounds, copy_files, opened_source
from tunesmith.errors import DataError, SpecError, StorageError, TunesmithError
from tunesmith.settings import Settings

WIDE = Bounds(files=100, file_bytes=1 << 20, total_bytes=1 << 21)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "api_token").write_text("secret!!")
    return Settings.from_env({"TUNESMITH_HOME": str(tmp_path / "home")})


def copy(
    source: Path | str,
    settings: Settings,
    folder: Path,
    *,
    bounds: Bounds = WIDE,
    seen: Callable[[], object] = lambda: None,
    listen: Callable[[], None] = lambda: None,
) -> dict[str, bytes]:
    """Look at a source, do `seen`, copy it; what came out."""
    with opened_source(str(source), settings, bounds, lambda: None) as found:
        seen()
        copy_files(found, list(found.sizes), folder, listen)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def make(folder: Path, **files: bytes) -> Path:
    for path, data in files.items():
        place = folder / path.replace("__", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return folder


def test_files_come_out_as_they_lie(settings: Settings, tmp_path: Path) -> None:
    folder = make(tmp_path / "data", a=b"1", deep__er__b=b"22", empty=b"")
    assert copy(folder, settings, tmp_path / "out") == {"a": b"1", "deep/er/b": b"22", "empty": b""}
    assert copy(folder / "a", settings, tmp_path / "one") == {"a": b"1"}


@pytest.mark.parametrize("swap", ["parent", "folder", "file"])
def test_what_is_swapped_after_the_look_leads_nowhere_else(settings: Settings, tmp_path: Path, swap: str) -> None:
    top = make(tmp_path / "up" / "data", deep__api_token=b"harmless")

    def swapped() -> None:
        place, target = {
            "parent": (tmp_path / "up", tmp_path / "evil"),
            "folder": (top / "deep", settings.home),
            "file": (top / "deep" / "api_token", settings.home / "api_token"),
        }[swap]
        make(tmp_path / "evil" / "data", deep__api_token=b"evil")
        place.rename(tmp_path / "away")
        place.symlink_to(target)

    try:
        found = copy(top, settings, tmp_path / "out", seen=swapped)
    except TunesmithError as error:
        assert error.code == "source_changed"
        found = {}
    assert found.get("deep/api_token") in (None, b"harmless")


def test_a_parent_that_became_a_link_is_refused(tmp_path: Path) -> None:
    """The door saw the real path; who copies it sees a link where a folder was."""
    make(tmp_path / "real" / "data", a=b"1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(DataError) as caught, sources._opened(f"{tmp_path}/link/data"):
        pass
    assert caught.value.code == "source_changed"


def test_the_home_is_never_copied_under_another_name(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "data", a=b"1")
    settings.home.rename(tmp_path / "data" / "home")
    settings.home.symlink_to(tmp_path / "data" / "home")
    # As if it had been moved there after the check.
    monkeypatch.setattr(sources, "check_source", lambda source, settings: source)
    with pytest.raises(SpecError) as caught:
        copy(tmp_path / "data", settings, tmp_path / "out")
    assert caught.value.code == "source_not_allowed"


def test_only_files_are_taken(settings: Settings, tmp_path: Path) -> None:
    folder = make(tmp_path / "data", a=b"1")
    os.mkfifo(folder / "pipe")
    with pytest.raises(DataError, match="pipe is neither a file nor a folder"):
        copy(folder, settings, tmp_path / "out")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        copy(folder / "pipe", settings, tmp_path / "out")
    (folder / "pipe").unlink()
    (folder / "link").symlink_to(folder / "a")
    with pytest.raises(DataError, match="is a link"):
        copy(folder, settings, tmp_path / "out")


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        (Bounds(files=2, file_bytes=100, total_bytes=1000), "more than 2 files"),
        (Bounds(files=9, file_bytes=5, total_bytes=1000), "b has 6 bytes"),
        (Bounds(files=9, file_bytes=100, total_bytes=10), "the files so far 14"),
    ],
)
def test_a_source_that_is_too_large_is_refused_before_a_byte_is_copied(
    settings: Settings, tmp_path: Path, bounds: Bounds, words: str
) -> None:
    folder = make(tmp_path / "data", a=b"1234", b=b"123456", c=b"1234")
    with pytest.raises(DataError, match=words) as caught:
        copy(folder, settings, tmp_path / "out", bounds=bounds)
    assert caught.value.code == "too_large"
    assert not (tmp_path / "out").exists()


def test_folders_without_an_end_are_refused(settings: Settings, tmp_path: Path) -> None:
    deep = tmp_path / "data"
    for _ in range(sources.MAX_DEPTH + 1):
        deep = deep / "d"
    deep.mkdir(parents=True)
    with pytest.raises(DataError, match="folders deep"):
        copy(tmp_path / "data", settings, tmp_path / "out")
    for number in range(30):
        (tmp_path / "many" / str(number)).mkdir(parents=True)
    with pytest.raises(DataError, match="too many files and folders"):
        copy(tmp_path / "many", settings, tmp_path / "out", bounds=Bounds(files=10, file_bytes=9, total_bytes=9))


@pytest.mark.parametrize("now", [b"12", b"1" * (1 << 20)])
def test_a_file_that_changes_while_it_is_copied_is_refused(settings: Settings, tmp_path: Path, now: bytes) -> None:
    folder = make(tmp_path / "data", a=b"1234")
    with pytest.raises(DataError, match="changed while it was copied"):
        copy(folder, settings, tmp_path / "out", seen=lambda: (folder / "a").write_bytes(now))
    assert (tmp_path / "out" / "a").stat().st_size <= 4


def test_a_copy_hears_that_it_is_to_stop(settings: Settings, tmp_path: Path) -> None:
    folder = make(tmp_path / "data", a=b"1234", b=b"1234")
    heard = threading.Event()

    def listen() -> None:
        if heard.is_set():
            raise InterruptedError
        heard.set()

    with pytest.raises(InterruptedError):
        copy(folder, settings, tmp_path / "out", listen=listen)
    assert not (tmp_path / "out" / "b").exists()


def test_a_disk_without_room_is_called_that(settings: Settings, tmp_path: Path) -> None:
    folder = make(tmp_path / "data", a=b"")
    os.truncate(folder / "a", 1 << 43)
    endless = Bounds(files=9, file_bytes=1 << 62, total_bytes=1 << 62)
    with pytest.raises(StorageError) as caught:
        copy(folder, settings, tmp_path / "out", bounds=endless)
    assert caught.value.code == "storage_full"


@pytest.mark.s3
def test_objects_are_looked_at_and_none_leads_out_of_the_folder(
    s3_server: S3Server, settings: Settings, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"s3_endpoint": s3_server.endpoint})
    client = boto3.client("s3", endpoint_url=s3_server.endpoint)
    client.put_object(Bucket=BUCKET, Key="good/a", Body=b"1")
    client.put_object(Bucket=BUCKET, Key="good/deep/b", Body=b"22")
    assert copy(s3_server.url("good"), settings, tmp_path / "out") == {"a": b"1", "deep/b": b"22"}
    with pytest.raises(DataError, match="more than 1 files"):
        copy(s3_server.url("good"), settings, tmp_path / "out", bounds=Bounds(files=1, file_bytes=9, total_bytes=9))
    with pytest.raises(SpecError, match="there is nothing at"):
        copy(s3_server.url("none"), settings, tmp_path / "out")
    with pytest.raises(SpecError, match="cannot be stored"):
        sources._check_name("../outside")
