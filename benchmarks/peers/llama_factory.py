"""LLaMA-Factory: `neat` (packed, rows kept apart by a mask), `wide` (several packs a pass) or `plain`.

It runs in an environment of its own. The tokens reach it through its `tokenized_path`, packed by its own processor.
"""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

from llamafactory.data.processor.supervised import PackedSupervisedDatasetProcessor, SupervisedDatasetProcessor
from llamafactory.train.tuner import run_exp

from benchmarks.peers.trainer_runs import PACKAGES, Watch, arguments, load_rows, load_tokenizer
from benchmarks.peers.work import Work

FILLED = 0.97
"""Share of a pack that its greedy packing fills, about."""


class _Given:
    """In place of a processor's tokenising: the tokens stand where it looks for texts."""

    def _encode_data_example(self, prompt: Any, response: Any, **rest: Any) -> tuple[list[int], list[int]]:
        return prompt[0], response[0]


class _Plain(_Given, SupervisedDatasetProcessor):  # type: ignore[misc]
    pass


class _Packed(_Given, PackedSupervisedDatasetProcessor):  # type: ignore[misc]
    pass


def main(path: str, setting: str = "neat") -> None:
    work = Work.read(path)
    neat = setting != "plain"
    if neat:
        # A pack has a token more than the limit, and must come out at a multiple of 8: its positions are not padded.
        length = -(-(work.max_length + 1) // 8) * 8
        work = dataclasses.replace(work, max_length=length - 1).packed(filled=FILLED, wide=setting == "wide")
    given = {
        **arguments(work),
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": work.model,
        "dataset": "rows",
        "template": "default",
        "tokenized_path": _tokenized(work, neat),
        "cutoff_len": work.max_length,
        "neat_packing": neat,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": work.lora_rank,
        "lora_alpha": work.lora_alpha,
        "lora_dropout": 0.0,
        "disable_gradient_checkpointing": True,
        "overwrite_output_dir": True,
    }
    given.pop("gradient_checkpointing")
    config = {"setting": setting, "neat_packing": neat, "cutoff_len": work.max_length if neat else None}
    run_exp(given, callbacks=[Watch(config, (*PACKAGES[:4], PACKAGES[5]))])


def _tokenized(work: Work, neat: bool) -> str:
    """The rows as LLaMA-Factory's processor leaves them, on the disk."""
    data = SimpleNamespace(cutoff_len=work.max_length, neat_packing=neat, packing=neat)
    processor = (_Packed if neat else _Plain)(
        template=None, tokenizer=load_tokenizer(work), processor=None, data_args=data
    )

    def prepare(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        nothing = [None] * len(batch["input_ids"])
        names = ("_system", "_tools", "_images", "_videos", "_audios")
        texts = {"_prompt": [[ids] for ids in batch["input_ids"]], "_response": [[ids] for ids in batch["labels"]]}
        made: dict[str, list[Any]] = processor.preprocess_dataset({**texts, **dict.fromkeys(names, nothing)})
        return {name: column for name, column in made.items() if name not in ("images", "videos", "audios")}

    rows = load_rows(work)
    folder = f"{work.out}/tokenized"
    rows.map(prepare, batched=True, remove_columns=rows.column_names).save_to_disk(folder)
    return folder


if __name__ == "__main__":
    main(*sys.argv[1:])
