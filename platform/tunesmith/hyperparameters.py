"""Hyperparameters of the text recipe: one definition checks, defaults and documents (contracts.md, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import SpecError, nearest

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Hyperparameter:
    """One public name with its type, bounds (both allowed), default and help."""

    name: str
    type: type
    default: Value
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Value, ...] = ()
    optional: bool = False
    """Whether None (absent) is a value of its own."""
    supported: tuple[Value, ...] | None = None
    """The values this version can run; any other that is legal is refused, not ignored. None: all of them."""


_H = Hyperparameter

GUIDE: tuple[Hyperparameter, ...] = (
    _H("data_url", str, None, "storage path of the data, in place of the dataset's", optional=True, supported=(None,)),
    _H("train_url", str, None, "storage path the products are written to", optional=True, supported=(None,)),
    _H("train_data_file", str, None, "file name of the training data; absent: all but the test file", optional=True),
    _H("test_data_file", str, None, "file name of the held-out data; absent: no evaluation", optional=True),
    _H("prompt_field", str, "prompt", "column with the prompt"),
    _H("response_field", str, "response", "column with the response; in text-generation it may be missing"),
    _H("history_field", str, None, "column with earlier turns, a list of [question, answer]", optional=True),
    _H("prefix", str, "", "text put before every prompt"),
    _H(
        "instruction_template", str, None, "text between prefix and prompt; absent: the model's template", optional=True
    ),
    _H("response_template", str, None, "text between prompt and response; absent: the model's template", optional=True),
    _H("lora_alpha", int, 16, "scale of the adapter: it acts with lora_alpha / lora_rank", 1, 4096),
    _H("lora_dropout", float, 0.0, "dropout before the adapter", 0.0, 0.9),
    _H("lora_rank", int, 8, "rank of the adapter's matrices", 1, 256),
    _H("per_device_train_batch_size", int, 4, "rows a worker takes in one forward pass", 1, 1024),
    _H("gradient_accumulation_steps", int, 1, "forward passes in one optimizer step", 1, 1024),
    _H("max_steps", int, None, "optimizer steps at most; absent: until the data is used up", 1, 10**7, optional=True),
    _H("save_steps", int, 100, "optimizer steps from one checkpoint to the next", 1, 10**7),
    _H("logging_steps", int, 1, "optimizer steps from one report to the next", 1, 10**7),
    _H("learning_rate", float, 2e-4, "highest learning rate", 1e-9, 1.0),
    _H("max_grad_norm", float, 1.0, "gradients are scaled down to this norm", 1e-6, 1e6),
    _H("warmup_ratio", float, 0.03, "share of the steps over which the learning rate rises", 0.0, 1.0),
    _H("max_seq_length", int, 1024, "tokens of a row at most", 8, 1 << 20),
    _H(
        "finetuned_model",
        str,
        None,
        "storage path of an earlier result to go on from",
        optional=True,
        supported=(None,),
    ),
    _H("bits", int, None, "bits of the quantized base; absent: none", choices=(4, 8), optional=True, supported=(None,)),
    _H("max_eval_samples", int, 500, "held-out rows evaluated at most", 1, 10**7),
)

ADVANCED: tuple[Hyperparameter, ...] = (
    _H("num_train_epochs", int, 1, "times the data is gone through", 1, 10**6),
    _H("seed", int, 0, "seed of order, dropout and adapter", 0, 2**31 - 1),
    _H("lr_scheduler_type", str, "cosine", "course of the learning rate", choices=("linear", "cosine", "constant")),
    _H("weight_decay", float, 0.0, "decoupled weight decay", 0.0, 10.0),
    _H("target_modules", str, "all-linear", "modules that get an adapter: all-linear, or names separated by commas"),
    _H("train_on_history", bool, False, "whether answers in the history are trained too"),
    _H(
        "strategy",
        str,
        "auto",
        "how workers share the work",
        choices=("auto", "ddp", "zero1", "zero2", "zero3", "zero3_offload"),
        supported=("auto", "ddp"),
    ),
    _H(
        "precision",
        str,
        "auto",
        "number format of the frozen weights; auto: bf16 where the device has units for it",
        choices=("auto", "fp32", "bf16"),
    ),
    _H("gradient_checkpointing", bool, False, "compute activations again to save memory"),
    _H(
        "packing",
        str,
        "auto",
        "how rows share a batch; auto: rows of like length",
        choices=("auto", "on", "off"),
        supported=("auto", "off"),
    ),
    _H("save_total_limit", int, 2, "checkpoints kept", 1, 1000),
    _H("max_retries", int, 3, "restarts after lost workers, and further attempts after lost drivers", 0, 100),
    _H("merge_adapter", bool, True, "whether the new model holds merged weights beside the adapter"),
)


def resolve(
    given: Mapping[str, Any], known: Iterable[Hyperparameter] = GUIDE, *, section: str = "hyperparameters"
) -> dict[str, Value]:
    """Check `given` and fill in the defaults; the order is that of `known`.

    Raises SpecError for an unknown name (with the nearest known one), a wrong type, a value out of bounds, or one that
    this version cannot run.
    """
    table = {h.name: h for h in known}
    for name in given:
        if name not in table:
            raise SpecError(
                f"there is no hyperparameter {name!r} in {section}",
                fields=[f"{section}.{name}"],
                hint=_elsewhere(name, section) or nearest(name, table) or f"known are: {', '.join(table)}",
                code="unknown_hyperparameter",
            )
    return {h.name: _check(h, given[h.name], section) if h.name in given else h.default for h in table.values()}


def _check(h: Hyperparameter, value: Any, section: str) -> Value:
    if value is None and h.optional:
        return None
    if h.type is float and type(value) is int:
        value = float(value)
    if type(value) is not h.type or value != value or value in (math.inf, -math.inf):  # a NaN differs from itself
        raise _refusal(h, value, section, f"must be of type {h.type.__name__}")
    return _check_range(h, value, section)


def _check_range(h: Hyperparameter, value: Any, section: str) -> Value:
    if h.choices and value not in h.choices:
        raise _refusal(h, value, section, f"must be one of {', '.join(map(str, h.choices))}")
    if (h.minimum is not None and value < h.minimum) or (h.maximum is not None and value > h.maximum):
        raise _refusal(h, value, section, f"must be {h.minimum:g} to {h.maximum:g}")
    if h.supported is not None and value not in h.supported:
        allowed = ", ".join("absent" if v is None else str(v) for v in h.supported)
        raise _refusal(h, value, section, f"can only be {allowed} in this version", code="not_supported")
    checked: Value = value
    return checked


def _refusal(
    h: Hyperparameter, value: Any, section: str, allowed: str, code: str = "invalid_hyperparameter"
) -> SpecError:
    return SpecError(
        f"{h.name} {allowed}, got {value!r}", fields=[f"{section}.{h.name}"], hint=f"{h.name}: {h.help}", code=code
    )


def _elsewhere(name: str, section: str) -> str | None:
    other, table = ("advanced", ADVANCED) if section == "hyperparameters" else ("hyperparameters", GUIDE)
    return f"{name} belongs under {other}" if any(h.name == name for h in table) else None
