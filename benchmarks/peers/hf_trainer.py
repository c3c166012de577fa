"""transformers' Trainer with peft, as its documentation shows it: `plain`, `bucketed`, or `compiled`.

`plain` takes the recipe's own steps, row for row, so its losses are those to compare with. `bucketed` and `compiled`
let the Trainer group rows of like length; `compiled` adds `torch_compile`.
"""

from __future__ import annotations

import sys

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from benchmarks.peers.trainer_runs import Watch, arguments, load_rows, load_tokenizer, lora_model
from benchmarks.peers.work import Work


def main(path: str, setting: str = "plain") -> None:
    work = Work.read(path)
    strategy = "sequential" if setting == "plain" else "group_by_length"
    config = {"setting": setting, "train_sampling_strategy": strategy, "torch_compile": setting == "compiled"}
    tokenizer = load_tokenizer(work)
    watch = Watch(config)
    trainer = Trainer(
        model=lora_model(work),
        args=TrainingArguments(
            **arguments(work), train_sampling_strategy=strategy, torch_compile=setting == "compiled"
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        train_dataset=load_rows(work),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
