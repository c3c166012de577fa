"""A model's card: the YAML front matter of its README.md, with the lines its keys stand on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import ModelError

FILE = "README.md"


@dataclass(frozen=True)
class Card:
    """What stands between the first two lines of `---`; empty where there is no such part."""

    values: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    """Line of each key in the file, from 1."""

    def text(self, key: str) -> str | None:
        """The value of `key` as text; None where it is not there or empty."""
        value = self.values.get(key)
        return None if value in (None, "") else str(value)


def read_card(folder: Path) -> Card:
    """The card of the model in `folder`. ModelError, with its line, where the front matter is not YAML."""
    path = folder / FILE
    if not path.is_file():
        return Card()
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return Card()
    first = parts[0].count("\n") + 2
    try:
        values, node = yaml.safe_load(parts[1]), yaml.compose(parts[1], yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{FILE}:{first + mark.line}" if mark is not None else FILE
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ModelError(f"{where}: the front matter is not YAML: {why}", fields=[FILE]) from None
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        return Card()
    return Card(values, {key.value: first + key.start_mark.line for key, _ in node.value})
