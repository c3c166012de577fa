"""A job's rows made ready for training: fetched, tokenised, and looked at before any worker is taken."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainers.attempt.cluster_work import Needs, run_on_cluster
from trainers.attempt.context import Attempt
from trainers.attempt.fetch import Fetched, fetch
from trainers.text.audit import CHECKED_ROWS, audit, refuse
from trainers.text.shards import TokenizedRows
from trainers.text.tokenized_data import PARALLEL_BYTES, DataFile, Progress, first_examples, tokenized
from tunesmith.assets.catalog import get_manifest
from tunesmith.assets.model_references import check_references
from tunesmith.jobs.audit_report import AuditReport
from tunesmith.jobs.drafting import training_files
from tunesmith.jobs.spec import TextJob
from tunesmith.settings import Settings
from tunesmith.storage import layout
from tunesmith.storage.base import Storage
from tunesmith.storage.urls import open_patiently

_MEMORY_BYTES, _PROCESS_BYTES = 1 << 30, 512 << 20
"""What tokenising takes: at all, and for each process that encodes."""

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
    processes: int | None = None,
    progress: Progress | None = None,
) -> Data:
    """The job's rows out of the cache of tokenised data, which is filled where they are not there."""
    from transformers import AutoTokenizer

    check_references(model_folder)
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
    rows = tokenized(files, tokenizer, **options, processes=processes, progress=progress)
    if h.test_data_file is None:
        return Data(tokenizer, files, rows, [], None)
    eval_files = data_files(dataset, [h.test_data_file])
    eval_rows = tokenized(eval_files, tokenizer, **options, limit=h.max_eval_samples)
    return Data(tokenizer, files, rows, eval_files, eval_rows)


def prepare(attempt: Attempt, job: TextJob) -> None:
    """Fill the cache, with progress as events, and audit what will be trained; the report is kept with the job.

    It is done on the cluster, in the job's own place. DataError where there is nothing to train on, or where the audit
    refuses it. StoppedError where the job is to stop meanwhile.
    """
    rows_told = 0

    def told(item: str | Read) -> None:
        nonlocal rows_told
        if isinstance(item, str):
            attempt.events.write(phase=item)
        elif item.rows != rows_told:
            rows_told = item.rows
            share = f"{item.rows:,} rows" if item.total is None else f"{item.rows:,} of {item.total:,} rows"
            attempt.events.write(f"{share} tokenised", rows_read=item.rows, rows_total=item.total)

    needs = _needs(attempt.storage, job)
    report = run_on_cluster(
        partial(_prepare, job, attempt.storage.url, attempt.settings, needs.cpus),
        name="tokenising",
        needs=needs,
        events=attempt.events,
        listen=attempt.stop.check,
        told=told,
    )
    attempt.storage.put(layout.audit(job.id, attempt.number), report.model_dump_json(indent=2).encode())
    for finding in report.findings:
        logger.warning("%s: audit: %s", job.id, finding.message)
    refuse(report)


@dataclass(frozen=True)
class Read:
    """How many rows are tokenised."""

    rows: int
    total: int | None


def _prepare(job: TextJob, root: str, settings: Settings, cpus: int, tell: Callable[[str | Read], None]) -> AuditReport:
    """Fill the cache and audit; tells phases and progress. The tokens are in storage at its end."""
    storage = open_patiently(root, settings)
    tell("fetch")
    base = fetch(storage, "model", job.model, settings)
    dataset = fetch(storage, "dataset", job.dataset, settings)
    tell("tokenize")
    processes = min(cpus, len(os.sched_getaffinity(0)))
    data = load_data(
        job,
        base.folder,
        dataset,
        storage,
        settings,
        processes=processes,
        progress=lambda rows, total: tell(Read(rows, total)),
    )
    tell("audit")
    return audit(
        data.rows,
        first_examples(data.files, job.hyperparameters, job.training_type, CHECKED_ROWS),
        data.tokenizer,
        hyperparameters=job.hyperparameters,
        advanced=job.advanced,
        model=job.model,
        dataset=job.dataset,
    )


def _needs(storage: Storage, job: TextJob) -> Needs:
    """One CPU; for files that are encoded by several processes, as many as the job's own workers are going to have."""
    files = get_manifest(storage, "dataset", job.dataset).files
    own = job.cards * int(job.resources.get("CPU", 1))
    cpus = max(1, own) if sum(file.size_bytes for file in files) >= PARALLEL_BYTES else 1
    return Needs(cpus=cpus, memory_bytes=_MEMORY_BYTES + cpus * _PROCESS_BYTES)
