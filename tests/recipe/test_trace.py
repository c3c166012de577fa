"""The trace of a training's steps: a file that a browser shows, of the steps that are wanted."""

import json
from pathlib import Path

from tests.support import tiny
from trainers.recipe.trace import traced
from trainers.recipe.training_loop import Hooks, train
from trainers.text.tokenized_data import tokenize_rows


def test_a_training_leaves_the_trace_of_its_third_to_fifth_step(tmp_path: Path) -> None:
    rows = tokenize_rows(
        tiny.sums(28),
        tiny.make_tokenizer(),
        hyperparameters=tiny.hyperparameters(),
        advanced=tiny.advanced(),
        training_type="text-question-answering",
    )
    path = tmp_path / "trace.json"
    outcome = train(
        tiny.make_model(tmp_path / "model"),
        rows,
        None,
        hyperparameters=tiny.hyperparameters(per_device_train_batch_size=4, gradient_accumulation_steps=1),
        advanced=tiny.advanced(),
        hooks=Hooks(report=lambda step, values: None, save=lambda step, folder: None, should_stop=lambda: False),
        profile=path,
    )
    assert outcome.steps == 7
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    layers, steps = 2, 3
    assert names.count("tunesmith::lora_linear") == 7 * layers * steps
    assert names.count("tunesmith::lora_linear_backward") == 7 * layers * steps


def test_a_training_that_stops_early_leaves_the_trace_of_what_it_has_done(tmp_path: Path) -> None:
    for last, written in ((2, False), (3, True), (9, True)):
        path = tmp_path / f"{last}.json"
        for step in traced(range(1, 10), path):
            if step == last:
                break
        assert path.exists() == written
