"""Memory that runs out: recognised as such, and the largest pass that fits is found by trying."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from pathlib import Path

from tunesmith.errors import OutOfMemoryError
from tunesmith.hyperparameters.definitions import LoraHyperparameters

_STATUS = Path("/proc/self/status")
SMALLEST_PASS = 8
"""Tokens of the smallest pass that is tried: the smallest `max_seq_length`."""
_WORDS = ("DefaultCPUAllocator: can't allocate memory", "std::bad_alloc", "could not create a primitive")
"""What torch and oneDNN say of it on a CPU, where it has no error class of its own."""


def limit(size: int) -> None:
    """Let this process have at most `size` bytes of memory of its own; allocations beyond that fail.

    Memory that it has allocated and not touched so far does not count. Only on Linux, which keeps count of it.
    """
    if not _STATUS.exists():
        return
    asked, used = (_status_bytes(name) for name in ("VmData", "RssAnon"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = asked - used + size
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _status_bytes(name: str) -> int:
    """Of this process, as Linux counts it (proc_pid_status(5))."""
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, of Ray or of Python says that memory ran out."""
    is_named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return is_named or any(words in str(error) for words in _WORDS)


def largest_pass(attempt: Callable[[int], None], tokens: int) -> int:
    """Tokens of a forward and backward pass that `attempt` can make: `tokens` halved until it fits, or 0."""
    while (tokens := tokens // 2) >= SMALLEST_PASS:
        gc.collect()
        try:
            attempt(tokens)
        except (RuntimeError, MemoryError) as error:  # torch has its own errors, oneDNN a RuntimeError
            if not is_out_of_memory(error):
                raise
        else:
            return tokens
    return 0


def does_not_fit(tokens: int, fits: int | None, hyperparameters: LoraHyperparameters, where: str) -> OutOfMemoryError:
    """The error of a run whose pass of `tokens` took more memory than `where` has.

    `fits`: tokens of a pass that were seen to fit; None where none was tried.
    """
    rows, length = hyperparameters.per_device_train_batch_size, hyperparameters.max_seq_length
    message = f"memory ran out in a pass of {tokens} tokens on {where} (per_device_train_batch_size={rows}, "
    message += f"max_seq_length={length})"
    others = "gradient_checkpointing=true, or a larger flavor"
    fields = ["hyperparameters.per_device_train_batch_size", "hyperparameters.max_seq_length"]
    if fits is None:
        return OutOfMemoryError(
            message, fields=fields, hint=f"{_half(rows, length)} takes half beside the model; or {others}"
        )
    if fits == 0:
        return OutOfMemoryError(f"{message}; not even the smallest pass fits beside the model", hint=others)
    wanted = f"per_device_train_batch_size={fits // length}" if fits >= length else f"max_seq_length={fits}"
    if fits < length and rows > 1:
        wanted += " and per_device_train_batch_size=1"
    hint = f"{wanted} fits, with more gradient_accumulation_steps for the same batch; or {others}"
    return OutOfMemoryError(f"{message}; a pass of {fits} tokens fits", fields=fields, hint=hint)


def _half(rows: int, length: int) -> str:
    return f"per_device_train_batch_size={rows // 2}" if rows > 1 else f"max_seq_length={length // 2}"
