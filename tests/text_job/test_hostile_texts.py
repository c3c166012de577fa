"""Templates, tokenizers and rows made to break who renders them: each ends as an error of theirs, and is not kept."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.support import tiny
from tests.support.stage import make_manifest
from trainers.attempt.fetch import Fetched, fetch
from trainers.text.shards import Batch
from trainers.text_job import tokenizing
from trainers.text_job.tokenizing import Rows, Work, audited_rows, data_files, tokenized_rows
from tunesmith.assets.catalog import Table, publish
from tunesmith.assets.stored_files import describe_files
from tunesmith.assets.tables import describe
from tunesmith.errors import TunesmithError
from tunesmith.jobs.audit_report import AuditCounts
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.folder import FolderStorage
from tunesmith.text.formats import Example, Turn
from tunesmith.text.tokenization import Encoder

pytestmark = pytest.mark.slow

NOT_MINE_MIB = 150
ROWS = tiny.sums(20)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"TUNESMITH_HOME": str(tmp_path / "home")})


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def published(
    settings: Settings,
    tokenizer_folder: Path,
    spoil: Callable[[Path], object] = lambda folder: None,
    rows: list[Any] | bytes = ROWS,
) -> Rows:
    """Rows of a model and a dataset that were taken in although they are hostile."""
    storage = FolderStorage(Path(settings.storage_url))
    places = {kind: storage.root / layout.asset_files(kind, "tiny", 1, "files") for kind in ("model", "dataset")}
    for folder in places.values():
        folder.mkdir(parents=True)
    for path in tokenizer_folder.iterdir():
        (places["model"] / path.name).write_bytes(path.read_bytes())
    spoil(places["model"])
    file = places["dataset"] / "rows.jsonl"
    file.write_bytes(rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode())
    tables = {
        "rows.jsonl": describe(file)
        if not isinstance(rows, bytes)
        else Table.model_validate({"format": "jsonl", "columns": ["prompt", "response"], "rows": 1})
    }
    for kind, folder in places.items():
        described = tables if kind == "dataset" else {}
        publish(storage, make_manifest(kind, "tiny", files=describe_files(folder), tables=described))
    model, dataset = (fetch(storage, kind, "tiny@1", settings) for kind in ("model", "dataset"))
    assert isinstance(model, Fetched)
    files = data_files(dataset, ["rows.jsonl"])
    return Rows(model, files, tiny.hyperparameters(), tiny.advanced(), "text-question-answering")


def work(settings: Settings, **given: Any) -> Work:
    return Work(FolderStorage(Path(settings.storage_url)), settings, **given)


@contextmanager
def unharmed(settings: Settings) -> Iterator[None]:
    """Nothing is kept, nothing is left of the reader, and this process stays as it was."""
    before = psutil.Process().memory_info().rss
    yield
    assert (psutil.Process().memory_info().rss - before) >> 20 < NOT_MINE_MIB
    assert [*(settings.home / "tmp").iterdir()] == []
    storage = FolderStorage(Path(settings.storage_url))
    assert [entry.key for entry in storage.entries("cache")] == []


def template(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def raw(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def changed(name: str, **changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


LOOP = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "template: loops in loops": (template(LOOP), "no progress"),
    "template: 3 GiB of text": (template("{{ 'x' * 3221225472 }}"), "memory"),
    "template: a list of 10^10": (template("{{ [0] * 10000000000 }}"), "memory"),
    "template: a number of 10^9 digits": (template("{{ 10 ** (10 ** 9) }}"), "no progress|memory|does not take"),
    "template: a loop that grows": (
        template(
            "{% set n = namespace(t='x') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}"
        ),
        "memory",
    ),
    "template: a format of 10^10 columns": (template("{{ '%10000000000d' % 1 }}"), "memory|does not take"),
    "template: calls itself": (
        template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
        "does not take|ended with",
    ),
    "template: the classes of Python": (
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "does not take|leaves out",
    ),
    "template: the globals of a function": (template("{{ raise_exception.__globals__ }}"), "does not take|leaves out"),
    "template: another file": (template("{% include '/etc/passwd' %}"), "does not take"),
    "template: divides by zero": (template("{{ 1 // 0 }}"), "does not take"),
    "template: an attribute of nothing": (template("{{ messages.x.y }}"), "does not take"),
    "template: no template": (template("{% for %}"), "does not take|failed"),
    "template: 20,000 blocks in blocks": (
        template("{% if 1 %}" * 20_000 + "{% endif %}" * 20_000),
        "does not take|failed|ended with|memory",
    ),
    "template: raises": (template("{{ raise_exception('\\x1b[2Jno') }}"), "does not take"),
    "template: leaves out what was said": (template("{{ 'hello' }}"), "leaves out"),
    "template: empty": (template("{{ '' }}"), "leaves out"),
    "tokenizer: no JSON": (raw("tokenizer.json", b"\x80\4K\1."), "failed"),
    "tokenizer: lists in lists": (raw("tokenizer.json", b'{"a":' * 90_000 + b"1" + b"}" * 90_000), "failed|ended with"),
    "tokenizer: an id of 2^32": (
        changed("tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 2**32}, "unk_token": "a"}),
        "failed",
    ),
    "tokenizer: merges of tokens that are not there": (
        changed("tokenizer.json", model={"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}),
        "failed",
    ),
    "tokenizer: a class of its own": (
        changed("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own"),
        "",
    ),
    "tokenizer: files above": (changed("tokenizer_config.json", vocab_file="../../../../etc/passwd"), "path"),
    "rows: another text than its manifest says": (lambda folder: None, ""),
}
FAST = (
    "template: loops in loops",
    "template: 3 GiB of text",
    "template: a loop that grows",
    "template: divides by zero",
    "tokenizer: lists in lists",
    "tokenizer: files above",
)
"""Each loads a tokenizer anew, so the others are left to the soak."""


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.soak) for case in HOSTILE]
)
def test_a_hostile_template_or_tokenizer_is_refused(
    settings: Settings, tokenizer_folder: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, words = HOSTILE[case]
    monkeypatch.setattr(tokenizing, "MEMORY_BYTES", 1 << 30)
    monkeypatch.setattr(tokenizing, "SILENCE_S", 30.0)
    rows = published(
        settings, tokenizer_folder, spoil, rows=b"[" * 100_000 + b"\n" if case.startswith("rows") else ROWS
    )
    with unharmed(settings), pytest.raises(TunesmithError, match=f"(?s){words}") as caught:
        audited_rows(rows, work(settings), "tiny@1")
    assert caught.value.reason in ("user_error", "data_error", "out_of_memory"), caught.value
    assert len(caught.value.message) < 6000 and "\x1b" not in caught.value.message


def test_a_stop_is_heard_while_a_template_loops(settings: Settings, tokenizer_folder: Path) -> None:
    rows, calls = published(settings, tokenizer_folder, template(LOOP)), 0

    def listen() -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise InterruptedError

    with unharmed(settings), pytest.raises(InterruptedError):
        tokenized_rows(rows, work(settings, listen=listen))


def test_rows_that_are_there_need_no_reader_and_their_audit_is_the_same(
    settings: Settings, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = published(settings, tokenizer_folder)
    first, report = audited_rows(rows, work(settings), "tiny@1")
    example = Example([Turn("user", ROWS[0]["prompt"]), Turn("assistant", ROWS[0]["response"])])
    made = Encoder(tiny.make_tokenizer(), rows.hyperparameters, rows.advanced).encode([example])[0]
    assert first.ids(0).tolist() == made.ids.tolist() and first.trained(0).tolist() == made.trained.tolist()
    assert audited_rows(rows, work(settings), "tiny@1")[1] == report
    assert (report.checked, report.off, report.counts.rows) == (20, 0, 20)
    monkeypatch.setattr(tokenizing.readers, "stream", lambda *args, **options: pytest.fail("a reader was asked"))
    assert len(tokenized_rows(rows, work(settings))) == 20


def batch(
    *, counts: dict[str, Any] | None = None, offsets: list[int] | None = None, ids: list[int] | None = None
) -> tuple[AuditCounts, bytes]:
    """Two rows of two tokens as a reader tells them, with what is given in place of what is right."""
    said: dict[str, Any] = {"read": 2, "rows": 2, "tokens": 4, "trained_tokens": 2, "longest": 2, "lengths": {2: 2}}
    arrays = (np.asarray(offsets or [0, 2, 4], np.int32), np.asarray(ids or [1, 2, 3, 4], np.int32))
    return AuditCounts(**{**said, **(counts or {})}), b"".join(array.tobytes() for array in arrays) + b"\x0a"


def checked(told: tuple[AuditCounts, bytes]) -> Batch:
    made = Batch.of_bytes(*told)
    made.check(longest=8)
    return made


def test_a_batch_of_a_reader_is_what_it_was() -> None:
    made = checked(batch())
    assert (made.ids.tolist(), made.offsets.tolist(), made.to_bytes()) == ([1, 2, 3, 4], [0, 2, 4], batch()[1])


@pytest.mark.parametrize(
    "told",
    [
        batch(counts={"rows": 3}),
        batch(counts={"rows": -1}),
        batch(counts={"tokens": 5}),
        batch(counts={"tokens": -4}),
        batch(counts={"rows": 10**15}),
        batch(counts={"read": 1}),
        batch(counts={"skipped": -1, "read": 1}),
        batch(counts={"trained_tokens": 3}),
        batch(counts={"longest": 1}),
        batch(counts={"lengths": {2: 10**9}}),
        batch(counts={"truncated": 3}),
        batch(counts={"ended": -1}),
        batch(offsets=[0, 4, 2]),
        batch(offsets=[2, 2, 4]),
        batch(offsets=[0, -2, 4]),
        batch(offsets=[0, 2, 1 << 30]),
        batch(ids=[1, 2, 3, -1]),
        batch(ids=[1, 2, 3, 1 << 30]),
        (batch()[0], b""),
        (batch()[0], os.urandom(7)),
        (batch()[0], batch()[1] + b"\0"),
        (
            AuditCounts(read=1, rows=1, tokens=9, longest=9, lengths={16: 1}),
            np.asarray([0, 9, *range(9)], np.int32).tobytes() + b"\0\0",
        ),
    ],
)
def test_a_batch_that_cannot_be_is_refused(told: tuple[AuditCounts, bytes]) -> None:
    with pytest.raises(ValueError, match=r"."):
        checked(told)
