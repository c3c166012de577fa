"""TRL's SFTTrainer: `packed` (best-fit decreasing), `wide` (several packs joined), `padding_free`, or `plain`.

Packed and padding-free rows stand behind one another with positions that begin again. Without an attention mask and a
cache, transformers keeps such rows apart whatever computes attention: flash-attn where it is installed and there is a
GPU, else torch. `padding_free` and `plain` take the recipe's own steps, row for row. With `+liger` behind the setting,
layers are computed by Liger's kernels.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers.utils import is_flash_attn_2_available
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
    layout, _, liger = setting.partition("+")
    work = Work.read(path)
    given, work = sft_arguments(work, layout)
    attention = "flash_attention_2" if work.cuda and layout != "plain" and is_flash_attn_2_available() else None
    config = {"setting": setting, **given, "attention": attention or "sdpa"}
    watch = Watch(config, (*PACKAGES[:5], "liger-kernel") if liger else PACKAGES[:5])
    trainer = SFTTrainer(
        model=lora_model(work, attention),
        args=SFTConfig(**arguments(work), **given, use_liger_kernel=bool(liger), dataset_num_proc=1),
        train_dataset=load_rows(work),
        processing_class=load_tokenizer(work),
        callbacks=[watch],
    )
    trainer.train()


def sft_arguments(work: Work, layout: str) -> tuple[dict[str, Any], Work]:
    """What SFTConfig is given for a layout of rows, and the work with rows or packs a pass as it has them."""
    if layout in ("packed", "wide"):
        packs = work.packed(filled=FILLED, wide=layout == "wide")
        return {"max_length": work.max_length, "packing": True, "packing_strategy": "bfd"}, packs
    sequential = {"train_sampling_strategy": "sequential"}
    return {"max_length": None, "packing": False, "padding_free": layout == "padding_free", **sequential}, work


if __name__ == "__main__":
    main(*sys.argv[1:])
