"""How fast the LoRA recipe trains on a CPU, and in how much memory, beside its peers on the same tokens.

`python -m benchmarks.cpu_lora --rows FILE.jsonl --prompt-field question --response-field answer [--rounds 3]
[--threads N] [--only NAME,NAME]`, after `pip install -e '.[benchmarks]'`: SmolLM2-135M-Instruct, rank 8 on all linear
layers, fp32, no gradient checkpointing. The rows are tokenised once, by our encoder. In every round each contestant
runs in a process of its own; the speed is that of the steps after the warm-up, in tokens that are no padding. LLaMA-
Factory gets an environment of its own in `--cache`, some minutes and gigabytes the first time.

With `--only` a subset runs, of all settings in CONTESTANTS, and nothing is written down.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.environments import llamafactory_python, smollm2
from benchmarks.peers.flops import required_flops
from benchmarks.peers.work import Work
from benchmarks.results_file import ROOT, figure, say, write_results
from trainers.batches import BatchPlan
from trainers.shards import Batch, ShardWriter, TokenizedRows
from trainers.tokenized import tokenize_rows
from tunesmith.hyperparameters import ADVANCED, resolve
from tunesmith.tables import read_rows


@dataclass(frozen=True)
class Contestant:
    """A program of `benchmarks.peers`, one of its settings, and whose it is."""

    module: str
    setting: str | None
    peer: str | None
    usual: bool = False
    """Whether it runs without being asked for by name."""


CONTESTANTS: Mapping[str, Contestant] = {
    "ours": Contestant("ours", None, None, usual=True),
    "hf_plain": Contestant("hf_trainer", "plain", "hf_trainer", usual=True),
    "hf_bucketed": Contestant("hf_trainer", "bucketed", "hf_trainer_bucketed", usual=True),
    "hf_compiled": Contestant("hf_trainer", "compiled", "hf_trainer_bucketed"),
    "trl_packed": Contestant("trl_sft", "packed", "trl", usual=True),
    "trl_wide": Contestant("trl_sft", "wide", "trl"),
    "trl_padding_free": Contestant("trl_sft", "padding_free", "trl"),
    "trl_plain": Contestant("trl_sft", "plain", "trl"),
    "llamafactory_wide": Contestant("llama_factory", "wide", "llamafactory", usual=True),
    "llamafactory_neat": Contestant("llama_factory", "neat", "llamafactory"),
    "llamafactory_plain": Contestant("llama_factory", "plain", "llamafactory"),
}


@dataclass(frozen=True)
class Run:
    """What a contestant has printed."""

    steps: Sequence[Mapping[str, float]]
    """`loss`, `tokens`, `seconds` and `cpu_seconds` of each."""
    warmup_steps: int
    peak_rss_bytes: int
    config: Mapping[str, Any]

    @property
    def warmup_s(self) -> float:
        return sum(step["seconds"] for step in self.steps[: self.warmup_steps])

    @property
    def timed_s(self) -> float:
        return sum(step["seconds"] for step in self.steps[self.warmup_steps :])

    @property
    def timed_cpu_s(self) -> float:
        """Far below threads times `timed_s`, other programs were in the way."""
        return sum(step["cpu_seconds"] for step in self.steps[self.warmup_steps :])

    @property
    def summary(self) -> str:
        memory = f"{self.peak_rss_bytes / 2**30:.2f} GiB"
        size = f"{sum(step['tokens'] for step in self.steps) / len(self.steps):.0f} tokens a step"
        spent = f"warm-up {self.warmup_s:.1f} s, timed {self.timed_s:.1f} s, CPU {self.timed_cpu_s:.1f} s"
        return f"{self.tokens_per_s:.1f} tokens/s, {memory}, {size}, {spent}"

    @property
    def tokens_per_s(self) -> float:
        return sum(step["tokens"] for step in self.steps[self.warmup_steps :]) / self.timed_s

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.steps]


Round = dict[str, Run]
"""By the contestants' names."""


def main() -> None:
    arguments = _arguments()
    names = arguments.only.split(",") if arguments.only else [n for n, c in CONTESTANTS.items() if c.usual]
    if unknown := set(names) - set(CONTESTANTS):
        raise SystemExit(f"no contestant is called {', '.join(unknown)}; there are {', '.join(CONTESTANTS)}")
    lines: list[str] = []
    model = smollm2(arguments.cache)
    with tempfile.TemporaryDirectory(prefix="ts-cpu-lora-") as name:
        rows = tokenise(model, arguments)
        work = prepare(rows, model, Path(name), arguments)
        needed = _needed_flops(rows, work, arguments)
        say(lines, f"{len(rows)} rows, {work.mean_length:.1f} tokens each; {arguments.threads} threads")
        say(lines, f"steps of {work.global_rows} rows; arithmetic of the timed ones: {needed / 1e12:.2f} TFLOP")
        rounds, peaks, failed = _rounds(names, work, arguments, lines)
    for setting in ("trained_parameters", "threads"):
        values = {name: run.config[setting] for name, run in rounds[0].items()}
        if len(set(values.values())) > 1:
            raise SystemExit(f"the contestants do not do the same: {setting} {values}")
    figures = take_figures(rounds, needed, peaks, failed)
    for key, value in figures.items():
        say(lines, f"{key}: {value['value']:.4g} {value['unit']} ({value['min']:.4g} to {value['max']:.4g})")
    if not arguments.only:
        say(lines, str(write_results("cpu_lora", figures, "\n".join(lines) + "\n")))
    if failed:
        raise SystemExit(f"failed, so there are no figures of {', '.join(sorted(failed))}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_lora", description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="a jsonl file")
    parser.add_argument("--prompt-field", default="prompt")
    parser.add_argument("--response-field", default="response")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch-rows", type=int, default=8, help="rows of one forward pass")
    parser.add_argument("--passes", type=int, default=2, help="forward passes of one step")
    parser.add_argument("--warmup-steps", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=6, help="steps that are")
    parser.add_argument("--limit", type=int, default=4096, help="rows of the file to choose from")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--only", help=f"of {', '.join(CONTESTANTS)}")
    parser.add_argument("--advanced", action="append", default=[], metavar="NAME=VALUE", help="a setting of the recipe")
    cache = Path("~/.cache/tunesmith-benchmarks").expanduser()
    parser.add_argument("--cache", type=Path, default=cache, help="folder of the model and of peers' environments")
    return parser.parse_args()


def tokenise(model: Path, arguments: argparse.Namespace) -> TokenizedRows:
    """The first rows of the file, as many as make whole steps."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    given = {
        "prompt_field": arguments.prompt_field,
        "response_field": arguments.response_field,
        "max_seq_length": arguments.max_length,
    }

    def take(limit: int) -> TokenizedRows:
        return tokenize_rows(
            islice(read_rows(arguments.rows), arguments.limit),
            tokenizer,
            hyperparameters=resolve(given),
            advanced=resolve({}, ADVANCED, section="advanced"),
            training_type="text-question-answering",
            limit=limit,
        )

    rows = take(arguments.limit)
    global_rows = arguments.batch_rows * arguments.passes
    if len(rows) < global_rows * (arguments.warmup_steps + arguments.steps):
        raise SystemExit(f"{len(rows)} rows are too few for the steps")
    return take(len(rows) - len(rows) % global_rows) if len(rows) % global_rows else rows


def prepare(rows: TokenizedRows, model: Path, folder: Path, arguments: argparse.Namespace) -> Work:
    """Write the rows to `folder`, for the recipe and for its peers."""
    work = Work(
        model=str(model),
        rows=str(folder / "rows.jsonl"),
        shard=str(folder / "00000.arrow"),
        out=str(folder / "out"),
        steps=arguments.warmup_steps + arguments.steps,
        batch_rows=arguments.batch_rows,
        passes=arguments.passes,
        max_length=arguments.max_length,
        mean_length=float(rows.lengths.mean()),
        advanced={name: _value(text) for name, _, text in (a.partition("=") for a in arguments.advanced)},
    )
    write_rows(rows, _order(rows, work), Path(work.rows))
    _write_shard(rows, folder)
    return work


def write_rows(rows: TokenizedRows, order: Sequence[int], path: Path) -> None:
    """`input_ids` and `labels` of the rows in this order, a JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in order:
            ids = rows.ids(row)
            labels = np.where(rows.trained(row), ids, -100)
            file.write(json.dumps({"input_ids": ids.tolist(), "labels": labels.tolist()}) + "\n")


def batch_plan(rows: TokenizedRows, work: Work) -> BatchPlan:
    return BatchPlan(rows.lengths, batch_rows=work.batch_rows, passes=work.passes, world_size=1, seed=work.seed)


def _order(rows: TokenizedRows, work: Work) -> list[int]:
    """The rows of the recipe's first epoch, step by step; within a step shuffled, as a peer's sampler would."""
    plan, random = batch_plan(rows, work), np.random.default_rng(work.seed)
    steps = [random.permutation(plan.rows(step)) for step in range(1, plan.steps_per_epoch + 1)]
    order: list[int] = np.concatenate(steps).tolist()
    return order


def _write_shard(rows: TokenizedRows, folder: Path) -> None:
    batch = Batch(
        rows.report,
        np.concatenate([[0], np.cumsum(rows.lengths)]).astype(np.int32),
        np.concatenate([rows.ids(row) for row in range(len(rows))]),
        np.packbits(np.concatenate([rows.trained(row) for row in range(len(rows))]), bitorder="little"),
    )
    writer = ShardWriter(folder, lambda path: None)
    writer.write(batch)
    writer.close()


def _needed_flops(rows: TokenizedRows, work: Work, arguments: argparse.Namespace) -> int:
    """Of the recipe's timed steps."""
    from transformers import AutoConfig

    plan = batch_plan(rows, work)
    timed = [row for step in range(arguments.warmup_steps + 1, work.steps + 1) for row in plan.rows(step)]
    return required_flops(
        AutoConfig.from_pretrained(work.model),
        lora_rank=work.lora_rank,
        lengths=rows.lengths[timed].tolist(),
        trained_tokens=sum(int(rows.trained(row)[1:].sum()) for row in timed),
    )


def _rounds(
    names: Sequence[str], work: Work, arguments: argparse.Namespace, lines: list[str]
) -> tuple[list[Round], list[float], set[str]]:
    """What each round's contestants printed, the matmul peak beside them, and which ones failed."""
    rounds: list[Round] = []
    peaks: list[float] = []
    failed: set[str] = set()
    for number in range(arguments.rounds):
        runs: Round = {}
        told = _process(Path(sys.executable), ["matmul"], arguments.threads)
        peaks.append(json.loads(told.stdout.splitlines()[-1])["flops_per_s"])
        say(lines, f"round {number + 1}: matmul peak {peaks[-1] / 1e9:.1f} GFLOP/s")
        # Another one begins each round.
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            if name in failed:
                continue
            run = run_contestant(name, work, arguments, lines)
            if run is None:
                failed.add(name)
                continue
            runs[name] = run
            if number == 0:
                say(lines, f"{name} runs with {json.dumps(run.config)}")
            say(lines, f"round {number + 1}: {name} {run.summary}")
        rounds.append(runs)
    return rounds, peaks, failed


def run_contestant(name: str, work: Work, arguments: argparse.Namespace, lines: list[str]) -> Run | None:
    """One run of a contestant, its lines kept; None where it failed, which is said."""
    contestant = CONTESTANTS[name]
    llamafactory = contestant.peer == "llamafactory"
    python = llamafactory_python(arguments.cache) if llamafactory else Path(sys.executable)
    with tempfile.TemporaryDirectory(prefix=f"ts-{name}-") as folder:
        path = Path(folder) / "work.json"
        replace(work, out=folder).write(path)
        setting = [contestant.setting] if contestant.setting else []
        done = _process(python, [contestant.module, str(path), *setting], arguments.threads)
    told = [line for line in done.stdout.splitlines() if line.startswith(('{"step"', '{"peak_rss_bytes"'))]
    lines += [f"{name} {line}" for line in told]
    if done.returncode != 0 or len(told) != work.steps + 1:
        say(lines, f"{name} FAILED with exit code {done.returncode} after {len(told)} lines:\n{done.stderr[-3000:]}")
        return None
    *steps, end = map(json.loads, told)
    return Run(steps, arguments.warmup_steps, end["peak_rss_bytes"], end["config"])


def _process(python: Path, arguments: Sequence[str], threads: int) -> subprocess.CompletedProcess[str]:
    module, *rest = arguments
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    env = {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    # The core of `platform/` is installed here, and not among a peer's packages, which need none of it.
    command: list[str | Path] = [python, "-m", f"benchmarks.peers.{module}", *rest]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def take_figures(
    rounds: Sequence[Round], needed: int, peaks: Sequence[float], failed: set[str]
) -> dict[str, dict[str, Any]]:
    """The figures of contestants that have run in every round; ratios are taken round by round."""
    found: dict[str, dict[str, Any]] = {}
    names = [name for name in rounds[0] if name not in failed]

    def add(key: str, unit: str, value: Callable[[Round], float]) -> None:
        found[key] = figure([value(runs) for runs in rounds], unit)

    def add_ratio(key: str, theirs: Sequence[str]) -> None:
        if "ours" in names and theirs:
            add(key, "times", lambda runs: runs["ours"].tokens_per_s / max(runs[n].tokens_per_s for n in theirs))

    add_ratio("ratio_vs_hf_trainer", [n for n in names if n == "hf_plain"])
    for peer in ("hf_trainer_bucketed", "trl", "llamafactory"):
        add_ratio(f"ratio_vs_{peer}", [n for n in names if CONTESTANTS[n].peer == peer])
    if not failed:  # the best one may be among those that failed
        add_ratio("ratio_vs_best_peer", [n for n in names if CONTESTANTS[n].peer is not None])
    if {"ours", "hf_plain"} <= set(names):
        add(
            "memory_ratio_vs_hf_trainer",
            "times",
            lambda runs: runs["ours"].peak_rss_bytes / runs["hf_plain"].peak_rss_bytes,
        )
        add(
            "max_relative_loss_difference",
            "share",
            lambda runs: max(
                abs(mine - theirs) / theirs
                for mine, theirs in zip(runs["ours"].losses, runs["hf_plain"].losses, strict=True)
            ),
        )
    if "ours" in names:
        shares = [needed / runs["ours"].timed_s / peak for runs, peak in zip(rounds, peaks, strict=True)]
        found["matmul_peak_share"] = figure(shares, "share")
    found["matmul_peak_flops_per_s"] = figure(peaks, "FLOP/s")
    for name in names:
        add(f"{name}_tokens_per_s", "tokens/s", lambda runs, name=name: runs[name].tokens_per_s)  # type: ignore[misc]
        add(f"{name}_peak_rss_gib", "GiB", lambda runs, name=name: runs[name].peak_rss_bytes / 2**30)  # type: ignore[misc]
        add(f"{name}_warmup_s", "s", lambda runs, name=name: runs[name].warmup_s)  # type: ignore[misc]
    return found


def _value(text: str) -> Any:
    """A setting's value: JSON where it is that, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    main()
