"""Tokenised rows as Arrow files: written batch by batch, read row by row where they lie."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tunesmith.frozen import Frozen
from tunesmith.jobs.audit_report import AuditCounts
from tunesmith.text.tokenization import Encoded

MAX_VOCABULARY = 1 << 24
"""No model has as many tokens."""
SHARD_BYTES = 256 << 20
"""A shard is closed once it holds so much."""

_SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("trained", pa.list_(pa.bool_()))])


@dataclass(frozen=True)
class Batch:
    """Rows in a few arrays, cheap to send to another process."""

    counts: AuditCounts
    offsets: npt.NDArray[np.int32]
    """[rows + 1]: where each row's tokens begin and end."""
    ids: npt.NDArray[np.int32]
    """[tokens]"""
    trained: npt.NDArray[np.uint8]
    """[tokens / 8]: a bit a token, the lowest first."""

    @classmethod
    def of(cls, encoded: Sequence[Encoded], *, read: int, skipped: int) -> Batch:
        lengths = np.fromiter((len(row.ids) for row in encoded), np.int64, len(encoded))
        trained = np.concatenate([row.trained for row in encoded]) if encoded else np.zeros(0, np.bool_)
        counts = AuditCounts(
            read=read,
            rows=len(encoded),
            skipped=skipped,
            truncated=sum(row.truncated for row in encoded),
            untrained=sum(row.targets == 0 for row in encoded),
            answer_cut=sum(row.answer_cut for row in encoded),
            ended=sum(row.ended for row in encoded),
            spelled_out=sum(row.spelled_out for row in encoded),
            tokens=int(lengths.sum()),
            trained_tokens=int(trained.sum()),
            longest=int(lengths.max(initial=0)),
            lengths=_classes(lengths),
        )
        return cls(
            counts,
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            np.concatenate([np.asarray(row.ids, np.int32) for row in encoded]) if encoded else np.zeros(0, np.int32),
            np.packbits(trained, bitorder="little"),
        )

    def to_bytes(self) -> bytes:
        """The arrays, one behind the other."""
        return self.offsets.tobytes() + self.ids.tobytes() + self.trained.tobytes()

    @classmethod
    def of_bytes(cls, counts: AuditCounts, data: bytes) -> Batch:
        """What `to_bytes` gave of a batch of so many rows and tokens. ValueError where it has another length."""
        rows, tokens = counts.rows, counts.tokens
        if min(rows, tokens) < 0 or len(data) != 4 * (rows + 1) + 4 * tokens + -(-tokens // 8):
            raise ValueError(f"{len(data)} bytes are not {rows} rows of {tokens} tokens")
        offsets = np.frombuffer(data, np.int32, rows + 1)
        ids = np.frombuffer(data, np.int32, tokens, 4 * (rows + 1))
        return cls(counts, offsets, ids, np.frombuffer(data, np.uint8, offset=4 * (rows + 1 + tokens)))

    def check(self, *, longest: int) -> None:
        """Raise ValueError where a process that is not trusted has made what no rows are.

        `longest`: how many tokens a row may have.
        """
        counts, offsets = self.counts, self.offsets.astype(np.int64)
        lengths = offsets[1:] - offsets[:-1]
        if self.offsets[0] != 0 or self.offsets[-1] != counts.tokens or lengths.min(initial=0) < 0:
            raise ValueError("its rows do not lie one behind the other")
        if lengths.max(initial=0) > longest:
            raise ValueError(f"it has rows of more than {longest} tokens")
        if self.ids.min(initial=0) < 0 or self.ids.max(initial=0) >= MAX_VOCABULARY:
            raise ValueError("it has ids that no token has")
        parts = (counts.truncated, counts.untrained, counts.answer_cut, counts.ended, counts.spelled_out)
        trained = int(np.unpackbits(self.trained, count=counts.tokens, bitorder="little").sum())
        known = (counts.read - counts.skipped, counts.trained_tokens, counts.longest, counts.lengths)
        seen = (counts.rows, trained, lengths.max(initial=0), _classes(lengths))
        if known != seen or min(*parts, counts.skipped) < 0 or max(parts) > counts.rows:
            raise ValueError("its counts are not those of its rows")

    def arrow(self) -> Any:
        offsets = pa.py_buffer(self.offsets)
        columns = [
            pa.Array.from_buffers(kind, self.counts.rows, [None, offsets], children=[values])
            for kind, values in (
                (_SCHEMA.types[0], pa.array(self.ids)),
                (
                    _SCHEMA.types[1],
                    pa.Array.from_buffers(pa.bool_(), len(self.ids), [None, pa.py_buffer(self.trained)]),
                ),
            )
        ]
        return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _classes(lengths: npt.NDArray[np.int64]) -> dict[int, int]:
    """How many rows there are of each class of lengths."""
    classes, rows = np.unique(1 << np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64), return_counts=True)
    return dict(zip(classes.tolist(), rows.tolist(), strict=True))


class Shard(Frozen):
    """One file of rows."""

    name: str
    size_bytes: int
    rows: int


class ShardWriter:
    """Writes batches in their order to the shards of a folder, each synced to the disk before the next begins."""

    def __init__(self, folder: Path, closed: Callable[[Path], None]) -> None:
        """`closed` is called with the path of every shard that is whole."""
        self.shards: list[Shard] = []
        self._folder = folder
        self._closed = closed
        self._file: BinaryIO | None = None
        self._writer: Any = None
        self._rows = 0

    def write(self, batch: Batch) -> None:
        if not batch.counts.rows:
            return
        if self._file is None:
            self._file = _create(self._folder / self._name())
            self._writer = pa.ipc.new_file(self._file, _SCHEMA)
        self._writer.write_batch(batch.arrow())
        self._rows += batch.counts.rows
        if self._file.tell() >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """End the open shard."""
        if self._file is None:
            return
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self.shards.append(Shard(name=self._name(), size_bytes=self._file.tell(), rows=self._rows))
        self.abandon()
        self._closed(self._folder / self.shards[-1].name)

    def abandon(self) -> None:
        """Close the open shard's file without finishing it."""
        if self._file is not None:
            self._file.close()
        self._file, self._writer, self._rows = None, None, 0

    def _name(self) -> str:
        return f"{len(self.shards):05d}.arrow"


class TokenizedRows:
    """Rows ready for training, by their number. Their lengths are held in memory; the rest stays in the files."""

    def __init__(self, parts: Sequence[_Part], counts: AuditCounts) -> None:
        self.report = counts
        self._parts = parts
        self._starts = np.concatenate([[0], np.cumsum([part.rows for part in parts])]).astype(np.int64)
        self.lengths: npt.NDArray[np.int32] = np.empty(self._starts[-1], np.int32)
        """[rows]: tokens of each row."""
        for start, part in zip(self._starts, parts, strict=False):
            self.lengths[start : start + part.rows] = np.diff(part.offsets[0 : part.rows + 1])

    @classmethod
    def of(cls, batches: Iterable[Batch], counts: AuditCounts | None = None) -> TokenizedRows:
        """Rows that are held in memory; `counts` where they are the first of more."""
        kept = list(batches)
        parts = [_Part(batch.counts.rows, batch.offsets, batch.ids, batch.trained) for batch in kept]
        return cls(parts, counts or sum((batch.counts for batch in kept), AuditCounts()))

    @classmethod
    def open(cls, paths: Sequence[Path], counts: AuditCounts) -> TokenizedRows:
        """The rows of the shards at `paths`, in order. ValueError or OSError where one is not whole."""
        return cls([part for path in paths for part in _stored_parts(path)], counts)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def skipped(self) -> int:
        return self.report.skipped

    @property
    def truncated(self) -> int:
        return self.report.truncated

    def ids(self, row: int) -> npt.NDArray[np.int32]:
        """Token ids of a row; not to be written to."""
        part, start, end = self._find(row)
        ids: npt.NDArray[np.int32] = part.ids[start:end]
        return ids

    def trained(self, row: int) -> npt.NDArray[np.bool_]:
        """Which of a row's tokens are trained."""
        part, start, end = self._find(row)
        first = start // 8
        unpacked = np.unpackbits(part.trained[first : -(-end // 8)], bitorder="little")
        return unpacked[start - 8 * first : end - 8 * first].view(np.bool_)

    def first(self, limit: int) -> Batch:
        """The first rows, at most `limit`; of their counts, those of rows and tokens alone."""
        rows = range(min(limit, len(self)))
        lengths = self.lengths[: len(rows)].astype(np.int64)
        trained = np.concatenate([self.trained(row) for row in rows] or [np.zeros(0, np.bool_)])
        return Batch(
            AuditCounts(read=len(rows), rows=len(rows), tokens=int(lengths.sum())),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            np.concatenate([self.ids(row) for row in rows] or [np.zeros(0, np.int32)]),
            np.packbits(trained, bitorder="little"),
        )

    def _find(self, row: int) -> tuple[_Part, int, int]:
        if not 0 <= row < len(self.lengths):
            raise IndexError(f"row {row} of {len(self.lengths)}")
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        part = self._parts[number]
        at = row - int(self._starts[number])
        start, end = part.offsets[at : at + 2].tolist()
        return part, start, end


@dataclass(frozen=True)
class _Part:
    """The rows of one batch; offsets, ids and trained as in Batch, each an array or a column of a file."""

    rows: int
    offsets: Any
    ids: Any
    trained: Any


@dataclass(frozen=True)
class _Column:
    """Values that lie one after another in a file, read slice by slice.

    Not mapped into memory: a look at one value of a mapped file may take in a megabyte around it, which counts as the
    process's own.
    """

    file: BinaryIO
    at: int
    """Where in the file, bytes."""
    dtype: npt.DTypeLike

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        size = np.dtype(self.dtype).itemsize
        wanted = (part.stop - part.start) * size
        data = os.pread(self.file.fileno(), wanted, self.at + part.start * size)
        if len(data) != wanted:
            raise OSError(f"{self.file.name} is shorter than it was")
        return np.frombuffer(data, self.dtype)


def _stored_parts(path: Path) -> Iterator[_Part]:
    """The batches of a shard. ValueError or OSError where it is not whole."""
    file = path.open("rb")
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # only to find the columns
    whole = pa.py_buffer(mapped)
    reader = pa.ipc.open_file(whole)
    for number in range(reader.num_record_batches):
        ids, trained = reader.get_batch(number).columns
        buffers = (ids.buffers()[1], ids.values.buffers()[1], trained.values.buffers()[1])
        columns = [
            _Column(file, 0 if buffer is None else buffer.address - whole.address, dtype)
            for buffer, dtype in zip(buffers, (np.int32, np.int32, np.uint8), strict=True)
        ]
        yield _Part(len(ids), *columns)
        mapped.madvise(mmap.MADV_DONTNEED)


def _create(path: Path) -> BinaryIO:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Between the two lines a deletion may take the empty folder away.
        with suppress(FileNotFoundError):
            return path.open("xb")
