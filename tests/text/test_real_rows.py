"""Rows that nobody here wrote, English and Chinese, teach a pretrained model something."""

import json
from pathlib import Path

import pytest

from tunesmith.assets.tables import Row, read_rows
from tunesmith.hyperparameters.checks import resolve
from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters, for_model

SHARED = Path(__file__).parents[3] / "shared" / "data"
HELD_OUT_ROWS = 24

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("gsm8k/train.jsonl", {"prompt_field": "question", "response_field": "answer"}),
        ("alpaca_zh_demo.json", {}),
    ],
)
def test_the_held_out_loss_falls(smollm2: Path, file: str, fields: dict[str, str]) -> None:
    from transformers import AutoTokenizer

    from trainers.recipe.training_loop import Hooks, train
    from trainers.text.tokenized_data import tokenize_rows

    if not (SHARED / file).exists():
        pytest.skip(f"{SHARED / file} is not here")
    given = {**fields, "max_seq_length": 256, "per_device_train_batch_size": 2, "max_steps": 25, "warmup_ratio": 0.1}
    hyperparameters = resolve(LoraHyperparameters, given, known=for_model(LoraHyperparameters, {"parameters": 135e6}))
    advanced = Advanced()

    def tokens(rows: list[Row]) -> object:
        return tokenize_rows(
            rows,
            AutoTokenizer.from_pretrained(smollm2),
            hyperparameters=hyperparameters,
            advanced=advanced,
            training_type="text-question-answering",
        )

    # Rows are alike only by chance in these files: the first hundreds are enough, and what follows is held out.
    rows = list(read_rows(SHARED / file))
    held_out = rows[-HELD_OUT_ROWS:]
    assert not {json.dumps(row) for row in held_out} & {json.dumps(row) for row in rows[:200]}
    outcome = train(
        smollm2,
        tokens(rows[:200]),
        tokens(held_out),
        hyperparameters=hyperparameters,
        advanced=advanced,
        hooks=Hooks(report=lambda step, values: None, save=lambda step, at: None, should_stop=lambda: False),
    )
    assert outcome.steps == 25
    assert outcome.eval_loss < 0.97 * outcome.eval_loss_before, (outcome.eval_loss_before, outcome.eval_loss)
