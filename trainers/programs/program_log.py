"""What a user's program writes to its output, on its way to storage: any bytes, any length, in bounded memory."""

from __future__ import annotations

import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from trainers.isolation.program import Program
from tunesmith.errors import StorageError
from tunesmith.storage.segments import SegmentWriter

MAX_LINE_BYTES = 16 << 10
"""A longer line is cut, and the log says so."""
MAX_LOG_BYTES = 256 << 20
"""What is kept of one worker's log in one attempt. The log says where it was cut."""
MAX_WAITING_BYTES = 16 << 20
"""How much may wait for a storage that does not answer. Lines beyond that are left out and counted."""
TAIL_LINES = 20
_TAIL_LINE_BYTES = 500
_READ_BYTES = 1 << 16
_FLUSH_BYTES = 1 << 20

_LOSS = re.compile(rb"\bLOSS\b[^0-9+.\-\n]{0,16}?([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan\b|inf\b)")
_STEP = re.compile(rb"\b(?:step|iteration|iter|epoch)\b[ :=]{0,3}(\d{1,15})\b", re.IGNORECASE)

logger = logging.getLogger(__name__)


class ProgramLog:
    """Reads a program's output in a thread of its own and writes it to a segmented log, line by line.

    A program that writes faster than storage takes it waits in its writes. Thread-safe.
    """

    def __init__(self, segments: SegmentWriter) -> None:
        self._segments = segments
        self._lock = threading.Lock()
        self._tail: deque[bytes] = deque(maxlen=TAIL_LINES)
        self._losses: list[tuple[int, float]] = []
        self._lines_with_loss = 0
        self._written, self._waiting, self._left_out = 0, 0, 0

    @contextmanager
    def following(self, program: Program) -> Iterator[None]:
        """Read what a program writes; when the context is left, the program has ended and all of it is read."""
        with program:
            thread = self.follow(program.output)
            try:
                yield
            finally:
                program.end()
                thread.join()

    def follow(self, output: IO[bytes]) -> threading.Thread:
        """Read `output` to its end, in the thread that is returned."""
        thread = threading.Thread(target=self._read, args=(output,), name="program log", daemon=True)
        thread.start()
        return thread

    def tail(self) -> str:
        """The newest lines, each cut where it is long, without what would steer a terminal or break a record."""
        with self._lock:
            lines = [line.decode(errors="replace").expandtabs() for line in self._tail]
        return "\n".join("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line) for line in lines)

    def losses(self) -> list[tuple[int, float]]:
        """Steps and losses of lines with the keyword LOSS since the last call; at most some hundred."""
        with self._lock:
            losses, self._losses = self._losses, []
        return losses

    def write(self, line: bytes) -> None:
        """One line, without its newline."""
        with self._lock:
            self._tail.append(line[:_TAIL_LINE_BYTES])
            self._look_for_loss(line)
        size = len(line) + 1
        if self._written >= MAX_LOG_BYTES or self._waiting >= MAX_WAITING_BYTES:
            self._left_out += 1
            return
        if self._written + size >= MAX_LOG_BYTES:
            line += b"\n[the log has %d MiB; no more of it is kept]" % (MAX_LOG_BYTES >> 20)
        elif self._left_out:
            line = b"[%d lines are left out: storage did not take them in time]\n" % self._left_out + line
            self._left_out = 0
        self._segments.write(line + b"\n")
        self._written += size
        self._waiting += size
        if self._waiting >= _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        try:
            self._segments.flush()
        except StorageError as error:
            logger.warning("a program's log waits for storage: %s", error)
        else:
            self._waiting = 0

    def _look_for_loss(self, line: bytes) -> None:
        found = _LOSS.search(line) if b"LOSS" in line else None
        if found is None:
            return
        self._lines_with_loss += 1
        step = _STEP.search(line)
        if len(self._losses) < 500:
            self._losses.append((int(step[1]) if step else self._lines_with_loss, float(found[1])))
        else:
            self._losses[-1] = (int(step[1]) if step else self._lines_with_loss, float(found[1]))

    def _read(self, output: IO[bytes]) -> None:
        lines = BoundedLines(self.write)
        while data := output.read1(_READ_BYTES) if hasattr(output, "read1") else output.read(_READ_BYTES):
            lines.feed(data)
        lines.end()


class BoundedLines:
    """Puts pieces of output together to lines of at most MAX_LINE_BYTES. A carriage return ends a line as well."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take
        self._line = bytearray()
        self._cut = 0

    def feed(self, data: bytes) -> None:
        *whole, rest = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for part in whole:
            self._add(part)
            self.end(empty=True)
        self._add(rest)

    def end(self, *, empty: bool = False) -> None:
        """The line is whole; `empty`: it counts even without anything in it."""
        if self._cut:
            self._line += b" [%d bytes of this line are left out]" % self._cut
        if self._line or empty:
            self._take(bytes(self._line))
        self._line.clear()
        self._cut = 0

    def _add(self, part: bytes) -> None:
        room = MAX_LINE_BYTES - len(self._line)
        self._line += part[:room]
        self._cut += max(0, len(part) - room)
