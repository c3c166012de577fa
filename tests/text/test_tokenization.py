"""What is trained is the response and its end of turn; nothing else, and never less."""

from typing import Any

import pytest

from tests.support import tiny
from trainers.recipe.batches import BatchPlan
from trainers.text.shards import TokenizedRows
from trainers.text.tokenized_data import tokenize_rows
from tunesmith.errors import DataError
from tunesmith.text.formats import Example, Turn
from tunesmith.text.tokenization import Encoder, cut

TOKENIZER = tiny.make_tokenizer()


def tokens(rows: list[dict[str, Any]], training_type: str = "text-question-answering", **given: Any) -> TokenizedRows:
    advanced = tiny.advanced(train_on_history=given.pop("train_on_history", False))
    return tokenize_rows(
        rows, TOKENIZER, hyperparameters=tiny.hyperparameters(**given), advanced=advanced, training_type=training_type
    )


def marked(rows: TokenizedRows, row: int = 0) -> str:
    """The row as text, its trained parts in brackets."""
    text, inside = "", False
    for token, trained in zip(rows.ids(row).tolist(), rows.trained(row).tolist(), strict=True):
        if trained != inside:
            text, inside = text + ("[" if trained else "]"), trained
        text += TOKENIZER.decode([token])
    return text + ("]" if inside else "")


def test_the_response_and_its_end_of_turn_are_trained() -> None:
    assert marked(tokens([{"prompt": "hi", "response": "ho"}])) == "<|user|>hi<|end|>\n<|assistant|>[ho<|end|>]"


def test_history_is_context_unless_it_is_asked_for() -> None:
    row = {"prompt": "c", "response": "d", "history": [["a", "b"]]}
    plain = "<|user|>a<|end|>\n<|assistant|>b<|end|>\n<|user|>c<|end|>\n<|assistant|>[d<|end|>]"
    assert marked(tokens([row], history_field="history")) == plain
    whole = marked(tokens([row], history_field="history", train_on_history=True))
    assert whole == "<|user|>a<|end|>\n<|assistant|>[b<|end|>]\n<|user|>c<|end|>\n<|assistant|>[d<|end|>]"


def test_templates_of_the_user_take_the_place_of_the_models() -> None:
    row = {"prompt": "hi", "response": "ho"}
    rows = tokens([row], prefix="P:", instruction_template="I:", response_template=" R:")
    assert marked(rows) == "P:I:hi R:[ho<|end|>]"


def test_plain_text_is_trained_whole() -> None:
    rows = tokens([{"prompt": "once upon"}], "text-generation")
    assert marked(rows) == "[once upon<|end|>]"


def test_rows_without_prompt_or_response_are_skipped_and_counted() -> None:
    rows = tokens([{"prompt": "a", "response": ""}, {"prompt": " ", "response": "x"}, {"prompt": "a"}, *tiny.sums(2)])
    assert (len(rows), rows.skipped) == (2, 3)


def test_no_row_left_is_an_error() -> None:
    with pytest.raises(DataError, match="no row is left"):
        tokens([{"prompt": "a", "response": ""}])


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": 3, "response": "x"}, "prompt_field"),
        ({"prompt": "x", "response": ["y"]}, "response_field"),
        ({"prompt": "x", "response": "y", "history": [["a"]]}, "history_field"),
        ({"prompt": "x", "response": "y", "history": "not json"}, "history_field"),
    ],
)
def test_a_cell_that_is_not_what_it_must_be_is_named(row: dict[str, Any], field: str) -> None:
    with pytest.raises(DataError, match="row 2") as caught:
        tokens([{"prompt": "a", "response": "b"}, row], history_field="history")
    assert caught.value.fields == [f"hyperparameters.{field}"]


def test_a_long_row_loses_the_beginning_of_its_prompt_and_keeps_its_answer() -> None:
    rows = tokens([{"prompt": "0123456789" * 10, "response": "the answer"}], max_seq_length=40)
    assert len(rows.ids(0)) == 40
    assert rows.truncated == 1
    assert marked(rows).endswith("89<|end|>\n<|assistant|>[the answer<|end|>]")


def test_an_answer_that_is_too_long_alone_loses_its_end() -> None:
    parts = [(list(range(10)), False), (list(range(100, 130)), True)]
    assert cut(parts, 20) == [([5, 6, 7, 8, 9], False), (list(range(100, 115)), True)]
    assert cut(parts, 100) == parts


def test_the_prompt_for_generation_is_what_stood_before_the_response() -> None:
    example = Example([Turn("user", "hi"), Turn("assistant", "ho")])
    row = tokens([{"prompt": "hi", "response": "ho"}])
    prompt = Encoder(TOKENIZER, tiny.hyperparameters(), tiny.advanced()).prompt_ids(example).tolist()
    assert prompt == row.ids(0)[~row.trained(0)].tolist()
    assert TOKENIZER.decode(prompt) == "<|user|>hi<|end|>\n<|assistant|>"


def test_a_template_that_rewrites_earlier_text_is_refused() -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError) as caught:
        tokenize_rows(
            tiny.sums(1),
            tokenizer,
            hyperparameters=tiny.hyperparameters(),
            advanced=tiny.advanced(),
            training_type="text-question-answering",
        )
    assert caught.value.code == "template_not_additive"


def test_a_row_that_is_refused_is_named() -> None:
    examples = [Example([Turn("user", "a"), Turn("assistant", text)]) for text in ("b", "\U00100000")]
    encoder = Encoder(TOKENIZER, tiny.hyperparameters(), tiny.advanced())
    with pytest.raises(DataError, match=r"^row 2: .*private-use"):
        encoder.encode(examples)
    with pytest.raises(DataError, match=r"^a\.jsonl: line 9: "):
        encoder.encode(examples, ["a.jsonl: line 7", "a.jsonl: line 9"])


def test_what_befell_a_row_is_said() -> None:
    short, long, spelled = (
        Encoder(TOKENIZER, h, tiny.advanced()).encode([Example([Turn("user", "a"), Turn("assistant", text)])])[0]
        for h in [tiny.hyperparameters(max_seq_length=32)]
        for text in ("b", "b" * 50, "<|end|>")
    )
    assert (short.truncated, short.answer_cut, short.ended, short.spelled_out) == (False, False, True, False)
    assert (long.truncated, long.answer_cut, long.ended, long.spelled_out) == (True, True, False, False)
    assert (spelled.truncated, spelled.answer_cut, spelled.ended, spelled.spelled_out) == (False, False, True, True)
    assert (short.targets, spelled.targets) == (2, 8)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_epoch_takes_every_row_once_whatever_the_number_of_workers(world_size: int) -> None:
    lengths = [5 + n * 7 % 50 for n in range(101)]
    one = BatchPlan(lengths, batch_rows=8, passes=1, world_size=1, seed=3)
    plan = BatchPlan(lengths, batch_rows=8 // world_size, passes=1, world_size=world_size, seed=3)
    for epoch in (0, 1):
        seen = []
        for step in range(1 + epoch * plan.steps_per_epoch, 1 + (epoch + 1) * plan.steps_per_epoch):
            shares = [row for rank in range(world_size) for part in plan.padded(step, rank) for row in part]
            packed = [row for rank in range(world_size) for part in plan.packed(step, rank, 100) for row in part]
            assert sorted(shares) == sorted(packed) == sorted(one.rows(step))
            seen += shares
        assert sorted(seen) == list(range(101))
    assert one.rows(1) != one.rows(1 + one.steps_per_epoch)


def test_packed_rows_are_shared_out_by_their_tokens() -> None:
    lengths = [100, 90, 80, 70, 30, 20, 10, 5]
    plan = BatchPlan(lengths, batch_rows=2, passes=2, world_size=2, seed=0)
    tokens = [[sum(lengths[row] for row in part) for part in plan.packed(1, rank, None)] for rank in (0, 1)]
    assert [len(parts) for parts in tokens] == [2, 2]
    assert abs(sum(tokens[0]) - sum(tokens[1])) <= 10
    # More passes where they would be longer than is allowed.
    assert len(plan.packed(1, 0, 50)) == -(-sum(tokens[0]) // 50)
    # What all begin with, and a pass has once, is not counted.
    longer = BatchPlan([length + 40 for length in lengths], batch_rows=2, passes=2, world_size=2, seed=0)
    assert [longer.packed(1, rank, 50, 40) for rank in (0, 1)] == [plan.packed(1, rank, 50) for rank in (0, 1)]
