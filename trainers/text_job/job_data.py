"""A job's rows made ready for training: fetched, tokenised, and looked at before any worker is taken."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from trainers.attempt.cluster_work import Needs, Tell, run_on_cluster
from trainers.attempt.context import Attempt
from trainers.attempt.fetch import Fetched, fetch
from trainers.text.audit import refuse
from trainers.text.shards import TokenizedRows
from trainers.text.tokenized_data import PARALLEL_BYTES, DataFile
from trainers.text_job.tokenizing import Rows, Work, audited_rows, data_files, tokenized_rows
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


def load_data(job: TextJob, model: Fetched, dataset: Fetched, work: Work) -> Data:
    """The job's rows out of the cache of tokenised data, and the tokenizer, for a worker that trains on them.

    Where they are not there any more, a reader makes them again.
    """
    from transformers import AutoTokenizer

    rows, eval_rows = wanted_rows(job, model, dataset)
    found = tokenized_rows(rows, work)
    eval_found = None if eval_rows is None else tokenized_rows(eval_rows, work)
    check_references(model.folder)
    tokenizer = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False)
    eval_files = [] if eval_rows is None else list(eval_rows.files)
    return Data(tokenizer, list(rows.files), found, eval_files, eval_found)


def wanted_rows(job: TextJob, model: Fetched, dataset: Fetched) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those held out."""
    h = job.hyperparameters
    files = data_files(dataset, training_files(dataset.manifest.tables, h))
    rows = Rows(model, files, h, job.advanced, job.training_type)
    if h.test_data_file is None:
        return rows, None
    return rows, replace(rows, files=data_files(dataset, [h.test_data_file]), limit=h.max_eval_samples)


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


def _prepare(job: TextJob, root: str, settings: Settings, cpus: int, tell: Tell) -> AuditReport:
    """Fill the cache and audit; tells phases and progress. The tokens are in storage at its end."""
    storage = open_patiently(root, settings)
    tell("fetch")
    model = fetch(storage, "model", job.model, settings)
    dataset = fetch(storage, "dataset", job.dataset, settings)
    tell("tokenize")
    work = Work(
        storage,
        settings,
        processes=min(cpus, len(os.sched_getaffinity(0))),
        listen=tell.check,
        progress=lambda rows, total: tell(Read(rows, total)),
    )
    rows, eval_rows = wanted_rows(job, model, dataset)
    if eval_rows is not None:
        tokenized_rows(eval_rows, replace(work, progress=None))
    _, report = audited_rows(rows, replace(work, begins_audit=lambda: tell("audit")), job.dataset)
    return report


def _needs(storage: Storage, job: TextJob) -> Needs:
    """One CPU; for files that are encoded by several processes, as many as the job's own workers are going to have."""
    files = get_manifest(storage, "dataset", job.dataset).files
    own = job.cards * int(job.resources.get("CPU", 1))
    cpus = max(1, own) if sum(file.size_bytes for file in files) >= PARALLEL_BYTES else 1
    return Needs(cpus=cpus, memory_bytes=_MEMORY_BYTES + cpus * _PROCESS_BYTES)
