"""Every hyperparameter is known, checked and documented."""

from typing import Any

import pytest

from tunesmith.errors import SpecError
from tunesmith.hyperparameters import ADVANCED, GUIDE, resolve

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


def test_every_default_is_legal_and_every_name_has_help() -> None:
    for section, known in (("hyperparameters", GUIDE), ("advanced", ADVANCED)):
        defaults = resolve({}, known, section=section)
        assert resolve(defaults, known, section=section) == defaults
        assert all(h.help for h in known)


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
    for name, value in (("bits", 4), ("finetuned_model", "s3://b/x"), ("data_url", "s3://b/x")):
        with pytest.raises(SpecError) as caught:
            resolve({name: value})
        assert caught.value.code == "not_supported"
    with pytest.raises(SpecError):
        resolve({"strategy": "zero3"}, ADVANCED, section="advanced")


def test_an_integer_is_a_float_too() -> None:
    assert resolve({"max_grad_norm": 2})["max_grad_norm"] == 2.0
