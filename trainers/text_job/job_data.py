"""A job's rows made ready for training: fetched, tokenised, and looked at before any worker is taken."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.attempt.context import Attempt
from trainers.attempt.fetch import Fetched, fetch
from trainers.text.audit import CHECKED_ROWS, audit, refuse
from trainers.text.shards import TokenizedRows
from trainers.text.tokenization import DataFile, Progress, first_examples, tokenized
from tunesmith.jobs.drafting import training_files
from tunesmith.jobs.spec import TextJob
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.base import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """A job's rows, ready for training."""

    tokenizer: Any
    files: list[DataFile]
    rows: TokenizedRows
    eval_files: list[DataFile]
    """The test file; empty where the job names none."""
    eval_rows: TokenizedRows | None


def data_files(dataset: Fetched, names: Iterable[str]) -> list[DataFile]:
    """The named data files of a dataset."""
    hashes = {file.path: file.sha256 for file in dataset.manifest.files}
    tables = dataset.manifest.tables
    return [DataFile(dataset.folder / name, hashes[name], tables[name].columns, tables[name].rows) for name in names]


def load_data(
    job: TextJob,
    model_folder: Path,
    dataset: Fetched,
    storage: Storage,
    settings: Settings,
    *,
    progress: Progress | None = None,
) -> Data:
    """The job's rows out of the cache of tokenised data, which is filled where they are not there."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False)
    h = job.hyperparameters
    options: dict[str, Any] = {
        "hyperparameters": h,
        "advanced": job.advanced,
        "training_type": job.training_type,
        "storage": storage,
        "settings": settings,
    }
    files = data_files(dataset, training_files(dataset.manifest.tables, h))
    rows = tokenized(files, tokenizer, **options, progress=progress)
    if h.test_data_file is None:
        return Data(tokenizer, files, rows, [], None)
    eval_files = data_files(dataset, [h.test_data_file])
    eval_rows = tokenized(eval_files, tokenizer, **options, limit=h.max_eval_samples)
    return Data(tokenizer, files, rows, eval_files, eval_rows)


def prepare(attempt: Attempt, job: TextJob) -> None:
    """Fill the cache, with progress as events, and audit what will be trained; the report is kept with the job.

    DataError where there is nothing to train on, or where the audit refuses it. StoppedError where the job is to stop
    meanwhile.
    """
    storage, told = attempt.storage, 0

    def progress(read: int, total: int | None) -> None:
        nonlocal told
        # Once all are read, the workers stop the job at a step's border, with a checkpoint.
        if read != total:
            attempt.stop.check()
        if read != told:
            share = f"{read:,} rows" if total is None else f"{read:,} of {total:,} rows"
            attempt.events.write(f"{share} tokenised", rows_read=read, rows_total=total)
            told = read

    attempt.events.write(phase="fetch")
    base = fetch(storage, "model", job.model, attempt.settings)
    dataset = fetch(storage, "dataset", job.dataset, attempt.settings)
    attempt.events.write(phase="tokenize")
    data = load_data(job, base.folder, dataset, storage, attempt.settings, progress=progress)
    attempt.events.write(phase="audit")
    report = audit(
        data.rows,
        first_examples(data.files, job.hyperparameters, job.training_type, CHECKED_ROWS),
        data.tokenizer,
        hyperparameters=job.hyperparameters,
        advanced=job.advanced,
        model=job.model,
        dataset=job.dataset,
    )
    storage.put(layout.audit(job.id, attempt.number), report.model_dump_json(indent=2).encode())
    for finding in report.findings:
        logger.warning("%s: audit: %s", job.id, finding.message)
    refuse(report)
