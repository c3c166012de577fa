"""Taking a model or dataset in: its files copied, checked as far as a job will rely on them, and published."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from trainers.attempt.context import Attempt
from trainers.attempt.publication import Upload, publish
from trainers.registration.model_check import check_language_model, look_for_language_model
from trainers.registration.sources import copy_source
from tunesmith.assets.catalog import Description, Table
from tunesmith.assets.model_folder import read_model_folder
from tunesmith.assets.tables import FORMATS, data_format, describe
from tunesmith.assets.training_types import TEXT_TYPES
from tunesmith.clock import utc_text
from tunesmith.errors import DataError
from tunesmith.jobs.attempts import Result
from tunesmith.jobs.spec import RegisterJob

MAX_FILE_BYTES = 5 << 30
MAX_DATASET_BYTES = 50 << 30

logger = logging.getLogger(__name__)


def run_registration(attempt: Attempt, job: RegisterJob) -> Result:
    """Copy, check and publish. Raises SpecError, DataError or ModelError that says what is wrong with the source."""
    attempt.events.write(phase="fetch")
    scratch = attempt.settings.home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name) / "files"
        copy_source(job.source, folder, attempt)
        attempt.events.write(phase="audit")
        about = _check_dataset(folder) if job.asset == "dataset" else _check_model(folder, job)
        attempt.events.write(state="running", phase="publish")
        attempt.events.flush()
        upload = Upload(attempt.storage, job, attempt.number)
        upload.add_folder(folder)
    manifest = publish(attempt, upload.stored(), about)
    message = f"{job.asset} {job.output_asset} is registered"
    if job.asset == "model" and manifest.training.reason:
        message += f"; {manifest.training.reason}"
    return Result(outcome="completed", message=message, time=utc_text())


def _check_dataset(folder: Path) -> Description:
    tables: dict[str, Table] = {}
    total = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        total += size
        if size > MAX_FILE_BYTES or total > MAX_DATASET_BYTES:
            raise DataError(
                f"{path.name} has {size} bytes, the files so far {total}; allowed are 5 GB a file and 50 GB a dataset",
                hint="split the file, or leave rows out",
                code="too_large",
            )
        if data_format(path) is not None:
            tables[path.relative_to(folder).as_posix()] = describe(path)
    if not tables:
        names = sorted(p.name for p in folder.rglob("*") if p.is_file())[:10]
        raise DataError(
            f"there is no data file among {', '.join(names) or 'the files: there are none'}",
            fields=["source"],
            hint=f"data files end in {', '.join('.' + name for name in FORMATS)}",
            code="no_data_file",
        )
    return Description(tables=tables)


def _check_model(folder: Path, job: RegisterJob) -> Description:
    found = read_model_folder(folder, task_type=job.task_type)
    in_image = found.gallery is not None and found.gallery.image_url is not None
    if found.task_type in TEXT_TYPES and not in_image:
        details, language_model = check_language_model(folder), True
    else:
        # The text types are among a custom model's only where it is trainable at all, and outside of an image.
        worth_it = found.gallery is not None and not found.gallery.problems and not in_image
        details, language_model = look_for_language_model(folder) if worth_it else ({}, False)
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(f"---\ntask_type: {found.task_type}\n---\n\n# {job.name}\n")
    return Description(
        task_type=found.task_type,
        framework=found.card.text("framework") or "PyTorch",
        license=found.card.text("license"),
        details=details,
        gallery=found.gallery,
        language_model=language_model,
    )
