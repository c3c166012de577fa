"""The mask audit of what an order would train, before anybody places it.

`python -m trainers.text_job.audit_order [--rows N] < ORDER.json` writes the report as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from trainers.attempt.fetch import fetch
from trainers.text_job.tokenizing import Rows, Work, audited_rows, data_files
from tunesmith.clock import utc_text
from tunesmith.errors import SpecError, TunesmithError
from tunesmith.jobs.audit_report import AuditReport
from tunesmith.jobs.drafting import draft, new_job_id, training_files
from tunesmith.jobs.spec import RegisterSpec, TextJob, TrainSpec, parse_spec
from tunesmith.settings import Settings
from tunesmith.storage.urls import open_storage


def audit_order(spec: TrainSpec | RegisterSpec, settings: Settings, *, limit: int | None = None) -> AuditReport:
    """The audit of what an order would train, of `limit` rows or all; these are then in the cache for its job."""
    storage = open_storage(settings.storage_url, settings)
    # Names, columns and settings are checked, and defaults filled in, as for a job.
    job = draft(
        spec,
        storage=storage,
        account=settings.account,
        job_id=new_job_id(),
        created_at=utc_text(),
    )
    if not isinstance(job, TextJob):
        raise SpecError("only what a training job would train can be audited", fields=["kind"])
    model = fetch(storage, "model", job.model, settings)
    dataset = fetch(storage, "dataset", job.dataset, settings)
    files = data_files(dataset, training_files(dataset.manifest.tables, job.hyperparameters))
    rows = Rows(model, files, job.hyperparameters, job.advanced, job.training_type, limit)
    processes = len(os.sched_getaffinity(0))
    return audited_rows(rows, Work(storage, settings, processes=processes), job.dataset)[1]


def main() -> int:
    """0: the report is on standard output; 2: an error in the API's shape is."""
    parser = argparse.ArgumentParser(prog="python -m trainers.text_job.audit_order", description=__doc__)
    parser.add_argument("--rows", type=int, help="rows to tokenise, the first ones; all if left out")
    arguments = parser.parse_args()
    try:
        # Somebody waits for the answer: a storage that is away is said at once.
        settings = Settings.from_env().model_copy(update={"storage_patience_s": 0})
        report = audit_order(parse_spec(json.load(sys.stdin)), settings, limit=arguments.rows)
    except TunesmithError as error:
        sys.stdout.write(json.dumps({"error": {**error.as_dict(), "status": error.status}}))
        return 2
    sys.stdout.write(report.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
