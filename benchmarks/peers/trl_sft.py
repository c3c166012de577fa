"""TRL's SFTTrainer: `packed` (best-fit decreasing), `wide` (several packs joined), `padding_free`, or `plain`.

Packed and padding-free rows stand behind one another with positions that begin again. Without an attention mask and a
cache, transformers keeps such rows apart on a CPU too.
"""

from __future__ import annotations

import sys
from typing import Any

from trl import SFTConfig, SFTTrainer

from benchmarks.peers.trainer_runs import (
    PACKAGES,
    Watch,
    arguments,
    load_rows,
    load_tokenizer,
    lora_model,
)
from benchmarks.peers.work import Work

FILLED = 0.97
"""Share of a pack that best-fit decreasing fills, about."""


def main(path: str, setting: str = "packed") -> None:
    work = Work.read(path)
    given: dict[str, Any] = {"max_length": None, "packing": False, "padding_free": setting == "padding_free"}
    if setting in ("packed", "wide"):
        work = work.packed(filled=FILLED, wide=setting == "wide")
        given = {"max_length": work.max_length, "packing": True, "packing_strategy": "bfd"}
    tokenizer = load_tokenizer(work)
    config = {"setting": setting, **given}
    watch = Watch(config, PACKAGES[:5])
    trainer = SFTTrainer(
        model=lora_model(work),
        args=SFTConfig(**arguments(work), **given, dataset_num_proc=1),
        train_dataset=load_rows(work),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
