"""Hyperparameters as a user gave them: checked, and the defaults filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from tunesmith.errors import SpecError, nearest
from tunesmith.hyperparameters.definitions import SECTIONS
from tunesmith.hyperparameters.field import Hyperparameter, Section, Value, definitions
from tunesmith.visible_text import visible

S = TypeVar("S", bound=Section)


def resolve(definition: type[S], given: Mapping[str, Any], *, known: Sequence[Hyperparameter] | None = None) -> S:
    """`given`, checked, with the defaults of the others; `known` has other defaults and narrower bounds for a model.

    Raises SpecError for an unknown name (with the nearest known one), a wrong type, a value out of bounds, or one that
    this version cannot run.
    """
    table = {h.name: h for h in (definitions(definition) if known is None else known)}
    _check_names(given, table, definition.section)
    values = {name: given.get(name, h.default) for name, h in table.items()}
    try:
        resolved = definition.model_validate(values)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise refusal(table[name], values[name], definition.section) from None
    for name, h in table.items():
        if not h.is_within_bounds(values[name]):
            raise refusal(h, values[name], definition.section)
    return resolved


def is_of_type(h: Hyperparameter, value: Any) -> bool:
    """Whether `value` has the type of `h`. A whole number is a float too; None is of any optional one's type."""
    if value is None:
        return h.optional
    return type(value) is h.type or (h.type is float and type(value) is int)


def refusal(h: Hyperparameter, value: Any, section: str) -> SpecError:
    """Why `value` cannot be that of `h`: its type, or what is allowed."""
    code = "invalid_hyperparameter"
    if not is_of_type(h, value) or value != value:  # a NaN differs from itself
        allowed = f"must be of type {h.type.__name__}"
    elif h.supported is not None:
        allowed, code = f"can only be {_listed(h.supported)} in this version", "not_supported"
    elif h.choices:
        allowed = f"must be one of {_listed(h.choices)}"
    else:
        allowed = f"must be {h.bounds or 'a finite number'}"
    return SpecError(
        f"{h.name} {allowed}, got {visible(repr(value), limit=200)}",
        fields=[f"{section}.{h.name}"],
        hint=f"{h.name}: {h.help}",
        code=code,
    )


def _check_names(given: Mapping[str, Any], known: Mapping[str, Hyperparameter], section: str) -> None:
    for name in given:
        if name not in known:
            raise SpecError(
                f"there is no hyperparameter {visible(repr(name), limit=100)} in {section}",
                fields=[f"{section}.{visible(name, limit=100)}"],
                hint=_elsewhere(name, section) or nearest(name, known) or f"known are: {', '.join(known)}",
                code="unknown_hyperparameter",
            )


def _elsewhere(name: str, section: str) -> str | None:
    for other in SECTIONS:
        if other.section != section and name in other.model_fields:
            return f"{name} belongs under {other.section}"
    return None


def _listed(values: Sequence[Value]) -> str:
    return ", ".join("absent" if value is None else str(value) for value in values)
