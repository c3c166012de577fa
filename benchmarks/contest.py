"""Contestants that train on the same rows, in turn, each in a process of its own; what they print, and round by round.

The programs themselves are in `benchmarks.peers`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.flops import required_flops
from benchmarks.peers.work import Work
from benchmarks.results_file import ROOT, say
from trainers.recipe.batches import BatchPlan
from trainers.recipe.collate import shared_beginning
from trainers.recipe.training_loop import PASS_TOKENS
from trainers.text.shards import Batch, ShardWriter, TokenizedRows


@dataclass(frozen=True)
class Contestant:
    """A program of `benchmarks.peers`, one of its settings, and whose it is."""

    module: str
    setting: str | None
    peer: str | None
    usual: bool = False
    """Whether it runs without being asked for by name."""


@dataclass(frozen=True)
class Run:
    """What a contestant has printed."""

    steps: Sequence[Mapping[str, float]]
    """`loss`, `tokens`, `seconds` and `cpu_seconds` of each."""
    warmup_steps: int
    peak_rss_bytes: int
    config: Mapping[str, Any]
    peak_device_bytes: int = 0
    """Of the accelerator's memory; 0 without one."""

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
        memory = f"{(self.peak_device_bytes or self.peak_rss_bytes) / 2**30:.2f} GiB"
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


def chosen(contestants: Mapping[str, Contestant], only: str | None) -> list[str]:
    """The names that `only` lists, else those of the usual ones."""
    names = only.split(",") if only else [name for name, contestant in contestants.items() if contestant.usual]
    if unknown := set(names) - set(contestants):
        raise SystemExit(f"no contestant is called {', '.join(unknown)}; there are {', '.join(contestants)}")
    return names


def write_work(rows: TokenizedRows, work: Work) -> None:
    """Write the rows where `work` says, for the recipe and for its peers."""
    write_rows(rows, _order(rows, work), Path(work.rows))
    batch = Batch(
        rows.report,
        np.concatenate([[0], np.cumsum(rows.lengths)]).astype(np.int32),
        np.concatenate([rows.ids(row) for row in range(len(rows))]),
        np.packbits(np.concatenate([rows.trained(row) for row in range(len(rows))]), bitorder="little"),
    )
    writer = ShardWriter(Path(work.shard).parent, lambda path: None)
    writer.write(batch)
    writer.close()


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


def needed_flops(rows: TokenizedRows, work: Work, *, warmup_steps: int) -> int:
    """Of the recipe's timed steps: what the rows of a pass begin with counts once."""
    from transformers import AutoConfig

    plan, device = batch_plan(rows, work), torch.device("cuda" if work.cuda else "cpu")
    timed = [row for step in range(warmup_steps + 1, work.steps + 1) for row in plan.rows(step)]
    spans = []
    for step in range(warmup_steps + 1, work.steps + 1):
        shared = _shared(rows, plan.rows(step), device)
        for share in filter(None, plan.packed(step, 0, PASS_TOKENS.get(device.type), shared)):
            known = _shared(rows, share, device)
            spans += [(0, known), *((known, int(length)) for length in rows.lengths[share])]
    return required_flops(
        AutoConfig.from_pretrained(work.model),
        lora_rank=work.lora_rank,
        spans=spans,
        trained_tokens=sum(int(rows.trained(row)[1:].sum()) for row in timed),
    )


def _shared(rows: TokenizedRows, share: Sequence[int], device: torch.device) -> int:
    return shared_beginning([rows.ids(row) for row in share], device)


def run_rounds(
    names: Sequence[str],
    rounds: int,
    *,
    run: Callable[[str], Run | None],
    peak: Callable[[], float],
    lines: list[str],
) -> tuple[list[Round], list[float], set[str]]:
    """What each round's contestants printed, the matmul peak beside them, and which ones failed."""
    done: list[Round] = []
    peaks: list[float] = []
    failed: set[str] = set()
    for number in range(rounds):
        runs: Round = {}
        peaks.append(peak())
        say(lines, f"round {number + 1}: matmul peak {peaks[-1] / 1e9:.1f} GFLOP/s")
        # Another one begins each round.
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            if name in failed:
                continue
            ran = run(name)
            if ran is None:
                failed.add(name)
                continue
            runs[name] = ran
            if number == 0:
                say(lines, f"{name} runs with {json.dumps(ran.config)}")
            say(lines, f"round {number + 1}: {name} {ran.summary}")
        done.append(runs)
    return done, peaks, failed


def run_contestant(
    name: str,
    contestant: Contestant,
    work: Work,
    *,
    warmup_steps: int,
    env: Mapping[str, str],
    lines: list[str],
    python: Path = Path(sys.executable),
) -> Run | None:
    """One run of a contestant, its lines kept; None where it failed, which is said."""
    with tempfile.TemporaryDirectory(prefix=f"ts-{name}-") as folder:
        path = Path(folder) / "work.json"
        replace(work, out=folder).write(path)
        setting = [contestant.setting] if contestant.setting else []
        done = run_process([contestant.module, str(path), *setting], env=env, python=python)
    told = [line for line in done.stdout.splitlines() if line.startswith(('{"step"', '{"peak_rss_bytes"'))]
    lines += [f"{name} {line}" for line in told]
    if done.returncode != 0 or len(told) != work.steps + 1:
        say(lines, f"{name} FAILED with exit code {done.returncode} after {len(told)} lines:\n{done.stderr[-3000:]}")
        return None
    *steps, end = map(json.loads, told)
    return Run(steps, warmup_steps, end["peak_rss_bytes"], end["config"], end["peak_device_bytes"])


def run_process(
    arguments: Sequence[str], *, env: Mapping[str, str], python: Path = Path(sys.executable)
) -> subprocess.CompletedProcess[str]:
    """A program of `benchmarks.peers`, with what it printed."""
    module, *rest = arguments
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    command: list[str | Path] = [python, "-m", f"benchmarks.peers.{module}", *rest]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **quiet, **env}, capture_output=True, text=True, check=False
    )


def check_alike(runs: Round, settings: Sequence[str]) -> None:
    """End the program where contestants differ in one of these settings."""
    for setting in settings:
        values = {name: run.config[setting] for name, run in runs.items()}
        if len(set(values.values())) > 1:
            raise SystemExit(f"the contestants do not do the same: {setting} {values}")
