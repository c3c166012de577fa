"""From a request to an acknowledged job: check it, record it with its idempotency key, and answer."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from serve_app.door import Door
from serve_app.views import job_view
from tunesmith.assets.sources import check_source
from tunesmith.clock import utc_text
from tunesmith.errors import SpecError
from tunesmith.jobs.drafting import draft, new_job_id
from tunesmith.jobs.spec import Job, RegisterSpec, TrainSpec
from tunesmith.records.record import Insertion


def place(door: Door, spec: TrainSpec | RegisterSpec, *, key: str | None) -> Insertion:
    """Record a job for `spec`, or find the one that `key` was used for before. A refusal leaves nothing behind."""
    body_hash = hashlib.sha256(_canonical(spec)).hexdigest()
    if key is not None:
        _check_key(key)
        # This comes before the checks: the answer stays the same even where what was ordered is gone.
        first = door.store.first_answer(door.settings.account, idempotency_key=key, body_hash=body_hash)
        if first is not None:
            return first
    return door.store.insert(
        _draft(door, spec),
        respond=lambda record: job_view(record).model_dump(mode="json"),
        idempotency_key=key,
        body_hash=body_hash,
    )


def plan(door: Door, spec: TrainSpec | RegisterSpec) -> Job:
    """The job that `spec` would become; SpecError or DataError says what is wrong with it."""
    _canonical(spec)  # what could not be stored is refused
    return _draft(door, spec)


def _draft(door: Door, spec: TrainSpec | RegisterSpec) -> Job:
    if isinstance(spec, RegisterSpec):
        spec = spec.model_copy(update={"source": check_source(spec.source, door.settings)})
    return draft(
        spec,
        storage=door.storage,
        account=door.settings.account,
        job_id=new_job_id(),
        created_at=utc_text(),
        capacity=door.capacity,
    )


def _check_key(key: str) -> None:
    if re.fullmatch(r"[!-~]{1,255}", key) is None:
        raise SpecError(
            f"Idempotency-Key must be 1 to 255 visible ASCII characters, got {len(key)}: {key[:80]!r}",
            fields=["Idempotency-Key"],
            hint="use a UUID",
            code="invalid_idempotency_key",
        )


def _canonical(spec: TrainSpec | RegisterSpec) -> bytes:
    """The request as canonical JSON: what was given, in any order, and what it asks for."""
    body: dict[str, Any] = {**spec.model_dump(mode="json", exclude_unset=True), "kind": spec.kind}
    try:
        return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        message = "the body holds text that has no UTF-8 form (a lone surrogate)"
        raise SpecError(message, code="invalid_text") from None
