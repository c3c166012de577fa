"""How fast the LoRA recipe trains on one GPU, and in how much of its memory, beside its peers on the same tokens.

An 8B Llama's shape with random weights, rank 16 on all linear layers, bf16, rows of up to 4096 tokens that are made
up, their lengths log-normal (`--full`: all 4096). Nothing is fetched: a machine needs a GPU, this repository, and

    pip install torch transformers peft pyarrow pydantic jinja2  # ours
    pip install trl datasets liger-kernel  # TRL with Liger; flash-attn too where it can be built
    pip install unsloth  # Unsloth
    PYTHONPATH=.:platform python -m benchmarks.gpu_lora [--full] [--rounds 3]

What is not installed is left out, with a reason. 30 GB of disk for the weights (`--cache`) and 80 GB of GPU memory for
all 32 layers; `--layers N` takes fewer. `--tiny` runs everything on whatever there is, to see that it does:

    PYTHONPATH=.:platform python -m benchmarks.gpu_lora --tiny --rounds 1 --only ours,trl_stock
    PYTHONPATH=.:platform python -m benchmarks.gpu_lora --profile trace.json

In every round each contestant runs in a process of its own; the speed is that of the steps after the warm-up, in
tokens. None checkpoints activations, unless it ran out of memory without: then it goes on with. The share of the
device's arithmetic (`model_flops_utilisation`) is what the steps need, by `benchmarks.peers.flops`, over what a large
bf16 product gets out of the same GPU in the same round. `trl_padding_free` takes the recipe's own steps, so losses are
compared with its; the losses themselves mean nothing.

With `--only`, `--tiny`, `--layers` or `--profile` nothing is written down, unless `--out` says where.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contest import (
    Contestant,
    Round,
    Run,
    check_alike,
    chosen,
    needed_flops,
    run_contestant,
    run_process,
    run_rounds,
    write_work,
)
from benchmarks.peers.random_model import random_llama
from benchmarks.peers.work import Work
from benchmarks.results_file import FOLDER, ROOT, figure, say, write_results
from trainers.text.shards import Batch, TokenizedRows
from tunesmith.jobs.audit_report import AuditCounts

CONTESTANTS = {
    "ours": Contestant("ours", None, None, usual=True),
    "trl_wide": Contestant("trl_sft", "wide+liger", "trl", usual=True),
    "trl_padding_free": Contestant("trl_sft", "padding_free+liger", "trl", usual=True),
    "trl_packed": Contestant("trl_sft", "packed+liger", "trl"),
    "trl_plain": Contestant("trl_sft", "plain+liger", "trl"),
    "trl_stock": Contestant("trl_sft", "padding_free", "trl_without_liger"),
    "unsloth_packed": Contestant("unsloth_sft", "packed", "unsloth", usual=True),
    "unsloth_plain": Contestant("unsloth_sft", "plain", "unsloth", usual=True),
}
PACKAGES = {"ours": (), "trl_sft": ("trl", "datasets"), "unsloth_sft": ("unsloth", "trl", "datasets")}
"""What a program needs besides torch, transformers and peft."""

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TINY = {
    **SHAPE,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MEDIAN_TOKENS, SPREAD = 700, 0.9
"""Of the rows' lengths, which are log-normal: about 1000 tokens in the mean, and a few at the limit."""


def main() -> None:
    arguments = _arguments()
    lines: list[str] = []
    cuda = torch.cuda.is_available()
    names = able(chosen(CONTESTANTS, "ours" if arguments.profile else arguments.only), lines, cuda=cuda)
    shape = {
        **(TINY if arguments.tiny else SHAPE),
        **({"num_hidden_layers": arguments.layers} if arguments.layers else {}),
    }
    name = "tiny" if arguments.tiny else "8b-shape"
    model = random_llama(arguments.cache / f"llama-{name}-{shape['num_hidden_layers']}-layers", **shape)
    with tempfile.TemporaryDirectory(prefix="ts-gpu-lora-") as folder:
        rows = made_up_rows(arguments, int(shape["vocab_size"]))
        work = work_of(arguments, rows, model, Path(folder), cuda=cuda)
        write_work(rows, work)
        needed = needed_flops(rows, work, warmup_steps=arguments.warmup_steps)
        say(lines, f"{len(rows)} rows, {work.mean_length:.1f} tokens each, at most {work.max_length}")
        say(lines, f"steps of {work.global_rows} rows; arithmetic of the timed ones: {needed / 1e12:.2f} TFLOP")
        runner = Runner(work, arguments.warmup_steps, lines)
        rounds, peaks, failed = run_rounds(
            names, 1 if arguments.profile else arguments.rounds, run=runner.run, peak=runner.peak, lines=lines
        )
    check_alike(rounds[0], ["trained_parameters"])
    figures = take_figures(rounds, needed, peaks, failed)
    for key, value in figures.items():
        say(lines, f"{key}: {value['value']:.4g} {value['unit']} ({value['min']:.4g} to {value['max']:.4g})")
    part = arguments.only or arguments.tiny or arguments.layers or arguments.profile or not cuda
    if arguments.out or not part:
        log = "\n".join(lines) + "\n"
        say(lines, str(write_results("gpu_lora", figures, log, folder=arguments.out or FOLDER, device=runner.device)))
    if failed:
        raise SystemExit(f"failed, so there are no figures of {', '.join(sorted(failed))}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_lora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="all rows as long as --max-length")
    parser.add_argument("--layers", type=int, help="instead of 32")
    parser.add_argument(
        "--tiny", action="store_true", help="a model of two small layers, and rows of 128 tokens at most"
    )
    parser.add_argument("--max-length", type=int, help="tokens of the longest row, 4096 if left out")
    parser.add_argument("--batch-rows", type=int, help="rows of one forward pass: 8 if left out, 2 with --full")
    parser.add_argument("--passes", type=int, default=2, help="forward passes of one step")
    parser.add_argument("--warmup-steps", type=int, default=3, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=10, help="steps that are")
    parser.add_argument("--only", help=f"of {', '.join(CONTESTANTS)}")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="a trace of ours alone, three steps of one round")
    parser.add_argument("--uncompiled", action="store_true", help="the recipe does not compile the layers")
    parser.add_argument("--checkpointed", action="store_true", help="all checkpoint activations from the first")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where figures and log are written")
    cache = Path("~/.cache/tunesmith-benchmarks").expanduser()
    parser.add_argument("--cache", type=Path, default=cache, help="folder of the model")
    return parser.parse_args()


def able(names: Sequence[str], lines: list[str], *, cuda: bool) -> list[str]:
    """The contestants that can run here; why the others cannot is said."""
    able = []
    for name in names:
        contestant = CONTESTANTS[name]
        liger = (contestant.setting or "").endswith("+liger")
        missing = [p for p in (*PACKAGES[contestant.module], *(["liger_kernel"] if liger else [])) if not find_spec(p)]
        if missing:
            say(lines, f"{name} is left out: {', '.join(missing)} not installed")
        elif (liger or contestant.peer == "unsloth") and not cuda:
            say(lines, f"{name} is left out: there is no GPU")
        else:
            able.append(name)
    if not able:
        raise SystemExit("there is no contestant left")
    return able


def made_up_rows(arguments: argparse.Namespace, vocabulary: int) -> TokenizedRows:
    """Rows for whole steps, the same every time: unequal tokens, of which the first part, a prompt, is not trained."""
    random = np.random.default_rng(0)
    longest = arguments.max_length or (128 if arguments.tiny else 4096)
    batch_rows = arguments.batch_rows or (2 if arguments.full else 8)
    count = batch_rows * arguments.passes * (arguments.warmup_steps + arguments.steps)
    median = MEDIAN_TOKENS * longest / 4096
    lengths = np.clip(random.lognormal(np.log(median), SPREAD, count), 16, longest).astype(np.int32)
    if arguments.full:
        lengths[:] = longest
    prompts = (lengths * random.uniform(0.1, 0.6, count)).astype(np.int32)
    trained = np.concatenate([np.arange(n) >= prompt for n, prompt in zip(lengths, prompts, strict=True)])
    ids = (1 + (vocabulary - 1) * random.random(len(trained)) ** 3).astype(np.int32)
    counts = AuditCounts(rows=count, tokens=len(ids), trained_tokens=int(trained.sum()), longest=int(lengths.max()))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return TokenizedRows.of([Batch(counts, offsets, ids, np.packbits(trained, bitorder="little"))])


def work_of(arguments: argparse.Namespace, rows: TokenizedRows, model: Path, folder: Path, *, cuda: bool) -> Work:
    steps = arguments.warmup_steps + arguments.steps
    return Work(
        model=str(model),
        rows=str(folder / "rows.jsonl"),
        shard=str(folder / "00000.arrow"),
        out=str(folder / "out"),
        steps=steps,
        batch_rows=len(rows) // steps // arguments.passes,
        passes=arguments.passes,
        max_length=arguments.max_length or (128 if arguments.tiny else 4096),
        mean_length=float(rows.lengths.mean()),
        lora_rank=16,
        lora_alpha=32,
        cuda=cuda,
        checkpointed=arguments.checkpointed,
        profile=str(arguments.profile.absolute()) if arguments.profile else None,
        compiled=cuda and not arguments.uncompiled,
    )


class Runner:
    """Runs contestants; remembers which of them ran out of memory."""

    def __init__(self, work: Work, warmup_steps: int, lines: list[str]) -> None:
        self.device: str | None = None
        self._work = work
        self._warmup_steps = warmup_steps
        self._lines = lines
        self._short_of_memory: set[str] = set()

    def run(self, name: str) -> Run | None:
        work = replace(self._work, checkpointed=self._work.checkpointed or name in self._short_of_memory)
        run = run_contestant(
            name, CONTESTANTS[name], work, warmup_steps=self._warmup_steps, env=_env(), lines=self._lines
        )
        if run is None and not work.checkpointed and "OutOfMemoryError" in self._lines[-1]:
            say(self._lines, f"{name} checkpoints activations from now on")
            self._short_of_memory.add(name)
            return self.run(name)
        return run

    def peak(self) -> float:
        """FLOP/s"""
        done = run_process(["matmul", *(["cuda"] if self._work.cuda else [])], env=_env())
        told = json.loads(done.stdout.splitlines()[-1])
        self.device = told["device"] if self._work.cuda else None
        return float(told["flops_per_s"])


def _env() -> dict[str, str]:
    """Nothing of this repository need be installed."""
    paths = [str(ROOT), str(ROOT / "platform"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def take_figures(
    rounds: Sequence[Round], needed: int, peaks: Sequence[float], failed: set[str]
) -> dict[str, dict[str, Any]]:
    """The figures of contestants that have run in every round; ratios are taken round by round."""
    found: dict[str, dict[str, Any]] = {}
    names = [name for name in rounds[0] if name not in failed]
    for peer in ("trl", "trl_without_liger", "unsloth"):
        theirs = [name for name in names if CONTESTANTS[name].peer == peer]
        if "ours" in names and theirs:
            speeds = [(runs["ours"].tokens_per_s, max(runs[n].tokens_per_s for n in theirs)) for runs in rounds]
            found[f"ratio_vs_{peer}"] = figure([mine / best for mine, best in speeds], "times")
    if "ours" in names:
        shares = [needed / runs["ours"].timed_s / peak for runs, peak in zip(rounds, peaks, strict=True)]
        found["model_flops_utilisation"] = figure(shares, "share")
        found["tokens_per_s"] = figure([runs["ours"].tokens_per_s for runs in rounds], "tokens/s")
    same_steps = next((name for name in ("trl_padding_free", "trl_stock") if name in names), None)
    if "ours" in names and same_steps:
        found["max_relative_loss_difference"] = figure(
            [_loss_difference(runs["ours"], runs[same_steps]) for runs in rounds], "share"
        )
    found["matmul_peak_flops_per_s"] = figure(peaks, "FLOP/s")
    for name in names:
        ran = [runs[name] for runs in rounds]
        found[f"{name}_tokens_per_s"] = figure([run.tokens_per_s for run in ran], "tokens/s")
        found[f"{name}_peak_memory_gib"] = figure([run.peak_device_bytes / 2**30 for run in ran], "GiB")
        found[f"{name}_warmup_s"] = figure([run.warmup_s for run in ran], "s")
    return found


def _loss_difference(mine: Run, theirs: Run) -> float:
    return max(abs(a - b) / b for a, b in zip(mine.losses, theirs.losses, strict=True))


if __name__ == "__main__":
    main()
