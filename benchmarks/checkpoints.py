"""What checkpoints cost a training: the share of its time, at one checkpoint a minute.

`python -m benchmarks.checkpoints --rows FILE.jsonl --prompt-field question --response-field answer`, after
`pip install -e '.[dev,benchmarks]'`: SmolLM2-135M-Instruct, rank 8 on all linear layers, fp32, checkpoints to an S3
server on this machine, which competes for its processors. In every round the same steps run once without a checkpoint
and once with one after each; what a checkpoint adds to its step is its cost, written and uploaded. Each step takes
about a second, so that uploads never rest.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from benchmarks import cpu_lora
from benchmarks.peers.environments import smollm2
from benchmarks.results_file import figure, say, write_results
from tests.s3_fixture import BUCKET, endpoint, free_ports, s3_keys, s3_process
from trainers.lora import Hooks, train
from trainers.shards import TokenizedRows
from trainers.uploads import Uploads
from tunesmith.hyperparameters import ADVANCED, resolve
from tunesmith.settings import Settings
from tunesmith.storage import Storage, open_storage

MINUTE_S = 60.0


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    lines: list[str] = []
    model = smollm2(arguments.cache)
    rows = cpu_lora.tokenise(model, arguments)
    costs, step_s = [], []
    with tempfile.TemporaryDirectory(prefix="ts-checkpoints-") as name, s3_keys():
        folder, ports = Path(name), free_ports(8)
        settings = Settings.from_env({"TUNESMITH_HOME": name, "TUNESMITH_S3_ENDPOINT": endpoint(ports)})
        with s3_process(folder, ports):
            storage = open_storage(f"s3://{BUCKET}/checkpoints", settings)
            for number in range(arguments.rounds):
                without = _seconds(model, rows, arguments, None, f"job-{number}")
                with_them = _seconds(model, rows, arguments, storage, f"job-{number}")
                costs.append((with_them - without) / arguments.steps)
                step_s.append(without / arguments.steps)
                say(lines, f"round {number + 1}: a step takes {step_s[-1]:.3f} s, its checkpoint {costs[-1]:.3f} s")
    figures = {
        "time_lost_share": figure([cost / MINUTE_S for cost in costs], "share"),
        "checkpoint_s": figure(costs, "s"),
        "step_s": figure(step_s, "s"),
    }
    for key, value in figures.items():
        say(lines, f"{key}: {value['value']:.4g} {value['unit']} ({value['min']:.4g} to {value['max']:.4g})")
    say(lines, str(write_results("checkpoints", figures, "\n".join(lines) + "\n")))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="a jsonl file")
    parser.add_argument("--prompt-field", default="prompt")
    parser.add_argument("--response-field", default="response")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit", type=int, default=512, help="rows of the file to choose from")
    cache = Path("~/.cache/tunesmith-benchmarks").expanduser()
    parser.add_argument("--cache", type=Path, default=cache, help="folder of the model")
    # The rest of what `cpu_lora` asks for.
    parser.set_defaults(batch_rows=4, passes=1, warmup_steps=0, max_length=256, advanced=[])
    return parser.parse_args()


def _seconds(
    model: Path, rows: TokenizedRows, arguments: argparse.Namespace, storage: Storage | None, job_id: str
) -> float:
    """From the first step to the last, and to the end of the last upload where checkpoints go to `storage`."""
    began = 0.0

    def begin(phase: str) -> None:
        nonlocal began
        if phase == "train":
            began = time.perf_counter()

    uploads = Uploads(storage, job_id=job_id, attempt=1, keep=2) if storage is not None else None

    def save(step: int, folder: Path | None) -> None:
        if uploads is not None and folder is not None:
            uploads.add_checkpoint(step, folder)

    given = {
        "per_device_train_batch_size": arguments.batch_rows,
        "max_seq_length": arguments.max_length,
        "max_steps": arguments.steps,
        "save_steps": 1 if uploads is not None else arguments.steps,
    }
    with uploads or nullcontext():
        train(
            model,
            rows,
            None,
            hyperparameters=resolve(given),
            advanced=resolve({"precision": "fp32"}, ADVANCED, section="advanced"),
            hooks=Hooks(
                report=lambda step, values: None,
                save=save,
                should_stop=lambda: False,
                phase=lambda name, data: begin(name),
            ),
            compiled=False,
        )
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
