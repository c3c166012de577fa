"""What every contestant is given, and what it prints: a JSON line for each step, and one at the end.

Nothing but the standard library, so that it runs in the environment of any peer.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """One run: the same for all contestants."""

    model: str
    """Folder with safetensors, config and tokenizer."""
    rows: str
    """jsonl of `input_ids` and `labels`, -100 where a token is not trained; in the order of the recipe's steps."""
    shard: str
    """The same rows in the order of the data, as the recipe reads them."""
    out: str
    """Folder to write to."""
    steps: int
    batch_rows: int
    """Rows of one forward pass."""
    passes: int
    """Forward passes of one step."""
    max_length: int
    mean_length: float
    """Tokens of a row."""
    lora_rank: int = 8
    lora_alpha: int = 16
    learning_rate: float = 2e-4
    seed: int = 0
    cuda: bool = False
    """On the first GPU in bf16; else on the CPU in fp32."""
    checkpointed: bool = False
    """Whether activations are computed again in the backward pass."""
    profile: str | None = None
    """Where the recipe leaves a trace of some steps."""
    compiled: bool = True
    """Whether the recipe compiles the model's layers."""
    bits: int | None = None
    """Of the recipe's quantized base."""
    advanced: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the recipe, besides those that make the contestants alike."""

    @classmethod
    def read(cls, path: str | Path) -> Work:
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @property
    def global_rows(self) -> int:
        return self.batch_rows * self.passes

    def packed(self, *, filled: float, wide: bool = False) -> Work:
        """The same with packs of `max_length` for rows, each `filled` to that share, and as near to a step's tokens.

        One pack a pass, or, if `wide`, as many as leave the number of passes.
        """
        packs = max(1, round(self.global_rows * self.mean_length / (self.max_length * filled)))
        if not wide:
            return replace(self, batch_rows=1, passes=packs)
        return replace(self, batch_rows=max(1, round(packs / self.passes)))


class StepLines:
    """Prints a step's line when it ends; a step begins where the one before ended."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._since, self._cpu_since = time.perf_counter(), time.process_time()

    def end(self, step: int, *, loss: float, tokens: int) -> None:
        """`loss` is the mean over the step's trained tokens, `tokens` those that are no padding."""
        spent = {"seconds": time.perf_counter() - self._since, "cpu_seconds": time.process_time() - self._cpu_since}
        _say({"step": step, "loss": loss, "tokens": tokens, **spent})
        self.begin()


def say_end(config: Mapping[str, Any], *, device_bytes: int) -> None:
    """The last line: this process's peak of resident memory, its accelerator's, and what it ran with."""
    _say({"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": device_bytes, "config": config})


def peak_rss_bytes() -> int:
    """Not getrusage's, which begins with what the parent had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def _say(line: Mapping[str, Any]) -> None:
    sys.stdout.write("\n" + json.dumps(line) + "\n")
    sys.stdout.flush()
