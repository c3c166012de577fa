"""Who fetches a model or dataset gets its manifest's files and no others, or hears which one is not what it was."""

import uuid
from pathlib import Path

import pytest

from tests.support.s3_fixture import S3Server
from tests.support.stage import make_manifest
from trainers.attempt.fetch import fetch, local_copy
from tunesmith.assets.catalog import get_manifest, publish
from tunesmith.assets.stored_files import describe_files
from tunesmith.errors import DamagedError, SpecError
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage
from tunesmith.storage.urls import open_storage

FILES = {"config.json": "{}", "deep/weights": "1234"}


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """A folder, which is read where it lies, or a bucket."""
    env = {"TUNESMITH_HOME": str(tmp_path / "home"), "TUNESMITH_STORAGE_URL": str(tmp_path / "storage")}
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        env |= {"TUNESMITH_S3_ENDPOINT": server.endpoint, "TUNESMITH_STORAGE_URL": server.url(uuid.uuid4().hex)}
    return Settings.from_env(env)


@pytest.fixture
def storage(settings: Settings, tmp_path: Path) -> Storage:
    """With the model tiny@1 of two files, and a third one beside them."""
    storage = open_storage(settings.storage_url, settings)
    for path, text in FILES.items():
        place = tmp_path / "made" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    storage.upload_folder(tmp_path / "made", "models/tiny/1/files")
    storage.put("models/tiny/1/files/stray", b"of nobody")
    publish(storage, make_manifest("model", "tiny", files=describe_files(tmp_path / "made")))
    return storage


def fetched(storage: Storage, settings: Settings) -> dict[str, str]:
    folder = fetch(storage, "model", "tiny@1", settings).folder
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stray", [True, False])
def test_the_manifests_files_are_fetched_and_no_others(storage: Storage, settings: Settings, stray: bool) -> None:
    if not stray:
        storage.delete("models/tiny/1/files/stray")
    assert fetched(storage, settings) == FILES
    assert fetched(storage, settings) == FILES


@pytest.mark.parametrize("stray", [True, False])
@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"12345", "has 5 bytes; its manifest says 4"),
        (b"1235", "has the sha256 .*; its manifest says 03ac6742"),
        (None, "is gone; its manifest says 4 bytes"),
    ],
)
def test_a_file_that_is_not_the_manifests_is_refused_by_name(
    storage: Storage, settings: Settings, stray: bool, written: bytes | None, said: str
) -> None:
    key = "models/tiny/1/files/deep/weights"
    storage.put(key, written) if written is not None else storage.delete(key)
    if not stray:
        storage.delete("models/tiny/1/files/stray")
    stored = get_manifest(storage, "model", "tiny").stored
    with pytest.raises(DamagedError, match=f"files/deep/weights {said}"):
        fetch(storage, "model", "tiny@1", settings)
    with pytest.raises(DamagedError, match=f"deep/weights {said}"), local_copy(storage, stored.below("deep")):
        pass
    with pytest.raises(DamagedError, match=f"deep/weights {said}"):
        stored.read(storage, "deep/weights")
    assert stored.read(storage, "config.json") == b"{}"


def test_files_read_in_their_place_are_hashed_once_a_node_and_measured_each_time(tmp_path: Path) -> None:
    settings = Settings.from_env({"TUNESMITH_HOME": str(tmp_path / "home")})
    storage = open_storage(settings.storage_url, settings)
    storage.put("models/tiny/1/files/weights", b"1234")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "weights").write_bytes(b"1234")
    publish(storage, make_manifest("model", "tiny", files=describe_files(tmp_path / "made")))
    fetch(storage, "model", "tiny", settings)
    storage.put("models/tiny/1/files/weights", b"1235")
    fetch(storage, "model", "tiny", settings)
    other = Settings.from_env({"TUNESMITH_HOME": str(tmp_path / "other")})
    with pytest.raises(DamagedError):
        fetch(storage, "model", "tiny", other)
    storage.put("models/tiny/1/files/weights", b"12345")
    with pytest.raises(DamagedError, match="has 5 bytes"):
        fetch(storage, "model", "tiny", settings)


def test_a_model_that_is_not_there_is_said(storage: Storage, settings: Settings) -> None:
    with pytest.raises(SpecError, match="there is no model 'tiny@2'"):
        fetch(storage, "model", "tiny@2", settings)
