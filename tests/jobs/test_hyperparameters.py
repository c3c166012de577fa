"""Every hyperparameter is known, checked and documented."""

import re
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import SpecError
from tunesmith.hyperparameters import ADVANCED, GUIDE, SECTIONS, document, for_model, json_schema, resolve
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
    assert [h.name for h in GUIDE] == GUIDE_NAMES
    assert len(GUIDE) == 25
    assert [h.name for h in ADVANCED] == ADVANCED_NAMES


def test_every_default_is_legal_and_every_name_has_help_in_both_languages() -> None:
    for section, known in SECTIONS.items():
        defaults = resolve({}, known, section=section)
        assert resolve(defaults, known, section=section) == defaults
        for h in known:
            assert h.help.isascii() and h.help[0].islower() and not h.help.endswith(".")
            assert re.search("[\u4e00-\u9fff]", h.help_zh), h.name


def test_the_page_of_hyperparameters_is_the_one_that_the_definition_makes() -> None:
    # To write it: python -m tunesmith.hyperparameters
    assert (ROOT / "docs" / "hyperparameters.md").read_text(encoding="utf-8") == document()


def test_the_apis_schema_is_made_from_the_definition() -> None:
    properties = TrainSpec.model_json_schema()["properties"]
    for section, known in SECTIONS.items():
        assert {**json_schema(known), **properties[section]} == properties[section]
        assert list(properties[section]["properties"]) == [h.name for h in known]
    rank = properties["hyperparameters"]["properties"]["lora_rank"]
    assert (rank["type"], rank["default"], rank["minimum"], rank["maximum"]) == ("integer", 8, 1, 256)
    assert "rank of the adapter" in rank["description"] and "LoRA" in rank["x-description-zh"]
    assert properties["hyperparameters"]["properties"]["bits"]["enum"] == [4, 8, None]
    assert properties["advanced"]["properties"]["lr_scheduler_type"]["enum"] == ["linear", "cosine", "constant"]


@pytest.mark.parametrize(
    ("parameters", "rate"), [(135e6, 5e-4), (1.1e9, 2e-4), (7e9, 2e-4), (13e9, 2e-4), (33e9, 1e-4), (65e9, 1e-4)]
)
def test_the_default_learning_rate_of_lora_follows_from_the_models_size(parameters: float, rate: float) -> None:
    known = for_model(GUIDE, {"parameters": int(parameters)})
    assert resolve({}, known) == {**resolve({}), "learning_rate": rate}
    assert resolve({"learning_rate": 0.01}, known)["learning_rate"] == 0.01
    assert resolve({}, for_model(GUIDE, {"parameters": int(parameters)}, method="full")) == resolve({})


def test_rows_are_never_longer_than_the_models_context() -> None:
    short, long = (for_model(GUIDE, {"max_seq_length": length}) for length in (512, 32768))
    assert resolve({}, short)["max_seq_length"] == 512
    assert resolve({}, long)["max_seq_length"] == 1024
    assert resolve({"max_seq_length": 32768}, long)["max_seq_length"] == 32768
    with pytest.raises(SpecError, match="max_seq_length must be 8 to 512, got 513"):
        resolve({"max_seq_length": 513}, short)


def test_a_model_of_which_nothing_is_known_changes_nothing() -> None:
    for details in ({}, {"parameters": None, "max_seq_length": None}):
        assert for_model(GUIDE, details) == GUIDE
    assert for_model(ADVANCED, {"parameters": 10**9, "max_seq_length": 512}) == ADVANCED


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
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(SpecError) as caught:
        resolve({name: value})
    assert caught.value.fields == [f"hyperparameters.{name}"]
    assert repr(value) in caught.value.message
    assert caught.value.code == "invalid_hyperparameter"


def test_an_unknown_name_names_the_nearest_known_one() -> None:
    with pytest.raises(SpecError) as caught:
        resolve({"lora_rnak": 8})
    assert caught.value.code == "unknown_hyperparameter"
    assert caught.value.hint == "did you mean lora_rank?"


def test_a_name_of_the_other_section_is_sent_there() -> None:
    with pytest.raises(SpecError) as caught:
        resolve({"seed": 1})
    assert caught.value.hint == "seed belongs under advanced"


def test_a_legal_value_that_cannot_run_yet_is_refused_and_not_ignored() -> None:
    for name, value in (("train_url", "s3://b/x"), ("data_url", "s3://b/x")):
        with pytest.raises(SpecError) as caught:
            resolve({name: value})
        assert caught.value.code == "not_supported"


def test_an_integer_is_a_float_too() -> None:
    assert resolve({"max_grad_norm": 2})["max_grad_norm"] == 2.0
