"""The recipe of `trainers.recipe.training_loop`, as a job runs it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.peers.work import StepLines, Work, say_end
from trainers.recipe.batches import BatchPlan
from trainers.recipe.training_loop import Hooks, train
from trainers.text.shards import TokenizedRows
from tunesmith.hyperparameters.checks import resolve
from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters
from tunesmith.jobs.audit_report import AuditCounts


def main(path: str) -> None:
    work = Work.read(path)
    rows = TokenizedRows.open([Path(work.shard)], AuditCounts())
    hyperparameters = resolve(
        LoraHyperparameters,
        {
            "lora_rank": work.lora_rank,
            "lora_alpha": work.lora_alpha,
            "per_device_train_batch_size": work.batch_rows,
            "gradient_accumulation_steps": work.passes,
            "learning_rate": work.learning_rate,
            "max_seq_length": work.max_length,
            "max_steps": work.steps,
            "save_steps": work.steps,
            "warmup_ratio": 0.0,
            "bits": work.bits,
        },
    )
    own = {
        "lr_scheduler_type": "constant",
        "precision": "bf16" if work.cuda else "fp32",
        "gradient_checkpointing": work.checkpointed,
        "seed": work.seed,
    }
    advanced = resolve(Advanced, {**own, **work.advanced})
    compiled = work.compiled and not work.checkpointed
    plan = BatchPlan(rows.lengths, batch_rows=work.batch_rows, passes=work.passes, world_size=1, seed=work.seed)
    lines = StepLines()

    def report(step: int, values: Mapping[str, float]) -> None:
        if "loss" in values:
            lines.end(step, loss=values["loss"], tokens=int(rows.lengths[plan.rows(step)].sum()))

    hooks = Hooks(
        report=report,
        save=lambda step, folder: None,
        should_stop=lambda: False,
        phase=lambda name, data: lines.begin() if name == "train" else None,
    )
    ended = train(
        Path(work.model),
        rows,
        None,
        hyperparameters=hyperparameters,
        advanced=advanced,
        hooks=hooks,
        compiled=compiled,
        profile=None if work.profile is None else Path(work.profile),
    )
    parameters = list(ended.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen_bytes = sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad)
    config = {"compiled": compiled, "advanced": advanced.model_dump(), "versions": {"torch": torch.__version__}}
    say_end(
        {**config, "trained_parameters": trained, "frozen_bytes": frozen_bytes, "threads": torch.get_num_threads()},
        device_bytes=torch.cuda.max_memory_allocated(),  # 0 without a GPU
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
