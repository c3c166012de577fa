"""The page docs/hyperparameters.md; `python -m tunesmith.hyperparameters.document` writes it."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from tunesmith.hyperparameters.definitions import LORA_LEARNING_RATES, SECTIONS
from tunesmith.hyperparameters.field import Hyperparameter, Value, definitions


def document() -> str:
    """The text of docs/hyperparameters.md."""
    rates = ", ".join(
        f"{rate:g} below {limit / 1e9:g} billion" if limit < math.inf else f"{rate:g} from there on"
        for limit, rate in LORA_LEARNING_RATES
    )
    lines = [
        "<!-- Written by `python -m tunesmith.hyperparameters.document`: change the definitions, not this file. -->",
        "# Hyperparameters of the text recipe",
        "",
        "An order gives them under `hyperparameters` (`--set NAME=VALUE`) and `advanced` (`--advanced NAME=VALUE`).",
        "An unknown name, a wrong type or a value out of bounds is refused at the order.",
        "",
        "Two follow from the model, where its details are known:",
        "",
        f"- `learning_rate` of LoRA by the model's parameters: by default {rates};",
        "  the table has the one for a model of unknown size.",
        "- `max_seq_length` is at most the model's context length, and by default no more than it.",
        "",
        "`bits` quantizes the base for the training alone (QLoRA): a job's losses and answers are those of the adapter",
        "over the quantized base, while the new model is the same adapter merged into the base in full precision.",
        "So a job that goes on from it, by `finetuned_model` or as its model, begins at a slightly other held-out loss",
        "than the one before ended with, unless both have the same `bits` and the first is named by `finetuned_model`.",
    ]
    for definition in SECTIONS:
        lines += [
            "",
            f"## {definition.section}",
            "",
            "| name | type | default | allowed | what | 说明 |",
            "|---|---|---|---|---|---|",
        ]
        lines += [f"| {' | '.join(_cells(h))} |" for h in definitions(definition)]
    return "\n".join(lines) + "\n"


def _cells(h: Hyperparameter) -> tuple[str, ...]:
    allowed = ", ".join(map(_code, h.allowed)) + (" (in this version)" if h.supported else "")
    return f"`{h.name}`", h.type.__name__, _code(h.default), allowed if h.allowed else h.bounds, h.help, h.help_zh


def _code(value: Value) -> str:
    if value is None:
        return "absent"
    if value == "":
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    (Path(sys.argv[1]) if sys.argv[1:] else Path("docs/hyperparameters.md")).write_text(document(), encoding="utf-8")
