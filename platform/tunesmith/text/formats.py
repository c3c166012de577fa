"""Rows of every known format as turns: what was asked and answered, in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.errors import DataError
from tunesmith.hyperparameters.definitions import EncodingHyperparameters
from tunesmith.text.columns import RowFormat

Role = Literal["system", "user", "assistant", "text"]

_ROLES: dict[str, dict[str, Role]] = {
    "messages": {"system": "system", "user": "user", "assistant": "assistant"},
    "conversations": {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "assistant": "assistant",
    },
}
_NOT_READ = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight")
"""Keys of a turn that would change what is trained. A turn that has one is refused, not trained without it."""


@dataclass(frozen=True)
class Turn:
    role: Role
    """`text` is plain text, the only turn of its example."""
    text: str


@dataclass(frozen=True)
class Example:
    """One row: an optional system turn, then the user and the assistant in turn; the last turn is the assistant's."""

    turns: list[Turn]


def turns(
    row: Mapping[str, Any], row_format: RowFormat, hyperparameters: EncodingHyperparameters, number: int | str
) -> Example | None:
    """The turns of a row; None where it has no prompt or no response and is to be skipped.

    `number` is the row's, or words for its place (`a.jsonl: line 7`). DataError names the place and the column of what
    is not as its format says. A last question without an answer is left out: nothing of it would be trained.
    """
    cells = _Cells(row, f"row {number}" if isinstance(number, int) else number)
    found = _READERS[row_format](cells, hyperparameters)
    return Example(found) if found else None


@dataclass(frozen=True)
class _Cells:
    """A row, and how to get typed cells out of it."""

    row: Mapping[str, Any]
    place: str

    def text(self, column: str, parameter: str | None = None) -> str:
        """The text in `column`; empty where there is none."""
        value = self.row.get(column)
        return "" if value is None else self.as_text(value, column, f"column {column!r}", parameter)

    def as_text(self, value: Any, column: str, what: str, parameter: str | None = None) -> str:
        if not isinstance(value, str):
            raise self.wrong(f"{what} must hold text, got {type(value).__name__}", column, parameter)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            lone = f"\\u{ord(value[error.start]):04x}"
            raise self.wrong(f"{what} holds {lone}, half a character", column, parameter) from None
        return value

    def items(self, column: str, allowed: str, parameter: str | None = None) -> list[Any]:
        """The list in `column`, or the list that is written there as JSON; empty where there is none."""
        value = self.row.get(column)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise self.wrong(f"column {column!r} must hold {allowed}, got other text", column, parameter) from None
        if not value:
            return []
        if not isinstance(value, list):
            raise self.wrong(f"column {column!r} must hold {allowed}, got {type(value).__name__}", column, parameter)
        return value

    def wrong(self, what: str, column: str, parameter: str | None = None) -> DataError:
        return DataError(f"{self.place}: {what}", fields=[f"hyperparameters.{parameter}" if parameter else column])


def _prompt_response(cells: _Cells, h: EncodingHyperparameters) -> list[Turn]:
    prompt = cells.text(h.prompt_field, "prompt_field")
    response = cells.text(h.response_field, "response_field")
    history = _history(cells, h.history_field) if h.history_field is not None else []
    return _asked_and_answered(history, prompt, response)


def _alpaca(cells: _Cells, h: EncodingHyperparameters) -> list[Turn]:
    parts = (cells.text("instruction"), cells.text("input"))
    prompt = "\n".join(part for part in parts if part.strip())
    history = _history(cells, h.history_field or "history")
    return _asked_and_answered([*_system(cells), *history], prompt, cells.text("output"))


def _context_target(cells: _Cells, h: EncodingHyperparameters) -> list[Turn]:
    """`context` is the question, or a list: question, answer, …, question."""
    context = cells.row.get("context")
    if not isinstance(context, list):
        return _asked_and_answered([], cells.text("context"), cells.text("target"))
    texts = [cells.as_text(text, "context", f"text {n} of column 'context'") for n, text in enumerate(context, start=1)]
    if len(texts) % 2 == 0:
        if not texts:
            return []
        raise cells.wrong(
            f"column 'context' must hold an odd number of texts, question, answer, …, question, got {len(texts)}",
            "context",
        )
    before = [Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts[:-1])]
    return _asked_and_answered(before, texts[-1], cells.text("target"))


def _text(cells: _Cells, h: EncodingHyperparameters) -> list[Turn]:
    text = cells.text(h.prompt_field, "prompt_field")
    return [Turn("text", text)] if text.strip() else []


def _asked_and_answered(before: Sequence[Turn], prompt: str, response: str) -> list[Turn]:
    if not prompt.strip() or not response.strip():
        return []
    return [*before, Turn("user", prompt), Turn("assistant", response)]


def _system(cells: _Cells) -> list[Turn]:
    text = cells.text("system")
    return [Turn("system", text)] if text.strip() else []


def _history(cells: _Cells, column: str) -> list[Turn]:
    allowed = "a list of [question, answer] pairs of text"
    found: list[Turn] = []
    for number, pair in enumerate(cells.items(column, allowed, "history_field"), start=1):
        what = f"item {number} of column {column!r}"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            got = f"one of {len(pair)}" if isinstance(pair, list | tuple) else type(pair).__name__
            needed = f"{what} must be a pair, because the column must hold {allowed}"
            raise cells.wrong(f"{needed}, got {got}", column, "history_field")
        question, answer = (cells.as_text(text, column, what, "history_field") for text in pair)
        found += [Turn("user", question), Turn("assistant", answer)]
    return found


def _messages(cells: _Cells, h: EncodingHyperparameters) -> list[Turn]:
    return _conversation(cells, "messages", "role", "content")


def _sharegpt(cells: _Cells, h: EncodingHyperparameters) -> list[Turn]:
    return _conversation(cells, "conversations", "from", "value")


def _conversation(cells: _Cells, column: str, role_key: str, text_key: str) -> list[Turn]:
    allowed = f"a list of objects with {role_key!r} and {text_key!r}"
    said = [
        _turn(cells, column, item, number=number, keys=(role_key, text_key))
        for number, item in enumerate(cells.items(column, allowed), start=1)
    ]
    if not said:
        return []
    outside = _system(cells)
    if outside and said[0].role == "system":
        raise cells.wrong(f"there is a system text in column 'system' and in column {column!r}", column)
    for number, turn in enumerate(said, start=1):
        first = number - (said[0].role == "system")
        expected = "system" if first == 0 else ("user", "assistant")[(first - 1) % 2]
        if turn.role != expected:
            raise cells.wrong(
                f"turn {number} of column {column!r} is the {turn.role}'s and should be the {expected}'s; after the "
                "system's, user and assistant take turns",
                column,
            )
    if not any(turn.role == "assistant" for turn in said):
        raise cells.wrong(f"column {column!r} has no turn of the assistant, so there is nothing to train", column)
    if said[-1].role == "user":
        said.pop()
    if not all(turn.text.strip() for turn in said if turn.role != "system"):
        return []
    return [*outside, *said]


def _turn(cells: _Cells, column: str, item: Any, *, number: int, keys: tuple[str, str]) -> Turn:
    what = f"turn {number} of column {column!r}"
    role_key, text_key = keys
    if not isinstance(item, dict) or role_key not in item:
        raise cells.wrong(f"{what} must be an object with {role_key!r} and {text_key!r}", column)
    roles = _ROLES[column]
    role = item[role_key]
    if not isinstance(role, str) or role not in roles:
        raise cells.wrong(f"{what} has the role {role!r}; known are {', '.join(roles)}", column)
    for key in _NOT_READ:
        if item.get(key) not in (None, "", []) and (key != "weight" or item[key] != 1):
            raise cells.wrong(f"{what} has {key!r}, which is not trained in this version", column)
    text = item.get(text_key)
    return Turn(roles[role], "" if text is None else cells.as_text(text, column, what))


_READERS: dict[RowFormat, Callable[[_Cells, EncodingHyperparameters], list[Turn]]] = {
    "prompt_response": _prompt_response,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "context_target": _context_target,
    "text": _text,
}
