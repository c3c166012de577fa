"""The child's side of `descriptions`: cards, `gallery_train/` and data files, read within the walls."""

from __future__ import annotations

import time
from collections.abc import Callable

from pydantic import BaseModel

from trainers.registration.descriptions import ModelAbout, ModelRequest, Tables, TablesProgress, TablesRequest
from tunesmith.assets.model_folder import read_model_folder
from tunesmith.assets.tables import describe
from tunesmith.errors import DataError

_TELL_S = 1.0


def read_model(request: bytes, tell: Callable[[BaseModel, bytes], None]) -> ModelAbout:
    """What the card and `gallery_train/` of a model say."""
    asked = ModelRequest.model_validate_json(request)
    found = read_model_folder(asked.folder, task_type=asked.task_type, present=asked.present)
    return ModelAbout(
        task_type=found.task_type,
        framework=found.card.text("framework"),
        license=found.card.text("license"),
        gallery=found.gallery,
    )


def read_tables(request: bytes, tell: Callable[[BaseModel, bytes], None]) -> Tables:
    """What the data files hold; tells the file that it reads."""
    asked = TablesRequest.model_validate_json(request)
    tables = {}
    for file in asked.files:
        said = time.monotonic()

        def told(rows: int, file: str = file) -> None:
            nonlocal said
            if time.monotonic() - said >= _TELL_S:
                said = time.monotonic()
                tell(TablesProgress(file=file, rows=rows), b"")

        tell(TablesProgress(file=file, rows=0), b"")
        try:
            tables[file] = describe(asked.folder / file, told=told)
        except MemoryError as error:
            raise DataError(
                f"{file}: reading it takes more memory than a file of its size may: {error}".rstrip(": "),
                fields=[file],
                hint="a row is held whole, and so are the pages of a parquet file: write smaller ones",
                code="too_much_memory",
            ) from None
    return Tables(tables=tables)
