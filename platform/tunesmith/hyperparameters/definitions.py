"""The hyperparameters of the text recipe: checks, defaults, the API's schema and the documentation come from here.

Their names are public (docs/contracts.md, section 3). A class for each method: LoRA's is the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tunesmith.bounds import MAX_COLUMN, MAX_SOURCE, MAX_TEXT
from tunesmith.file_names import MAX_PATH_BYTES
from tunesmith.hyperparameters.field import Chinese, Hyperparameter, Section, definitions

_MANY = 10**7
_LONGEST_ROW = 1 << 20

MAX_SEQ_LENGTH = 1024
"""Default of `max_seq_length`, where the model's context is not shorter."""


# fmt: off
class EncodingHyperparameters(Section):
    """Those that decide which tokens a row becomes, whatever the method: code that makes tokens takes no others.

    Tokenised data is kept under a key of these values, and none of the rest.
    """

    section: ClassVar[str] = "hyperparameters"

    prompt_field: Annotated[
        str, Field(max_length=MAX_COLUMN, description="column with the prompt"), Chinese("提问所在的列名")] = "prompt"
    response_field: Annotated[
        str, Field(max_length=MAX_COLUMN,
                   description="column with the response; in text-generation it may be missing"),
        Chinese("回答所在的列名；文本生成任务可以没有这一列")] = "response"
    history_field: Annotated[
        str | None, Field(max_length=MAX_COLUMN,
                          description="column with earlier turns, a list of [question, answer]"),
        Chinese("历史对话所在的列名，内容为 [问题, 回答] 的列表")] = None
    prefix: Annotated[
        str, Field(max_length=MAX_TEXT, description="text put before every prompt"),
        Chinese("加在每条提问之前的文本")] = ""
    instruction_template: Annotated[
        str | None, Field(max_length=MAX_TEXT,
                          description="text between prefix and prompt; absent: the model's template"),
        Chinese("prefix 与提问之间的文本；不填：使用模型自带的对话模板")] = None
    response_template: Annotated[
        str | None, Field(max_length=MAX_TEXT,
                          description="text between prompt and response; absent: the model's template"),
        Chinese("提问与回答之间的文本；不填：使用模型自带的对话模板")] = None
    max_seq_length: Annotated[
        int, Field(ge=8, le=_LONGEST_ROW, description="tokens of a row at most"),
        Chinese("每条样本的最大 token 数")] = MAX_SEQ_LENGTH


class LoraHyperparameters(EncodingHyperparameters):
    """The 25 of Huawei Cloud AI Gallery's fine-tuning guide, for the method LoRA (docs/contracts.md, section 3)."""

    method: ClassVar[str] = "LoRA"

    data_url: Annotated[
        None, Field(description="storage path of the data, in place of the dataset's"),
        Chinese("数据的存储路径，代替所选数据集的路径")] = None
    train_url: Annotated[
        None, Field(description="storage path the products are written to"),
        Chinese("训练产物写入的存储路径")] = None
    train_data_file: Annotated[
        str | None, Field(max_length=MAX_PATH_BYTES,
                          description="file name of the training data; absent: all but the test file"),
        Chinese("训练数据的文件名；不填：除测试文件外的所有文件")] = None
    test_data_file: Annotated[
        str | None, Field(max_length=MAX_PATH_BYTES,
                          description="file name of the held-out data; absent: no evaluation"),
        Chinese("测试数据的文件名；不填：不做评估")] = None
    lora_alpha: Annotated[
        int, Field(ge=1, le=4096, description="scale of the adapter: it acts with lora_alpha / lora_rank"),
        Chinese("LoRA 的缩放系数：实际缩放比例为 lora_alpha / lora_rank")] = 16
    lora_dropout: Annotated[
        float, Field(ge=0.0, le=0.9, description="dropout before the adapter"),
        Chinese("LoRA 之前的随机失活（dropout）比例")] = 0.0
    lora_rank: Annotated[
        int, Field(ge=1, le=256, description="rank of the adapter's matrices"), Chinese("LoRA 低秩矩阵的秩")] = 8
    per_device_train_batch_size: Annotated[
        int, Field(ge=1, le=1024, description="rows a worker takes in one forward pass"),
        Chinese("每张卡一次前向计算的样本数")] = 4
    gradient_accumulation_steps: Annotated[
        int, Field(ge=1, le=1024, description="forward passes in one optimizer step"),
        Chinese("梯度累积步数，即一次参数更新包含的前向计算次数")] = 1
    max_steps: Annotated[
        int | None, Field(ge=1, le=_MANY, description="optimizer steps at most; absent: until the data is used up"),
        Chinese("最大训练步数，数据用完则提前结束；不填：直到数据用完")] = None
    save_steps: Annotated[
        int, Field(ge=1, le=_MANY, description="optimizer steps from one checkpoint to the next"),
        Chinese("每隔多少步保存一次检查点")] = 100
    logging_steps: Annotated[
        int, Field(ge=1, le=_MANY, description="optimizer steps from one report to the next"),
        Chinese("每隔多少步记录一次指标")] = 1
    learning_rate: Annotated[
        float, Field(ge=1e-9, le=1.0, description="highest learning rate"), Chinese("学习率的最大值")] = 2e-4
    max_grad_norm: Annotated[
        float, Field(ge=1e-6, le=1e6, description="gradients are scaled down to this norm"),
        Chinese("梯度裁剪的最大范数")] = 1.0
    warmup_ratio: Annotated[
        float, Field(ge=0.0, le=1.0, description="share of the steps over which the learning rate rises"),
        Chinese("学习率预热步数占总步数的比例")] = 0.03
    finetuned_model: Annotated[
        str | None,
        Field(max_length=MAX_SOURCE,
              description="earlier result whose adapter is trained on: NAME@VERSION, the id of a stopped job "
              "(its newest checkpoint), or the storage path of a model or checkpoint"),
        Chinese("已有微调结果，在其 LoRA 权重的基础上继续训练：模型名@版本、已停止任务的 ID（取其最新检查点），"
                "或模型、检查点的存储路径")] = None
    bits: Annotated[
        Literal[4, 8] | None,
        Field(description="bits of the quantized base in training, not on NPUs; absent: none"),
        Chinese("训练时冻结的基础模型量化的位数（NPU 不支持）；不填：不量化")] = None
    max_eval_samples: Annotated[
        int, Field(ge=1, le=_MANY,
                   description="held-out rows at most that are evaluated, and answered by the model"),
        Chinese("评估时最多使用的测试样本数：计算损失，并生成回答")] = 64


class SharedAdvanced(Section):
    """Those under `advanced` that mean something to any training, a model's own `train.py` included."""

    section: ClassVar[str] = "advanced"

    max_retries: Annotated[
        int, Field(ge=0, le=100,
                   description="restarts after lost workers, and further attempts after lost drivers"),
        Chinese("工作进程或主进程意外丢失后最多重试的次数")] = 3


class EncodingAdvanced(Section):
    """Those under `advanced` that decide which tokens a row becomes; see EncodingHyperparameters."""

    section: ClassVar[str] = "advanced"

    train_on_history: Annotated[
        bool, Field(description="whether answers in the history are trained too"),
        Chinese("历史对话中的回答是否也参与训练")] = False


class Advanced(EncodingAdvanced, SharedAdvanced):
    """Those that the platform adds to the guide's 25, for the built-in recipe."""

    num_train_epochs: Annotated[
        int, Field(ge=1, le=10**6, description="times the data is gone through"),
        Chinese("训练轮数，即遍历数据的次数")] = 1
    seed: Annotated[
        int, Field(ge=0, le=2**31 - 1, description="seed of order, dropout and adapter"),
        Chinese("随机种子，决定数据顺序、随机失活和 LoRA 初始值")] = 0
    lr_scheduler_type: Annotated[
        Literal["linear", "cosine", "constant"], Field(description="course of the learning rate"),
        Chinese("学习率的变化方式")] = "cosine"
    weight_decay: Annotated[
        float, Field(ge=0.0, le=10.0, description="decoupled weight decay"),
        Chinese("权重衰减系数（AdamW）")] = 0.0
    target_modules: Annotated[
        str, Field(max_length=MAX_SOURCE,
                   description="modules that get an adapter: all-linear, or names separated by commas"),
        Chinese("添加 LoRA 的模块：all-linear 表示所有线性层，或以逗号分隔的模块名")] = "all-linear"
    strategy: Annotated[
        Literal["auto", "ddp", "zero1", "zero2", "zero3", "zero3_offload"],
        Field(description="how workers share the work; auto: ddp on CPUs; on accelerators zero2, "
              "or zero3 for a large base"),
        Chinese("多卡并行的方式；auto：CPU 用 ddp，加速卡用 DeepSpeed 的 zero2，模型较大时用 zero3")] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        Field(description="number format of the frozen weights; auto: bf16 where the device has units for it"),
        Chinese("冻结权重的数值精度；auto：设备支持时使用 bf16")] = "auto"
    gradient_checkpointing: Annotated[
        bool, Field(description="compute activations again to save memory"),
        Chinese("重新计算激活值以节省显存（梯度检查点）")] = False
    packing: Annotated[
        Literal["auto", "on", "off"],
        Field(description="whether rows lie end to end, unpadded, none seeing another; auto: where the model allows; "
              "on: or it fails"),
        Chinese("样本是否首尾相接、不加填充且互不可见；auto：模型支持时启用；on：模型不支持时任务失败")] = "auto"
    save_total_limit: Annotated[
        int, Field(ge=1, le=1000, description="checkpoints kept"), Chinese("最多保留的检查点个数")] = 2
    merge_adapter: Annotated[
        bool, Field(description="whether the new model holds merged weights beside the adapter"),
        Chinese("新模型除 LoRA 权重外是否还包含合并后的完整权重")] = True
# fmt: on

SECTIONS: tuple[type[Section], ...] = (LoraHyperparameters, Advanced)
"""What an order for the text recipe may give."""

LORA_LEARNING_RATES: tuple[tuple[float, float], ...] = ((1e9, 5e-4), (20e9, 2e-4), (math.inf, 1e-4))
"""Default learning rate of LoRA by the model's parameters: below the first number, the second.

7 and 13 billion take 2e-4, 33 and 65 billion 1e-4 (Dettmers et al., "QLoRA", 2023, table 9). Below a billion the best
rate is higher still: it falls with the width, 5e-4 at 2,000 (Schulman et al., "LoRA Without Regret", 2025).
"""


def for_model(definition: type[Section], details: Mapping[str, Any]) -> tuple[Hyperparameter, ...]:
    """The hyperparameters for one model: with defaults and bounds that follow from the `details` of its manifest.

    `parameters` gives LoRA's learning rate; `max_seq_length`, the model's context length, bounds the length of rows.
    Where a detail is missing, all stays as it is defined.
    """
    changes: dict[str, dict[str, Any]] = {}
    parameters, context = details.get("parameters"), details.get("max_seq_length")
    if parameters and issubclass(definition, LoraHyperparameters):
        rate = next(rate for limit, rate in LORA_LEARNING_RATES if parameters < limit)
        changes["learning_rate"] = {"default": rate}
    if context:
        changes["max_seq_length"] = {"default": min(MAX_SEQ_LENGTH, context), "maximum": min(_LONGEST_ROW, context)}
    return tuple(replace(h, **changes.get(h.name, {})) for h in definitions(definition))
