"""Hyperparameters of the text recipe: one definition checks, defaults and documents (docs/contracts.md, section 3).

`python -m tunesmith.hyperparameters` writes docs/hyperparameters.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
    help_zh: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Value, ...] = ()
    optional: bool = False
    """Whether None (absent) is a value of its own."""
    supported: tuple[Value, ...] | None = None
    """The values this version can run; any other that is legal is refused, not ignored. None: all of them."""

    @property
    def allowed(self) -> tuple[Value, ...]:
        """The values that can be given, where there are but a few; empty where there are bounds or nothing."""
        if self.supported is not None:
            return self.supported
        return (*self.choices, None) if self.choices and self.optional else self.choices


def _text(name: str, default: Value, help: str, help_zh: str, **more: Any) -> Hyperparameter:
    return Hyperparameter(name, str, default, help, help_zh, **more)


def _file(name: str, help: str, help_zh: str, **more: Any) -> Hyperparameter:
    return Hyperparameter(name, str, None, help, help_zh, optional=True, **more)


def _int(
    name: str, default: Value, low: int, high: int, help: str, help_zh: str, *, optional: bool = False
) -> Hyperparameter:
    return Hyperparameter(name, int, default, help, help_zh, low, high, optional=optional)


def _float(name: str, default: float, low: float, high: float, help: str, help_zh: str) -> Hyperparameter:
    return Hyperparameter(name, float, default, help, help_zh, low, high)


def _bool(name: str, default: bool, help: str, help_zh: str) -> Hyperparameter:
    return Hyperparameter(name, bool, default, help, help_zh)


_NOT_YET: dict[str, Any] = {"supported": (None,)}
_MANY = 10**7

MAX_SEQ_LENGTH = 1024
"""Default of `max_seq_length`, where the model's context is not shorter."""

# fmt: off
GUIDE: tuple[Hyperparameter, ...] = (
    _file("data_url", "storage path of the data, in place of the dataset's", "数据的存储路径，代替所选数据集的路径",
          **_NOT_YET),
    _file("train_url", "storage path the products are written to", "训练产物写入的存储路径", **_NOT_YET),
    _file("train_data_file", "file name of the training data; absent: all but the test file",
          "训练数据的文件名；不填：除测试文件外的所有文件"),
    _file("test_data_file", "file name of the held-out data; absent: no evaluation",
          "测试数据的文件名；不填：不做评估"),
    _text("prompt_field", "prompt", "column with the prompt", "提问所在的列名"),
    _text("response_field", "response", "column with the response; in text-generation it may be missing",
          "回答所在的列名；文本生成任务可以没有这一列"),
    _file("history_field", "column with earlier turns, a list of [question, answer]",
          "历史对话所在的列名，内容为 [问题, 回答] 的列表"),
    _text("prefix", "", "text put before every prompt", "加在每条提问之前的文本"),
    _file("instruction_template", "text between prefix and prompt; absent: the model's template",
          "prefix 与提问之间的文本；不填：使用模型自带的对话模板"),
    _file("response_template", "text between prompt and response; absent: the model's template",
          "提问与回答之间的文本；不填：使用模型自带的对话模板"),
    _int("lora_alpha", 16, 1, 4096, "scale of the adapter: it acts with lora_alpha / lora_rank",
         "LoRA 的缩放系数：实际缩放比例为 lora_alpha / lora_rank"),
    _float("lora_dropout", 0.0, 0.0, 0.9, "dropout before the adapter", "LoRA 之前的随机失活（dropout）比例"),
    _int("lora_rank", 8, 1, 256, "rank of the adapter's matrices", "LoRA 低秩矩阵的秩"),
    _int("per_device_train_batch_size", 4, 1, 1024, "rows a worker takes in one forward pass",
         "每张卡一次前向计算的样本数"),
    _int("gradient_accumulation_steps", 1, 1, 1024, "forward passes in one optimizer step",
         "梯度累积步数，即一次参数更新包含的前向计算次数"),
    _int("max_steps", None, 1, _MANY, "optimizer steps at most; absent: until the data is used up",
         "最大训练步数，数据用完则提前结束；不填：直到数据用完", optional=True),
    _int("save_steps", 100, 1, _MANY, "optimizer steps from one checkpoint to the next", "每隔多少步保存一次检查点"),
    _int("logging_steps", 1, 1, _MANY, "optimizer steps from one report to the next", "每隔多少步记录一次指标"),
    _float("learning_rate", 2e-4, 1e-9, 1.0, "highest learning rate", "学习率的最大值"),
    _float("max_grad_norm", 1.0, 1e-6, 1e6, "gradients are scaled down to this norm", "梯度裁剪的最大范数"),
    _float("warmup_ratio", 0.03, 0.0, 1.0, "share of the steps over which the learning rate rises",
           "学习率预热步数占总步数的比例"),
    _int("max_seq_length", MAX_SEQ_LENGTH, 8, 1 << 20, "tokens of a row at most", "每条样本的最大 token 数"),
    _file("finetuned_model", "earlier result whose adapter is trained on: NAME@VERSION, the id of a stopped job "
          "(its newest checkpoint), or the storage path of a model or checkpoint",
          "已有微调结果，在其 LoRA 权重的基础上继续训练：模型名@版本、已停止任务的 ID（取其最新检查点），"
          "或模型、检查点的存储路径"),
    Hyperparameter("bits", int, None, "bits of the quantized base in training, not on NPUs; absent: none",
                   "训练时冻结的基础模型量化的位数（NPU 不支持）；不填：不量化", choices=(4, 8), optional=True),
    _int("max_eval_samples", 64, 1, _MANY, "held-out rows at most that are evaluated, and answered by the model",
         "评估时最多使用的测试样本数：计算损失，并生成回答"),
)

ADVANCED: tuple[Hyperparameter, ...] = (
    _int("num_train_epochs", 1, 1, 10**6, "times the data is gone through", "训练轮数，即遍历数据的次数"),
    _int("seed", 0, 0, 2**31 - 1, "seed of order, dropout and adapter",
         "随机种子，决定数据顺序、随机失活和 LoRA 初始值"),
    _text("lr_scheduler_type", "cosine", "course of the learning rate", "学习率的变化方式",
          choices=("linear", "cosine", "constant")),
    _float("weight_decay", 0.0, 0.0, 10.0, "decoupled weight decay", "权重衰减系数（AdamW）"),
    _text("target_modules", "all-linear", "modules that get an adapter: all-linear, or names separated by commas",
          "添加 LoRA 的模块：all-linear 表示所有线性层，或以逗号分隔的模块名"),
    _bool("train_on_history", False, "whether answers in the history are trained too",
          "历史对话中的回答是否也参与训练"),
    _text("strategy", "auto",
          "how workers share the work; auto: ddp on CPUs; on accelerators zero2, or zero3 for a large base",
          "多卡并行的方式；auto：CPU 用 ddp，加速卡用 DeepSpeed 的 zero2，模型较大时用 zero3",
          choices=("auto", "ddp", "zero1", "zero2", "zero3", "zero3_offload")),
    _text("precision", "auto", "number format of the frozen weights; auto: bf16 where the device has units for it",
          "冻结权重的数值精度；auto：设备支持时使用 bf16", choices=("auto", "fp32", "bf16")),
    _bool("gradient_checkpointing", False, "compute activations again to save memory",
          "重新计算激活值以节省显存（梯度检查点）"),
    _text("packing", "auto",
          "whether rows lie end to end, unpadded, none seeing another; auto: where the model allows; on: or it fails",
          "样本是否首尾相接、不加填充且互不可见；auto：模型支持时启用；on：模型不支持时任务失败",
          choices=("auto", "on", "off")),
    _int("save_total_limit", 2, 1, 1000, "checkpoints kept", "最多保留的检查点个数"),
    _int("max_retries", 3, 0, 100, "restarts after lost workers, and further attempts after lost drivers",
         "工作进程或主进程意外丢失后最多重试的次数"),
    _bool("merge_adapter", True, "whether the new model holds merged weights beside the adapter",
          "新模型除 LoRA 权重外是否还包含合并后的完整权重"),
)
# fmt: on

SECTIONS: Mapping[str, tuple[Hyperparameter, ...]] = {"hyperparameters": GUIDE, "advanced": ADVANCED}

LORA_LEARNING_RATES: tuple[tuple[float, float], ...] = ((1e9, 5e-4), (20e9, 2e-4), (math.inf, 1e-4))
"""Default learning rate of LoRA by the model's parameters: below the first number, the second.

7 and 13 billion take 2e-4, 33 and 65 billion 1e-4 (Dettmers et al., "QLoRA", 2023, table 9). Below a billion the best
rate is higher still: it falls with the width, 5e-4 at 2,000 (Schulman et al., "LoRA Without Regret", 2025).
"""


def for_model(
    known: Iterable[Hyperparameter], details: Mapping[str, Any], *, method: str = "LoRA"
) -> tuple[Hyperparameter, ...]:
    """`known` for one model and method: defaults and bounds that follow from the `details` of the model's manifest.

    `parameters` gives the learning rate, `max_seq_length`, the model's context length, bounds the rows' length. Where
    a detail is missing, all stays as it is.
    """
    changes: dict[str, dict[str, Any]] = {}
    parameters, context = details.get("parameters"), details.get("max_seq_length")
    if method == "LoRA" and parameters:
        rate = next(rate for limit, rate in LORA_LEARNING_RATES if parameters < limit)
        changes["learning_rate"] = {"default": rate}
    if context:
        changes["max_seq_length"] = {"default": min(MAX_SEQ_LENGTH, context), "maximum": min(1 << 20, context)}
    return tuple(replace(h, **changes.get(h.name, {})) for h in known)


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


def json_schema(known: Iterable[Hyperparameter]) -> dict[str, Any]:
    """JSON Schema of an object with these hyperparameters, each with its help in both languages."""
    return {"type": "object", "additionalProperties": False, "properties": {h.name: _schema(h) for h in known}}


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
        raise _refusal(h, value, section, f"must be {bounds(h)}")
    if h.supported is not None and value not in h.supported:
        allowed = ", ".join("absent" if v is None else str(v) for v in h.supported)
        raise _refusal(h, value, section, f"can only be {allowed} in this version", code="not_supported")
    checked: Value = value
    return checked


def bounds(h: Hyperparameter) -> str:
    """`1 to 256`; empty where there are no bounds."""
    if h.minimum is None or h.maximum is None:
        return ""
    # Whole numbers are written out: 262144, not 2.62144e+05.
    return " to ".join(str(int(b)) if h.type is int else f"{b:g}" for b in (h.minimum, h.maximum))


def _refusal(
    h: Hyperparameter, value: Any, section: str, allowed: str, code: str = "invalid_hyperparameter"
) -> SpecError:
    return SpecError(
        f"{h.name} {allowed}, got {value!r}", fields=[f"{section}.{h.name}"], hint=f"{h.name}: {h.help}", code=code
    )


def _elsewhere(name: str, section: str) -> str | None:
    for other, table in SECTIONS.items():
        if other != section and any(h.name == name for h in table):
            return f"{name} belongs under {other}"
    return None


def _schema(h: Hyperparameter) -> dict[str, Any]:
    kind = {str: "string", int: "integer", float: "number", bool: "boolean"}[h.type]
    made: dict[str, Any] = {"type": [kind, "null"] if h.optional else kind, "default": h.default}
    if h.allowed:
        made["enum"] = list(h.allowed)
    if h.minimum is not None:
        made |= {"minimum": h.minimum, "maximum": h.maximum}
    return {**made, "description": h.help, "x-description-zh": h.help_zh}


def document() -> str:
    """The text of docs/hyperparameters.md."""
    rates = ", ".join(
        f"{rate:g} below {limit / 1e9:g} billion" if limit < math.inf else f"{rate:g} from there on"
        for limit, rate in LORA_LEARNING_RATES
    )
    lines = [
        "<!-- Written by `python -m tunesmith.hyperparameters`: change the definition there, not this file. -->",
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
    for section, known in SECTIONS.items():
        lines += [
            "",
            f"## {section}",
            "",
            "| name | type | default | allowed | what | 说明 |",
            "|---|---|---|---|---|---|",
        ]
        lines += [f"| {' | '.join(_cells(h))} |" for h in known]
    return "\n".join(lines) + "\n"


def _cells(h: Hyperparameter) -> tuple[str, ...]:
    allowed = ", ".join(map(_code, h.allowed)) + (" (in this version)" if h.supported else "")
    return f"`{h.name}`", h.type.__name__, _code(h.default), allowed if h.allowed else bounds(h), h.help, h.help_zh


def _code(value: Value) -> str:
    if value is None:
        return "absent"
    if value == "":
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    import sys
    from pathlib import Path

    (Path(sys.argv[1]) if sys.argv[1:] else Path("docs/hyperparameters.md")).write_text(document(), encoding="utf-8")
