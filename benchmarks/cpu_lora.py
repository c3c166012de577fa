"""How fast the LoRA recipe trains on a CPU, and in how much memory, beside its peers on the same tokens.

`python -m benchmarks.cpu_lora --rows FILE.jsonl --prompt-field question --response-field answer [--rounds 3]
[--threads N] [--only NAME,NAME]`, after `pip install -e '.[benchmarks]'`: SmolLM2-135M-Instruct, rank 8 on all linear
layers, fp32, no gradient checkpointing. The rows are tokenised once, by our encoder. In every round each contestant
runs in a process of its own; the speed is that of the steps after the warm-up, in tokens that are no padding. LLaMA-
Factory gets an environment of its own in `--cache`, some minutes and gigabytes the first time.

With `--only` a subset runs, of all settings in CONTESTANTS, and with `--profile FILE` ours, of which the file is a
Chrome trace; nothing is written down then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import contest
from benchmarks.contest import (
    Contestant,
    Round,
    Run,
    check_alike,
    chosen,
    needed_flops,
    run_process,
    run_rounds,
    write_work,
)
from benchmarks.peers.environments import llamafactory_python, smollm2
from benchmarks.peers.work import Work
from benchmarks.results_file import figure, say, write_results
from trainers.text.shards import TokenizedRows
from trainers.text.tokenized_data import tokenize_rows
from tunesmith.assets.tables import read_rows
from tunesmith.hyperparameters.checks import resolve
from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters

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


def main() -> None:
    arguments = _arguments()
    names = chosen(CONTESTANTS, "ours" if arguments.profile else arguments.only)
    lines: list[str] = []
    model = smollm2(arguments.cache)
    with tempfile.TemporaryDirectory(prefix="ts-cpu-lora-") as name:
        rows = tokenise(model, arguments)
        work = prepare(rows, model, Path(name), arguments)
        needed = needed_flops(rows, work, warmup_steps=arguments.warmup_steps)
        say(lines, f"{len(rows)} rows, {work.mean_length:.1f} tokens each; {arguments.threads} threads")
        say(lines, f"steps of {work.global_rows} rows; arithmetic of the timed ones: {needed / 1e12:.2f} TFLOP")
        rounds, peaks, failed = run_rounds(
            names,
            1 if arguments.profile else arguments.rounds,
            run=lambda name: run_contestant(name, work, arguments, lines),
            peak=lambda: _matmul_peak(arguments.threads),
            lines=lines,
        )
    check_alike(rounds[0], ("trained_parameters", "threads"))
    figures = take_figures(rounds, needed, peaks, failed)
    for key, value in figures.items():
        say(lines, f"{key}: {value['value']:.4g} {value['unit']} ({value['min']:.4g} to {value['max']:.4g})")
    if not arguments.only and not arguments.profile:
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
    parser.add_argument("--profile", type=Path, metavar="FILE", help="a trace of ours alone, three steps of one round")
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
            hyperparameters=resolve(LoraHyperparameters, given),
            advanced=Advanced(),
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
        profile=str(arguments.profile.absolute()) if arguments.profile else None,
        advanced={name: _value(text) for name, _, text in (a.partition("=") for a in arguments.advanced)},
    )
    write_work(rows, work)
    return work


def run_contestant(name: str, work: Work, arguments: argparse.Namespace, lines: list[str]) -> Run | None:
    """One run of a contestant, its lines kept; None where it failed, which is said."""
    contestant = CONTESTANTS[name]
    llamafactory = contestant.peer == "llamafactory"
    # The core of `platform/` is installed here, and not among a peer's packages, which need none of it.
    python = llamafactory_python(arguments.cache) if llamafactory else Path(sys.executable)
    return contest.run_contestant(
        name,
        contestant,
        work,
        warmup_steps=arguments.warmup_steps,
        env=_threads(arguments.threads),
        lines=lines,
        python=python,
    )


def _matmul_peak(threads: int) -> float:
    """FLOP/s"""
    told = run_process(["matmul"], env=_threads(threads))
    return float(json.loads(told.stdout.splitlines()[-1])["flops_per_s"])


def _threads(count: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}


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
