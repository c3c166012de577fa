"""Whether a model's files are a causal language model: asked of a process of its own.

That process loads torch and the weights (`python -m trainers.registration.language_models`), so this one does not, and
the memory is given back with its end.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunesmith import processes
from tunesmith.assets.model_folder import LANGUAGE_MODEL_FILES
from tunesmith.errors import ModelError, OutOfMemoryError, WorkerLostError
from tunesmith.frozen import Frozen

TAIL_LINES = 20

logger = logging.getLogger(__name__)


class LanguageModel(Frozen):
    """What a causal language model was found to be."""

    architecture: str
    parameters: int
    dtype: str
    max_seq_length: int | None
    chat_template: bool


class Refusal(Frozen):
    """Why the files are no causal language model that loads."""

    message: str
    fields: list[str]
    hint: str | None
    code: str


class Verdict(Frozen):
    """The answer of the process: one of the two."""

    model: LanguageModel | None = None
    refusal: Refusal | None = None


def may_be_language_model(folder: Path) -> bool:
    """Whether the folder has the files that every causal language model has."""
    return any(folder.glob("*.safetensors")) and all((folder / name).is_file() for name in LANGUAGE_MODEL_FILES)


def check_names(names: Collection[str]) -> None:
    """ModelError where files of these names are no causal language model: a GGUF file alone, or what goes together."""
    if any(name.endswith(".gguf") for name in names) and not any(name.endswith(".safetensors") for name in names):
        return
    for name in LANGUAGE_MODEL_FILES:
        if name not in names:
            raise ModelError(
                f"the model has no {name}; it has {', '.join(sorted(names)[:20])}",
                fields=["source"],
                hint="a causal language model has config.json, tokenizer.json and *.safetensors, or is one GGUF file; "
                "a model with training of its own has another task type",
            )


def look_for_language_model(folder: Path) -> tuple[dict[str, Any], bool]:
    """What the files in `folder` are, and whether they are a causal language model at all."""
    if not may_be_language_model(folder):
        return {}, False
    try:
        return check_language_model(folder), True
    except ModelError as error:
        logger.info("the model is no causal language model: %s", error.message)
        return {}, False


def check_language_model(folder: Path) -> dict[str, Any]:
    """Load the model as a job will, and run it once; what it is. A GGUF file is put into safetensors on the way.

    ModelError says why the model does not load.
    """
    verdict = _ask(folder)
    if verdict.refusal is not None:
        given = verdict.refusal
        raise ModelError(given.message, fields=given.fields, hint=given.hint, code=given.code)
    if verdict.model is None:
        raise WorkerLostError("the check of the model ended without an answer")
    return verdict.model.model_dump()


def _ask(folder: Path) -> Verdict:
    command = [sys.executable, "-m", "trainers.registration.language_models", str(folder)]
    with processes.lifeline() as stdin, tempfile.TemporaryFile() as said:
        process = subprocess.run(
            processes.with_lifeline(command),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
            check=False,
        )
        said.seek(0)
        tail = said.read().decode(errors="replace").strip().splitlines()[-TAIL_LINES:]
    if tail:
        logger.info("the check of the model said:\n%s", "\n".join(tail))
    try:
        return Verdict.model_validate_json(process.stdout)
    except ValidationError:
        pass
    how = f"exit code {process.returncode}" if process.returncode >= 0 else f"signal {-process.returncode}"
    if process.returncode == -9:
        raise OutOfMemoryError(
            f"the check of the model ended with {how}: the memory of the machine may have run out",
            hint="register it where more memory is free",
        )
    raise ModelError(
        f"the check of the model ended with {how}; its last line: {tail[-1] if tail else 'none'}",
        fields=["source"],
        hint="loading these files ends the process that loads them",
    )
