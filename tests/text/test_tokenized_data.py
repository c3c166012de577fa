"""Tokenised data is made once, whole and in order, whoever else makes it and whoever is killed meanwhile."""

import ast
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.support import tiny
from tests.support.s3_fixture import S3Server
from tests.support.tokenizing import ROOT, TOKENIZER, build
from tests.support.waiting import until
from trainers.text import encoding_processes, shards, token_cache, tokenized_data
from trainers.text.tokenized_data import DataFile, TokenizedRows, tokenize_rows
from tunesmith.assets import tables
from tunesmith.assets.stored_files import File, describe_files
from tunesmith.errors import DataError, StorageError, WorkerLostError
from tunesmith.hyperparameters.definitions import Advanced
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage
from tunesmith.storage.folder import FolderStorage
from tunesmith.storage.urls import open_storage
from tunesmith.text.formats import Example, Turn
from tunesmith.text.tokenization import Encoder


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return FolderStorage(tmp_path / "storage")


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are small here are cut as large ones are."""
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 2000)
    monkeypatch.setattr(tables, "_BLOCK_ROWS", 40)
    monkeypatch.setattr(tokenized_data, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(tokenized_data, "PROGRESS_S", 0.0)
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def helpers_of(process: psutil.Process) -> list[psutil.Process]:
    """Its children that tokenise; other tests may have left children of other kinds, and zombies."""
    found = []
    for child in process.children():
        with suppress(psutil.Error):
            if any("trainers.text.encoding_processes" in word for word in child.cmdline()):
                found.append(child)
    return found


def content(rows: TokenizedRows) -> list[tuple[list[int], list[bool]]]:
    return [(rows.ids(row).tolist(), rows.trained(row).tolist()) for row in range(len(rows))]


def expected(rows: list[dict[str, Any]]) -> list[tuple[list[int], list[bool]]]:
    examples = [Example([Turn("user", row["prompt"]), Turn("assistant", row["response"])]) for row in rows]
    made = Encoder(TOKENIZER, tiny.hyperparameters(), tiny.advanced()).encode(examples)
    return [(row.ids.tolist(), row.trained.tolist()) for row in made]


def stored(storage: Storage) -> list[str]:
    return [entry.key for entry in storage.entries("cache")]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.usefixtures("blocks")
def test_rows_keep_the_order_of_their_files_however_many_make_them(
    tmp_path: Path, storage: Storage, processes: int
) -> None:
    rows = tiny.sums(700)
    (tmp_path / "b.json").write_text(json.dumps(rows[500:]))
    made = build([write(tmp_path / "a.jsonl", rows[:500]), tmp_path / "b.json"], storage, tmp_path, processes=processes)
    assert content(made) == expected(rows)
    assert made.lengths.tolist() == [len(ids) for ids, _ in expected(rows)]
    assert made.lengths.dtype == np.int32
    manifest, *files = sorted(stored(storage), key=lambda key: "manifest" not in key)
    assert manifest.endswith("/manifest.json")
    assert len(files) > 2


def test_what_was_made_is_taken_again_without_a_look_at_the_data(tmp_path: Path, storage: Storage) -> None:
    file = DataFile.at(write(tmp_path / "a.jsonl", tiny.sums(20)))
    text: dict[str, Any] = {
        "hyperparameters": tiny.hyperparameters(),
        "advanced": tiny.advanced(),
        "training_type": "text-question-answering",
    }
    options: dict[str, Any] = {
        **text,
        "tokenizer": "a",
        "storage": storage,
        "settings": Settings.from_env({"TUNESMITH_HOME": str(tmp_path)}),
    }
    encode = partial(tokenized_data.encoded, [file], TOKENIZER, **text)
    first = tokenized_data.tokenized([file], encode, **options)
    file.path.write_text("no longer what the manifest says")
    told: list[tuple[int, int | None]] = []
    again = tokenized_data.tokenized([file], _never, **options, progress=lambda *said: told.append(said))
    assert content(again) == content(first)
    assert again.report == first.report
    assert told == [(20, 20)]


def _never() -> Any:
    pytest.fail("what is there is not made again")


def test_the_key_is_made_of_what_decides_the_tokens_and_of_nothing_else(tmp_path: Path) -> None:
    file = DataFile.at(write(tmp_path / "a.jsonl", tiny.sums(3)))

    def key(
        files: list[DataFile] | None = None, tokenizer: Any = TOKENIZER, limit: int | None = None, **given: Any
    ) -> str:
        advanced = {name: given.pop(name) for name in Advanced.model_fields if name in given}
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "model.safetensors").write_bytes(os.urandom(8))
        (tmp_path / "model" / "README.md").write_bytes(os.urandom(8))
        return tokenized_data.cache_key(
            files or [file],
            tokenized_data.tokenizer_key(describe_files(tmp_path / "model")),
            hyperparameters=tiny.hyperparameters(**given),
            advanced=tiny.advanced(**advanced),
            training_type="text-question-answering",
            limit=limit,
        )

    same = [
        key(),
        key(tokenizer=tiny.make_tokenizer()),
        key(learning_rate=0.5, lora_rank=7, max_steps=3, train_data_file="a.jsonl", max_eval_samples=9),
        key(seed=4, num_train_epochs=3, lr_scheduler_type="linear", save_total_limit=9),
        key([DataFile(tmp_path / "other" / "a.jsonl", file.sha256, file.columns, None)]),
    ]
    assert len(set(same)) == 1
    template = tiny.make_tokenizer()
    template.chat_template += " "
    vocabulary = tiny.make_tokenizer()
    vocabulary.add_tokens(["new"])
    others = [
        key([DataFile(file.path, "0" * 64, file.columns, 3)]),
        key([file, file]),
        key(tokenizer=template),
        key(tokenizer=vocabulary),
        key(limit=2),
        key(train_on_history=True),
        *(key(**{name: "x"}) for name in ("prompt_field", "response_field", "history_field", "prefix")),
        *(key(**{name: "x"}) for name in ("instruction_template", "response_template")),
        key(max_seq_length=65),
    ]
    assert len({same[0], *others}) == len(others) + 1


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_templates/tools.jinja",
        "additional_chat_templates/tools.jinja",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "config.json",
    ],
)
def test_another_file_that_a_tokenizer_is_loaded_from_is_another_key(name: str) -> None:
    def key(sha256: str) -> str:
        return tokenized_data.tokenizer_key([File(path=name, size_bytes=1, sha256=sha256)])

    assert key("a") != key("b")
    assert key("a") != tokenized_data.tokenizer_key([])


NO_TOKENS = {
    "trainers.text.shards",  # has a number of its own, FORMAT
    "tunesmith.assets.catalog",  # what a manifest says of a file
    "tunesmith.bounds",  # what goes beyond one is refused, and never changed
    "tunesmith.errors",
    "tunesmith.visible_text",  # of messages
    "tunesmith.hyperparameters.definitions",  # the values themselves are part of the key
}
"""Modules of ours that encoding imports and that leave the tokens as they are."""


def imported_by(module: str) -> set[str]:
    """The modules of ours that `module` imports, wherever in its text; packages, which are empty, are left out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(tokenized_data._source(module))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.level == 0, "relative imports are not followed"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] in ("trainers", "tunesmith") and is_module(name)}


def is_module(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # a name in a module
        return False
    return spec is not None and spec.submodule_search_locations is None


def test_every_module_that_decides_the_tokens_is_part_of_the_key() -> None:
    found, new = set[str](), {"trainers.text.encoding_processes"}
    while new:
        module = new.pop()
        found.add(module)
        new |= set() if module in NO_TOKENS else imported_by(module) - found
    assert found >= {"tunesmith.assets.json_array", "tunesmith.text.control_tokens"}  # reached by others alone
    assert found - NO_TOKENS == {*tokenized_data._CODE}
    assert found >= NO_TOKENS


@pytest.mark.parametrize("module", tokenized_data._CODE)
def test_another_text_of_a_module_that_decides_the_tokens_is_another_key(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key() -> str:
        return tokenized_data.cache_key(
            [],
            "a",
            hyperparameters=tiny.hyperparameters(),
            advanced=tiny.advanced(),
            training_type="text-question-answering",
            limit=None,
        )

    before, source = key(), tokenized_data._source
    monkeypatch.setattr(tokenized_data, "_source", lambda name: source(name) + (b"#" if name == module else b""))
    assert key() != before


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.usefixtures("blocks")
def test_a_bad_row_is_named_by_file_and_line_and_leaves_nothing_behind(
    tmp_path: Path, storage: Storage, processes: int
) -> None:
    rows: list[dict[str, Any]] = [*tiny.sums(400)]
    rows[250] = {"prompt": "a", "response": 7}
    rows[380] = {"prompt": 7, "response": "a"}
    with pytest.raises(DataError, match=r"a.jsonl: line 251: column 'response' must hold text, got int") as caught:
        build([write(tmp_path / "a.jsonl", rows)], storage, tmp_path / "home", processes=processes)
    assert caught.value.fields == ["hyperparameters.response_field"]
    assert stored(storage) == []
    assert not list((tmp_path / "home").rglob("*.arrow"))
    assert helpers_of(psutil.Process()) == []


@pytest.mark.usefixtures("blocks")
def test_the_first_fault_of_a_file_is_named_not_the_first_one_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,response,history\n" + "a,b,\n" * 50 + "a,b,no pairs\n" + "a,b,\n" * 20 + "a,b\n")
    config = encoding_processes.EncodingConfig(
        TOKENIZER, tiny.hyperparameters(history_field="history"), tiny.advanced()
    )
    tasks = ((block, "prompt_response") for block in tables.read_blocks(path))
    with pytest.raises(DataError, match="line 52"):
        list(encoding_processes.encode_in_processes(tasks, config, 1))


def test_no_row_left_is_an_error_and_is_not_kept(tmp_path: Path, storage: Storage) -> None:
    with pytest.raises(DataError, match="2 of 2 have no prompt or no response"):
        build([write(tmp_path / "a.jsonl", [{"prompt": "a", "response": ""}] * 2)], storage, tmp_path)
    assert stored(storage) == []


def test_counts_say_what_became_of_the_rows(tmp_path: Path, storage: Storage) -> None:
    rows = [
        {"prompt": "a", "response": "b"},
        {"prompt": "a", "response": ""},
        {"prompt": "x" * 100, "response": "b"},
        {"prompt": "a", "response": "y" * 100},
    ]
    report = build([write(tmp_path / "a.jsonl", rows)], storage, tmp_path, max_seq_length=40).report
    assert (report.read, report.rows, report.skipped, report.truncated) == (4, 3, 1, 2)
    assert (report.untrained, report.longest, report.ended, report.answer_cut) == (0, 40, 2, 1)
    assert report.lengths == {8: 1, 64: 2}
    assert report.tokens == 7 + 40 + 40


@pytest.mark.parametrize("count", [1, 5, 600, 5000])
def test_a_limit_takes_the_first_rows_that_are_kept(tmp_path: Path, storage: Storage, count: int) -> None:
    rows = tiny.sums(1200)
    file = write(tmp_path / "a.jsonl", [{"prompt": "", "response": "x"}, *rows])
    made = build([file], storage, tmp_path, limit=count)
    assert content(made) == expected(rows[:count])
    assert made.report.read == min(count, 1200) + 1


@pytest.mark.usefixtures("blocks")
def test_progress_is_told_while_it_runs_and_may_give_up(tmp_path: Path, storage: Storage) -> None:
    told: list[tuple[int, int | None]] = []
    file = write(tmp_path / "a.jsonl", tiny.sums(300))
    build([file], storage, tmp_path, progress=lambda *said: told.append(said))
    assert len(told) > 4
    assert told == sorted(told)
    assert told[-1] == (300, 300)
    assert {total for _, total in told} == {300}

    def stop(done: int, total: int | None) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        build([file], storage, tmp_path, progress=stop, prefix="another")
    assert len({key.split("/")[2] for key in stored(storage)}) == 1


def test_masks_are_whole_at_every_place_of_a_byte() -> None:
    random = np.random.default_rng(0)
    rows = [
        {"prompt": "p" * int(random.integers(1, 9)), "response": "r" * int(random.integers(1, 9))} for _ in range(64)
    ]
    made = tokenize_rows(
        rows,
        TOKENIZER,
        hyperparameters=tiny.hyperparameters(),
        advanced=tiny.advanced(),
        training_type="text-question-answering",
    )
    assert content(made) == expected(rows)
    assert all(made.trained(row).dtype == np.bool_ for row in range(len(made)))
    with pytest.raises(IndexError):
        made.ids(64)


@pytest.mark.usefixtures("blocks")
def test_of_two_nodes_the_first_ones_manifest_stands_and_the_other_takes_it(tmp_path: Path, storage: Storage) -> None:
    file = write(tmp_path / "a.jsonl", tiny.sums(600))
    others: list[TokenizedRows] = []

    def another_node(done: int, total: int | None) -> None:
        if not others:
            others.append(build([file], storage, tmp_path / "second"))

    first = build([file], storage, tmp_path / "first", progress=another_node)
    assert content(first) == content(others[0]) == expected(tiny.sums(600))
    assert len({key.split("/")[3] for key in stored(storage)} - {"manifest.json"}) == 1


@pytest.mark.usefixtures("blocks")
def test_a_cache_that_is_not_whole_is_made_again(tmp_path: Path, storage: Storage) -> None:
    file = write(tmp_path / "a.jsonl", tiny.sums(600))
    build([file], storage, tmp_path)
    shard = next(key for key in stored(storage) if key.endswith("00001.arrow"))
    storage.put(shard, b"short")
    assert content(build([file], storage, tmp_path)) == expected(tiny.sums(600))
    assert shard not in stored(storage)


def test_a_helper_that_is_killed_is_a_lost_worker(tmp_path: Path) -> None:
    task = (tables.Block(Path("a.json"), parsed=[(1, tiny.sums(1)[0])]), "prompt_response")
    config = encoding_processes.EncodingConfig(TOKENIZER, tiny.hyperparameters(), tiny.advanced())
    batches = encoding_processes.encode_in_processes(iter([task] * 50), config, 1)
    assert next(batches).counts.rows == 1
    for helper in helpers_of(psutil.Process()):
        helper.kill()
    with pytest.raises(WorkerLostError, match="exit code -9"):
        list(batches)
    assert helpers_of(psutil.Process()) == []


BUILDER = """
import sys
from pathlib import Path
from tests.support.tokenizing import build
from trainers.text import tokenized_data
from tunesmith.assets import tables
from tunesmith.assets.stored_files import File, describe_files
from tunesmith.storage.folder import FolderStorage

tables._BLOCK_BYTES, tokenized_data.PARALLEL_BYTES, tokenized_data.PROGRESS_S = 2000, 0, 0.0

def wait(done, total):
    if done < 300:
        return
    sys.stdout.write("half\\n")
    sys.stdout.flush()
    sys.stdin.read()

file, root, home = map(Path, sys.argv[1:4])
rows = build([file], FolderStorage(root), home, processes=int(sys.argv[4]), progress=wait)
print(len(rows))
"""


OLD_BUILDER = "00000000-000000000000-00000000"
"""What another node left in 1970."""


def builder(folder: Path, file: Path, *, processes: int) -> subprocess.Popen[str]:
    """A builder in a process of its own; it stops half way until its standard input is closed."""
    arguments = [str(file), str(folder / "storage"), str(folder / "home"), str(processes)]
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"},
    )


def half_done(builder: subprocess.Popen[str]) -> subprocess.Popen[str]:
    assert builder.stdout is not None and builder.stdout.readline() == "half\n"
    return builder


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Path]:
    """A data file whose builder was killed half way, with all that it left."""
    file = write(tmp_path / "a.jsonl", tiny.sums(900))
    victim = half_done(builder(tmp_path, file, processes=2))
    helpers = helpers_of(psutil.Process(victim.pid))
    assert len(helpers) == 2
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    # They see their input end.
    until(lambda: not any(helper.is_running() for helper in helpers))
    return file


def test_the_next_builder_takes_the_place_of_a_killed_one_and_clears_up(
    tmp_path: Path, storage: Storage, killed: Path
) -> None:
    left = stored(storage)
    assert left and not any(key.endswith("manifest.json") for key in left)
    assert content(build([killed], storage, tmp_path / "home")) == expected(tiny.sums(900))
    assert not {*left} & {*stored(storage)}


def test_a_builder_that_waits_goes_on_when_the_other_one_is_killed(tmp_path: Path, storage: Storage) -> None:
    file = write(tmp_path / "a.jsonl", tiny.sums(900))
    first, second = half_done(builder(tmp_path, file, processes=1)), builder(tmp_path, file, processes=1)
    lock = next((tmp_path / "home" / "cache" / "tokenized").glob("*.lock"))
    until(lambda: any(Path(file.path) == lock for file in psutil.Process(second.pid).open_files()))
    first.kill()
    first.wait()
    said, _ = second.communicate()
    assert said.split()[-1] == "900"
    assert content(build([file], storage, tmp_path / "home")) == expected(tiny.sums(900))
    assert len({key.split("/")[3] for key in stored(storage)} - {"manifest.json"}) == 1


def test_what_another_nodes_builder_may_still_be_writing_is_left_alone(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.jsonl", tiny.sums(9))
    build([file], storage, tmp_path / "home")
    own = next(key for key in stored(storage) if key.endswith(".arrow")).rpartition("/")[0]
    folder = own.rpartition("/")[0]
    foreign = f"{folder}/ffffffff-{int(time.time()):012d}-00000000/00000.arrow"
    for key in (foreign, f"{folder}/{OLD_BUILDER}/00000.arrow"):
        storage.put(key, b"rows")
    build([file], storage, tmp_path / "home")
    assert [key for key in stored(storage) if not key.startswith(own)] == [foreign, f"{folder}/manifest.json"]
    # A builder that takes so long gives up.
    monkeypatch.setattr(token_cache, "LONGEST_BUILD_S", -1)
    build([file], storage, tmp_path / "home")
    assert foreign not in stored(storage)
    with pytest.raises(StorageError, match="takes longer than"):
        build([write(tmp_path / "b.jsonl", tiny.sums(8))], storage, tmp_path / "home")


@pytest.mark.s3
@pytest.mark.usefixtures("blocks")
def test_a_bucket_holds_the_rows_and_each_node_has_one_copy(
    tmp_path: Path, s3_server: S3Server, request: pytest.FixtureRequest
) -> None:
    settings = Settings.from_env(
        {
            "TUNESMITH_HOME": str(tmp_path),
            "TUNESMITH_S3_ENDPOINT": s3_server.endpoint,
            "TUNESMITH_S3_REGION": "us-east-1",
        }
    )
    storage = open_storage(s3_server.url(request.node.name), settings)
    file = write(tmp_path / "a.jsonl", tiny.sums(600))
    leftover = tmp_path / "second" / "cache" / "tokenized"
    others: list[TokenizedRows] = []

    def another_node(done: int, total: int | None) -> None:
        if not others:
            others.append(build([file], storage, tmp_path / "second"))
            key = stored(storage)[0].split("/")[2]
            storage.put(f"cache/tokenized/{key}/{OLD_BUILDER}/00000.arrow", b"left by a killed one")
            (leftover / f"{key}-dead.partial").mkdir()

    first = build([file], storage, tmp_path / "first", progress=another_node)
    third = build([file], storage, tmp_path / "second")
    assert content(first) == content(others[0]) == content(third) == expected(tiny.sums(600))
    assert len({key.split("/")[3] for key in stored(storage)} - {"manifest.json"}) == 1
    for home in ("first", "second"):
        copies = [path for path in (tmp_path / home / "cache" / "tokenized").iterdir() if path.is_dir()]
        assert len(copies) == 1
        next(copies[0].iterdir()).write_bytes(b"spoilt")
    assert content(build([file], storage, tmp_path / "second")) == expected(tiny.sums(600))


def test_a_file_system_without_locks_is_no_hindrance(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: Any, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(token_cache.fcntl, "flock", no_locks)
    assert len(build([write(tmp_path / "a.jsonl", tiny.sums(9))], storage, tmp_path)) == 9
