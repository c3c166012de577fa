"""How much memory LoRA takes by sequence length and batch size: the recipe, and transformers' Trainer with peft.

`python -m benchmarks.memory --rows FILE.jsonl --prompt-field question --response-field answer`, after
`pip install -e '.[benchmarks,demo]'`: SmolLM2-135M-Instruct, rank 8 on all linear layers, fp32, nothing compiled, no
gradient checkpointing. The file's rows are laid end to end and cut, so that every row has exactly the cell's tokens,
trained ones among them as in the file. Each contestant takes a few optimizer steps of one batch in a process of its
own, whose highest resident memory is the figure, round after round. A cell that would not fit into the machine's free
memory, as the smaller ones foretell, is left out. Draws docs/memory.png.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import cpu_lora
from benchmarks.contest import Run
from benchmarks.peers.environments import smollm2
from benchmarks.results_file import ROOT, figure, say, write_results
from trainers.recipe.batches import BatchPlan
from trainers.recipe.training_loop import PASS_TOKENS
from trainers.text.shards import Batch, TokenizedRows
from tunesmith.text.tokenization import Encoded

CONTESTANTS: Mapping[str, str] = {"ours": "ours", "hf_trainer": "hf_plain"}
"""By the names of their figures, those of `cpu_lora`."""
PICTURE = ROOT / "docs" / "memory.png"
DRAWN_ROWS, DRAWN_LENGTH = 4, 512
"""What stands still in the picture's two panels."""
FILLED = 0.9
"""Share of the free memory that a run may be foretold to take."""


@dataclass(frozen=True)
class Cell:
    """One batch: rows of one forward pass, and tokens of each."""

    batch_rows: int
    length: int

    @property
    def name(self) -> str:
        return f"b{self.batch_rows}_l{self.length}"

    def pass_tokens(self, contestant: str) -> int:
        """Tokens of the contestant's largest forward pass: the recipe splits a large batch, the Trainer never."""
        if contestant != "ours":
            return self.batch_rows * self.length
        lengths = [self.length] * self.batch_rows
        plan = BatchPlan(lengths, batch_rows=self.batch_rows, passes=1, world_size=1, seed=0)
        return max(len(share) for share in plan.packed(1, 0, PASS_TOKENS["cpu"])) * self.length


CELLS = sorted(
    [*(Cell(rows, length) for rows in (1, 4, 8) for length in (128, 256, 512, 1024)), Cell(1, 2048)],
    key=lambda cell: (cell.batch_rows * cell.length, cell.length),
)

Runs = Mapping[str, Mapping[Cell, Sequence[Run]]]
"""By the contestants' names; a run for every round."""


def main() -> None:
    arguments = _arguments()
    lines: list[str] = []
    model = smollm2(arguments.cache)
    rows = cpu_lora.tokenise(model, arguments)
    share = rows.report.trained_tokens / rows.report.tokens
    say(lines, f"{len(rows)} rows, {rows.report.tokens} tokens, {share:.0%} of them trained; {arguments.steps} steps")
    runs, failed = _rounds(rows, model, arguments, lines)
    figures = take_figures(runs)
    for key, value in figures.items():
        say(lines, f"{key}: {value['value']:.4g} {value['unit']} ({value['min']:.4g} to {value['max']:.4g})")
    say(lines, str(write_results("memory", figures, "\n".join(lines) + "\n")))
    draw(figures, PICTURE)
    if failed:
        raise SystemExit(f"failed, so there are no figures of {', '.join(failed)}")


def _arguments() -> argparse.Namespace:
    parser = recipe_arguments("python -m benchmarks.memory", __doc__)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    # The rest of what `cpu_lora` asks for; batch and length are each cell's.
    parser.set_defaults(batch_rows=1, passes=1, warmup_steps=0, max_length=2048, advanced=[], profile=None)
    return parser.parse_args()


def recipe_arguments(program: str, description: str | None) -> argparse.ArgumentParser:
    """What a benchmark of the recipe over a file's rows asks for in any case."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--rows", type=Path, required=True, help="a jsonl file")
    parser.add_argument("--prompt-field", default="prompt")
    parser.add_argument("--response-field", default="response")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=1024, help="rows of the file to take")
    cache = Path("~/.cache/tunesmith-benchmarks").expanduser()
    parser.add_argument("--cache", type=Path, default=cache, help="folder of the model")
    return parser


def _rounds(
    rows: TokenizedRows, model: Path, arguments: argparse.Namespace, lines: list[str]
) -> tuple[Runs, list[str]]:
    """The cells that ran in every round, and those that failed."""
    runs: dict[str, dict[Cell, list[Run]]] = {name: {} for name in CONTESTANTS}
    left_out: set[tuple[str, Cell]] = set()
    failed: list[str] = []
    turns = [(number + 1, cell, name) for number in range(arguments.rounds) for cell in CELLS for name in CONTESTANTS]
    for number, cell, name in turns:
        if (name, cell) in left_out:
            continue
        needed, free = foretell(runs[name], name, cell), psutil.virtual_memory().available / 2**30
        if needed > FILLED * free:
            say(lines, f"{cell.name}: {name} left out, for it would take {needed:.1f} GiB, and {free:.1f} are free")
            left_out.add((name, cell))
            continue
        run = _run(name, cell, rows, model, arguments, lines)
        if run is None:
            failed.append(f"{name} {cell.name}")
            left_out.add((name, cell))
            continue
        runs[name].setdefault(cell, []).append(run)
        say(lines, f"round {number}: {cell.name}: {name} {run.summary}; foretold {needed:.2f} GiB")
    whole = {
        name: {cell: done for cell, done in cells.items() if (name, cell) not in left_out}
        for name, cells in runs.items()
    }
    return whole, failed


def _run(
    name: str, cell: Cell, rows: TokenizedRows, model: Path, arguments: argparse.Namespace, lines: list[str]
) -> Run | None:
    """One contestant's run; None where it failed, which is said."""
    given = argparse.Namespace(**{**vars(arguments), "batch_rows": cell.batch_rows, "max_length": cell.length})
    cut = cut_rows(rows, length=cell.length, count=cell.batch_rows * arguments.steps)
    with tempfile.TemporaryDirectory(prefix="ts-memory-") as folder:
        work = replace(cpu_lora.prepare(cut, model, Path(folder), given), compiled=False)
        return cpu_lora.run_contestant(CONTESTANTS[name], work, given, lines)


def cut_rows(rows: TokenizedRows, *, length: int, count: int) -> TokenizedRows:
    """`count` rows of exactly `length` tokens: the given ones end to end, cut."""
    ids = np.concatenate([rows.ids(row) for row in range(len(rows))])
    trained = np.concatenate([rows.trained(row) for row in range(len(rows))])
    if len(ids) < length * count:
        raise SystemExit(f"{len(ids)} tokens are too few for {count} rows of {length}")
    parts = [slice(at, at + length) for at in range(0, length * count, length)]
    flags = {"truncated": False, "answer_cut": False, "ended": False, "spelled_out": False}
    return TokenizedRows.of([Batch.of([Encoded(ids[p], trained[p], **flags) for p in parts], read=count, skipped=0)])


def foretell(done: Mapping[Cell, Sequence[Run]], name: str, cell: Cell) -> float:
    """GiB that a contestant will take for a cell, 0 where too little is known."""
    if len({other.pass_tokens(name) for other in done}) < 2:
        return 0.0
    fixed, each = fit(done, name)
    return fixed + each * cell.pass_tokens(name)


def fit(done: Mapping[Cell, Sequence[Run]], name: str) -> tuple[float, float]:
    """The straight line nearest to a contestant's peaks: GiB whatever the batch, and GiB a token of a forward pass."""
    peaks = [statistics.median(_gib(runs)) for runs in done.values()]
    each, fixed = np.polyfit([cell.pass_tokens(name) for cell in done], peaks, 1)
    return float(fixed), float(each)


def _gib(runs: Sequence[Run]) -> list[float]:
    return [run.peak_rss_bytes / 2**30 for run in runs]


def take_figures(runs: Runs) -> dict[str, dict[str, Any]]:
    """Every cell's peaks; each contestant's line through them; and over the cells that both ran, ours to theirs."""
    found: dict[str, dict[str, Any]] = {}
    for name, done in runs.items():
        found |= {f"{name}_{cell.name}_gib": figure(_gib(peaks), "GiB") for cell, peaks in done.items()}
        fixed, each = fit(done, name)
        found[f"{name}_fixed_gib"] = figure([fixed], "GiB")
        found[f"{name}_mib_per_pass_token"] = figure([each * 1024], "MiB")
    both = [(ours, runs["hf_trainer"][cell]) for cell, ours in runs["ours"].items() if cell in runs["hf_trainer"]]
    ratios = [figure([a / b for a, b in zip(_gib(ours), _gib(theirs), strict=True)], "times") for ours, theirs in both]
    found["max_ratio"] = max(ratios, key=lambda ratio: ratio["value"])
    found["min_ratio"] = min(ratios, key=lambda ratio: ratio["value"])
    pairs = [pair for ours, theirs in both for pair in zip(ours[0].losses, theirs[0].losses, strict=True)]
    found["max_relative_loss_difference"] = figure([max(abs(a - b) / b for a, b in pairs)], "share")
    return found


def draw(figures: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """A PNG with the peaks, GiB, and their range: by sequence length at one batch size, by batch size at one length."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(10, 4.2), layout="constrained")
    by_length, by_rows = picture.subplots(1, 2, sharey=True)
    lengths = {cell.length: cell for cell in CELLS if cell.batch_rows == DRAWN_ROWS}
    rows = {cell.batch_rows: cell for cell in CELLS if cell.length == DRAWN_LENGTH}
    looks = {"hf_trainer": ("HF Trainer with peft", "s-", "#c2571a", 8), "ours": ("Tunesmith", "o-", "#1f6fb4", -17)}
    for name, (label, marks, colour, offset) in looks.items():
        for axes, cells in ((by_length, lengths), (by_rows, rows)):
            keys = {at: f"{name}_{cell.name}_gib" for at, cell in sorted(cells.items())}
            points = {at: figures[key] for at, key in keys.items() if key in figures}
            low, value, high = ([point[part] for point in points.values()] for part in ("min", "value", "max"))
            axes.fill_between(list(points), low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(list(points), value, marks, label=label, color=colour, linewidth=2, markersize=7)
            for at, gib in zip(points, value, strict=True):
                style = {"textcoords": "offset points", "ha": "center", "color": colour}
                axes.annotate(f"{gib:.1f}", (at, gib), (0, offset), **style)
    by_length.set(xlabel="sequence length, tokens", title=f"batch of {DRAWN_ROWS} rows", ylabel="peak memory, GiB")
    by_rows.set(xlabel="batch size, rows", title=f"rows of {DRAWN_LENGTH} tokens")
    by_length.set_xticks(sorted(lengths))
    by_rows.set_xticks(sorted(rows))
    for axes in (by_length, by_rows):
        axes.set_ylim(0, None)
        axes.margins(x=0.08, y=0.12)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    by_length.legend(loc="upper left", frameon=False)
    picture.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
