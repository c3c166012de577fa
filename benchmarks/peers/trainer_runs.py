"""What the peers on transformers' Trainer have in common: model, arguments, and the lines of their steps."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from benchmarks.peers.work import StepLines, Work, say_end

PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory")


class Watch(TrainerCallback):  # type: ignore[misc]
    """Prints steps and end of a Trainer's run. Made before the run; counts what every `training_step` is given.

    Packed rows, known by their positions, must not see each other: the first batch is looked at, else the run ends.
    """

    def __init__(self, config: Mapping[str, Any], packages: tuple[str, ...] = PACKAGES[:4]) -> None:
        self._config = {**config, "versions": {name: version(name) for name in packages}}
        self._lines = StepLines()
        self._loss: Any = 0.0
        self._tokens: Any = 0
        plain = Trainer.training_step

        def training_step(trainer: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            if "position_ids" in inputs and "rows_apart" not in self._config:
                if not rows_are_apart(model, inputs):
                    raise SystemExit("rows of one pack see each other: not the training that was asked for")
                self._config["rows_apart"] = True
            self._tokens = self._tokens + real_tokens(inputs)
            loss = plain(trainer, model, inputs, num_items_in_batch)
            # Each pass gives its share of the step's mean. A number of it would make the host wait.
            self._loss = self._loss + loss.detach()
            return loss

        Trainer.training_step = training_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        model = more["model"]
        dtypes = {str(parameter.dtype) for parameter in model.parameters()}
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self._config |= {
            "dtypes": sorted(dtypes),
            "trained_parameters": trained,
            "half_precision": bool(args.bf16 or args.fp16),
            "optim": str(args.optim),
            "rows_or_packs_a_pass": args.per_device_train_batch_size,
            "passes": args.gradient_accumulation_steps,
            "gradient_checkpointing": bool(getattr(model, "is_gradient_checkpointing", False)),
            "threads": torch.get_num_threads(),
        }
        self._lines.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if not isinstance(self._loss, torch.Tensor):
            raise SystemExit("the passes of this trainer are not seen")
        self._lines.end(state.global_step, loss=float(self._loss), tokens=int(self._tokens))
        self._loss, self._tokens = 0.0, 0

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        say_end(self._config, device_bytes=torch.cuda.max_memory_allocated())


def real_tokens(inputs: Mapping[str, Any]) -> Any:
    """Tokens of a batch that are no padding, a number or a tensor of one."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return int(inputs["input_ids"].numel())
    if mask.dim() == 4:  # of floats: what is seen is 0, and all but padding sees itself
        return (mask[:, 0].diagonal(dim1=1, dim2=2) == 0).sum()
    return (mask != 0).sum()


def lora_model(work: Work, attention: str | None = None) -> Any:
    """The model with a fresh adapter on all linear layers but the head; the seed gives the recipe's own.

    `attention` is one of transformers' implementations, its choice if None.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if work.cuda else torch.float32
    base = AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype, attn_implementation=attention)
    config = LoraConfig(
        r=work.lora_rank,
        lora_alpha=work.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(work.seed)
    return get_peft_model(base, config)


def load_tokenizer(work: Work) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_rows(work: Work) -> Any:
    from datasets import Dataset

    return Dataset.from_json(work.rows, cache_dir=f"{work.out}/datasets")


def arguments(work: Work) -> dict[str, Any]:
    """What the arguments of all Trainers have in common."""
    return {
        "output_dir": f"{work.out}/trainer",
        "per_device_train_batch_size": work.batch_rows,
        "gradient_accumulation_steps": work.passes,
        "max_steps": work.steps,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not work.cuda,
        "bf16": work.cuda,  # TRL turns it on by itself
        "seed": work.seed,
        "gradient_checkpointing": work.checkpointed,
        "disable_tqdm": True,
        "dataloader_pin_memory": work.cuda,
    }


@torch.no_grad()
def rows_are_apart(model: Any, batch: Mapping[str, Any]) -> bool:
    """Whether no row of a packed batch sees another: each has the hidden states that it has alone."""
    body = model.get_base_model().base_model
    given = {name: value for name, value in batch.items() if name != "labels"}
    packed = body(**given, use_cache=False).last_hidden_state
    apart = packed.clone()
    for number, (ids, places) in enumerate(zip(batch["input_ids"], batch["position_ids"], strict=True)):
        starts = [at for at, place in enumerate(places.tolist()) if place == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if end - start > 1:  # padding has places of 0
                apart[number, start:end] = body(input_ids=ids[None, start:end], use_cache=False).last_hidden_state[0]
    difference = torch.linalg.vector_norm((packed - apart).float()) / torch.linalg.vector_norm(apart.float())
    # What rounding comes to; a row that sees another differs by far more.
    return bool(difference < (1e-3 if packed.dtype == torch.float32 else 3e-2))
