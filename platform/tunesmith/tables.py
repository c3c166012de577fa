"""Data files, row by row: jsonl, json (an array), csv and parquet, told by their names and held to what they say."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.catalog import Table
from tunesmith.errors import DataError

Row = dict[str, Any]


def data_format(path: Path) -> str | None:
    """The format that a file's name promises, or None where it is no data file."""
    return path.suffix[1:] if path.suffix[1:] in _READERS else None


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a data file. DataError names the file and the line or row that is not what it should be."""
    try:
        yield from _READERS[path.suffix[1:]](path)
    except UnicodeDecodeError as error:
        raise _wrong(path, f"it is not UTF-8: {error.reason} near byte {error.start}") from None


def describe(path: Path) -> Table:
    """Columns and number of rows of a data file, all of it read. DataError where it does not parse or has no row."""
    columns: dict[str, None] = {}
    rows = 0
    for row in read_rows(path):
        columns.update(dict.fromkeys(row))
        rows += 1
    if rows == 0:
        raise _wrong(path, "it has no row")
    return Table(format=path.suffix[1:], columns=list(columns), rows=rows)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                yield _object(path, _parse(path, text, f"line {number}"), f"line {number}")


def _read_json(path: Path) -> Iterator[Row]:
    rows = _parse(path, path.read_bytes().decode("utf-8-sig"), "the file")
    if not isinstance(rows, list):
        raise _wrong(path, f"a .json file holds an array of objects, this one a {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield _object(path, row, f"row {number}")


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise _wrong(path, f"line {reader.line_num} has not as many cells as the header")
                yield row
        except csv.Error as error:
            raise _wrong(path, f"line {reader.line_num}: {error}") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise _wrong(path, f"it is not parquet: {error}") from None


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
FORMATS = tuple(_READERS)


def _parse(path: Path, text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _wrong(path, f"{place} is not JSON: {error.msg} at column {error.colno}") from None


def _object(path: Path, row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise _wrong(path, f"{place} must be an object with columns, got a {type(row).__name__}")
    return row


def _wrong(path: Path, what: str) -> DataError:
    return DataError(f"{path.name}: {what}", fields=[path.name], hint=f"allowed are {', '.join(FORMATS)} in UTF-8")
