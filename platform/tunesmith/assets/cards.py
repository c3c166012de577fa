"""A model's card: the YAML front matter of its README.md, with the line of each key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.assets.located_yaml import MAX_BYTES, YamlError, read_yaml
from tunesmith.errors import ModelError

FILE = "README.md"


@dataclass(frozen=True)
class Card:
    """What is between the first two lines of `---`. Without such a part, the card is empty."""

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
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(MAX_BYTES)
    parts = text.split("---\n", 2)
    if len(parts) == 2 and not parts[0].strip() and len(text) == MAX_BYTES:
        raise ModelError(f"{FILE}: the front matter does not end within {MAX_BYTES} characters", fields=[FILE])
    if len(parts) < 3 or parts[0].strip():
        return Card()
    before = parts[0].count("\n") + 1
    try:
        document = read_yaml(parts[1])
    except YamlError as error:
        where = FILE if error.line is None else f"{FILE}:{before + error.line}"
        raise ModelError(
            f"{where}: the front matter is not YAML that can be read: {error.why}", fields=[FILE]
        ) from None
    if not isinstance(document.value, dict):
        return Card()
    return Card(document.value, {key: before + line for key, line in document.lines.items()})
