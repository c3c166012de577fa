"""A user's own file made into a dataset: some rows held out, always the same ones, the others to train on."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator
from pathlib import Path

from tunesmith.assets.tables import FORMATS, data_format, read_rows
from tunesmith.errors import DataError

HELD_OUT_ROWS = 64
HELD_OUT_SHARE = 10
"""One row in this many is held out, up to HELD_OUT_ROWS."""


def split(file: Path, folder: Path, *, prompt_field: str, response_field: str) -> tuple[int, int]:
    """Write `train.jsonl` and `held_out.jsonl` to `folder`, each row's two fields; how many rows each has.

    Which rows are held out depends on what they say alone, not on their order. Rows without a prompt or a response
    are left out, and so are repeated ones. Raises DataError that says what is wrong with the file.
    """
    if not file.is_file():
        raise DataError(f"there is no file {file}", fields=["DATA"])
    if data_format(file) is None:
        raise DataError(f"{file.name} is not a data file", fields=["DATA"], hint=f"allowed are {', '.join(FORMATS)}")

    digests = {digest for digest, _ in _rows(file, prompt_field, response_field)}
    if len(digests) < 2:
        raise DataError(
            f"{file.name} has {len(digests)} row with both {prompt_field!r} and {response_field!r}, at least 2 are "
            "needed: one to train on and one to hold out",
            fields=["DATA"],
        )
    held_out = set(heapq.nsmallest(min(HELD_OUT_ROWS, max(1, len(digests) // HELD_OUT_SHARE)), digests))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("w") as train, (folder / "held_out.jsonl").open("w") as test:
        left = set(digests)
        for digest, line in _rows(file, prompt_field, response_field):
            if digest in left:
                left.remove(digest)
                (test if digest in held_out else train).write(line + "\n")
    return len(digests) - len(held_out), len(held_out)


def _rows(file: Path, prompt_field: str, response_field: str) -> Iterator[tuple[bytes, str]]:
    """Every usable row as a line of JSON, with a digest of it."""
    columns: dict[str, None] = {}
    found = {prompt_field: False, response_field: False}
    for number, row in enumerate(read_rows(file), start=1):
        columns.update(dict.fromkeys(row))
        pair = {}
        for field in found:
            found[field] |= field in row
            pair[field] = row.get(field) or ""
            if not isinstance(pair[field], str):
                raise DataError(
                    f"{file.name}, row {number}: {field!r} must hold text, got {type(row[field]).__name__}",
                    fields=["DATA"],
                )
        if all(text.strip() for text in pair.values()):
            line = json.dumps(pair, ensure_ascii=False)
            yield hashlib.sha256(line.encode()).digest(), line
    for variable, field in (("PROMPT_FIELD", prompt_field), ("RESPONSE_FIELD", response_field)):
        if not found[field]:
            raise DataError(
                f"{file.name} has no column {field!r}; it has {', '.join(columns) or 'none'}", fields=[variable]
            )
