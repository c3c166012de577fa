"""What is known of one hyperparameter, read from the field of the class that defines it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, get_args, get_origin

import annotated_types
from pydantic import ConfigDict, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

from tunesmith.frozen import Frozen

Value = str | int | float | bool | None


class Section(Frozen):
    """Hyperparameters that an order gives together, under the name `section`."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    section: ClassVar[str]


@dataclass(frozen=True)
class Chinese:
    """The help of a field in Chinese; the field's description is the English one."""

    text: str

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "x-description-zh": self.text}


@dataclass(frozen=True)
class Hyperparameter:
    """One public name with its type, bounds (both allowed), default and help."""

    name: str
    type: type
    default: Value
    help: str
    help_zh: str
    minimum: float | None = None
    maximum: float | None = None
    longest: int | None = None
    """Characters of a text at most."""
    choices: tuple[Value, ...] = ()
    optional: bool = False
    """Whether None (absent) is a value of its own."""
    supported: tuple[Value, ...] | None = None
    """The values that this version can run; any other is refused, not ignored. None: all of them."""

    @property
    def allowed(self) -> tuple[Value, ...]:
        """The values that can be given, where they are few; empty where there are bounds or nothing."""
        if self.supported is not None:
            return self.supported
        return (*self.choices, None) if self.choices and self.optional else self.choices

    @property
    def bounds(self) -> str:
        """`1 to 256`, `at most 1000 characters`; empty where there are no bounds."""
        if self.longest is not None:
            return f"at most {self.longest} characters"
        if self.minimum is None or self.maximum is None:
            return ""
        # Whole numbers are written out: 262144, not 2.62144e+05.
        return " to ".join(str(int(b)) if self.type is int else f"{b:g}" for b in (self.minimum, self.maximum))

    def is_within_bounds(self, value: Value) -> bool:
        """Whether a value of the right type lies within the bounds; None always does."""
        if isinstance(value, str):
            return self.longest is None or len(value) <= self.longest
        if value is None or self.minimum is None or self.maximum is None:
            return True
        return self.minimum <= value <= self.maximum


def definitions(definition: type[Section]) -> tuple[Hyperparameter, ...]:
    """The hyperparameters that `definition` defines, in its order."""
    return tuple(_read(name, field) for name, field in definition.model_fields.items())


def json_schema(definition: type[Section]) -> dict[str, Any]:
    """JSON Schema of an object with these hyperparameters, each with its help in both languages."""
    properties: Mapping[str, Mapping[str, Any]] = definition.model_json_schema()["properties"]
    bare = {name: {key: it for key, it in about.items() if key != "title"} for name, about in properties.items()}
    return {"type": "object", "additionalProperties": False, "properties": bare}


def _read(name: str, field: FieldInfo) -> Hyperparameter:
    annotation: Any = field.annotation
    parts = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    # A field that can only be None has a name alone in this version; what it will take is text.
    kind = next((part for part in parts if part is not NoneType), str)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return Hyperparameter(
        name=name,
        type=type(choices[0]) if choices else kind,
        default=field.default,
        help=field.description or "",
        help_zh=next(it.text for it in field.metadata if isinstance(it, Chinese)),
        minimum=next((float(it.ge) for it in field.metadata if isinstance(it, annotated_types.Ge)), None),  # type: ignore[arg-type]
        maximum=next((float(it.le) for it in field.metadata if isinstance(it, annotated_types.Le)), None),  # type: ignore[arg-type]
        longest=next((it.max_length for it in field.metadata if isinstance(it, annotated_types.MaxLen)), None),
        choices=choices,
        optional=NoneType in parts,
        supported=(None,) if parts == (NoneType,) else None,
    )
