"""`train_params.json`: a model's own methods of training and their hyperparameters (docs/contracts.md, section 4)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from tunesmith.assets.located_json import Place, read_json
from tunesmith.bounds import MAX_TEXT, MAX_VALUES, value_fault
from tunesmith.frozen import Frozen
from tunesmith.visible_text import visible

TYPES: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}

MAX_METHODS = 50
"""Ways of training that one model may have."""

_NAME = re.compile(r"[A-Za-z0-9_]{1,64}", re.ASCII)


def _check_name(value: Any) -> str:
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise PydanticCustomError("name", "must be 1 to 64 letters, digits and '_'")
    return value


Name = Annotated[str, BeforeValidator(_check_name)]


class Parameter(Frozen):
    """One hyperparameter of a method. Keys beyond these are kept, and mean nothing to the platform."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: Name
    type: Literal["int", "float", "str", "bool"]
    required: bool = False
    """Whether it cannot be left out."""
    default: int | float | str | bool | None = None
    """Used where none is given. Without a default, a hyperparameter that is not required is left out."""
    help: str = Field(default="", max_length=MAX_TEXT)

    @field_validator("default", mode="before")
    @classmethod
    def _fits_its_type(cls, value: Any, info: ValidationInfo) -> Any:
        kind = info.data.get("type")  # missing where it is wrong itself
        if kind is None:
            return None
        if value is not None and not _fits(value, kind):
            raise PydanticCustomError("default", "must be of type {kind}", {"kind": kind})
        if (why := value_fault(value)) is not None:
            raise PydanticCustomError("default", "{why}", {"why": why})
        return value


class Method(Frozen):
    """One way of training that `train.py` knows."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: Name
    hyperparameters: list[Parameter] = Field(max_length=MAX_VALUES)


class _Methods(Frozen):
    """`train_params.json`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    training_methods: list[Method] = Field(min_length=1, max_length=MAX_METHODS)


def read_methods(text: str, path: str) -> tuple[list[Method], list[str]]:
    """The methods in the text of the file at `path`, and what is wrong with it, each with file, line and key."""
    document = read_json(text)
    methods: list[Method] = []
    faults: list[tuple[Place, str]] = []
    if not document.faults or document.value is not None:
        try:
            methods = _Methods.model_validate(document.value).training_methods
            faults = list(_names_given_twice(methods))
        except ValidationError as error:
            faults = [
                (item["loc"] or ("training_methods",), _sentence(item)) for item in error.errors(include_url=False)
            ]
    located = [*document.faults, *((place, document.line(place), why) for place, why in faults)]
    problems = [
        f"{path}:{line}: {_path(place)}{why}" for place, line, why in sorted(located, key=lambda fault: fault[1])
    ]
    return ([] if problems else methods), problems


def _names_given_twice(methods: list[Method]) -> Iterator[tuple[Place, str]]:
    lists: list[tuple[Place, str, Sequence[Method | Parameter]]] = [(("training_methods",), "method", methods)]
    for number, method in enumerate(methods):
        lists.append((("training_methods", number, "hyperparameters"), "hyperparameter", method.hyperparameters))
    for place, what, named in lists:
        seen: set[str] = set()
        for number, each in enumerate(named):
            if each.name in seen:
                yield (*place, number, "name"), f"{each.name!r} is the name of another {what} already"
            seen.add(each.name)


def _sentence(item: ErrorDetails) -> str:
    """What is wrong at one place, out of pydantic's words for it."""
    if item["type"] == "too_short":
        return "is empty; at least one method is needed"
    if item["type"] == "too_long":
        return f"has {item['ctx']['actual_length']} entries; allowed are {item['ctx']['max_length']}"
    if item["type"] == "string_too_long":
        return f"has more than {item['ctx']['max_length']} characters"
    if item["loc"] in ((), ("training_methods",)):
        return 'must be a list of methods, in an object: {"training_methods": [{"name": …, "hyperparameters": […]}]}'
    if item["type"] == "missing":
        return "is missing; it may be []" if item["loc"][-1] == "hyperparameters" else "is missing"
    return f"{_ALLOWED.get(item['type'], item['msg'])}, got {_short(item['input'])}"


_ALLOWED = {
    "model_type": "must be an object",
    "list_type": "must be a list",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "literal_error": f"must be {', '.join(TYPES)}",
}
"""By pydantic's name of an error, what a value may be."""


def _fits(value: Any, kind: str) -> bool:
    """Whether a default is of its type: a bool is not an int, an int is a float too, NaN is not a number."""
    if kind == "float" and type(value) is int:
        value = float(value) if abs(value) < 1 << 1000 else math.inf
    return type(value) is TYPES[kind] and not (isinstance(value, float) and not math.isfinite(value))


def _path(place: Place) -> str:
    """`training_methods[0].name: `."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return f"{text.removeprefix('.')}: " if place else ""


def _short(value: Any) -> str:
    return visible(repr(value), limit=80)
