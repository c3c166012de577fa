"""Every hyperparameter is known, checked and documented."""

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith.bounds import VALUES_SCHEMA
from tunesmith.errors import SpecError
from tunesmith.hyperparameters.checks import resolve
from tunesmith.hyperparameters.definitions import (
    SECTIONS,
    Advanced,
    EncodingAdvanced,
    EncodingHyperparameters,
    LoraHyperparameters,
    SharedAdvanced,
    for_model,
)
from tunesmith.hyperparameters.document import document
from tunesmith.hyperparameters.field import definitions, json_schema
from tunesmith.jobs.spec import TrainSpec

ROOT = Path(__file__).parents[2]

GUIDE_NAMES = [
    "data_url",
    "train_url",
    "train_data_file",
    "test_data_file",
    "prompt_field",
    "response_field",
    "history_field",
    "prefix",
    "instruction_template",
    "response_template",
    "lora_alpha",
    "lora_dropout",
    "lora_rank",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "save_steps",
    "logging_steps",
    "learning_rate",
    "max_grad_norm",
    "warmup_ratio",
    "max_seq_length",
    "finetuned_model",
    "bits",
    "max_eval_samples",
]

ADVANCED_NAMES = [
    "num_train_epochs",
    "seed",
    "lr_scheduler_type",
    "weight_decay",
    "target_modules",
    "train_on_history",
    "strategy",
    "precision",
    "gradient_checkpointing",
    "packing",
    "save_total_limit",
    "max_retries",
    "merge_adapter",
]


def test_the_names_are_the_guides_25_and_ours() -> None:
    assert sorted(LoraHyperparameters.model_fields) == sorted(GUIDE_NAMES)
    assert len(GUIDE_NAMES) == 25
    assert sorted(Advanced.model_fields) == sorted(ADVANCED_NAMES)


def test_what_decides_the_tokens_and_what_means_something_to_custom_training_is_said_where_it_is_defined() -> None:
    assert {*EncodingHyperparameters.model_fields, *EncodingAdvanced.model_fields} == {
        "prompt_field",
        "response_field",
        "history_field",
        "prefix",
        "instruction_template",
        "response_template",
        "max_seq_length",
        "train_on_history",
    }
    assert [*SharedAdvanced.model_fields] == ["max_retries"]


def test_every_default_is_legal_and_every_name_has_help_in_both_languages() -> None:
    for section in SECTIONS:
        defaults = section()
        assert resolve(section, {}) == defaults
        assert resolve(section, defaults.model_dump()) == defaults
        for h in definitions(section):
            assert h.help.isascii() and h.help[0].islower() and not h.help.endswith(".")
            assert re.search("[\u4e00-\u9fff]", h.help_zh), h.name


def test_the_page_of_hyperparameters_is_the_one_that_the_definitions_make() -> None:
    # To write it: python -m tunesmith.hyperparameters.document
    assert (ROOT / "docs" / "hyperparameters.md").read_text(encoding="utf-8") == document()


def test_the_apis_schema_is_made_from_the_definitions() -> None:
    properties = TrainSpec.model_json_schema()["properties"]
    for section in SECTIONS:
        there = properties[section.section]["properties"]
        assert there == json_schema(section)["properties"]
        for h in definitions(section):
            assert (there[h.name]["description"], there[h.name]["x-description-zh"]) == (h.help, h.help_zh)
            assert there[h.name]["default"] == h.default
    assert (properties["hyperparameters"]["additionalProperties"], properties["advanced"]["additionalProperties"]) == (
        VALUES_SCHEMA["additionalProperties"],  # a custom model has names of its own
        False,
    )
    rank = properties["hyperparameters"]["properties"]["lora_rank"]
    assert (rank["type"], rank["default"], rank["minimum"], rank["maximum"]) == ("integer", 8, 1, 256)
    assert "rank of the adapter" in rank["description"] and "LoRA" in rank["x-description-zh"]
    bits, _ = properties["hyperparameters"]["properties"]["bits"]["anyOf"]
    assert bits["enum"] == [4, 8]
    assert properties["advanced"]["properties"]["lr_scheduler_type"]["enum"] == ["linear", "cosine", "constant"]


def test_hyperparameters_never_change_and_cross_to_other_processes() -> None:
    h = resolve(LoraHyperparameters, {"lora_rank": 4}, known=for_model(LoraHyperparameters, {"max_seq_length": 512}))
    assert pickle.loads(pickle.dumps(h)) == h
    assert type(h) is LoraHyperparameters
    with pytest.raises(ValueError, match="frozen"):
        h.lora_rank = 8  # type: ignore[misc]


def test_a_misspelt_name_and_one_that_does_not_decide_the_tokens_are_found_by_the_type_checker(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from tunesmith.hyperparameters.definitions import EncodingHyperparameters, LoraHyperparameters\n"
        "def encode(h: EncodingHyperparameters) -> None:\n"
        "    repr(h.prefix)\n"
        "    repr(h.learning_rate)\n"
        "def train(h: LoraHyperparameters) -> None:\n"
        "    encode(h)\n"
        "    repr(h.lora_rnak)\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert re.findall(r"program.py:(\d+): error: (.*) has no attribute (\S+)", done.stdout) == [
        ("4", '"EncodingHyperparameters"', '"learning_rate"'),
        ("7", '"LoraHyperparameters"', '"lora_rnak";'),
    ], done.stdout + done.stderr


@pytest.mark.parametrize(
    ("parameters", "rate"), [(135e6, 5e-4), (1.1e9, 2e-4), (7e9, 2e-4), (13e9, 2e-4), (33e9, 1e-4), (65e9, 1e-4)]
)
def test_the_default_learning_rate_of_lora_follows_from_the_models_size(parameters: float, rate: float) -> None:
    known = for_model(LoraHyperparameters, {"parameters": int(parameters)})
    assert resolve(LoraHyperparameters, {}, known=known) == LoraHyperparameters(learning_rate=rate)
    assert resolve(LoraHyperparameters, {"learning_rate": 0.01}, known=known).learning_rate == 0.01


def test_rows_are_never_longer_than_the_models_context() -> None:
    short, long = (for_model(LoraHyperparameters, {"max_seq_length": length}) for length in (512, 32768))
    assert resolve(LoraHyperparameters, {}, known=short).max_seq_length == 512
    assert resolve(LoraHyperparameters, {}, known=long).max_seq_length == 1024
    assert resolve(LoraHyperparameters, {"max_seq_length": 32768}, known=long).max_seq_length == 32768
    with pytest.raises(SpecError, match="max_seq_length must be 8 to 512, got 513"):
        resolve(LoraHyperparameters, {"max_seq_length": 513}, known=short)


def test_a_model_of_which_nothing_is_known_changes_nothing() -> None:
    for details in ({}, {"parameters": None, "max_seq_length": None}):
        assert for_model(LoraHyperparameters, details) == definitions(LoraHyperparameters)
    assert for_model(Advanced, {"parameters": 10**9, "max_seq_length": 512}) == definitions(Advanced)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_rank", 0),
        ("lora_rank", 257),
        ("lora_rank", "8"),
        ("lora_rank", 8.0),
        ("lora_rank", True),
        ("learning_rate", float("nan")),
        ("learning_rate", -1),
        ("lora_dropout", 1),
        ("bits", 3),
        ("prompt_field", None),
        ("max_steps", True),
        ("max_grad_norm", float("inf")),
        ("bits", "4"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(SpecError) as caught:
        resolve(LoraHyperparameters, {name: value})
    assert caught.value.fields == [f"hyperparameters.{name}"]
    assert repr(value) in caught.value.message
    assert caught.value.code == "invalid_hyperparameter"


def test_an_unknown_name_names_the_nearest_known_one() -> None:
    with pytest.raises(SpecError) as caught:
        resolve(LoraHyperparameters, {"lora_rnak": 8})
    assert caught.value.code == "unknown_hyperparameter"
    assert caught.value.hint == "did you mean lora_rank?"


def test_a_name_of_the_other_section_is_sent_there() -> None:
    with pytest.raises(SpecError) as caught:
        resolve(LoraHyperparameters, {"seed": 1})
    assert caught.value.hint == "seed belongs under advanced"


def test_a_legal_value_that_cannot_run_yet_is_refused_and_not_ignored() -> None:
    for name, value in (("train_url", "s3://b/x"), ("data_url", "s3://b/x")):
        with pytest.raises(SpecError) as caught:
            resolve(LoraHyperparameters, {name: value})
        assert caught.value.code == "not_supported"


def test_an_integer_is_a_float_too() -> None:
    assert resolve(LoraHyperparameters, {"max_grad_norm": 2}).max_grad_norm == 2.0
