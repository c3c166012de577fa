"""Taking a model or dataset in: its files copied, checked as far as a job will rely on them, and published."""

from __future__ import annotations

import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from trainers.attempt.cluster_work import Needs, Tell, run_on_cluster
from trainers.attempt.context import Attempt
from trainers.attempt.publication import Upload, publish
from trainers.attempt.stop_watch import StoppedError, stopped
from trainers.registration.descriptions import ModelAbout, describe_model, describe_tables
from trainers.registration.model_check import (
    check_language_model,
    check_names,
    look_for_language_model,
    may_be_language_model,
)
from trainers.registration.sources import Bounds, copy_files, opened_source
from tunesmith import caches
from tunesmith.assets.cards import FILE as CARD
from tunesmith.assets.catalog import Description
from tunesmith.assets.gallery import FOLDER as GALLERY
from tunesmith.assets.model_references import is_reference_file
from tunesmith.assets.tables import FORMATS, data_format
from tunesmith.assets.training_types import TEXT_TYPES
from tunesmith.clock import utc_text
from tunesmith.errors import DataError
from tunesmith.jobs.attempts import Result
from tunesmith.jobs.spec import RegisterJob
from tunesmith.settings import Settings

BOUNDS = {
    "dataset": Bounds(files=100_000, file_bytes=5 << 30, total_bytes=50 << 30),
    "model": Bounds(files=100_000, file_bytes=500 << 30, total_bytes=2000 << 30),
}
FIRST_BYTES = 16 << 20
"""Files of a model up to this size are copied first: what they say decides whether the rest is."""
_LOADING_BYTES = 2 << 30
"""What the check of a model takes beside the weights."""
_LOADED_PER_BYTE = {".safetensors": 1.2, ".gguf": 18.0}
"""What a byte of a weights' file takes in memory; 4 bits become 32, and are held twice while they are written."""

logger = logging.getLogger(__name__)


def run_registration(attempt: Attempt, job: RegisterJob) -> Result:
    """Copy, check and publish. Raises SpecError, DataError or ModelError that says what is wrong with the source."""
    try:
        return _register(attempt, job)
    except StoppedError as stop:
        return stopped(stop.args[0], " before anything was published")


def _register(attempt: Attempt, job: RegisterJob) -> Result:
    attempt.events.write(phase="fetch")
    scratch = attempt.settings.home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as name, caches.held(Path(name)):
        folder = Path(name) / "files"
        listen = attempt.stop.check
        with opened_source(job.source, attempt.settings, BOUNDS[job.asset], listen) as source:
            said: ModelAbout | None = None
            if job.asset == "model":
                first = [path for path, size in source.sizes.items() if size <= FIRST_BYTES or _is_read(path)]
                copy_files(source, first, folder, listen)
                there = list(source.sizes)
                said = describe_model(folder, job.task_type, present=there, settings=attempt.settings, listen=listen)
                if said.task_type in TEXT_TYPES and not said.is_in_image:
                    check_names([path for path in there if "/" not in path])  # before the weights are copied
            copy_files(source, [path for path in source.sizes if not (folder / path).exists()], folder, listen)
        attempt.events.write(phase="audit")
        about = _check_dataset(folder, attempt) if said is None else _check_model(folder, attempt, said, job.name)
        attempt.events.write(state="running", phase="publish")
        attempt.events.flush()
        upload = Upload(attempt.storage, job, attempt.number)
        upload.add_folder(folder)
    manifest = publish(attempt, upload.stored(), about)
    message = f"{job.asset} {job.output_asset} is registered"
    if job.asset == "model" and manifest.training.reason:
        message += f"; {manifest.training.reason}"
    return Result(outcome="completed", message=message, time=utc_text())


def _check_dataset(folder: Path, attempt: Attempt) -> Description:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    files = [path.relative_to(folder).as_posix() for path in paths if data_format(path) is not None]
    if not files:
        raise DataError(
            f"there is no data file among {', '.join(p.name for p in paths[:10]) or 'the files: there are none'}",
            fields=["source"],
            hint=f"data files end in {', '.join('.' + name for name in FORMATS)}",
            code="no_data_file",
        )
    return Description(
        tables=describe_tables(folder, files, settings=attempt.settings, listen=attempt.stop.check),
    )


def _is_read(path: str) -> bool:
    """Whether a model is described by this file, however large it is."""
    return path == CARD or path.startswith(f"{GALLERY}/") or is_reference_file(path)


def _check_model(folder: Path, attempt: Attempt, said: ModelAbout, name: str) -> Description:
    is_text = said.task_type in TEXT_TYPES and not said.is_in_image
    # The text types are among a custom model's only where it is trainable at all, and outside of an image.
    worth_it = said.gallery is not None and not said.gallery.problems and not said.is_in_image
    details, language_model = dict[str, Any](), False
    if is_text or (worth_it and may_be_language_model(folder)):
        weights = [path for path in folder.iterdir() if path.suffix in _LOADED_PER_BYTE]
        memory_bytes = _LOADING_BYTES + sum(int(p.stat().st_size * _LOADED_PER_BYTE[p.suffix]) for p in weights)
        details, language_model = run_on_cluster(
            partial(_look, folder, is_text, attempt.settings),
            name="the check of the model",
            needs=Needs(memory_bytes=memory_bytes, on_this_node=True),
            events=attempt.events,
            listen=attempt.stop.check,
        )
    if not (folder / CARD).exists():
        (folder / CARD).write_text(f"---\ntask_type: {said.task_type}\n---\n\n# {name}\n")
    return Description(
        task_type=said.task_type,
        framework=said.framework or "PyTorch",
        license=said.license,
        details=details,
        gallery=said.gallery,
        language_model=language_model,
    )


def _look(folder: Path, must_be: bool, settings: Settings, tell: Tell) -> tuple[dict[str, Any], bool]:
    if must_be:
        return check_language_model(folder, settings=settings, listen=tell.check), True
    return look_for_language_model(folder, settings=settings, listen=tell.check)
