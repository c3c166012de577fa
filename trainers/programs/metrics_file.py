"""The metrics file of a user's program, followed as it is written: a line each of `iteration|loss|throughput`."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

MAX_QUOTED = 10
"""How many malformed lines are quoted. The number of the others is reported at the end."""
MAX_POINTS = 500
"""How many points of one look are kept: evenly spaced, and always the last one."""
MAX_BYTES = 1 << 30
"""What is read of the file at most."""
_MAX_LINE_BYTES = 4096
_READ_BYTES = 1 << 20
_READS = 64

# Possessive, so that a line that does not match takes no longer than one that does.
_NUMBER = rb"[-+]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?"
_GAP = rb"[ \t]*+"
_TEXT = _GAP + rb"(\d{1,15})" + _GAP + rb"\|" + _GAP + rb"(" + _NUMBER + rb"|nan|[-+]?inf)" + _GAP
_TEXT += rb"\|" + _GAP + rb"(" + _NUMBER + rb")" + _GAP + rb"\r?"
_LINE = re.compile(_TEXT, re.IGNORECASE)
_LINES = re.compile(rb"(?:" + re.sub(rb"\((?!\?)", b"(?:", _TEXT) + rb"\n)*+", re.IGNORECASE)
"""Lines that are all well-formed: of very many, only those are parsed that are kept."""


@dataclass(frozen=True)
class Point:
    """One line."""

    step: int
    loss: float
    throughput: float


@dataclass
class Look:
    """What was found since the previous look."""

    points: list[Point] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)
    """Lines to be quoted, as `line N: TEXT`."""


class MetricsFile:
    """Reads on where it was; never more than some MiB at once. The file is the program's: it may be anything."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place, self._number = 0, 0
        self._rest = b""
        self._too_long = False
        self.malformed_lines = 0
        self.has_more = False
        """Whether the last look left something for the next one."""
        self.is_cut = False
        """Whether it has grown beyond MAX_BYTES."""
        self.seen = False
        """Whether it ever held a whole line."""

    def look(self, *, at_end: bool = False) -> Look:
        """What is new. `at_end`: the program has ended, and a last line without a newline counts."""
        look = Look()
        try:
            # Neither a link nor a pipe that the program may have put there is followed.
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return look
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return look
            if status.st_size < self._place:
                # Written anew.
                self._place, self._number, self._rest, self._too_long = 0, 0, b"", False
            for _ in range(_READS):
                data = os.pread(descriptor, min(_READ_BYTES, MAX_BYTES - self._place), self._place)
                if not data:
                    break
                self._place += len(data)
                self._take(data, look)
            self.is_cut = status.st_size > MAX_BYTES
            self.has_more = self._place < min(status.st_size, MAX_BYTES)
        finally:
            os.close(descriptor)
        if at_end and self._rest and not self.has_more:
            self._take(b"\n", look)
        return look

    def _take(self, data: bytes, look: Look) -> None:
        text = self._rest + data
        *lines, self._rest = text.split(b"\n")
        found = []
        are_short = all(len(line) <= _MAX_LINE_BYTES for line in lines)
        if are_short and not self._too_long and _LINES.fullmatch(text, 0, len(text) - len(self._rest)):
            self._number += len(lines)
            self.seen = self.seen or bool(lines)
            found = [match for line in _evenly(lines) if (match := _LINE.fullmatch(line))]
            lines = []
        for line in lines:
            self._number += 1
            self.seen = True
            match = None if self._too_long or len(line) > _MAX_LINE_BYTES else _LINE.fullmatch(line)
            self._too_long = False
            if match is not None:
                found.append(match)
            elif line.strip():
                self._quote(line, look)
        if len(self._rest) > _MAX_LINE_BYTES:
            self._rest, self._too_long = self._rest[:_MAX_LINE_BYTES], True
        look.points += [Point(int(m[1]), float(m[2]), float(m[3])) for m in _evenly(found)]
        if len(look.points) > 2 * MAX_POINTS:
            look.points = _evenly(look.points)

    def _quote(self, line: bytes, look: Look) -> None:
        self.malformed_lines += 1
        if self.malformed_lines <= MAX_QUOTED:
            text = line[:200].decode(errors="backslashreplace")
            look.malformed.append(f"line {self._number}: {text!r}")


def _evenly(items: list[T]) -> list[T]:
    """At most MAX_POINTS of them, and always the last one."""
    if len(items) <= MAX_POINTS:
        return items
    stride = -(-len(items) // MAX_POINTS)
    return items[::-stride][::-1]
