"""The forms that rows of text come in, told apart by a file's columns: one rule for the order and for the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from tunesmith.errors import DataError, nearest
from tunesmith.hyperparameters import GUIDE

RowFormat = Literal["prompt_response", "messages", "sharegpt", "alpaca", "context_target", "text"]
ROW_FORMATS: tuple[RowFormat, ...] = get_args(RowFormat)

_KNOWN: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "context_target": ("context", "target"),
}
"""Columns that tell a form; where several fit, the first."""

_FIELDS = ("prompt_field", "response_field", "history_field")
_USUAL = {h.name: h.default for h in GUIDE if h.name in _FIELDS}


def find_format(
    columns: Sequence[str], hyperparameters: Mapping[str, Any], *, training_type: str, file: str = "the file"
) -> RowFormat:
    """The form of a file's rows.

    The columns named by `prompt_field` and `response_field` come first where both are there; then the known forms by
    their columns; in text-generation `prompt_field` alone is plain text. A column that was named by hand, that is
    unlike the default, must be there. Raises DataError, which calls the file `file`.
    """
    named = [name for name in _FIELDS if hyperparameters.get(name) not in (None, _USUAL[name])]
    for name in named:
        if hyperparameters[name] not in columns:
            raise _missing(name, columns, hyperparameters, file)
    form = _form(columns, hyperparameters, training_type, file, by_hand=bool({*named} - {"history_field"}))
    if "history_field" in named and form not in ("prompt_response", "alpaca"):
        raise DataError(
            f"history_field is {hyperparameters['history_field']!r}, but the rows of {file} are of the form {form}, "
            "which has no history of its own",
            fields=["hyperparameters.history_field"],
            hint="leave history_field out, or name prompt_field and response_field too",
            code="history_not_used",
        )
    return form


def _form(
    columns: Sequence[str], hyperparameters: Mapping[str, Any], training_type: str, file: str, *, by_hand: bool
) -> RowFormat:
    has_prompt, has_response = (hyperparameters[name] in columns for name in _FIELDS[:2])
    if has_prompt and has_response:
        return "prompt_response"
    known = next((form for form, needed in _KNOWN.items() if {*needed} <= {*columns}), None)
    if known is not None and not by_hand:
        return known
    if has_prompt and training_type == "text-generation":
        return "text"
    raise _missing("response_field" if has_prompt else "prompt_field", columns, hyperparameters, file)


def _missing(name: str, columns: Sequence[str], hyperparameters: Mapping[str, Any], file: str) -> DataError:
    wanted = str(hyperparameters[name])
    return DataError(
        f"{file} has no column {wanted!r}; it has {', '.join(columns)}",
        fields=[f"hyperparameters.{name}"],
        hint=nearest(wanted, columns) or f"set {name} to one of the file's columns",
        code="missing_column",
    )
