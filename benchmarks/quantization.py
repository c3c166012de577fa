"""What a quantized base saves in memory, and costs in speed and in loss: the recipe with `bits` absent, 8 and 4.

`python -m benchmarks.quantization --rows FILE.jsonl --prompt-field question --response-field answer`, after
`pip install -e '.[benchmarks,demo]'`: SmolLM2-135M-Instruct, rank 8 on all linear layers, fp32, nothing compiled. The
rows and steps are the same, each run is a process of its own, round after round. `peak_rss_gib` is the highest resident
memory of the whole process, `base_mib` the bytes of the frozen parameters; `first_loss` is that of the bare base. Speed
is by the processor's time: with `--threads 1` what else runs on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import cpu_lora
from benchmarks.contest import Run
from benchmarks.memory import recipe_arguments
from benchmarks.peers.environments import smollm2
from benchmarks.results_file import figure, say, write_results

BITS: Mapping[str, int | None] = {"full": None, "bits_8": 8, "bits_4": 4}
"""By the names of their figures."""


def main() -> None:
    arguments = _arguments()
    lines: list[str] = []
    model = smollm2(arguments.cache)
    rows = cpu_lora.tokenise(model, arguments)
    say(lines, f"{len(rows)} rows, {rows.lengths.mean():.1f} tokens each; {arguments.threads} threads")
    runs: dict[str, list[Run]] = {name: [] for name in BITS}
    with tempfile.TemporaryDirectory(prefix="ts-quantization-") as folder:
        work = replace(cpu_lora.prepare(rows, model, Path(folder), arguments), compiled=False)
        for number in range(arguments.rounds):
            for name, bits in BITS.items():
                run = cpu_lora.run_contestant("ours", replace(work, bits=bits), arguments, lines)
                if run is None:
                    raise SystemExit(f"{name} failed, so there are no figures")
                runs[name].append(run)
                say(
                    lines, f"round {number + 1}: {name} {run.summary}, loss {run.losses[0]:.4f} to {run.losses[-1]:.4f}"
                )
    figures = take_figures(runs)
    for key, value in figures.items():
        say(lines, f"{key}: {value['value']:.4g} {value['unit']} ({value['min']:.4g} to {value['max']:.4g})")
    say(lines, str(write_results("quantization", figures, "\n".join(lines) + "\n")))


def _arguments() -> argparse.Namespace:
    parser = recipe_arguments("python -m benchmarks.quantization", __doc__)
    parser.add_argument("--batch-rows", type=int, default=8, help="rows of one forward pass")
    parser.add_argument("--warmup-steps", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=14, help="steps that are")
    parser.set_defaults(passes=1, max_length=512, advanced=[], profile=None)
    return parser.parse_args()


def take_figures(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """Of each kind of base; and of the quantized ones beside the full one, round by round."""
    found: dict[str, dict[str, Any]] = {}
    for name, done in runs.items():
        found[f"{name}_base_mib"] = figure([run.config["frozen_bytes"] / 2**20 for run in done], "MiB")
        found[f"{name}_peak_rss_gib"] = figure([run.peak_rss_bytes / 2**30 for run in done], "GiB")
        found[f"{name}_tokens_per_cpu_s"] = figure([_speed(run) for run in done], "tokens/s")
        found[f"{name}_first_loss"] = figure([run.losses[0] for run in done], "nats")
        found[f"{name}_last_loss"] = figure([run.losses[-1] for run in done], "nats")
    for name in list(runs)[1:]:
        pairs = list(zip(runs[name], runs["full"], strict=True))
        found[f"{name}_speed_ratio"] = figure([_speed(own) / _speed(full) for own, full in pairs], "times")
        found[f"{name}_memory_ratio"] = figure(
            [own.peak_rss_bytes / full.peak_rss_bytes for own, full in pairs], "times"
        )
        found[f"{name}_max_relative_loss_difference"] = figure(
            [max(abs(a - b) / b for a, b in zip(own.losses, full.losses, strict=True)) for own, full in pairs], "share"
        )
    return found


def _speed(run: Run) -> float:
    """Tokens of the timed steps, for each second of the processor."""
    return sum(step["tokens"] for step in run.steps[run.warmup_steps :]) / run.timed_cpu_s


if __name__ == "__main__":
    main()
