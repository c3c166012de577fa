"""A model's tokenizer and chat template at work on rows, and the audit of what they make: a reader's side.

`prepare` runs in a process within the walls (`trainers.isolation.readers`); who asks is `trainers.text_job.tokenizing`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from pydantic import Base64Bytes, BaseModel

from trainers.text.audit import CHECKED_ROWS, audit
from trainers.text.encoding_processes import HelperLostError
from trainers.text.shards import Batch, TokenizedRows
from trainers.text.tokenized_data import DataFile, encoded, first_examples
from tunesmith.assets.model_references import check_references
from tunesmith.errors import ModelError, OutOfMemoryError
from tunesmith.frozen import Frozen
from tunesmith.hyperparameters.definitions import EncodingAdvanced, EncodingHyperparameters
from tunesmith.jobs.audit_report import AuditCounts, AuditReport


class Sample(Frozen):
    """The first rows of those that are there already, and the counts of all."""

    first: AuditCounts
    rows: Base64Bytes
    counts: AuditCounts


class Wish(Frozen):
    """What is to be made of which files."""

    model: Path
    files: list[DataFile]
    hyperparameters: EncodingHyperparameters
    advanced: EncodingAdvanced
    training_type: str
    limit: int | None = None
    processes: int = 1
    sample: Sample | None = None
    """Where the rows are there, they are only audited."""
    audit_for: tuple[str, str] | None = None
    """Model and dataset that the audit names; None: no audit."""


class Said(Frozen):
    """What is told on the way: a batch of rows, whose arrays follow, or that the audit has begun."""

    counts: AuditCounts | None = None


class Prepared(Frozen):
    """The answer: the audit, where one was asked for."""

    report: AuditReport | None


def prepare(request: bytes, tell: Callable[[BaseModel, bytes], None]) -> Prepared:
    """Tokenise rows, whose batches are told, and audit them."""
    wish = Wish.model_validate_json(request)
    check_references(wish.model)
    tokenizer = _load_tokenizer(wish.model)
    if wish.sample is None:
        rows = _encoded(wish, tokenizer, tell)
    else:
        sample = wish.sample
        first = Batch.of_bytes(sample.first, sample.rows)
        rows = TokenizedRows.of([first], sample.counts)
    if wish.audit_for is None or not len(rows):
        return Prepared(report=None)
    tell(Said(), b"")
    model, dataset = wish.audit_for
    examples = first_examples(wish.files, wish.hyperparameters, wish.training_type, CHECKED_ROWS)
    options: dict[str, Any] = {"hyperparameters": wish.hyperparameters, "advanced": wish.advanced}
    return Prepared(report=audit(rows, examples, tokenizer, **options, model=model, dataset=dataset))


def _load_tokenizer(model: Path) -> Any:
    """Without torch: no tokenizer needs it, and its import takes longer than all else that a reader begins with."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that there is no torch
    sys.modules.setdefault("torch", cast(ModuleType, None))
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def _encoded(wish: Wish, tokenizer: Any, tell: Callable[[BaseModel, bytes], None]) -> TokenizedRows:
    """The first rows; all of them are told."""
    batches = encoded(
        wish.files,
        tokenizer,
        hyperparameters=wish.hyperparameters,
        advanced=wish.advanced,
        training_type=wish.training_type,
        limit=wish.limit,
        processes=wish.processes,
    )
    counts, first, held = AuditCounts(), list[Batch](), 0
    try:
        with closing(batches):
            for batch in batches:
                tell(Said(counts=batch.counts), batch.to_bytes())
                counts += batch.counts
                if held < CHECKED_ROWS:
                    first.append(batch)
                    held += batch.counts.rows
    except HelperLostError as error:
        if error.exit_code == -signal.SIGKILL:
            raise OutOfMemoryError(
                "a process that tokenises was killed: the memory of the machine may have run out",
                hint="try again where more memory is free",
            ) from None
        raise ModelError(
            f"the model's tokenizer ends the process that uses it: {error.message}",
            hint="look at tokenizer.json and the chat template",
            code="tokenizer_fails",
        ) from None
    return TokenizedRows.of(first, counts)
