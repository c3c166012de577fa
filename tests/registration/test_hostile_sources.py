"""Files made to break who reads them end as an error of theirs: in time, and with nothing taken from who registers."""

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import galleries, tiny
from trainers.registration import descriptions, model_check
from trainers.registration.descriptions import describe_model, describe_tables
from trainers.registration.model_check import check_language_model
from tunesmith.errors import DataError, ModelError, SpecError, TunesmithError
from tunesmith.settings import Settings

pytestmark = pytest.mark.slow

NOT_MINE_MIB = 200
"""How much the memory of who registers may grow; what is read would take gigabytes."""
MEMORY_BYTES = 400 << 20
"""Of readers of data here, so that little is filled before they end."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"TUNESMITH_HOME": str(tmp_path / "home")})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers of data get less memory and time than they would have."""
    monkeypatch.setattr(descriptions, "_MEMORY_BYTES", MEMORY_BYTES)
    monkeypatch.setattr(descriptions, "_SILENCE_S", 20.0)


@contextmanager
def unharmed(settings: Settings) -> Iterator[None]:
    """Whatever happens, the process that asks stays as it was, and nothing is left of the reader."""
    before = psutil.Process().memory_info().rss
    yield
    assert (psutil.Process().memory_info().rss - before) >> 20 < NOT_MINE_MIB
    assert [*(settings.home / "tmp").iterdir()] == []


def stay() -> None:
    """Nobody asks to stop."""


def parquet(table: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def one_value(text: str) -> bytes:
    """A parquet file of one row whose text is written as a few kilobytes."""
    return parquet(pa.table({"prompt": [text]}), compression="zstd", use_dictionary=False)


def many_rows(count: int, text: str) -> bytes:
    """The same text in all rows, which a dictionary holds once."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), [text])
    return parquet(pa.table({"prompt": column}), compression="zstd")


def deep_parquet(depth: int) -> bytes:
    kind, value = pa.string(), "x"
    for _ in range(depth):
        kind, value = pa.list_(kind), [value]
    return parquet(pa.table({"prompt": pa.array([value], kind)}))


def lying_parquet(at: int, value: bytes) -> bytes:
    """A good file with other bytes near its end, where its metadata lies."""
    data = bytearray(parquet(pa.table({"prompt": ["x"] * 1000})))
    data[at : at + len(value)] = value
    return bytes(data)


DATA: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "parquet: 600 MiB in one value": ("a.parquet", lambda: one_value("x" * (600 << 20)), "memory"),
    "parquet: lists in lists": ("a.parquet", lambda: deep_parquet(900), ""),
    "parquet: its length is a lie": ("a.parquet", lambda: lying_parquet(-8, b"\xff\xff\xff\x7f"), "not parquet"),
    "parquet: its metadata is garbage": ("a.parquet", lambda: lying_parquet(-60, b"\xff" * 40), "not parquet"),
    "parquet: its magic alone": ("a.parquet", lambda: b"PAR1PAR1", "not parquet"),
    "parquet: cut short": ("a.parquet", lambda: one_value("x" * 9999)[:-9], "not parquet"),
    "parquet: a column name of 10 MB": (
        "a.parquet",
        lambda: parquet(pa.table({"c" * 10_000_000: [1]})),
        "column whose name|not parquet",
    ),
    "parquet: 5,000 columns": (
        "a.parquet",
        lambda: parquet(pa.table({f"c{n}": [1] for n in range(5000)})),
        "more than 1000 columns",
    ),
    "json: 100,000 lists in lists": ("a.json", lambda: b"[" + b"[" * 100_000 + b"]" * 100_001, "an object"),
    "json: 100,000 objects in objects": (
        "a.json",
        lambda: b"[" + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"]",
        "nested too deeply",
    ),
    "jsonl: 900 lists in lists": ("a.jsonl", lambda: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "deeply"),
    "jsonl: a line without an end": ("a.jsonl", lambda: b'{"a":"' + b"x" * (40 << 20), "longer than 16 MiB"),
    "jsonl: a key of 10 MB": ("a.jsonl", lambda: b'{"' + b"k" * 10_000_000 + b'":1}\n', "column whose name"),
    "jsonl: other columns in every row": (
        "a.jsonl",
        lambda: b"".join(b'{"c%d":1}\n' % n for n in range(5000)),
        "more than 1000 columns",
    ),
    "jsonl: a number of 5 million digits": ("a.jsonl", lambda: b'{"a":' + b"9" * 5_000_000 + b"}\n", "not JSON"),
    "jsonl: millions of lists": ("a.jsonl", lambda: b'{"a":[' + b"[]," * 5_000_000 + b"[]]}\n", "memory"),
    "jsonl: zeros": ("a.jsonl", lambda: b"\0" * (1 << 20) + b"\n", "not JSON"),
    "json: no array": ("a.json", lambda: b'{"a": 1}', "array of objects"),
    "json: an array without an end": ("a.json", lambda: b'[{"a":1},' * 1, "not JSON|must be"),
    "json: a row without an end": ("a.json", lambda: b'[{"a":"' + b"x" * (40 << 20), "longer than 16 MiB"),
    "csv: a cell without an end": ("a.csv", lambda: b'q,r\n"' + b"x" * (40 << 20), "longer than 16 MiB"),
    "csv: a quote that spans the file": (
        "a.csv",
        lambda: b'q,r\n"' + b"x\n" * (12 << 20),
        "limit|memory|unexpected end",
    ),
    "csv: 5,000 columns": ("a.csv", lambda: b",".join(b"c%d" % n for n in range(5000)) + b"\n1\n", "1000 columns"),
    "csv: a column name of 10 MB": ("a.csv", lambda: b"c" * 10_000_000 + b"\n1\n", "column whose name"),
    "csv: NUL": ("a.csv", lambda: b"q,r\n\0,1\n\xff,2\n", "not UTF-8|NUL"),
    "csv: one column twice": ("a.csv", lambda: b"q,q\n1,2\n", "twice"),
    "a zip called parquet": ("a.parquet", lambda: b"PK\3\4" + zlib.compress(b"0" * (1 << 20)), "not parquet"),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", DATA)
def test_a_hostile_data_file_is_refused_by_name(settings: Settings, tmp_path: Path, case: str) -> None:
    name, make, words = DATA[case]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(make())
    with unharmed(settings), pytest.raises(DataError, match=f"(?s){words}") as caught:
        describe_tables(folder, [name], settings=settings, listen=stay)
    assert name in caught.value.message
    assert len(caught.value.message) < 5000


@pytest.mark.usefixtures("small")
def test_rows_without_an_end_are_ended_and_a_stop_is_heard(settings: Settings, tmp_path: Path) -> None:
    """200 million rows in a few kilobytes."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(many_rows(20_000_000, "x"))
    assert (folder / "a.parquet").stat().st_size < 1 << 20
    calls = 0

    def listen() -> None:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise InterruptedError

    with unharmed(settings), pytest.raises(InterruptedError):
        describe_tables(folder, ["a.parquet"], settings=settings, listen=listen)


def bomb() -> str:
    """A few aliases that stand for thousands of millions of values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(lines)


CARDS: dict[str, tuple[str, str]] = {
    "aliases that multiply": (bomb(), "more than|not YAML"),
    "an alias inside itself": ("a: &a [*a]", "stands inside"),
    "lists in lists": ("a: " + "[" * 20_000 + "]" * 20_000, "deeply|not YAML"),
    "an object of Python": ("a: !!python/object/apply:os.system ['touch /tmp/owned']", "not YAML"),
    "a number of thousands of digits": ("a: " + "9" * 20_000, "not YAML|digits"),
    "no end": ("a: b\n" * 200_000, "does not end|twice|not YAML"),
    "a key twice": ("a: 1\na: 2", "not YAML"),
    "binary": ("a: \0\1\2", "not YAML"),
    "hundreds of kilobytes": ("a: '" + "x" * 300_000 + "'", "does not end|allowed are"),
    "a task type that is a list": ("task_type: [x]", "task type"),
    "a task type that is a bomb's part": ("x: &x [1]\ntask_type: *x", "task type"),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", CARDS)
def test_a_hostile_card_is_refused(settings: Settings, tmp_path: Path, case: str) -> None:
    text, words = CARDS[case]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{text}\n---\n# hello\n")
    with unharmed(settings), pytest.raises((ModelError, SpecError), match=f"(?s){words}") as caught:
        describe_model(folder, None, present=[], settings=settings, listen=stay)
    assert len(caught.value.message) < 5000


PARAMETERS: dict[str, bytes] = {
    "not JSON": b"{",
    "lists in lists": b"[" * 100_000 + b"]" * 100_000,
    "objects in objects": b'{"training_methods":' * 50_000 + b"1" + b"}" * 50_000,
    "a number of a million digits": b'{"training_methods": ' + b"9" * 1_000_000 + b"}",
    "another type": b'{"training_methods": {"full": 1}}',
    "two million bytes": b'{"training_methods": [' + b" " * 2_000_000 + b"]}",
    "thousands of methods": json.dumps({"training_methods": [{"name": f"m{n}!"} for n in range(9000)]}).encode(),
    "infinite": b'{"training_methods": [{"name": "a", "hyperparameters": '
    b'[{"name": "x", "type": "float", "default": Infinity}]}]}',
    "lone surrogates": b'{"training_methods": [{"name": "\\ud800"}]}',
    "no UTF-8": b'{"training_methods": "\xff\xfe"}',
    "empty": b"",
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", PARAMETERS)
def test_hostile_parameters_of_training_are_problems_that_are_named(
    settings: Settings, tmp_path: Path, case: str
) -> None:
    folder = galleries.make(tmp_path / "model")
    (folder / "gallery_train" / "train_params.json").write_bytes(PARAMETERS[case])
    with unharmed(settings):
        said = describe_model(folder, None, present=[], settings=settings, listen=stay)
    assert said.gallery is not None and said.gallery.problems
    assert all("train_params.json" in problem or "more" in problem for problem in said.gallery.problems)
    assert sum(map(len, said.gallery.problems)) < 20_000


@pytest.fixture(scope="module")
def model_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("source") / "model")


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def written(name: str, data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return write


def tokenizer(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def header(said: object) -> Callable[[Path], None]:
    """Weights whose header says this, with a kilobyte behind it."""
    text = json.dumps(said).encode()
    return written("model.safetensors", struct.pack("<Q", len(text)) + text + b"\0" * 1024)


def index_of(data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(data)

    return write


def index(name: str) -> Callable[[Path], None]:
    weights = dict.fromkeys(("model.embed_tokens.weight", "model.norm.weight"), name)
    return index_of(json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}).encode())


F32 = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
MODELS: dict[str, Callable[[Path], None]] = {
    "config: a width of 10^9": config(hidden_size=10**9),
    "config: a width of 10^18": config(hidden_size=10**18),
    "config: a vocabulary of 10^12": config(vocab_size=10**12),
    "config: 10^9 layers": config(num_hidden_layers=10**9),
    "config: a negative width": config(hidden_size=-4),
    "config: no heads": config(num_attention_heads=0),
    "config: text for a number": config(hidden_size="wide"),
    "config: code of its own": config(model_type="own", auto_map={"AutoConfig": "own.Config"}),
    "config: lists in lists": written("config.json", b"[" * 100_000 + b"]" * 100_000),
    "config: no JSON": written("config.json", b"\x80\4K\1."),
    "config: an activation of another module": config(hidden_act="os.system"),
    "tokenizer: lists in lists": written("tokenizer.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "tokenizer: no JSON": written("tokenizer.json", b"\x80\4K\1."),
    "tokenizer: tokens beyond the vocabulary": tokenizer(
        added_tokens=[
            {
                "id": 10**6,
                "content": "<|far|>",
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        ]
    ),
    "tokenizer: a pattern without an end": tokenizer(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "((a+)+)+$("}, "behavior": "Isolated", "invert": False}
    ),
    "weights: a header of 2^62 bytes": written("model.safetensors", struct.pack("<Q", 1 << 62) + b"{}"),
    "weights: a header that is cut": written("model.safetensors", struct.pack("<Q", 1000) + b"{}"),
    "weights: of another shape": header({"model.norm.weight": F32}),
    "weights: beyond their end": header({"model.norm.weight": F32 | {"data_offsets": [0, 1 << 50]}}),
    "weights: a shape that overflows": header({"model.norm.weight": F32 | {"shape": [1 << 62, 1 << 62]}}),
    "weights: negative": header({"model.norm.weight": F32 | {"shape": [-16]}}),
    "weights: overlapping": header({"a": F32, "b": F32}),
    "weights: pickled": written("model.safetensors", b"\x80\2cposix\nsystem\nX\4\0\0\0true\x85R."),
    "index: a folder above": index("../model-00001-of-00001.safetensors"),
    "index: an absolute path": index("/etc/passwd"),
    "index: a file that is not there": index("model-00002-of-00001.safetensors"),
    "index: lists in lists": index_of(b"[" * 100_000 + b"]" * 100_000),
}


FAST = (
    "config: a width of 10^9",
    "config: lists in lists",
    "tokenizer: lists in lists",
    "weights: a header of 2^62 bytes",
    "index: a folder above",
)
"""Each loads torch anew, so the others are left to the soak."""


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.soak) for case in MODELS]
)
def test_a_hostile_model_is_refused(
    settings: Settings, model_source: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_check, "_MEMORY_BYTES", 3 << 29)
    folder = shutil.copytree(model_source, tmp_path / "model")
    MODELS[case](folder)
    before = sorted(path.name for path in folder.iterdir())
    with unharmed(settings), pytest.raises(TunesmithError) as caught:
        check_language_model(folder, settings=settings)
    assert caught.value.reason in ("user_error", "data_error", "out_of_memory"), caught.value
    assert len(caught.value.message) < 5000
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_stop_is_heard_while_a_model_is_checked(settings: Settings, model_source: Path) -> None:
    def listen() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        check_language_model(model_source, settings=settings, listen=listen)


def test_of_what_a_conversion_leaves_only_plain_files_are_taken(settings: Settings, tmp_path: Path) -> None:
    own, folder = tmp_path / "own", tmp_path / "model"
    (own / "deep").mkdir(parents=True)
    folder.mkdir()
    (folder / "a.gguf").write_bytes(b"GGUF")
    (own / "model.safetensors").write_bytes(b"weights")
    (own / "config.json").symlink_to("/etc/passwd")
    (own / "README.md").write_text("another card")
    (own / "train.py").write_text("import os")
    (own / ".hidden.json").write_text("{}")
    (own / "deep" / "tokenizer.json").write_text("{}")
    (settings.home / "tmp").mkdir(parents=True)
    # In the folder of a program's output, which may be converted too, a link may have the name.
    (tmp_path / "victim").write_text("untouched")
    (folder / "model.safetensors").symlink_to(tmp_path / "victim")
    model_check._take_converted(folder, own)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"model.safetensors": b"weights"}
    assert (tmp_path / "victim").read_text() == "untouched"
