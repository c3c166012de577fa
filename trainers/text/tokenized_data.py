"""Tokenised data, made once and shared: by the workers of a node, by later jobs, by the trials of a search.

Rows keep the order of their files. A few blocks are held at a time, whatever the files' size.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trainers.text.encoding_processes import EncodingConfig, EncodingTask, encode_here, encode_in_processes
from trainers.text.shards import Batch, TokenizedRows
from trainers.text.token_cache import TokenCache
from tunesmith import caches
from tunesmith.assets.stored_files import File, hash_file
from tunesmith.assets.tables import Block, Row, describe, place, read_blocks, read_rows
from tunesmith.errors import DataError
from tunesmith.hyperparameters.definitions import EncodingAdvanced, EncodingHyperparameters
from tunesmith.jobs.audit_report import AuditCounts
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage
from tunesmith.text.columns import find_format
from tunesmith.text.formats import Example, turns

FORMAT = 1
"""Of the shards; raised when what is stored changes."""
PARALLEL_BYTES = 16 << 20
"""Files that are smaller in all are encoded in this process: others would take as long to start."""
PROGRESS_S = 3.0

_NO_TOKENIZER = (".safetensors", ".index.json", ".md", ".bin", ".gguf", ".pt", ".py")
"""How files end that no tokenizer is loaded from."""

_CODE = (
    "tunesmith.text.tokenization",
    "tunesmith.text.chat_templates",
    "tunesmith.text.control_tokens",
    "tunesmith.text.formats",
    "tunesmith.text.columns",
    "tunesmith.assets.tables",
    "tunesmith.assets.json_array",
    "trainers.text.encoding_processes",
)
"""Modules that decide which tokens come out: a change of their source is another key."""

Progress = Callable[[int, int | None], None]
"""Called every few seconds with the rows read and, where it is known, how many there are; may raise to give up."""


@dataclass(frozen=True)
class DataFile:
    """A local data file and what is known of it."""

    path: Path
    sha256: str
    columns: Sequence[str]
    rows: int | None

    @classmethod
    def at(cls, path: Path) -> DataFile:
        """A file that no manifest describes, read to its end."""
        table = describe(path)
        return cls(path, hash_file(path), table.columns, table.rows)


Encode = Callable[[], Generator[Batch, None, None]]
"""Begins to make the batches of some files, in their order."""


def tokenized(
    files: Sequence[DataFile],
    encode: Encode,
    *,
    tokenizer: str,
    hyperparameters: EncodingHyperparameters,
    advanced: EncodingAdvanced,
    training_type: str,
    storage: Storage,
    settings: Settings,
    limit: int | None = None,
    progress: Progress | None = None,
) -> TokenizedRows:
    """The rows of `files` in their order, at most `limit`, from the cache, or made now by `encode`.

    `tokenizer`: a hash of the tokenizer's files, see `tokenizer_key`.
    On one node one builder works at a time, and the others wait for its rows; a killed builder leaves no lock. Raises
    DataError where no row is left, or with the file and line of a row that is not what it must be.
    """
    key = cache_key(
        files,
        tokenizer,
        hyperparameters=hyperparameters,
        advanced=advanced,
        training_type=training_type,
        limit=limit,
    )
    known = [file.rows for file in files]
    total = sum(filter(None, known)) if None not in known else None
    cache = TokenCache(storage, settings.home / "cache" / "tokenized", key)
    with closing(_begun(encode)) as batches:
        rows = cache.rows(_checked(_told(batches, progress, total)))
    if cache.has_added:
        caches.keep_bounds(settings)
    if progress is not None:
        progress(rows.report.read, rows.report.read)
    return rows


def encoded(
    files: Sequence[DataFile],
    tokenizer: Any,
    *,
    hyperparameters: EncodingHyperparameters,
    advanced: EncodingAdvanced,
    training_type: str,
    limit: int | None = None,
    processes: int | None = None,
) -> Generator[Batch, None, None]:
    """The batches of `files` in their order, at most `limit` rows, made by `processes` (default: cores)."""
    config = EncodingConfig(tokenizer, hyperparameters, advanced)
    tasks = _tasks(files, config, training_type)
    small = limit is not None or sum(file.path.stat().st_size for file in files) < PARALLEL_BYTES
    processes = 1 if small else processes or len(os.sched_getaffinity(0))
    return encode_here(tasks, config, limit) if processes == 1 else encode_in_processes(tasks, config, processes)


def first_examples(
    files: Sequence[DataFile], hyperparameters: EncodingHyperparameters, training_type: str, limit: int
) -> list[Example]:
    """The turns of the first rows kept: of rows 0, 1, 2, … of the tokenised files, at most `limit`."""
    return list(islice(_examples(files, hyperparameters, training_type), limit))


def tokenize_rows(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    hyperparameters: EncodingHyperparameters,
    advanced: EncodingAdvanced,
    training_type: str,
    limit: int | None = None,
) -> TokenizedRows:
    """`rows` tokenised in memory, for few of them. Raises DataError as `tokenized` does."""
    held = list(enumerate(rows, start=1))
    columns = dict.fromkeys(name for _, row in held for name in row)
    if hyperparameters.history_field is not None:
        columns[hyperparameters.history_field] = None  # rows without it have none
    config = EncodingConfig(tokenizer, hyperparameters, advanced)
    row_format = find_format(list(columns), hyperparameters, training_type=training_type)
    task = (Block(Path("rows.json"), parsed=held), row_format)
    return TokenizedRows.of(_checked(encode_here([task], config, limit)))


def cache_key(
    files: Sequence[DataFile],
    tokenizer: str,
    *,
    hyperparameters: EncodingHyperparameters,
    advanced: EncodingAdvanced,
    training_type: str,
    limit: int | None,
) -> str:
    """A hash of everything that decides which tokens come out."""
    parts = {
        "format": FORMAT,
        "code": [hashlib.sha256(_source(module)).hexdigest() for module in _CODE],
        "versions": [importlib.metadata.version(package) for package in ("tokenizers", "transformers")],
        "tokenizer": tokenizer,
        "hyperparameters": hyperparameters.model_dump(include={*EncodingHyperparameters.model_fields}),
        "advanced": advanced.model_dump(include={*EncodingAdvanced.model_fields}),
        "training_type": training_type,
        "files": [(file.sha256, file.path.suffix.lower(), list(file.columns)) for file in files],
        "limit": limit,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:40]


def tokenizer_key(files: Iterable[File]) -> str:
    """A hash of a model's files that its tokenizer and its chat template may be loaded from, which nobody parses.

    What is no weight and no document counts, in the model's folder and in those of further templates: a file too many
    costs tokens that are made again, one too few would take another model's.
    """
    counted = sorted((file.path, file.sha256) for file in files if _decides_tokens(file.path))
    return hashlib.sha256(json.dumps(counted).encode()).hexdigest()


def _decides_tokens(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    if folder not in ("", "chat_templates", "additional_chat_templates"):
        return False
    return not name.endswith(_NO_TOKENIZER) and name not in ("generation_config.json", "LICENSE")


def _source(module: str) -> bytes:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} has no source"
    return Path(spec.origin).read_bytes()


def _tasks(files: Sequence[DataFile], config: EncodingConfig, training_type: str) -> Iterator[EncodingTask]:
    for file in files:
        try:
            row_format = find_format(file.columns, config.hyperparameters, training_type=training_type)
        except DataError as error:
            message = f"{file.path.name}: {error.message}"
            raise DataError(message, fields=error.fields, hint=error.hint, code=error.code) from None
        for block in read_blocks(file.path):
            yield block, row_format


def _examples(
    files: Sequence[DataFile], hyperparameters: EncodingHyperparameters, training_type: str
) -> Iterator[Example]:
    for file in files:
        row_format = find_format(file.columns, hyperparameters, training_type=training_type)
        for number, row in enumerate(read_rows(file.path), start=1):
            if (example := turns(row, row_format, hyperparameters, place(file.path, number))) is not None:
                yield example


def _begun(encode: Encode) -> Generator[Batch, None, None]:
    """The batches, made once somebody asks for the first."""
    with closing(encode()) as batches:
        yield from batches


def _told(batches: Iterator[Batch], progress: Progress | None, total: int | None) -> Iterator[Batch]:
    read, said = 0, time.monotonic()
    for batch in batches:
        read += batch.counts.read
        if progress is not None and time.monotonic() - said >= PROGRESS_S:
            said = time.monotonic()
            progress(read, total)
        yield batch


def _checked(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield `batches`. Raises DataError where no row is in any of them."""
    counts = AuditCounts()
    for batch in batches:
        counts += batch.counts
        yield batch
    if counts.rows == 0:
        raise DataError(
            f"no row is left to train on: {counts.skipped} of {counts.read} have no prompt or no response",
            fields=["hyperparameters.prompt_field", "hyperparameters.response_field"],
            code="no_row_left",
        )
