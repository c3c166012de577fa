"""Whether a model's files are a causal language model: asked of a reader within the walls.

It loads torch and the weights (`trainers.registration.language_models`), so this process does not, and the memory is
given back with its end.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from trainers.isolation import outputs, readers
from trainers.isolation.readers import Limits, Reading
from tunesmith.assets.model_folder import LANGUAGE_MODEL_FILES
from tunesmith.errors import ModelError, WorkerLostError
from tunesmith.frozen import Frozen
from tunesmith.settings import Settings

_LOADED_PER_BYTE = {".safetensors": 2.5, ".gguf": 25.0}
"""What a byte of a weights' file takes in memory at the very most; 4 bits become 32, and are held twice."""
_MEMORY_BYTES = 3 << 30
"""What loading takes beside the weights, torch's own among it."""
_SLOWEST_BYTES_PER_S = 10 << 20
_CONVERTED = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,200}\.(json|jinja|model|safetensors|txt)")
"""Names of the files that a GGUF file becomes."""

logger = logging.getLogger(__name__)


class ModelQuestion(Frozen):
    """The folder that may be a language model."""

    folder: Path


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
    """The answer of the reader: one of the two."""

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


def look_for_language_model(
    folder: Path, *, settings: Settings, listen: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], bool]:
    """What the files in `folder` are, and whether they are a causal language model at all."""
    if not may_be_language_model(folder):
        return {}, False
    try:
        return check_language_model(folder, settings=settings, listen=listen), True
    except ModelError as error:
        logger.info("the model is no causal language model: %s", error.message)
        return {}, False


def check_language_model(
    folder: Path, *, settings: Settings, listen: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Load the model as a job will, and run it once; what it is. A GGUF file is put into safetensors on the way.

    ModelError says why the model does not load. `listen` may raise what ends the check.
    """
    sizes = [(path.suffix, path.stat().st_size) for path in folder.iterdir() if path.suffix in _LOADED_PER_BYTE]
    largest = int(sum(size * _LOADED_PER_BYTE[suffix] for suffix, size in sizes))
    reading = Reading(
        name="the check of the model",
        place="trainers.registration.language_models:judge",
        request=ModelQuestion(folder=folder),
        answer=Verdict,
        readable=[folder],
        limits=Limits(
            memory_bytes=_MEMORY_BYTES + largest,
            time_s=900 + largest / _SLOWEST_BYTES_PER_S,
            silence_s=900 + largest / _SLOWEST_BYTES_PER_S,
            file_bytes=(1 << 30) + largest,
        ),
        fault=ModelError,
    )
    verdict = readers.read(reading, settings=settings, listen=listen, take=partial(_take_converted, folder))
    if verdict.refusal is not None:
        given = verdict.refusal
        raise ModelError(given.message, fields=given.fields, hint=given.hint, code=given.code)
    if verdict.model is None:
        raise WorkerLostError("the check of the model ended without an answer")
    return verdict.model.model_dump()


def _take_converted(folder: Path, own: Path) -> None:
    """Put what a GGUF file became in its place: regular files of plain names, and nothing else that lies in `own`."""
    names = [name for name in outputs.walk(own).files if _CONVERTED.fullmatch(name)]
    if not any(name.endswith(".safetensors") for name in names):
        return
    for name in names:
        with outputs.opened(own, name) as (descriptor, _):
            # In the folder of a program's output a link may have the name.
            (folder / name).unlink(missing_ok=True)
            with Path(f"/proc/self/fd/{descriptor}").open("rb") as made, (folder / name).open("xb") as put:
                shutil.copyfileobj(made, put)
    for file in folder.glob("*.gguf"):
        file.unlink()
