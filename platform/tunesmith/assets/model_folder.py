"""A model's folder before it is registered: what can be known of it without loading any weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tunesmith.assets.cards import Card, read_card
from tunesmith.assets.gallery import Gallery, read_gallery
from tunesmith.assets.model_references import check_references
from tunesmith.assets.training_types import TEXT_TYPES
from tunesmith.errors import DataError, SpecError

LANGUAGE_MODEL_FILES = ("config.json", "tokenizer.json")
"""Every causal language model has these beside its weights."""


@dataclass(frozen=True)
class ModelFolder:
    """What a folder with a model holds."""

    task_type: str
    card: Card
    gallery: Gallery | None
    may_be_language_model: bool
    """Whether it has the files that every causal language model has."""


def read_model_folder(
    folder: Path, *, task_type: str | None = None, present: Collection[str] | None = None
) -> ModelFolder:
    """Read the card and `gallery_train/`. A given `task_type` overrides the card's.

    `present`: the paths of all files that the folder will have, where it has not all of them yet.
    Raises SpecError without a task type, ModelError for a card that is not YAML or a file that names one outside,
    DataError for a link.
    """
    refuse_links(folder)
    check_references(folder, present=present)
    card = read_card(folder)
    found = task_type or card.values.get("task_type")
    if not isinstance(found, str) or not found:
        raise SpecError(
            "the model's task type is not given",
            fields=["task_type"],
            hint=f"give task_type, or write it in the front matter of README.md: {', '.join(TEXT_TYPES)}, or a word of "
            "your own for a custom model",
        )
    may_be = all((folder / name).is_file() for name in LANGUAGE_MODEL_FILES)
    return ModelFolder(found, card, read_gallery(folder, card, present=present), may_be)


def refuse_links(path: Path) -> None:
    """Raise DataError where `path` is a link or a link lies below it, wherever it leads."""
    links = [p for p in (path, *(path.rglob("*") if path.is_dir() else ())) if p.is_symlink()]
    if links:
        raise DataError(f"{links[0]} is a link; only files and folders are taken", hint="copy what it points to")
