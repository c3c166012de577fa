"""YAML 1.2 as cards, orders and flavors are written in: what it means, and what is refused with its line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith.assets.cards import read_card
from tunesmith.assets.located_yaml import MAX_BYTES, MAX_VALUES, YamlError, read_yaml
from tunesmith.cli.spec_files import read_order
from tunesmith.errors import ModelError, SpecError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"), ("yes", "yes"), ("true", True), ("null", None), ("~", None), ("", None),
        ("2e-4", 2e-4), (".5", 0.5), ("1e3", 1000.0), ("0o17", 15), ("017", 17), ("0x1F", 31), ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"), ("2026-13-45", "2026-13-45"), ("=", "="), ("<<", "<<"),
        ("{packing: off}", {"packing": "off"}), ('{"a":\t[1,\n\t2]}', {"a": [1, 2]}),
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}\n", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
        ("a: &x [1]\nb: *x\n", {"a": [1], "b": [1]}),
    ],
)  # fmt: skip
def test_a_document_means_what_yaml_1_2_says(text: str, value: Any) -> None:
    found = read_yaml(text).value
    assert (found, type(found)) == (value, type(value))


def test_json_is_read_however_it_is_laid_out() -> None:
    data = {"a": [1, {"b": None, "c": "x: [y]\n\u2028"}], "d": 1e-05, "e": True, "f": "\\ \" 'q' #"}
    for indent in (None, 1, "\t"):
        for ascii_alone in (True, False):
            assert read_yaml(json.dumps(data, indent=indent, ensure_ascii=ascii_alone)).value == data


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "duplicate key"),
        ('{"a": 1,\n"a": 2}', 2, "duplicate key"),
        ("a: 1\nb: [1\n", 3, "expected ',' or ']'"),
        ("a: 1\nb: !!python/object/apply:os.system ['id']\n", 2, "could not determine a constructor"),
        ("b: !!binary aaaa\n", 1, "could not determine a constructor"),
        ("b: !!set {a}\n", 1, "could not determine a constructor"),
        ("a: 1\nb: *c\n", 2, "undefined alias"),
        ("a: 1\nb: &b [*b]\n", 2, "an alias stands inside the value that it names"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("a: \0", None, "special characters are not allowed"),
        ("[" * 20_000, None, "nested too deeply"),
        ("a: " + "9" * 5000, None, "Exceeds the limit"),
        ("a: " + "x" * MAX_BYTES, None, f"allowed are {MAX_BYTES}"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(text: str, line: int | None, why: str) -> None:
    with pytest.raises(YamlError) as caught:
        read_yaml(text)
    assert caught.value.line == line, caught.value
    assert why in caught.value.why


def bomb(levels: int, *, merge: bool) -> str:
    """A few hundred bytes that stand for 9 ** levels values."""
    lines = ["a0: &a0 {x: 1, y: 2}"]
    for level in range(1, levels):
        many = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {{<<: [{many}]}}" if merge else f"a{level}: &a{level} [{many}]")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("merge", [False, True])
def test_a_bomb_of_aliases_is_refused_before_it_grows(tmp_path: Path, merge: bool) -> None:
    assert len(bomb(8, merge=merge)) < 600
    (tmp_path / "README.md").write_text(f"---\ntask_type: x\n{bomb(8, merge=merge)}---\n")
    (tmp_path / "order.yaml").write_text(bomb(8, merge=merge))
    with pytest.raises(ModelError, match=rf"README.md:\d+: .* more than {MAX_VALUES} values"):
        read_card(tmp_path)
    with pytest.raises(SpecError, match=rf"order.yaml:\d+: .* more than {MAX_VALUES} values"):
        read_order(str(tmp_path / "order.yaml"))


def test_a_bomb_takes_little_memory() -> None:
    """In a process of its own, which may take 200 MiB of memory beyond what it has."""
    code = f"""
import resource
from tunesmith.assets.located_yaml import YamlError, read_yaml
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
limit = int(open("/proc/self/statm").read().split()[0]) * 4096 + (200 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    read_yaml({bomb(8, merge=True)!r})
except YamlError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 20_000, "KiB"


def test_a_cards_keys_have_their_lines_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("\n---\ntask_type: x\n\nlicense: 2026-01-31\n---\ntext\n")
    card = read_card(tmp_path)
    assert card.lines == {"task_type": 3, "license": 5}
    assert card.text("license") == "2026-01-31"


def test_front_matter_without_an_end_is_refused_and_a_long_text_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n" + "# a comment\n" * (MAX_BYTES // 8))
    with pytest.raises(ModelError, match="does not end within"):
        read_card(tmp_path)
    (tmp_path / "README.md").write_text("---\na: 1\n---\n" + "a line of text\n" * (MAX_BYTES // 8))
    assert read_card(tmp_path).values == {"a": 1}
