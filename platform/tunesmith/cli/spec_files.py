"""An order as written by a user: a YAML or JSON file, and flags over it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.assets.located_yaml import YamlError, read_yaml
from tunesmith.errors import SpecError

if TYPE_CHECKING:
    from tunesmith.hyperparameters.field import Hyperparameter, Value

_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def read_order(file: str) -> dict[str, Any]:
    """The document in `file` (`-`: stdin). SpecError where it is not a mapping in YAML or JSON."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        document = read_yaml(text).value
    except YamlError as error:
        where = file if error.line is None else f"{file}:{error.line}"
        raise SpecError(f"{where}: neither YAML nor JSON that can be read: {error.why}") from None
    if not isinstance(document, dict):
        raise SpecError(f"{file} must hold one mapping, such as `model: NAME`, got {type(document).__name__}")
    return document


def with_flags(
    order: Mapping[str, Any], flags: Mapping[str, Any], *, hyperparameters: Sequence[str], advanced: Sequence[str]
) -> dict[str, Any]:
    """The order with the flags over it; NAME=VALUE texts get the type of their hyperparameter."""
    from tunesmith.hyperparameters.definitions import SECTIONS
    from tunesmith.hyperparameters.field import definitions

    merged = {**order, **flags}
    for definition, given in zip(SECTIONS, (hyperparameters, advanced), strict=True):
        if given:
            section, known = definition.section, definitions(definition)
            there = merged.get(section) or {}
            if not isinstance(there, Mapping):
                raise SpecError(f"{section} must be a mapping, got {there!r}", fields=[section])
            merged[section] = {**there, **dict(_typed(text, section, known) for text in given)}
    return merged


def _typed(text: str, section: str, known: Sequence[Hyperparameter]) -> tuple[str, Value]:
    """Name and value of one NAME=VALUE. What does not fit the type stays a text, which the door refuses.

    A name of a model's own, whose type is not known here, has the value that it would have in YAML.
    """
    name, sign, raw = text.partition("=")
    if not sign or not name:
        raise SpecError(f"a hyperparameter is given as NAME=VALUE, got {text!r}", fields=[section])
    h = next((h for h in known if h.name == name), None)
    if h is None:
        return name, _scalar(raw)
    if raw == "" and h.optional:
        return name, None
    if h.type is bool:
        return name, _BOOLEANS.get(raw.lower(), raw)
    try:
        return name, h.type(raw)
    except ValueError:
        return name, raw


def _scalar(raw: str) -> Value:
    try:
        value = read_yaml(raw).value
    except YamlError:
        return raw
    return value if value is None or type(value) in (str, int, float, bool) else raw
