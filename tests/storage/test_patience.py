"""A storage that is away is waited for: with growing pauses, for a stated time, and never forgetting a write."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.errors import NotFoundError, SpecError, StorageError
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.patience import PatientStorage
from tunesmith.storage.urls import open_patiently


class Away(FolderStorage):
    """A folder that does not answer the next `refusals` calls; `after_write`: it writes, and then does not answer."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.refusals, self.after_write = 0, False

    def _path(self, key: str) -> Path:
        if self.refusals and not self.after_write:
            self.refusals -= 1
            raise StorageError("away")
        return super()._path(key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        written = super().put_if_absent(key, data)
        if self.after_write and self.refusals:
            self.refusals -= 1
            raise StorageError("no answer")
        return written


class Time:
    """A clock that only pauses move."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def patient(storage: Storage, clock: Time, patience_s: float = 60.0) -> PatientStorage:
    return PatientStorage(storage, patience_s=patience_s, pause=clock.pause, clock=clock)


def download(storage: Storage) -> None:
    assert isinstance(storage, PatientStorage)
    storage.download_file("a/b", Path(storage.url) / "copy")


CALLS: dict[str, Callable[[Storage], object]] = {
    "get": lambda storage: storage.get("a/b"),
    "put": lambda storage: storage.put("a/c", b"c"),
    "put_if_absent": lambda storage: storage.put_if_absent("a/c", b"c"),
    "exists": lambda storage: storage.exists("a/b"),
    "entries": lambda storage: list(storage.entries("a")),
    "children": lambda storage: storage.children("a"),
    "delete": lambda storage: storage.delete("a/b"),
    "delete_folder": lambda storage: storage.delete_folder("a"),
    "upload_file": lambda storage: storage.upload_file(Path(storage.url) / "a" / "b", "a/c"),
    "upload_folder": lambda storage: storage.upload_folder(Path(storage.url) / "a", "b"),
    "download_file": download,
    "download_folder": lambda storage: storage.download_folder("a", Path(storage.url) / "copies"),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_waits_until_storage_answers(tmp_path: Path, name: str) -> None:
    clock, storage = Time(), Away(tmp_path)
    storage.put("a/b", b"b")
    expected = CALLS[name](patient(storage, Time()))
    if name.startswith(("put", "delete")):  # which changed what is there
        storage.put("a/b", b"b")
        storage.delete("a/c")
    storage.refusals = 7
    assert CALLS[name](patient(storage, clock, 120)) == expected
    assert clock.pauses == [1, 2, 4, 8, 15, 15, 15]


def test_an_outage_is_given_up_at_the_end_of_patience_and_then_asked_once(tmp_path: Path) -> None:
    clock, storage = Time(), Away(tmp_path)
    waited_for = patient(storage, clock, 60)
    storage.refusals = 1000
    with pytest.raises(StorageError):
        waited_for.exists("a")
    assert 45 < clock.now <= 60
    left = storage.refusals
    with pytest.raises(StorageError):
        waited_for.put("a", b"")
    assert storage.refusals == left - 1
    # One answer, and the next outage is waited for anew.
    storage.refusals = 0
    assert not waited_for.exists("a")
    storage.refusals = 3
    assert not waited_for.exists("a")


def test_a_conditional_write_that_was_not_answered_is_known_for_ones_own(tmp_path: Path) -> None:
    storage = Away(tmp_path)
    storage.refusals, storage.after_write = 1, True
    assert patient(storage, Time()).put_if_absent("claim", b"mine")
    assert storage.get("claim") == b"mine"
    assert not patient(storage, Time()).put_if_absent("claim", b"mine")
    storage.refusals = 1
    assert not patient(storage, Time()).put_if_absent("claim", b"another's")


@pytest.mark.parametrize("call", [lambda s: s.get("none"), lambda s: s.put("../out", b"")])
def test_what_waiting_cannot_mend_is_said_at_once(tmp_path: Path, call: Callable[[Storage], object]) -> None:
    clock = Time()
    with pytest.raises((NotFoundError, SpecError)):
        call(patient(FolderStorage(tmp_path), clock))
    assert clock.pauses == []


def test_the_settings_say_how_long(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in-the-way" / "of").mkdir(parents=True)
    for patience_s, tried_again in (("0", 0), ("1.5", 1)):
        settings = Settings.from_env({"TUNESMITH_HOME": str(tmp_path), "TUNESMITH_STORAGE_PATIENCE_S": patience_s})
        caplog.clear()
        with pytest.raises(StorageError):
            open_patiently(str(tmp_path), settings).put("in-the-way", b"")
        assert len([message for message in caplog.messages if message.startswith("tried again")]) == tried_again
