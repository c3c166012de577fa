"""A data file is read row by row, whatever its size and form; what is wrong with it is named by its line or row."""

import csv
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunesmith.assets import tables
from tunesmith.assets.tables import MAX_ROW_BYTES, Row, describe, read_blocks, read_rows
from tunesmith.errors import DataError

ROWS: list[Row] = [
    {"q": "one", "a": "eins"},
    {"q": 'zwei\nZeilen, "and" a comma', "a": "中文 🙂"},
    {"q": "\\u0041 stays", "a": ""},
]


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")


def write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[Row]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[Row]], None]] = {
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert caught.value.fields == [path.name]
    return caught.value.message


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_gives_the_rows_that_were_written(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a.{form}"
    WRITERS[form](path, ROWS)
    assert list(read_rows(path)) == ROWS
    assert describe(path).model_dump() == {"format": form, "columns": ["q", "a"], "rows": 3}


@pytest.mark.parametrize("form", WRITERS)
def test_blocks_hold_the_same_rows_in_the_same_order(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 100)
    chance = random.Random(1)
    rows = [{"q": f"{n} {'x' * chance.randrange(300)}", "a": "é\n" * chance.randrange(9)} for n in range(200)]
    path = tmp_path / f"a.{form}"
    WRITERS[form](path, rows)
    blocks = list(read_blocks(path))
    assert len(blocks) > 50
    numbered = [each for block in blocks for each in block.rows()]
    assert [row for _, row in numbered] == rows == list(read_rows(path))
    if form in ("jsonl", "csv"):
        text = path.read_bytes().split(b"\n")
        assert all(text[number - 1].lstrip(b'{"q: ').startswith(row["q"][:4].encode()) for number, row in numbered)
    else:
        assert [number for number, _ in numbered] == list(range(1, 201))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", b'\xef\xbb\xbf{"q": "1"}\n{"q": "2"}\n'),
        ("crlf.jsonl", b'{"q": "1"}\r\n\r\n{"q": "2"}\r\n'),
        ("unended.jsonl", b'\n{"q": "1"}\n \t\n{"q": "2"}'),
        ("bom.json", b'\xef\xbb\xbf [ {"q": "1"} ,\r\n{"q": "2"}]\r\n'),
        ("bom.csv", b"\xef\xbb\xbfq\n1\n2\n"),
        ("crlf.csv", b"q\r\n1\r\n\r\n2\r\n"),
        ("cr.csv", b'q\r"1"\r2'),
        ("UPPER.JSONL", b'{"q": "1"}\n{"q": "2"}\n'),
    ],
)
def test_marks_and_line_ends_of_other_systems_are_no_part_of_the_rows(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_rows(tmp_path / name)) == [{"q": "1"}, {"q": "2"}]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"q": 1}\n\n{"q": "\xff"}\n', "line 3 is not UTF-8: invalid start byte at byte 8"),
        ("a.jsonl", b'{"q": 1}\r\n{"q": 1\r\n', "line 2 is not JSON: Expecting ',' delimiter at column 9"),
        ("a.jsonl", b'{"q": 1} {"q": 2}\n', "line 1 is not JSON: Extra data at column 10"),
        ("a.jsonl", b"\n[1]\n", "line 2 must be an object with columns, got a list"),
        ("a.jsonl", b'{"q": ' + b"[" * 100_000 + b"\n", "line 1 is not JSON: it is nested too deeply"),
        ("a.jsonl", b'{"q": ' + b"1" * 5000 + b"}\n", "line 1 is not JSON: Exceeds the limit"),
        ("a.jsonl", '{"q": 1}\n'.encode("utf-16"), "line 1 is not UTF-8"),
        ("a.json", b"", "this one is empty"),
        ("a.json", b'{"q": 1}\n{"q": 2}', "one object a line is .jsonl"),
        ("a.json", b'[{"q": 1},\n{"q": 2},\n]', "row 3 is not JSON: Expecting value (line 3, column 1)"),
        ("a.json", b'[{"q": 1},\n {"q": "2}]', "row 2 is not JSON: Unterminated string (line 2, column 8)"),
        ("a.json", b'[{"q": 1}\n{"q": 2}]', "after row 1 there must be ',' or ']' (line 2, column 1)"),
        ("a.json", b'[{"q": 1},\n', "row 2 is not JSON: Expecting value (line 2, column 1, where the file ends)"),
        ("a.json", b'[{"q": 1}]\n[]', "there is more after the end of the array (line 2, column 1)"),
        ("a.json", b'[{"q": 1},\n 7]', "row 2 must be an object with columns, got a number (line 2, column 2)"),
        ("a.json", b'[{"q": 1},\n\n{"q": "\xff"}]', "line 3 is not UTF-8"),
        ("a.json", b'[{"q": "\xe4', "line 1 is not UTF-8"),
        ("a.csv", b"q,r\n1,2\n1,2,3\n", "line 3 has not as many cells as the header: 3, not 2"),
        ("a.csv", b'q,r\n"1\n1",2\n"3\n', "line 4: unexpected end of data"),
        ("a.csv", b"q,r\n1,2\n\xff,2\n", "line 3 is not UTF-8 at character 1"),
        ("a.csv", b"q,q\n1,2\n", "the header has the column 'q' twice"),
        ("a.parquet", b"PAR1 no more", "it is not parquet"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert message.startswith(f"{name}: ")
    assert says in message


def test_a_line_far_down_is_named_by_its_number(tmp_path: Path) -> None:
    line = b'{"q":""}\n'
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        for _ in range(30):
            file.write(line * 100_000)
        file.write(b'{"q":"\n')
    *_, last = read_blocks(path)
    with pytest.raises(DataError, match="line 3000001 is not JSON: Unterminated string at column 6"):
        list(last.rows())


def test_a_place_far_down_an_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    row = b'{"q": "' + b"x" * 90 + b'"},'
    path.write_bytes(b"[" + row * 30_000 + b"\n" + row * 30_000 + b"{]")
    message = refusal(path)
    assert f"row 60001 is not JSON: Expecting property name enclosed in double quotes (line 2, column {3_000_002})" in (
        message
    )


@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_a_row_too_long_to_be_held_is_refused_and_one_just_below_is_read(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a.{form}"
    for size, allowed in ((MAX_ROW_BYTES - 100, True), (3 * MAX_ROW_BYTES, False)):
        WRITERS[form](path, [{"q": "x"}, {"q": "x" * size}])
        if allowed:
            assert [len(row["q"]) for row in read_rows(path)] == [1, size]
        else:
            message = refusal(path)
            assert "longer than 16 MiB" in message or "field larger than field limit" in message
            assert "row 2" in message or "line 2" in message or "line 3" in message


def test_text_that_is_not_utf_8_in_a_parquet_file_is_named_by_its_row(tmp_path: Path) -> None:
    values = pa.array([b"a", b"\xff", b"c"], pa.binary())
    text = pa.StringArray.from_buffers(3, values.buffers()[1], values.buffers()[2])
    pq.write_table(pa.table({"q": text}), tmp_path / "a.parquet")
    assert "row 2 is not UTF-8" in refusal(tmp_path / "a.parquet")


def test_a_parquet_file_with_a_damaged_page_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"q": f"{n}" * 50} for n in range(5000)])
    data = bytearray(path.read_bytes())
    data[100:4000] = bytes(3900)
    path.write_bytes(data)
    assert "parquet" in refusal(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "b.json"])
def test_a_file_without_rows_is_refused_and_one_row_is_enough(tmp_path: Path, name: str) -> None:
    empty, one = {
        "a.jsonl": ("\n", '{"q": "1"}'),
        "a.csv": ("q\n", "q\n1"),
        "b.json": ("[]", '[{"q": "1"}]'),
    }[name]
    (tmp_path / name).write_text(empty)
    with pytest.raises(DataError, match="it has no row"):
        describe(tmp_path / name)
    (tmp_path / name).write_text(one)
    assert describe(tmp_path / name).rows == 1


def test_columns_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{f"c{n}": 1} for n in range(tables.MAX_COLUMNS + 1)])
    with pytest.raises(DataError, match="more than 1000 columns"):
        describe(path)


def _peak(rows: Iterator[Any]) -> int:
    tracemalloc.start()
    try:
        for _ in rows:
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a.{form}"
    WRITERS[form](path, [{"q": f"{n} " + "text " * 400, "a": "b"} for n in range(12_000)])
    assert path.stat().st_size > 20 << 20
    assert _peak(read_rows(path)) < 9 << 20
    assert _peak(iter(read_blocks(path))) < 9 << 20


def test_a_parquet_file_of_one_row_group_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [random.Random(n).randbytes(1000).hex() for n in range(20_000)]
    pq.write_table(pa.table({"q": texts}), path, compression="none", use_dictionary=False)
    del texts
    before = pa.total_allocated_bytes()
    highest = 0
    for _ in read_rows(path):
        highest = max(highest, pa.total_allocated_bytes() - before)
    assert path.stat().st_size > 38 << 20
    assert highest < 16 << 20
