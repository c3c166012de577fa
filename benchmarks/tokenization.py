"""How many rows a second are tokenised, beside `datasets.map` doing the same work with as many processes.

`python -m benchmarks.tokenization --rows FILE.jsonl --prompt-field question --response-field answer [--copies 10]
[--rounds 3]`: the file's rows, `copies` times over, from jsonl to token ids and masks on the disk, with the tokenizer
and the chat template of SmolLM2-135M-Instruct. Every run is a process of its own with nothing cached; its imports are
not counted, starting its helpers is. Both must come out with the same tokens and the same masks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.own_platform import smollm2_gguf
from benchmarks.results_file import figure, say, write_results

MAX_LENGTH = 4096
"""No row is cut: what each makes of a long one is its own affair."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenization", description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="a jsonl file")
    parser.add_argument("--prompt-field", default="prompt")
    parser.add_argument("--response-field", default="response")
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run = {"ours": _ours, "theirs": _theirs}[arguments.run]
        sys.stdout.write("\n" + json.dumps(run(arguments)) + "\n")
        return
    with tempfile.TemporaryDirectory(prefix="ts-tokenize-") as name:
        _measure(arguments, Path(name))


def _measure(arguments: argparse.Namespace, folder: Path) -> None:
    _save_tokenizer(folder / "tokenizer")
    text = arguments.rows.read_bytes().rstrip(b"\n") + b"\n"
    (folder / "rows.jsonl").write_bytes(text * arguments.copies)
    rows = text.count(b"\n") * arguments.copies
    lines: list[str] = []
    say(lines, f"{rows} rows, {len(text) * arguments.copies} bytes, {os.cpu_count()} cores")
    say(lines, ", ".join(f"{name} {version(name)}" for name in ("datasets", "tokenizers", "pyarrow")))
    speeds: dict[str, list[float]] = {"ours": [], "theirs": [], "map": []}
    # The first of each fills the disk's cache and counts for nothing.
    for number in range(arguments.rounds + 1):
        told = {name: _run(name, folder, number, arguments) for name in ("theirs", "ours")}
        if told["ours"]["digest"] != told["theirs"]["digest"]:
            raise SystemExit("the two have made different tokens or masks of the same rows")
        seconds = {"ours": told["ours"]["seconds"], "theirs": told["theirs"]["seconds"], "map": told["theirs"]["map"]}
        said = [f"{name} {value:.1f} s {rows / value:.0f} rows/s" for name, value in seconds.items()]
        cpu = [f"{name} {told[name]['cpu']:.1f} s" for name in told]
        say(lines, f"round {number}: {', '.join(said)}; CPU {', '.join(cpu)}")
        if number > 0:
            for name, value in seconds.items():
                speeds[name].append(rows / value)
    figures = {
        "rows_per_s": figure(speeds["ours"], "rows/s"),
        "ratio_vs_datasets_map": figure(_ratios(speeds["ours"], speeds["map"]), "times"),
        "ratio_vs_load_dataset_and_map": figure(_ratios(speeds["ours"], speeds["theirs"]), "times"),
        "datasets_map_rows_per_s": figure(speeds["map"], "rows/s"),
    }
    for key, value in figures.items():
        say(lines, f"{key}: {value['value']:.2f} {value['unit']} ({value['min']:.2f} to {value['max']:.2f})")
    say(lines, str(write_results("tokenize", figures, "\n".join(lines) + "\n")))


def _run(name: str, folder: Path, number: int, arguments: argparse.Namespace) -> dict[str, Any]:
    fields = [f"--prompt-field={arguments.prompt_field}", f"--response-field={arguments.response_field}"]
    own = folder / f"{name}-{number}"
    command = [
        sys.executable,
        "-m",
        "benchmarks.tokenization",
        "--run",
        name,
        f"--rows={folder / 'rows.jsonl'}",
        *fields,
    ]
    # Processes share the cores in both; `map` forks, and is told what ours tell their helpers.
    env = {
        **os.environ,
        "HF_HOME": str(own / "hf"),
        **({"TOKENIZERS_PARALLELISM": "false"} if name == "theirs" else {}),
    }
    done = subprocess.run([*command, f"--folder={own}"], stdout=subprocess.PIPE, text=True, check=True, env=env)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _ours(arguments: argparse.Namespace) -> dict[str, Any]:
    from trainers.text.tokenized_data import DataFile, encoded, tokenized
    from tunesmith.hyperparameters.checks import resolve
    from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters
    from tunesmith.settings import Settings
    from tunesmith.storage.folder import FolderStorage

    given = {"prompt_field": arguments.prompt_field, "response_field": arguments.response_field}
    # What the manifest of a dataset says of its files.
    file = DataFile.at(arguments.rows)
    tokenizer = _load_tokenizer(arguments)
    started, cpu = time.perf_counter(), _cpu_s()
    options: dict[str, Any] = {
        "hyperparameters": resolve(LoraHyperparameters, {**given, "max_seq_length": MAX_LENGTH}),
        "advanced": Advanced(),
        "training_type": "text-question-answering",
    }
    rows = tokenized(
        [file],
        lambda: encoded([file], tokenizer, **options),
        tokenizer="SmolLM2",
        **options,
        storage=FolderStorage(arguments.folder),
        settings=Settings.from_env({"TUNESMITH_HOME": str(arguments.folder)}),
    )
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "cpu": _cpu_s() - cpu, "digest": _digest(len(rows), rows.ids, rows.trained)}


def _theirs(arguments: argparse.Namespace) -> dict[str, Any]:
    from datasets import load_dataset

    tokenizer = _load_tokenizer(arguments)
    encode = _map_function(tokenizer, arguments.prompt_field, arguments.response_field)
    started, cpu = time.perf_counter(), _cpu_s()
    loaded = load_dataset("json", data_files=str(arguments.rows), split="train", cache_dir=str(arguments.folder))
    reading = time.perf_counter() - started
    rows = loaded.map(encode, batched=True, num_proc=os.cpu_count(), remove_columns=loaded.column_names)
    seconds, cpu = time.perf_counter() - started, _cpu_s() - cpu
    rows.set_format("numpy")
    digest = _digest(len(rows), lambda row: rows[row]["input_ids"], lambda row: rows[row]["trained"])
    return {"seconds": seconds, "map": seconds - reading, "cpu": cpu, "digest": digest}


def _map_function(tokenizer: Any, prompt_field: str, response_field: str) -> Callable[[Mapping[str, Any]], Any]:
    """What a careful script gives to `map`: prompt and answer in the model's template, one call of the tokenizer."""

    def encode(batch: Mapping[str, Any]) -> dict[str, Any]:
        asked = [[{"role": "user", "content": text}] for text in batch[prompt_field]]
        whole = [
            [*messages, {"role": "assistant", "content": text}]
            for messages, text in zip(asked, batch[response_field], strict=True)
        ]
        prompts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        texts = tokenizer.apply_chat_template(whole, tokenize=False)
        # The newline behind the end of turn is no part of the answer.
        answers = [text[len(prompt) :].removesuffix("\n") for text, prompt in zip(texts, prompts, strict=True)]
        tokens = tokenizer([*prompts, *answers], add_special_tokens=False)["input_ids"]
        made: dict[str, Any] = {"input_ids": [], "trained": []}
        for prompt, answer in zip(tokens[: len(prompts)], tokens[len(prompts) :], strict=True):
            made["input_ids"].append(prompt + answer)
            made["trained"].append([False] * len(prompt) + [True] * len(answer))
        return made

    return encode


def _cpu_s() -> float:
    """Seconds of processor time that this process and its ended helpers have had."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in spent)


def _digest(count: int, ids: Callable[[int], Any], trained: Callable[[int], Any]) -> str:
    """A hash of a thousand rows all over the data."""
    digest = hashlib.sha256(str(count).encode())
    for row in np.linspace(0, count - 1, min(count, 1000), dtype=int).tolist():
        digest.update(np.asarray(ids(row), np.int32).tobytes() + np.asarray(trained(row), np.bool_).tobytes())
    return digest.hexdigest()


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def _save_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    gguf = smollm2_gguf()
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _load_tokenizer(arguments: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(arguments.folder.parent / "tokenizer")


if __name__ == "__main__":
    main()
