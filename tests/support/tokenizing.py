"""Tokenised data of the tiny tokenizer, made as a job makes it."""

from pathlib import Path
from typing import Any

from tests.support import tiny
from trainers.text import tokenized_data
from trainers.text.shards import TokenizedRows
from trainers.text.tokenized_data import DataFile
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage

TOKENIZER = tiny.make_tokenizer()
ROOT = Path(__file__).parents[2]


KEY = "the tiny tokenizer's"
"""In place of a hash of a tokenizer's files."""


def build(
    files: list[Path], storage: Storage, home: Path, *, processes: int = 1, limit: int | None = None, **given: Any
) -> TokenizedRows:
    """Rows made in this process, without walls, and kept as a job keeps them."""
    progress, tokenizer = given.pop("progress", None), given.pop("tokenizer", TOKENIZER)
    found = [DataFile.at(file) for file in files]
    options: dict[str, Any] = {
        "advanced": tiny.advanced(train_on_history=given.pop("train_on_history", False)),
        "hyperparameters": tiny.hyperparameters(**given),
        "training_type": "text-question-answering",
        "limit": limit,
    }
    return tokenized_data.tokenized(
        found,
        lambda: tokenized_data.encoded(found, tokenizer, processes=processes, **options),
        tokenizer=KEY if tokenizer is TOKENIZER else f"another {id(tokenizer)}",
        storage=storage,
        settings=Settings.from_env({"TUNESMITH_HOME": str(home)}),
        progress=progress,
        **options,
    )
