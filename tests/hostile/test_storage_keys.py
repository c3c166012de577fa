"""Keys of buckets that are not ours: none makes a folder or a file outside, and none takes another's place."""

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, quote, urlsplit

import boto3
import pytest

from tests.support.s3_fixture import BUCKET, S3Server
from trainers.registration.sources import Bounds, copy_files, opened_source
from tunesmith.assets.stored_files import File, StoredFiles
from tunesmith.errors import DataError, SpecError, TunesmithError
from tunesmith.file_names import collision, name_fault, path_fault
from tunesmith.settings import Settings
from tunesmith.storage.base import MAX_KEY_BYTES, Storage
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.urls import open_storage

WIDE = Bounds(files=100, file_bytes=1 << 20, total_bytes=1 << 21)

OUTSIDE = [
    "/etc/passwd", "/", "//x", "../x", "../../../../tmp/x", "a/../../x", "a/..", "..", ".", "./a", "a/./b", "a//b",
    "a/", "\0", "a\0b", "a\\b", "..\\..\\x", "C:\\x", "\\\\host\\share", "\x1b[2J", "a\nb", "a\rb", "a\tb",
    "a\x7f", "\x9b2J", "\u202egpj.exe", "a\u2066b", "a\u200bb", "a\u2028b", "x" * 256, "é" * 128, "a/" + "x" * 256,
    "/".join(["d" * 200] * 6), ".partial-0", "a/.partial-0/b",
]  # fmt: skip
FOLDED = [
    ("A", "a"), ("data/Train.csv", "data/train.CSV"), ("caf\u00e9", "cafe\u0301"), ("Stra\u00dfe", "STRASSE"),
    ("A", "a/b"), ("A/x", "a/X"), ("\u212a", "k"), ("\ufb01", "fi"),
]  # fmt: skip
"""Names that are one to a file system that folds them."""
PAIRS = [("a", "a/b"), ("a/b", "a/b/c/d")]
"""Names of which one would take the other's place, anywhere."""


class Listing(ThreadingHTTPServer):
    """An S3 service that lists whatever it is told to, and has every object."""

    keys: Sequence[str] = ()
    asked_for: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Listing

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if "list-type" in parse_qs(url.query):
            items = "".join(f"<Contents><Key>{quote(key)}</Key><Size>4</Size></Contents>" for key in self.server.keys)
            self._say(f"<ListBucketResult><EncodingType>url</EncodingType>{items}</ListBucketResult>".encode())
        else:
            self.server.asked_for.append(url.path)
            self._say(b"evil")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _say(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def listing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listing]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    with Listing(("127.0.0.1", 0), _Answers) as server:
        server.asked_for = []
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def settings_for(endpoint: str, home: Path) -> Settings:
    env = {"TUNESMITH_S3_ENDPOINT": endpoint, "TUNESMITH_S3_REGION": "us-east-1", "TUNESMITH_HOME": str(home)}
    return Settings.from_env({**env, "TUNESMITH_S3_ADDRESSING_STYLE": "path"})


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def take(source: str, settings: Settings, folder: Path) -> set[str]:
    with opened_source(source, settings, WIDE, lambda: None) as found:
        copy_files(found, list(found.sizes), folder, lambda: None)
    return tree(folder)


@pytest.mark.parametrize("key", OUTSIDE, ids=ascii)
def test_a_bucket_with_such_a_key_is_refused_before_anything_is_written(
    listing: Listing, tmp_path: Path, key: str
) -> None:
    listing.keys = ["good.csv", key]
    with pytest.raises(SpecError) as caught:
        take("s3://theirs", settings_for(listing.url, tmp_path / "home"), tmp_path / "a" / "b" / "out")
    assert caught.value.code == "invalid_key"
    assert caught.value.fields == ["source"]
    assert caught.value.message.isprintable()
    assert (tree(tmp_path), listing.asked_for) == (set(), [])


@pytest.mark.parametrize("pair", PAIRS, ids=ascii)
def test_two_names_of_which_one_hides_the_other_are_refused(
    listing: Listing, tmp_path: Path, pair: tuple[str, str]
) -> None:
    listing.keys = ["good.csv", *pair]
    with pytest.raises(SpecError) as caught:
        take("s3://theirs", settings_for(listing.url, tmp_path / "home"), tmp_path / "out")
    assert caught.value.code == "invalid_key"
    assert all(repr(name) in caught.value.message for name in pair)
    assert (tree(tmp_path), listing.asked_for) == ({"out"}, [])


def test_a_bucket_with_good_keys_is_taken(listing: Listing, tmp_path: Path) -> None:
    names = {"good.csv", "数据/训练 集.jsonl", "a.b/c-d_e/(1).csv", "émoji 👩\u200d🔬.csv", "x" * 255}
    listing.keys = sorted(names)
    found = take("s3://theirs", settings_for(listing.url, tmp_path / "home"), tmp_path / "out")
    assert names <= found


@pytest.mark.parametrize("key", OUTSIDE, ids=ascii)
def test_no_storage_makes_a_folder_for_such_a_key(listing: Listing, tmp_path: Path, key: str) -> None:
    listing.keys = [f"p/{key}"]
    remote = open_storage("s3://theirs", settings_for(listing.url, tmp_path / "home"))
    local = FolderStorage(tmp_path / "storage")
    for storage in (remote, local):
        _refuse(storage, key, tmp_path / "a" / "out")
    with pytest.raises(SpecError):
        remote.download_folder("p", tmp_path / "a" / "out")
    stored = StoredFiles("p", [File(path=key, size_bytes=4, sha256="0" * 64)])
    for call in (lambda: stored.copy(remote, tmp_path / "a" / "out"), lambda: stored.check(tmp_path / "a" / "out")):
        with pytest.raises(TunesmithError):
            call()
    assert (tree(tmp_path), listing.asked_for) == (set(), [])


def _refuse(storage: Storage, key: str, folder: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: storage.download_file(key, folder / "x"),
        lambda: storage.get(key),
        lambda: storage.put(key, b"x"),
        lambda: storage.put_if_absent(key, b"x"),
        lambda: storage.exists(key),
        lambda: storage.delete(key),
        lambda: storage.delete_folder(key),
        lambda: storage.local_path(key),
        lambda: list(storage.entries(key)),
    ]
    for call in calls:
        with pytest.raises(SpecError) as caught:
            call()
        assert caught.value.code == "invalid_key" and caught.value.message.isprintable()


def test_the_roots_own_prefix_counts_for_the_length_of_a_key(listing: Listing, tmp_path: Path) -> None:
    storage = open_storage("s3://theirs/" + "p/" * 100, settings_for(listing.url, tmp_path / "home"))
    fits = "/".join(["x" * 100] * 8)
    storage.get(fits)
    with pytest.raises(SpecError, match="bytes"):
        storage.get(f"{fits}/{'x' * (MAX_KEY_BYTES - len(fits) - 100)}")


LOCAL = [
    [b"a\\b"], [b"a\nb"], [b"\x1b[2J"], [b"\xff\xfe"], [b".partial-0"],
    [b"a\xe2\x80\xaeb"], [b"\x7f"], [b"sub/a\tb"], [b"sub\r/x"], [b"/".join([b"d" * 200] * 5)],
]  # fmt: skip


@pytest.mark.parametrize("names", LOCAL, ids=ascii)
def test_a_local_source_with_such_names_is_refused_likewise(tmp_path: Path, names: list[bytes]) -> None:
    for name in [b"good.csv", *names]:
        place = Path(os.fsdecode(os.fsencode(tmp_path / "data") + b"/" + name))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("x")
    before = tree(tmp_path)
    with pytest.raises((SpecError, DataError)) as caught:
        take(str(tmp_path / "data"), Settings.from_env({"TUNESMITH_HOME": str(tmp_path / "home")}), tmp_path / "out")
    assert caught.value.code == "invalid_key" and caught.value.message.isprintable()
    assert tree(tmp_path) == before


KEPT_BY_THE_SERVER = ["a\nb", "\x1b[2J", "\u202egpj.exe", ".partial-0", "a\x7f", "a\u200bb"]
"""Keys that the server of the tests takes as they are; it has folders beneath, so it takes no `..`."""


@pytest.mark.s3
@pytest.mark.parametrize("names", [[key] for key in KEPT_BY_THE_SERVER], ids=ascii)
def test_a_real_servers_bucket_is_refused_before_anything_is_written(
    s3_server: S3Server, tmp_path: Path, names: list[str]
) -> None:
    client = boto3.client("s3", endpoint_url=s3_server.endpoint, region_name="us-east-1")
    prefix = f"hostile-{uuid.uuid4().hex}"
    for name in ["good.csv", *names]:
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=b"evil")
    with pytest.raises(SpecError) as caught:
        take(s3_server.url(prefix), settings_for(s3_server.endpoint, tmp_path / "home"), tmp_path / "out")
    assert caught.value.code == "invalid_key"
    assert tree(tmp_path) == set()


def test_the_rule_of_names_is_one_for_parts_and_for_paths() -> None:
    assert [path_fault(path) for path in ("a", "a/b.c", "模型/1 (2).bin", "x" * 255)] == [None] * 4
    assert name_fault("a") is None and name_fault("a/b") == "is a path, not the name of a file"
    assert all(name_fault(key) for key in OUTSIDE if not key.startswith(".partial") and "/.partial" not in key)


def test_no_file_takes_the_place_of_another() -> None:
    for folds in (True, False):
        assert collision(["a/b", "a/c", "b", "ab"], folds=folds) is None
        assert collision(["a", "b", "a/c"], folds=folds) == ("a", "a/c")
    assert [collision(pair, folds=False) for pair in FOLDED] == [None] * len(FOLDED)
    assert None not in [collision(pair, folds=True) for pair in FOLDED]


def test_names_that_differ_in_capitals_alone_are_two_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("A.csv", "a.csv"):
        (folder / name).write_text(name)
    take(str(folder), settings_for("http://127.0.0.1:1", tmp_path / "home"), tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
        "A.csv": "A.csv",
        "a.csv": "a.csv",
    }
