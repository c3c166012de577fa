"""Rows tokenised and audited by a reader within the walls, and kept in the cache of tokenised data.

This process parses neither the model's tokenizer nor its template nor the rows. It checks what the reader makes.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass

from trainers.attempt.fetch import Fetched
from trainers.isolation import readers
from trainers.isolation.readers import Limits, Reading
from trainers.text.audit import CHECKED_ROWS
from trainers.text.preparation import Prepared, Said, Sample, Wish
from trainers.text.shards import Batch, TokenizedRows
from trainers.text.token_cache import LONGEST_BUILD_S
from trainers.text.tokenized_data import DataFile, Progress, tokenized, tokenizer_key
from tunesmith.errors import DataError, UnavailableError
from tunesmith.hyperparameters.definitions import EncodingAdvanced, EncodingHyperparameters
from tunesmith.jobs.audit_report import AuditReport
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage

MEMORY_BYTES = 2 << 30
_PER_TOKENIZER_BYTE = 60
"""What a byte of a tokenizer's files takes in memory at the very most."""
_LARGEST_TOKENIZER_BYTES = 64 << 20
"""What counts of them: the largest that is known has 34 MB."""
SILENCE_S = 300.0
"""For a block of rows, about 1 MiB of text."""


@dataclass(frozen=True)
class Rows:
    """Which rows are wanted, and of what model."""

    model: Fetched
    files: Sequence[DataFile]
    hyperparameters: EncodingHyperparameters
    advanced: EncodingAdvanced
    training_type: str
    limit: int | None = None


@dataclass(frozen=True)
class Work:
    """What tokenising has at hand."""

    storage: Storage
    settings: Settings
    processes: int = 1
    listen: Callable[[], None] = lambda: None
    """Called all the while; may raise what ends it."""
    progress: Progress | None = None
    begins_audit: Callable[[], None] = lambda: None


def data_files(dataset: Fetched, names: Iterable[str]) -> list[DataFile]:
    """The named data files of a dataset."""
    hashes = {file.path: file.sha256 for file in dataset.manifest.files}
    tables = dataset.manifest.tables
    return [DataFile(dataset.folder / name, hashes[name], tables[name].columns, tables[name].rows) for name in names]


def tokenized_rows(rows: Rows, work: Work) -> TokenizedRows:
    """The rows out of the cache, filled where they are not there. Raises as `readers.stream` and `tokenized`."""
    return _tokenized(rows, work, None)[0]


def audited_rows(rows: Rows, work: Work, dataset: str) -> tuple[TokenizedRows, AuditReport]:
    """As `tokenized_rows`, with the audit of the rows, which names the dataset."""
    found, report = _tokenized(rows, work, dataset)
    if report is None:
        first = found.first(CHECKED_ROWS)
        sample = Sample(first=first.counts, rows=b64encode(first.to_bytes()), counts=found.report)
        said = _read(rows, work, audit_for=dataset, sample=sample)
        for _ in said.batches():
            pass
        report = said.report
    if report is None:
        raise UnavailableError("the audit ended without a report")
    return found, report.model_copy(update={"counts": found.report})


def _tokenized(rows: Rows, work: Work, audit_for: str | None) -> tuple[TokenizedRows, AuditReport | None]:
    said = _read(rows, work, audit_for=audit_for, sample=None)
    found = tokenized(
        rows.files,
        said.batches,
        tokenizer=tokenizer_key(rows.model.manifest.files),
        hyperparameters=rows.hyperparameters,
        advanced=rows.advanced,
        training_type=rows.training_type,
        storage=work.storage,
        settings=work.settings,
        limit=rows.limit,
        progress=work.progress,
    )
    return found, said.report


class _Reader:
    """A reader of rows, which begins once its batches are asked for."""

    def __init__(self, reading: Reading[Prepared], work: Work, longest: int) -> None:
        self._reading, self._work, self._longest = reading, work, longest
        self.report: AuditReport | None = None
        """Once the batches have ended."""

    def batches(self) -> Generator[Batch, None, None]:
        """The batches that it makes, each checked."""
        work = self._work
        said = readers.stream(self._reading, Said, settings=work.settings, listen=work.listen)
        with closing(said):
            while True:
                try:
                    item, payload = next(said)
                except StopIteration as end:
                    self.report = end.value.report
                    return
                if item.counts is None:
                    work.begins_audit()
                    continue
                try:
                    batch = Batch.of_bytes(item.counts, payload)
                    batch.check(longest=self._longest)
                except ValueError as error:
                    raise DataError(f"what the tokenizer has made cannot be used: {error}", code="unreadable") from None
                yield batch


def _read(rows: Rows, work: Work, *, audit_for: str | None, sample: Sample | None) -> _Reader:
    model = rows.model
    tokenizer_bytes = sum(file.size_bytes for file in model.manifest.files if file.path.startswith("tokenizer"))
    wish = Wish(
        model=model.folder,
        files=list(rows.files),
        hyperparameters=EncodingHyperparameters.model_validate(
            rows.hyperparameters.model_dump(include={*EncodingHyperparameters.model_fields})
        ),
        advanced=EncodingAdvanced.model_validate(rows.advanced.model_dump(include={*EncodingAdvanced.model_fields})),
        training_type=rows.training_type,
        limit=rows.limit,
        processes=work.processes,
        sample=sample,
        audit_for=None if audit_for is None else (model.manifest.ref, audit_for),
    )
    reading = Reading(
        name="tokenising the rows with the model's tokenizer and chat template",
        place="trainers.text.preparation:prepare",
        request=wish,
        answer=Prepared,
        readable=[model.folder, *dict.fromkeys(file.path.parent for file in rows.files)],
        limits=Limits(
            memory_bytes=MEMORY_BYTES + _PER_TOKENIZER_BYTE * min(tokenizer_bytes, _LARGEST_TOKENIZER_BYTES),
            time_s=LONGEST_BUILD_S,
            silence_s=SILENCE_S,
            cpus=work.processes,
        ),
        fault=DataError,
    )
    return _Reader(reading, work, rows.hyperparameters.max_seq_length)
