"""The demo's data: reproducible, held out for good, and only learnt from where prompt and response belong together."""

from __future__ import annotations

import csv
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from demo import make_data, own_file
from demo.job import ORDER
from tunesmith.assets.tables import read_rows
from tunesmith.errors import DataError

DATA = Path(make_data.__file__).parent / "data"
Row = dict[str, Any]


def demo_rows(name: str) -> list[Row]:
    return list(read_rows(DATA / name))


def test_the_committed_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    make_data.write(tmp_path)
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_no_held_out_answer_prompt_name_or_waybill_is_trained_on() -> None:
    train, held_out = demo_rows("train.jsonl"), demo_rows("held_out.jsonl")
    assert (len(train), len(held_out)) == (make_data.TRAIN_ROWS, make_data.HELD_OUT_ROWS)
    trained = "\n".join(text for row in train for text in row.values())
    for row in held_out:
        last_name, _, _, waybill, *_ = row["response"].split(", ")
        for text in (*row.values(), f" {last_name}", waybill):
            assert text not in trained


def test_every_line_of_the_register_stands_in_its_own_letter() -> None:
    rows = [*demo_rows("train.jsonl"), *demo_rows("held_out.jsonl")]
    for row in rows:
        last_name, first_name, place, waybill, date, goods = row["response"].split(", ")
        year, _, day = date.split("-")
        for part in (f"{first_name} {last_name}", place, waybill, goods, year, str(int(day))):
            assert part in row["prompt"]


@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_an_own_file_is_split_the_same_way_in_whatever_order_and_form(tmp_path: Path, form: str) -> None:
    rows = [{"q": f"{n} plus {n}?", "a": f"{2 * n}", "note": "x"} for n in range(300)]
    random.Random(4).shuffle(rows)
    rows += [{"q": "0 plus 0?", "a": "0", "note": "again"}, {"q": " ", "a": "no prompt", "note": "x"}]
    file = tmp_path / f"own.{form}"
    if form == "csv":
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, ["q", "a", "note"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row) for row in rows]
        file.write_text("\n".join(lines) if form == "jsonl" else f"[{','.join(lines)}]")

    assert own_file.split(file, tmp_path / "out", prompt_field="q", response_field="a") == (270, 30)
    train, held_out = (list(read_rows(tmp_path / "out" / name)) for name in ("train.jsonl", "held_out.jsonl"))
    assert {row["q"] for row in train}.isdisjoint(row["q"] for row in held_out)
    assert {(row["q"], row["a"]) for row in train + held_out} == {(f"{n} plus {n}?", f"{2 * n}") for n in range(300)}
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"q": f"{n} plus {n}?", "a": f"{2 * n}"}) + "\n" for n in range(300)))
    own_file.split(plain, tmp_path / "other", prompt_field="q", response_field="a")
    assert sorted(row["q"] for row in held_out) == sorted(
        row["q"] for row in read_rows(tmp_path / "other" / "held_out.jsonl")
    )


def test_at_most_64_rows_and_at_least_one_are_held_out(tmp_path: Path) -> None:
    for count, expected in ((2, (1, 1)), (9, (8, 1)), (5_000, (4_936, 64))):
        file = tmp_path / f"{count}.jsonl"
        file.write_text("".join(json.dumps({"p": str(n), "r": str(n)}) + "\n" for n in range(count)))
        assert own_file.split(file, tmp_path / "out", prompt_field="p", response_field="r") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "there is no file"),
        ("letters.docx", "x", "is not a data file"),
        ("rows.jsonl", '{"question": "a", "answer": "b"}\n' * 3, "has no column 'prompt'; it has question, answer"),
        ("rows.jsonl", '{"prompt": "a", "response": "b"}\n', "has 1 row with both"),
        ("rows.jsonl", '{"prompt": ["a"], "response": "b"}\n', "row 1: 'prompt' must hold text, got list"),
        ("rows.jsonl", "{", "line 1 is not JSON"),
    ],
)
def test_an_own_file_that_will_not_do_is_refused_by_name(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        own_file.split(tmp_path / name, tmp_path / "out", prompt_field="prompt", response_field="response")


@pytest.fixture(scope="module")
def base_loss(smollm2: Path) -> float:
    from transformers import AutoModelForCausalLM

    return stock_loss(AutoModelForCausalLM.from_pretrained(smollm2), smollm2)


@pytest.mark.soak
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tuning_halves_the_held_out_loss_and_not_where_responses_are_shuffled(
    smollm2: Path, base_loss: float, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows = demo_rows("train.jsonl")
    losses = {}
    for name, train_rows in (("tuned", rows), ("shuffled", shuffled(rows, seed))):
        train_adapter(smollm2, train_rows, tmp_path / name, seed=seed)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm2), tmp_path / name)
        losses[name] = stock_loss(model, smollm2)
    with capsys.disabled():
        figures = ", ".join(f"{name} {loss:.3f}" for name, loss in {"base": base_loss, **losses}.items())
        sys.stdout.write(f"\nseed {seed}, held-out loss: {figures}\n")
    assert losses["tuned"] <= 0.5 * base_loss
    assert losses["shuffled"] > base_loss


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """The same prompts and the same responses, no longer each other's."""
    responses = [row["response"] for row in rows]
    random.Random(seed).shuffle(responses)
    return [{**row, "response": response} for row, response in zip(rows, responses, strict=True)]


def train_adapter(smollm2: Path, rows: Sequence[Row], folder: Path, *, seed: int) -> None:
    """What the demo's job does, without a platform."""
    import torch
    from transformers import AutoTokenizer

    from trainers.recipe.training_loop import Hooks, train
    from trainers.text.tokenized_data import tokenize_rows
    from tunesmith.hyperparameters.checks import resolve
    from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters

    torch.set_num_threads(2)
    hyperparameters = resolve(LoraHyperparameters, json.loads(ORDER.read_text())["hyperparameters"])
    advanced = Advanced(seed=seed)
    tokens = tokenize_rows(
        rows,
        AutoTokenizer.from_pretrained(smollm2),
        hyperparameters=hyperparameters,
        advanced=advanced,
        training_type="text-question-answering",
    )
    outcome = train(
        smollm2,
        tokens,
        None,
        hyperparameters=hyperparameters,
        advanced=advanced,
        hooks=Hooks(report=lambda step, values: None, save=lambda step, at: None, should_stop=lambda: False),
    )
    outcome.model.save_pretrained(folder)


def stock_loss(model: Any, tokenizer_folder: Path) -> float:
    """Mean loss of the held-out responses' tokens, the end of turn included, by transformers alone; float32."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    total, count = 0.0, 0
    for row in demo_rows("held_out.jsonl"):
        asked = [{"role": "user", "content": row["prompt"]}]
        answered = [*asked, {"role": "assistant", "content": row["response"]}]
        before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(answered, return_dict=True)["input_ids"]
        assert ids[: len(before)] == before
        while ids[-1] != tokenizer.eos_token_id:
            ids.pop()  # the template's newline after the end of turn
        labels = [-100] * len(before) + ids[len(before) :]
        with torch.no_grad():
            loss = model.eval()(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total += float(loss) * (len(ids) - len(before))
        count += len(ids) - len(before)
    return total / count
