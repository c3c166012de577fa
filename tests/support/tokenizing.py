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


def build(
    files: list[Path], storage: Storage, home: Path, *, processes: int = 1, limit: int | None = None, **given: Any
) -> TokenizedRows:
    progress = given.pop("progress", None)
    advanced = tiny.advanced(train_on_history=given.pop("train_on_history", False))
    return tokenized_data.tokenized(
        [DataFile.at(file) for file in files],
        given.pop("tokenizer", TOKENIZER),
        hyperparameters=tiny.hyperparameters(**given),
        advanced=advanced,
        training_type="text-question-answering",
        storage=storage,
        settings=Settings.from_env({"TUNESMITH_HOME": str(home)}),
        limit=limit,
        processes=processes,
        progress=progress,
    )
