"""Every known format of row becomes the same turns, and what is not as its format says is named with its place."""

from typing import Any, get_args

import pytest

from tests.support import tiny
from tests.support.stage import Stage
from tunesmith.assets.catalog import Table, publish
from tunesmith.errors import DataError
from tunesmith.text.columns import RowFormat, find_format
from tunesmith.text.formats import Example, Turn, turns

QA, GENERATION = "text-question-answering", "text-generation"
SAID = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")]
SYSTEM = Turn("system", "s")


def read(row: dict[str, Any], **given: Any) -> list[Turn] | None:
    h = tiny.hyperparameters(**given)
    example = turns(row, find_format([*row, *filter(None, [h.history_field])], h, training_type=QA), h, 1)
    return None if example is None else example.turns


def refusal(row: dict[str, Any], **given: Any) -> DataError:
    h = tiny.hyperparameters(**given)
    with pytest.raises(DataError) as caught:
        turns(row, find_format(list(row), h, training_type=QA), h, "a.jsonl: line 7")
    assert caught.value.message.startswith("a.jsonl: line 7: ")
    return caught.value


def chat(*contents: str, roles: tuple[str, ...] = ("user", "assistant")) -> list[dict[str, str]]:
    return [{"role": roles[n % len(roles)], "content": text} for n, text in enumerate(contents)]


def shared(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(values)]


@pytest.mark.parametrize(
    ("columns", "given", "row_format"),
    [
        (["prompt", "response"], {}, "prompt_response"),
        (["q", "a", "messages"], {"prompt_field": "q", "response_field": "a"}, "prompt_response"),
        (["prompt", "response", "messages"], {}, "prompt_response"),
        (["instruction", "output"], {}, "alpaca"),
        (["instruction", "input", "output", "history", "system"], {}, "alpaca"),
        (["instruction", "input", "output"], {"prompt_field": "input", "response_field": "output"}, "prompt_response"),
        (["id", "conversations"], {}, "sharegpt"),
        (["prompt", "prompt_id", "messages"], {}, "messages"),
        (["context", "target"], {}, "context_target"),
    ],
)
def test_formats_are_told_apart_by_their_columns(columns: list[str], given: dict[str, Any], row_format: str) -> None:
    h = tiny.hyperparameters(**given)
    assert {find_format(columns, h, training_type=kind) for kind in (QA, GENERATION)} == {row_format}


def test_a_prompt_alone_is_plain_text_in_text_generation_only() -> None:
    by_hand = tiny.hyperparameters(prompt_field="text")
    assert find_format(["prompt"], tiny.hyperparameters(), training_type=GENERATION) == "text"
    assert find_format(["text", "messages"], by_hand, training_type=GENERATION) == "text"
    with pytest.raises(DataError) as caught:
        find_format(["prompt"], tiny.hyperparameters(), training_type=QA)
    assert (caught.value.code, caught.value.fields) == ("missing_column", ["hyperparameters.response_field"])


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"prompt_field": "question"}, "prompt_field"),
        ({"response_field": "answer"}, "response_field"),
        ({"history_field": "before"}, "history_field"),
        ({"prompt_field": "input"}, "response_field"),
        ({"response_field": "output"}, "prompt_field"),
    ],
)
@pytest.mark.parametrize("training_type", [QA, GENERATION])
def test_a_column_named_by_hand_is_never_passed_over(given: dict[str, Any], field: str, training_type: str) -> None:
    if given == {"prompt_field": "input"} and training_type == GENERATION:
        return  # plain text
    with pytest.raises(DataError) as caught:
        find_format(["instruction", "input", "output"], tiny.hyperparameters(**given), training_type=training_type)
    assert (caught.value.code, caught.value.fields) == ("missing_column", [f"hyperparameters.{field}"])
    assert "it has instruction, input, output" in caught.value.message


def test_a_history_that_no_one_would_read_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        find_format(["messages", "before"], tiny.hyperparameters(history_field="before"), training_type=QA)
    assert caught.value.code == "history_not_used"


@pytest.mark.parametrize(
    ("row", "given", "expected"),
    [
        ({"prompt": "c", "response": "d", "history": [["a", "b"]]}, {"history_field": "history"}, SAID),
        ({"prompt": "c", "response": "d", "history": '[["a", "b"]]'}, {"history_field": "history"}, SAID),
        ({"prompt": "c", "response": "d", "history": [["a", "b"]]}, {}, SAID[2:]),
        ({"prompt": "c", "response": "d"}, {"history_field": "history"}, SAID[2:]),
        ({"q": "c", "r": "d"}, {"prompt_field": "q", "response_field": "r"}, SAID[2:]),
        ({"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]}, {}, SAID),
        ({"instruction": "c", "output": "d", "past": [["a", "b"]]}, {"history_field": "past"}, SAID),
        ({"instruction": "c", "output": "d", "system": "s"}, {}, [SYSTEM, *SAID[2:]]),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            {},
            [Turn("user", "Add\n1 2"), Turn("assistant", "3")],
        ),
        ({"messages": chat("a", "b", "c", "d")}, {}, SAID),
        ({"messages": [{"role": "system", "content": "s"}, *chat("a", "b", "c", "d")]}, {}, [SYSTEM, *SAID]),
        ({"messages": chat("a", "b", "c", "d", "what is never answered")}, {}, SAID),
        ({"conversations": shared("a", "b", "c", "d")}, {}, SAID),
        ({"conversations": shared("a", "b", "c", "d"), "system": "s"}, {}, [SYSTEM, *SAID]),
        ({"context": ["a", "b", "c"], "target": "d"}, {}, SAID),
        ({"context": "c", "target": "d"}, {}, SAID[2:]),
    ],
)
def test_every_format_gives_the_turns_in_order(
    row: dict[str, Any], given: dict[str, Any], expected: list[Turn]
) -> None:
    assert read(row, **given) == expected


def test_plain_text_is_one_turn() -> None:
    assert turns({"prompt": "once"}, "text", tiny.hyperparameters(), 1) == Example([Turn("text", "once")])
    assert turns({"prompt": " \n"}, "text", tiny.hyperparameters(), 1) is None


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "response": ""},
        {"prompt": " ", "response": "b"},
        {"prompt": "a", "response": None},
        {"instruction": "", "input": " ", "output": "d"},
        {"messages": []},
        {"messages": None},
        {"messages": chat("a", "")},
        {"conversations": shared(" ", "b")},
        {"context": [], "target": "x"},
        {"context": ["a"], "target": ""},
    ],
)
def test_rows_without_prompt_or_response_are_skipped(row: dict[str, Any]) -> None:
    assert read(row) is None


@pytest.mark.parametrize(
    ("row", "says", "field"),
    [
        ({"prompt": 3, "response": "b"}, "column 'prompt' must hold text, got int", "hyperparameters.prompt_field"),
        ({"prompt": "a", "response": ["b"]}, "'response' must hold text, got list", "hyperparameters.response_field"),
        ({"prompt": "a\ud83d", "response": "b"}, "'prompt' holds \\ud83d, half a character", None),
        ({"instruction": "a", "output": {"b": 1}}, "column 'output' must hold text, got dict", "output"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "item 1 of column 'history' must be a pair", None),
        ({"messages": "a: b"}, "must hold a list of objects with 'role' and 'content', got other text", "messages"),
        ({"messages": {"role": "user"}}, "got dict", "messages"),
        ({"messages": ["hi"]}, "turn 1 of column 'messages' must be an object", "messages"),
        ({"messages": chat("a", roles=("tool",))}, "has the role 'tool'; known are system, user, assistant", None),
        ({"conversations": [{"from": "observation", "value": ""}]}, "known are system, human", "conversations"),
        ({"messages": chat("a")}, "has no turn of the assistant", "messages"),
        ({"messages": chat("b", "a", roles=("assistant", "user"))}, "turn 1", "messages"),
        ({"messages": chat("a", "b", roles=("user",))}, "turn 2 of column 'messages' is the user's", "messages"),
        ({"messages": chat("a", "b", "s", roles=("user", "assistant", "system"))}, "turn 3", "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "turn 1 of column 'messages' must hold text, got int", None),
        ({"messages": [*chat("a"), {"role": "assistant", "content": None, "tool_calls": [1]}]}, "'tool_calls'", None),
        ({"messages": [*chat("a"), {"role": "assistant", "content": "b", "weight": 0}]}, "'weight'", None),
        ({"messages": [{"role": "system", "content": "s"}, *chat("a", "b")], "system": "t"}, "'system'", None),
        ({"context": ["a", "b"], "target": "c"}, "must hold an odd number of texts", "context"),
        ({"context": ["a", 1, "c"], "target": "d"}, "text 2 of column 'context' must hold text, got int", "context"),
    ],
)
def test_what_is_not_as_its_format_says_is_named_with_row_and_column(
    row: dict[str, Any], says: str, field: str | None
) -> None:
    error = refusal(row)
    assert says in error.message
    if field is not None:
        assert error.fields == [field]


@pytest.mark.parametrize("history", ["not json", [["a"]], [["a", "b", "c"]], ["ab"], {"a": "b"}, [["a", 1]], 7])
def test_a_history_that_is_not_pairs_is_refused(history: Any) -> None:
    error = refusal({"prompt": "c", "response": "d", "history": history}, history_field="history")
    assert error.fields == ["hyperparameters.history_field"]


def test_the_order_is_checked_by_the_rule_that_the_run_reads_by(tmp_path: Any) -> None:
    stage = Stage(tmp_path)
    rows: dict[str, dict[str, Any]] = {
        "prompt_response": {"prompt": "a", "response": "b"},
        "messages": {"messages": chat("a", "b")},
        "sharegpt": {"conversations": shared("a", "b")},
        "alpaca": {"instruction": "a", "output": "b"},
        "context_target": {"context": "a", "target": "b"},
        "text": {"prompt": "a"},
    }
    assert set(rows) == set(get_args(RowFormat))
    for version, (row_format, row) in enumerate(rows.items(), start=2):
        table = Table(format="jsonl", columns=list(row), rows=1)
        publish(stage.storage, _dataset(version, {"train.jsonl": table}))
        if row_format == "text":
            with pytest.raises(DataError, match=r"train.jsonl of sums@7 has no column 'response'"):
                stage.draft(dataset=f"sums@{version}")
            stage.draft(dataset=f"sums@{version}", training_type=GENERATION)
        else:
            stage.draft(dataset=f"sums@{version}")
            assert read(row) == [Turn("user", "a"), Turn("assistant", "b")]


def _dataset(version: int, files: dict[str, Table]) -> Any:
    from tests.support.stage import make_manifest

    return make_manifest("dataset", "sums", version, tables=files)
