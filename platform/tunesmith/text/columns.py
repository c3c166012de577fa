"""The formats that rows of text come in, told apart by a file's columns: one rule for the order and for the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tunesmith.errors import DataError, nearest
from tunesmith.hyperparameters.definitions import EncodingHyperparameters
from tunesmith.visible_text import visible

RowFormat = Literal["prompt_response", "messages", "sharegpt", "alpaca", "context_target", "text"]

_KNOWN: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "context_target": ("context", "target"),
}
"""Columns that tell a format; where several fit, the first."""

_FIELDS = ("prompt_field", "response_field", "history_field")


def find_format(
    columns: Sequence[str],
    hyperparameters: EncodingHyperparameters,
    *,
    training_type: str,
    file: str = "the file",
) -> RowFormat:
    """The format of a file's rows.

    The columns that `prompt_field` and `response_field` name come first, where both are there; then the known formats
    by their columns; in text-generation `prompt_field` alone is plain text. A column that was named by hand, which is
    one unlike the default, must be there. Raises DataError, which calls the file `file`.
    """
    usual = EncodingHyperparameters()
    named = [name for name in _FIELDS if getattr(hyperparameters, name) not in (None, getattr(usual, name))]
    for name in named:
        if getattr(hyperparameters, name) not in columns:
            raise _missing(name, columns, hyperparameters, file)
    by_hand = bool({*named} - {"history_field"})
    row_format = _by_columns(columns, hyperparameters, training_type=training_type, file=file, by_hand=by_hand)
    if "history_field" in named and row_format not in ("prompt_response", "alpaca"):
        raise DataError(
            f"history_field is {hyperparameters.history_field!r}, but the rows of {file} have the format {row_format}, "
            "which has no history of its own",
            fields=["hyperparameters.history_field"],
            hint="leave history_field out, or name prompt_field and response_field too",
            code="history_not_used",
        )
    return row_format


def _by_columns(
    columns: Sequence[str], hyperparameters: EncodingHyperparameters, *, training_type: str, file: str, by_hand: bool
) -> RowFormat:
    has_prompt = hyperparameters.prompt_field in columns
    has_response = hyperparameters.response_field in columns
    if has_prompt and has_response:
        return "prompt_response"
    known = next((known for known, needed in _KNOWN.items() if {*needed} <= {*columns}), None)
    if known is not None and not by_hand:
        return known
    if has_prompt and training_type == "text-generation":
        return "text"
    raise _missing("response_field" if has_prompt else "prompt_field", columns, hyperparameters, file)


def _missing(name: str, columns: Sequence[str], hyperparameters: EncodingHyperparameters, file: str) -> DataError:
    wanted = str(getattr(hyperparameters, name))
    return DataError(
        f"{file} has no column {wanted!r}; it has {visible(', '.join(columns), limit=2000)}",
        fields=[f"hyperparameters.{name}"],
        hint=nearest(wanted, columns) or f"set {name} to one of the file's columns",
        code="missing_column",
    )
