"""JSON with the line of every value, and without what it leaves open: keys given twice, NaN, text without UTF-8."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Place = tuple[str | int, ...]
"""The way to a value: keys and positions from 0."""

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]|[^\s{}\[\],:"]+')
_NO_NUMBERS = ("NaN", "Infinity", "-Infinity")


@dataclass
class Located:
    """A document, and where in its text everything stands."""

    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    faults: list[tuple[Place, int, str]] = field(default_factory=list)
    """What is wrong with it: place, line (from 1), sentence."""

    def line(self, place: Place) -> int:
        """Of the value at `place`, or of the nearest one around it."""
        while place not in self.lines and place:
            place = place[:-1]
        return self.lines.get(place, 1)


def read_json(text: str) -> Located:
    """Read a document; what cannot be read has value None and a fault that names its line and column."""
    document = Located()
    try:
        document.value = json.loads(text)
    except json.JSONDecodeError as error:
        document.faults.append(((), error.lineno, f"not JSON: {error.msg} at column {error.colno}"))
        return document
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        document.faults.append(((), 1, f"not JSON that can be read: {why}"))
        return document
    try:
        tokens = _tokens(text)
        _locate(next(tokens), tokens, (), document)
    except RecursionError:
        document.faults.append(((), 1, "not JSON that can be read: nested too deeply"))
    return document


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    """Tokens of text that is known to be JSON, with their lines; commas and colons are left out."""
    line, last = 1, 0
    for match in _TOKEN.finditer(text):
        line += text.count("\n", last, match.start())
        last = match.start()
        yield match[0], line


def _locate(token: tuple[str, int], tokens: Iterator[tuple[str, int]], place: Place, document: Located) -> None:
    """Note the lines of the value that begins with `token`, and of all below it."""
    text, line = token
    document.lines.setdefault(place, line)
    if text == "{":
        keys: set[str] = set()
        while (found := next(tokens))[0] != "}":
            key = _text(found, place, document)
            if key in keys:
                document.faults.append(((*place, key), found[1], "is given twice"))
            keys.add(key)
            document.lines[(*place, key)] = found[1]
            _locate(next(tokens), tokens, (*place, key), document)
    elif text == "[":
        number = 0
        while (found := next(tokens))[0] != "]":
            _locate(found, tokens, (*place, number), document)
            number += 1
    elif text in _NO_NUMBERS:
        document.faults.append((place, line, f"must be a number, got {text}"))
    elif text.startswith('"'):
        _text(token, place, document)


def _text(token: tuple[str, int], place: Place, document: Located) -> str:
    decoded: str = json.loads(token[0])
    try:
        decoded.encode()
    except UnicodeEncodeError:
        document.faults.append((place, token[1], "holds text that has no UTF-8 form (a lone surrogate)"))
    return decoded
