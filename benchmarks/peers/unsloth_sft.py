"""Unsloth, as its documentation shows it, on top of TRL's SFTTrainer: `packed` or `plain`. Needs a GPU."""

from __future__ import annotations

import sys

import unsloth  # isort: skip  # before all that it patches
import torch
from trl import SFTConfig, SFTTrainer

from benchmarks.peers.trainer_runs import PACKAGES, Watch, arguments, load_rows
from benchmarks.peers.trl_sft import sft_arguments
from benchmarks.peers.work import Work

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main(path: str, setting: str = "packed") -> None:
    given, work = sft_arguments(Work.read(path), "wide" if setting == "packed" else setting)
    base, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        work.model, max_seq_length=work.max_length, dtype=torch.bfloat16, load_in_4bit=False
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        base,
        r=work.lora_rank,
        lora_alpha=work.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(LAYERS),
        use_gradient_checkpointing="unsloth" if work.checkpointed else False,
        random_state=work.seed,
    )
    watch = Watch({"setting": setting, **given}, (*PACKAGES[:5], "unsloth"))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**{**arguments(work), "gradient_checkpointing": False}, **given, dataset_num_proc=1),
        train_dataset=load_rows(work),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
