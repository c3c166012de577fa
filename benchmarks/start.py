"""How long from the accepted order to the first optimizer step, beside a bare transformers + peft script.

`python -m benchmarks.start --rows FILE.jsonl --prompt-field question --response-field answer [--rounds 5]`: in every
round one job on a platform that runs, and the bare script from its process start to the same step on the same rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.own_platform import register, settings_in
from benchmarks.results_file import figure, say, write_results
from trainers.recipe.batches import BatchPlan
from trainers.text.tokenized_data import tokenize_rows
from tunesmith import clock
from tunesmith.api.client import Client, read_on
from tunesmith.assets.catalog import get_manifest
from tunesmith.assets.tables import read_rows
from tunesmith.hyperparameters.checks import resolve
from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters
from tunesmith.jobs.spec import TrainSpec
from tunesmith.local import local_platform
from tunesmith.settings import Settings
from tunesmith.storage.urls import open_storage

BATCH_ROWS, MAX_LENGTH = 4, 512


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="a jsonl file")
    parser.add_argument("--prompt-field", default="prompt")
    parser.add_argument("--response-field", default="response")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(namespace=argparse.Namespace(max_length=MAX_LENGTH))
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ts-start-") as name:
        settings = settings_in(Path(name), SEGMENT_S="1")
        local_platform.up(settings)
        try:
            with Client(settings.door_url, settings.api_token_path.read_text()) as client:
                ours, bare = _measure(client, settings, arguments, lines)
        finally:
            local_platform.down(settings)
    ratios = [mine / theirs for mine, theirs in zip(ours, bare, strict=True)]
    figures = {
        "ratio_vs_bare_script": figure(ratios, "times"),
        "accepted_to_first_step_s": figure(ours, "s"),
        "bare_script_s": figure(bare, "s"),
    }
    for key, value in figures.items():
        say(lines, f"{key}: {value['value']:.2f} {value['unit']} ({value['min']:.2f} to {value['max']:.2f})")
    say(lines, str(write_results("start", figures, "\n".join(lines) + "\n")))


def _measure(
    client: Client, settings: Settings, arguments: argparse.Namespace, lines: list[str]
) -> tuple[list[float], list[float]]:
    folder = _register(client, settings, arguments.rows)
    first_rows = _first_rows(folder, arguments)
    ours, bare = [], []
    # The first of each fills the disk's cache and counts for nothing.
    for number in range(arguments.rounds + 1):
        # Another limit each time, which no row reaches: the tokens of the round before are of no use.
        arguments.max_length = MAX_LENGTH + number
        theirs, their_loss = _bare(folder, first_rows, arguments)
        mine, my_loss, phases = _job(client, arguments)
        if abs(my_loss - their_loss) > 1e-3 * their_loss:
            raise SystemExit(f"the first steps are not the same: losses {my_loss} and {their_loss}")
        say(
            lines,
            f"round {number}: job {mine:.2f} s, bare {theirs:.2f} s, losses {my_loss:.4f} {their_loss:.4f}; {phases}",
        )
        if number > 0:
            ours.append(mine)
            bare.append(theirs)
    return ours, bare


def _job(client: Client, arguments: argparse.Namespace) -> tuple[float, float, str]:
    """Seconds from the accepted order to the end of step 1, that step's loss, and when each phase began."""
    order = TrainSpec(
        model="model",
        dataset="rows",
        flavor="cpu-medium",
        output_model="started",
        hyperparameters={**_hyperparameters(arguments), "max_steps": 1},
        advanced={"merge_adapter": False},
    )
    job = client.submit(order)
    accepted = time.time()
    ended = client.wait(job.id)
    if ended.state != "completed":
        raise SystemExit(f"{job.id} {ended.state}: {ended.message}")
    losses, _ = read_on(lambda after: client.metrics(job.id, names=["loss"], after=after))
    events, _ = read_on(lambda after: client.events(job.id, after=after))
    begun = {event.phase or event.state: clock.seconds(event.time) - accepted for event in events}
    phases = ", ".join(f"{name} {begun[name]:.1f}" for name in ("preparing", "fetch", "tokenize", "audit", "train"))
    return clock.seconds(losses[0].time) - accepted, losses[0].value, phases


def _hyperparameters(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "prompt_field": arguments.prompt_field,
        "response_field": arguments.response_field,
        "per_device_train_batch_size": BATCH_ROWS,
        "max_seq_length": arguments.max_length,
    }


def _first_rows(folder: Path, arguments: argparse.Namespace) -> list[int]:
    """Numbers of the rows that a job takes in its first step."""
    from transformers import AutoTokenizer

    advanced = Advanced()
    rows = tokenize_rows(
        read_rows(arguments.rows),
        AutoTokenizer.from_pretrained(folder),
        hyperparameters=resolve(LoraHyperparameters, _hyperparameters(arguments)),
        advanced=advanced,
        training_type="text-question-answering",
    )
    return BatchPlan(rows.lengths, batch_rows=BATCH_ROWS, passes=1, world_size=1, seed=advanced.seed).rows(1)


def _bare(folder: Path, first_rows: list[int], arguments: argparse.Namespace) -> tuple[float, float]:
    """Seconds from the script's process start to the end of its first step, and that step's loss."""
    script = Path(__file__).with_name("bare_lora.py")
    fields = (arguments.prompt_field, arguments.response_field)
    numbers = ",".join(map(str, first_rows))
    # -P: beside the script lies tokenize.py, a name of the standard library.
    command = [sys.executable, "-P", script, folder, arguments.rows, *fields, numbers, str(arguments.max_length)]
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told["first_step"] - started, told["loss"]


def _register(client: Client, settings: Settings, rows: Path) -> Path:
    """Register SmolLM2-135M-Instruct and the rows; the model's folder."""
    register(client, rows)
    storage = open_storage(settings.storage_url, settings)
    folder = storage.local_path(get_manifest(storage, "model", "model@1").stored.prefix)
    assert folder is not None
    return folder


if __name__ == "__main__":
    main()
