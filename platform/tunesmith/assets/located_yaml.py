"""YAML 1.2 with the line of every key. Types that JSON has not, keys given twice and bombs of aliases are refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

MAX_BYTES = 256 << 10
"""Of a document. Reading takes seconds for each MiB."""
MAX_VALUES = 20_000
"""Values of a document, each counted at every place where it stands: an alias names a value that stands elsewhere."""


class YamlError(Exception):
    """What keeps a text from being a document: the line (from 1) where that is known, and a sentence."""

    def __init__(self, why: str, line: int | None = None) -> None:
        super().__init__(why if line is None else f"line {line}: {why}")
        self.why = why
        self.line = line


@dataclass(frozen=True)
class YamlDocument:
    """The value of a document, and the line of each key of its outermost mapping, from 1."""

    value: Any
    lines: dict[str, int] = field(default_factory=dict)


def read_yaml(text: str) -> YamlDocument:
    """Read one document; JSON is YAML too. YamlError says what is wrong with it."""
    size = len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        raise YamlError(f"it has {size} bytes; allowed are {MAX_BYTES}")
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        value = yaml.load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise YamlError(why, None if mark is None else mark.line + 1) from None
    except RecursionError:
        raise YamlError("it is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise YamlError(str(error).partition(";")[0]) from None
    return YamlDocument(value, yaml.constructor.lines)


class _Constructor(SafeConstructor):
    """Makes the types of JSON alone, out of at most MAX_VALUES values."""

    # Those of the superclass make dates, sets and bytes, too.
    yaml_constructors: dict[str | None, Any] = {}  # noqa: RUF012

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lines: dict[str, int] = {}

    def construct_document(self, node: Node) -> Any:
        _count(node, {})
        if isinstance(node, MappingNode):
            self.lines = {key.value: key.start_mark.line + 1 for key, _ in node.value if isinstance(key, ScalarNode)}
        return super().construct_document(node)


_MAKERS = {
    "null": SafeConstructor.construct_yaml_null,
    "bool": SafeConstructor.construct_yaml_bool,
    "int": SafeConstructor.construct_yaml_int,
    "float": SafeConstructor.construct_yaml_float,
    "seq": SafeConstructor.construct_yaml_seq,
    "map": SafeConstructor.construct_yaml_map,
}
_TEXT = ("str", "timestamp", "merge", "value")
"""What YAML 1.2 takes for text: 2026-01-31, << and = are of YAML 1.1."""

for _tag, _maker in [*_MAKERS.items(), *((tag, SafeConstructor.construct_yaml_str) for tag in _TEXT)]:
    _Constructor.add_constructor(f"tag:yaml.org,2002:{_tag}", _maker)
_Constructor.add_constructor(None, SafeConstructor.construct_undefined)


def _count(node: Node, counted: dict[int, int | None]) -> int:
    """How many values the node stands for. Raises YamlError where they are too many, or where it holds itself."""
    known = counted.get(id(node), 0)
    if known is None:
        raise YamlError("an alias stands inside the value that it names", node.start_mark.line + 1)
    if not known:
        counted[id(node)] = None
        known = 1 + sum(_count(child, counted) for child in _children(node))
        if known > MAX_VALUES:
            raise YamlError(f"it has more than {MAX_VALUES} values, aliases followed", node.start_mark.line + 1)
        counted[id(node)] = known
    return known


def _children(node: Node) -> Iterable[Node]:
    if isinstance(node, ScalarNode):
        return ()
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    children: list[Node] = node.value
    return children
