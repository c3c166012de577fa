"""Storage keeps what it took, whole, under its root; the same on a folder and on a real S3 server."""

import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.s3_server import BUCKET, free_ports
from tests.support.s3_fixture import S3Server
from tunesmith.errors import DataError, NotFoundError, SpecError, StorageError
from tunesmith.settings import Settings
from tunesmith.storage.base import Entry, Storage
from tunesmith.storage.urls import open_storage


def s3_settings(tmp_path: Path, endpoint: str) -> Settings:
    env = {"TUNESMITH_S3_ENDPOINT": endpoint, "TUNESMITH_S3_REGION": "us-east-1", "TUNESMITH_HOME": str(tmp_path)}
    return Settings.from_env(env)


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(str(tmp_path / "root"), Settings.from_env({"TUNESMITH_HOME": str(tmp_path)}))
    server: S3Server = request.getfixturevalue("s3_server")
    return open_storage(server.url(f"test-{uuid.uuid4().hex}"), s3_settings(tmp_path, server.endpoint))


def test_what_is_put_is_got_again(storage: Storage) -> None:
    storage.put("jobs/a/job.json", b"one")
    storage.put("jobs/a/job.json", b"two")
    assert storage.get("jobs/a/job.json") == b"two"
    assert storage.exists("jobs/a/job.json")
    assert not storage.exists("jobs/a")


def test_what_is_not_there_is_said_by_name(storage: Storage) -> None:
    with pytest.raises(NotFoundError, match="jobs/none"):
        storage.get("jobs/none")
    assert not storage.exists("jobs/none")
    assert list(storage.entries("jobs")) == []
    assert storage.children("jobs") == []


def test_of_many_conditional_writers_one_wins(storage: Storage) -> None:
    def claim(number: int) -> bool:
        return storage.put_if_absent("jobs/a/attempts/1/claim", str(number).encode())

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(claim, range(16)))
    assert won.count(True) == 1
    assert storage.get("jobs/a/attempts/1/claim") == str(won.index(True)).encode()


def test_listing_is_sorted_and_ends_at_the_folders_name(storage: Storage) -> None:
    for key in ("models/b/1/manifest.json", "models/a/2/manifest.json", "models/a/1/x", "models-not/c"):
        storage.put(key, b"123")
    assert list(storage.entries("models/a")) == [Entry("models/a/1/x", 3), Entry("models/a/2/manifest.json", 3)]
    assert len(list(storage.entries())) == 4
    assert storage.children("models") == ["a", "b"]
    assert storage.children("models/a/1") == []
    assert storage.children() == ["models", "models-not"]


def test_a_listing_goes_on_after_a_key(storage: Storage) -> None:
    keys = ["a/1/x", "a/1/y", "a/10/x", "b/x"]
    for key in keys:
        storage.put(key, b"")
    for number, key in enumerate(keys):
        assert [entry.key for entry in storage.entries(after=key)] == keys[number + 1 :]
    assert [entry.key for entry in storage.entries("a", after="a/1/none")] == ["a/1/x", "a/1/y", "a/10/x"]
    assert [entry.key for entry in storage.entries("a", after="a/1/x")] == ["a/1/y", "a/10/x"]


def test_what_is_deleted_is_gone_and_no_more(storage: Storage) -> None:
    for key in ("a/1/x", "a/1/y", "a/10/x", "b/x"):
        storage.put(key, b"")
    storage.delete_folder("a/1")
    storage.delete("b/x")
    storage.delete("b/x")
    assert [entry.key for entry in storage.entries()] == ["a/10/x"]


def test_folders_go_in_and_come_out_the_same(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "small.txt").write_bytes(b"")
    (tmp_path / "in" / "deep" / "大.bin").write_bytes(os.urandom(33 << 20))
    stored = storage.upload_folder(tmp_path / "in", "models/m/1/files")
    assert [entry.size_bytes for entry in stored] == [33 << 20, 0]
    storage.download_folder("models/m/1/files", tmp_path / "out")
    for name in ("small.txt", "deep/大.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


def test_a_link_in_an_uploaded_folder_is_refused(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(DataError, match="link"):
        storage.upload_folder(tmp_path / "in", "models/m/1/files")
    assert list(storage.entries("models")) == []


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".", "a/./b", "a\0b", "a\\b"])
def test_no_key_leaves_the_root(storage: Storage, key: str) -> None:
    for call in (storage.get, storage.exists, storage.delete, storage.delete_folder):
        with pytest.raises(SpecError):
            call(key)
    with pytest.raises(SpecError):
        storage.put(key, b"")


def test_a_link_inside_a_folder_storage_leads_nowhere(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "root"), Settings.from_env({"TUNESMITH_HOME": str(tmp_path)}))
    storage.put("a/x", b"")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_bytes(b"k")
    (tmp_path / "root" / "a" / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(SpecError):
        storage.get("a/out/key")
    assert [entry.key for entry in storage.entries()] == ["a/x"]


def test_a_server_that_is_away_is_said_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    away = open_storage("s3://bucket", s3_settings(tmp_path, f"http://127.0.0.1:{free_ports(1)[0]}"))
    with pytest.raises(StorageError, match="does not answer"):
        away.put("x", b"")


@pytest.mark.s3
def test_a_wrong_key_opens_nothing(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    stranger = open_storage(f"s3://{BUCKET}", s3_settings(tmp_path, s3_server.endpoint))
    with pytest.raises(StorageError):
        stranger.get("ready")


@pytest.mark.parametrize("url", ["http://x/y", "gs://b", "s3://"])
def test_a_url_that_is_no_storage_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError):
        open_storage(url, Settings.from_env({"TUNESMITH_HOME": str(tmp_path)}))
