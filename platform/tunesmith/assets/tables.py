"""Data files, row by row: jsonl, json (an array), csv and parquet. A file's name says its format, and it must have it.

Files of any size are streamed. JSON is read by the standard library's decoder in both of its formats: what streaming
parsers make of half a surrogate pair or a large number differs from it.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.assets.catalog import Table
from tunesmith.assets.json_array import ArrayError, read_array
from tunesmith.bounds import MAX_COLUMN
from tunesmith.errors import DataError

Row = dict[str, Any]

MAX_ROW_BYTES = 16 << 20
"""A row is held in memory whole; one that is longer is refused."""
MAX_COLUMNS = 1000
"""Manifests and messages hold the names of them all."""

_BLOCK_BYTES = 1 << 20
_BLOCK_ROWS = 4096
_PLACES = {"jsonl": "line", "json": "row", "csv": "line", "parquet": "row"}


@dataclass(frozen=True)
class Block:
    """A stretch of a file's rows, about 1 MiB: small enough to be held, and to be sent to another process."""

    path: Path
    first: int = 1
    """The number of its first line, for jsonl."""
    offset: int = 0
    size_bytes: int = 0
    parsed: Sequence[tuple[int, Row]] = ()
    """The rows with their numbers. Empty for jsonl, whose rows are parsed when they are asked for."""

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Its rows, each with the number of its line (jsonl, csv) or row. DataError as `read_rows`."""
        return iter(self.parsed) if self.parsed else ((number, row) for number, row, _ in _parse_block(self))


def data_format(path: Path) -> str | None:
    """The format that a file's name says, or None where it is not a data file."""
    suffix = path.suffix[1:].lower()
    return suffix if suffix in _READERS else None


def place(path: Path, number: int) -> str:
    """Words for where a row is: `train.jsonl: line 7`."""
    return f"{path.name}: {_PLACES[path.suffix[1:].lower()]} {number}"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a data file. DataError names the file and the line or row that is not what it should be."""
    return (row for _, row, _ in _reader(path)(path))


def read_blocks(path: Path) -> Iterator[Block]:
    """The rows of a data file in blocks. jsonl is cut without being parsed, so its errors come from `Block.rows`."""
    if data_format(path) == "jsonl":
        yield from _cut_jsonl(path)
        return
    rows: list[tuple[int, Row]] = []
    size = 0
    try:
        for number, row, row_bytes in _reader(path)(path):
            rows.append((number, row))
            size += row_bytes
            if size >= _BLOCK_BYTES or len(rows) >= _BLOCK_ROWS:
                yield Block(path, parsed=rows)
                rows, size = [], 0
    except DataError:
        if rows:
            yield Block(path, parsed=rows)
        raise
    if rows:
        yield Block(path, parsed=rows)


def describe(path: Path, told: Callable[[int], None] = lambda rows: None) -> Table:
    """Columns and number of rows of a data file, all of it read; `told` is called with the rows so far.

    DataError where it does not parse or has no row.
    """
    columns: dict[str, None] = {}
    rows = 0
    for row in read_rows(path):
        if not row.keys() <= columns.keys():
            columns.update(dict.fromkeys(row))
            _check_columns(path, columns)
        rows += 1
        if not rows % 256:
            told(rows)
    if rows == 0:
        raise _wrong(path, "it has no row")
    return Table.model_validate({"format": data_format(path), "columns": list(columns), "rows": rows})


_Read = tuple[int, Row, int]
"""A row's number, the row, and about how many bytes it takes."""


def _read_jsonl(path: Path) -> Iterator[_Read]:
    for block in _cut_jsonl(path):
        yield from _parse_block(block)


def _cut_jsonl(path: Path) -> Iterator[Block]:
    first, offset = 1, 0
    with path.open("rb") as file:
        while data := file.read(_BLOCK_BYTES):
            rest = file.readline(MAX_ROW_BYTES) if not data.endswith(b"\n") else b""
            lines = data.count(b"\n")
            if len(rest) == MAX_ROW_BYTES and not rest.endswith(b"\n"):
                raise _too_long(path, f"line {first + lines}")
            yield Block(path, first, offset, len(data) + len(rest))
            first += lines + rest.endswith(b"\n")
            offset += len(data) + len(rest)


def _parse_block(block: Block) -> Iterator[_Read]:
    with block.path.open("rb") as file:
        file.seek(block.offset)
        data = file.read(block.size_bytes)
    if block.offset == 0:
        data = data.removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(data.split(b"\n"), start=block.first):
        if not line or line.isspace():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise _wrong(block.path, f"{where} is not UTF-8: {error.reason} at byte {error.start + 1}") from None
        except (ValueError, RecursionError) as error:
            raise _wrong(block.path, f"{where} is not JSON: {_fault(error)}") from None
        if not isinstance(row, dict):
            raise _wrong(block.path, f"{where} must be an object with columns, got a {type(row).__name__}")
        yield number, row, len(line)


def _read_json(path: Path) -> Iterator[_Read]:
    try:
        for number, (row, size) in enumerate(read_array(path, MAX_ROW_BYTES), start=1):
            yield number, row, size
    except ArrayError as error:
        raise _wrong(path, str(error)) from None


def _read_csv(path: Path) -> Iterator[_Read]:
    # The limit is the process's; the module's own would refuse cells of 128 KiB.
    csv.field_size_limit(MAX_ROW_BYTES)
    # Bytes that are not UTF-8 become half characters, so that the line that holds them can be named.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(_csv_lines(path, file), strict=True)
        header: list[str] | None = None
        number = 1
        try:
            for cells in reader:
                if header is None and cells:
                    header = cells
                    _check_header(path, header)
                elif header is not None and cells:
                    if len(cells) != len(header):
                        counts = f"{len(cells)}, not {len(header)}"
                        raise _wrong(path, f"line {number} has not as many cells as the header: {counts}")
                    yield number, dict(zip(header, cells, strict=True)), sum(map(len, cells))
                number = reader.line_num + 1
        except csv.Error as error:
            raise _wrong(path, f"line {number}: {error}") from None


def _check_columns(path: Path, names: Collection[str]) -> None:
    if len(names) > MAX_COLUMNS:
        raise _wrong(path, f"it has more than {MAX_COLUMNS} columns")
    longest = max(names, key=len, default="")
    if len(longest) > MAX_COLUMN:
        what = f"it has a column whose name has {len(longest):,} characters, {longest[:40]!r} and so on"
        raise _wrong(path, f"{what}; allowed are {MAX_COLUMN:,}")


def _check_header(path: Path, header: list[str]) -> None:
    _check_columns(path, header)
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise _wrong(path, f"the header has the column {twice!r} twice")


def _csv_lines(path: Path, file: Any) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES):
        number += 1
        if len(line) == MAX_ROW_BYTES and not line.endswith("\n"):
            raise _too_long(path, f"line {number}")
        try:
            line.isascii() or line.encode()
        except UnicodeEncodeError as error:
            raise _wrong(path, f"line {number} is not UTF-8 at character {error.start + 1}") from None
        yield line


def _read_parquet(path: Path) -> Iterator[_Read]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with path.open("rb") as raw:
        try:
            with pq.ParquetFile(raw, pre_buffer=False, buffer_size=_BLOCK_BYTES) as file:
                groups = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
                row_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
                size = max(1, min(1024, 4 * _BLOCK_BYTES // max(1, row_bytes)))
                for batch in file.iter_batches(batch_size=size):
                    for row in _python_rows(path, batch, number):
                        number += 1
                        yield number, row, row_bytes
        except MemoryError:
            raise
        except (pa.ArrowException, OSError) as error:
            place = f"after row {number} " if number else ""
            raise _wrong(path, f"{place}it is not parquet: {error}") from None


def _python_rows(path: Path, batch: Any, before: int) -> list[Row]:
    try:
        rows: list[Row] = batch.to_pylist()
    except UnicodeDecodeError:
        for at in range(batch.num_rows):
            try:
                batch.slice(at, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise _wrong(path, f"row {before + at + 1} is not UTF-8: {error.reason}") from None
        raise
    return rows


_READERS: dict[str, Callable[[Path], Iterator[_Read]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
FORMATS = tuple(_READERS)


def _reader(path: Path) -> Callable[[Path], Iterator[_Read]]:
    return _READERS[path.suffix[1:].lower()]


def _fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' starting at')} at column {error.colno}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _too_long(path: Path, where: str) -> DataError:
    return _wrong(path, f"{where} is longer than {MAX_ROW_BYTES >> 20} MiB")


def _wrong(path: Path, what: str) -> DataError:
    return DataError(f"{path.name}: {what}", fields=[path.name], hint=f"allowed are {', '.join(FORMATS)} in UTF-8")
