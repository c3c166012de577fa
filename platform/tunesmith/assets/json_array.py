"""A JSON array of objects of any length, read object by object."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_READ_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_TYPES = {"[": "list", '"': "str", "t": "bool", "f": "bool", "n": "NoneType", **dict.fromkeys("-0123456789", "number")}


class ArrayError(Exception):
    """The file is no JSON array of objects; the message says where."""


def read_array(path: Path, max_row_bytes: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The objects of the array in a UTF-8 file, each with its length; no more than one and a block are held."""
    with path.open("rb") as file:
        text = _Text(file, max_row_bytes)
        if (start := text.peek()) != "[":
            what = f"this one begins with {start!r}" if start else "this one is empty"
            raise ArrayError(f"a .json file holds an array of objects, {what}; one object a line is .jsonl")
        text.take()
        number, ended = 0, text.peek() == "]"
        while not ended:
            number += 1
            yield text.row(number)
            after = text.peek()
            if after not in ("]", ","):
                raise text.wrong(f"after row {number} there must be ',' or ']'")
            ended = after == "]"
            if not ended:
                text.take()
        text.take()
        if text.peek():
            raise text.wrong("there is more after the end of the array")


class _Text:
    """The file's text around the place that is read."""

    def __init__(self, file: BinaryIO, max_row_bytes: int) -> None:
        self._max_row_bytes = max_row_bytes
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0
        self._line, self._column = 1, 0
        """The line that `_text` begins in, and how many of its characters stand before."""

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space is not None else self._at
            if self._at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def take(self) -> None:
        self._at += 1

    def row(self, number: int) -> tuple[dict[str, Any], int]:
        """The object that begins here, and its length."""
        start = self.peek()
        if start in _TYPES:
            raise self.wrong(f"row {number} must be an object with columns, got a {_TYPES[start]}")
        while True:
            try:
                row, end = self._parse(self._text, self._at)
            except json.JSONDecodeError as error:
                # It may only be cut off.
                if len(self._text) - self._at < self._max_row_bytes and self._fill():
                    continue
                too_long = len(self._text) - self._at >= self._max_row_bytes
                allowed = f", or longer than {self._max_row_bytes >> 20} MiB" if too_long else ""
                self._at = error.pos
                why = error.msg.removesuffix(" starting at")
                raise self.wrong(f"row {number} is not JSON{allowed}: {why}") from None
            except RecursionError:
                raise self.wrong(f"row {number} is nested too deeply") from None
            except ValueError as error:
                raise self.wrong(f"row {number} is not JSON: {error}") from None
            length = end - self._at
            self._at = end
            return row, length

    def wrong(self, what: str) -> ArrayError:
        """An error that names the place that is read just now."""
        before = self._text[: self._at]
        line, start = self._line + before.count("\n"), before.rfind("\n")
        column = self._at - start if start >= 0 else self._column + self._at + 1
        end = "" if self._at < len(self._text) else ", where the file ends"
        return ArrayError(f"{what} (line {line}, column {column}{end})")

    def _fill(self) -> bool:
        """Read on; False at the end of the file."""
        data = self._file.read(max(_READ_BYTES, len(self._text) - self._at))
        try:
            more = self._decode(data, not data)
        except UnicodeDecodeError as error:
            whole = self._text.count("\n") + error.object[: error.start].count(b"\n")
            raise ArrayError(f"line {self._line + whole} is not UTF-8: {error.reason}") from None
        if not data:
            return False
        start = self._text.rfind("\n", 0, self._at)
        self._column = self._at - start - 1 if start >= 0 else self._column + self._at
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + more, 0
        return True
