"""How long texts and how large numbers may be that come in over the API, in an order's file, or in a model's own files.

What is longer than anybody needs is refused where it comes in: nobody after that has to think of a name of a megabyte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from tunesmith.visible_text import is_visible, visible

MAX_LINE = 255
"""Characters of a name, or of what names one."""
MAX_SOURCE = 4096
"""Characters of a path or URL."""
MAX_COLUMN = 1000
"""Characters of the name of a column."""
MAX_TEXT = 20_000
"""Characters of a text that becomes part of every row, such as a template."""
MAX_WHOLE = 2**63 - 1
"""Whole numbers lie between this and its negative."""
MAX_NUMBER = 1.7e308
"""Other numbers likewise: what is finite."""
MAX_RUN_TIME_S = 366 * 24 * 3600
MAX_VALUES = 200
"""Hyperparameters that are given together."""
MAX_VALUE_NAME = 64
"""Characters of the name of one."""
MAX_CUSTOM_TEXT = 100_000
"""Characters of a hyperparameter of a model's own."""
MAX_DEPTH = 32
"""Lists and objects in each other, in a request's body."""


def _one_line(text: str) -> str:
    if not is_visible(text):
        raise PydanticCustomError("not_visible", "must be one line without control characters")
    return text


Line = Annotated[str, Field(max_length=MAX_LINE), AfterValidator(_one_line)]
"""A name, or what names something: one line of text that is shown as it is."""

SourceText = Annotated[str, Field(max_length=MAX_SOURCE), AfterValidator(_one_line)]
"""A path or URL."""


def check_values(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Hyperparameters as they come in: how many, and what they hold; which there are, is known later."""
    if len(given) > MAX_VALUES:
        raise PydanticCustomError(
            "too_many", "has {n} entries; allowed are {most}", {"n": len(given), "most": MAX_VALUES}
        )
    for name, value in given.items():
        if len(name) > MAX_VALUE_NAME or not is_visible(name):
            raise PydanticCustomError(
                "name", "names are one line of at most {most} characters; one begins with {name}",
                {"most": MAX_VALUE_NAME, "name": repr(visible(name, limit=MAX_VALUE_NAME))},
            )  # fmt: skip
        why = value_fault(value)
        if why is not None:
            raise PydanticCustomError("value", "{name} {why}", {"name": name, "why": why})
    return given


def value_fault(value: Any) -> str | None:
    """Why a value is out of all bounds, as the end of a sentence; None where it is not."""
    if isinstance(value, str) and len(value) > MAX_CUSTOM_TEXT:
        return f"has {len(value)} characters; allowed are {MAX_CUSTOM_TEXT}"
    if isinstance(value, int) and not -MAX_WHOLE <= value <= MAX_WHOLE:
        return f"must be a whole number from {-MAX_WHOLE} to {MAX_WHOLE}"
    if isinstance(value, float) and abs(value) > MAX_NUMBER:
        return "must be a finite number"
    return None


VALUES_SCHEMA: dict[str, Any] = {
    "maxProperties": MAX_VALUES,
    "propertyNames": {"maxLength": MAX_VALUE_NAME},
    "additionalProperties": {
        "anyOf": [
            {"type": "string", "maxLength": MAX_CUSTOM_TEXT},
            {"type": "integer", "minimum": -MAX_WHOLE, "maximum": MAX_WHOLE},
            {"type": "number", "minimum": -MAX_NUMBER, "maximum": MAX_NUMBER},
            {"type": "boolean"},
            {"type": "null"},
        ]
    },
}
"""JSON Schema of the same, for an object whose names are a model's own."""
