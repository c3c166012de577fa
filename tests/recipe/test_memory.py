"""A run whose memory runs out says so, and what would fit."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import tiny, workers
from trainers.recipe import training_loop
from trainers.recipe.memory import does_not_fit, largest_pass
from trainers.recipe.training_loop import Hooks, train
from tunesmith.errors import OutOfMemoryError

ROWS = 1024
MORE_BYTES = 160 << 20
"""What a run may take beside what its process has before: `ROWS` in one pass take twice as much, an eighth half."""


def run(folder: Path, **hyperparameters: Any) -> int:
    rows = tiny.tokens(ROWS)
    # The C library keeps what is freed, so memory is that of the largest pass.
    outcome = train(
        folder,
        rows,
        None,
        hyperparameters=tiny.hyperparameters(max_steps=2, **hyperparameters),
        advanced=tiny.advanced(),
        hooks=Hooks(report=lambda step, values: None, save=lambda step, at: None, should_stop=lambda: False),
        compiled=False,
    )
    return outcome.steps


def _limited(folder: Path, hyperparameters: dict[str, Any], queue: Any) -> None:
    training_loop.PASS_TOKENS = {}
    run(folder, per_device_train_batch_size=1)  # all is loaded that a run needs
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    limit = int(line.split()[1]) * 1024 + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        queue.put(run(folder, **hyperparameters))
    except OutOfMemoryError as error:
        queue.put(error)


def with_little_memory(folder: Path, **hyperparameters: Any) -> Any:
    """Steps done, or the error, of a run in a process of its own that may take only so much."""
    queue = workers.CONTEXT.Queue()
    with workers.process(_limited, folder, hyperparameters, queue):
        return queue.get(timeout=workers.LIMIT_S)


def test_a_run_whose_memory_runs_out_says_what_takes_half(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "model", mlp_width=512)
    error = with_little_memory(folder, per_device_train_batch_size=ROWS)
    assert isinstance(error, OutOfMemoryError), error
    assert (error.code, error.reason) == ("out_of_memory", "out_of_memory")
    assert error.message.startswith("memory ran out in a pass of ")
    assert f"per_device_train_batch_size={ROWS}, max_seq_length=64" in error.message
    assert error.hint is not None
    assert error.hint.startswith(f"per_device_train_batch_size={ROWS // 2} takes half")
    assert with_little_memory(folder, per_device_train_batch_size=ROWS // 8) == 2


def test_the_largest_pass_that_fits_is_found_by_trying() -> None:
    tried = []

    def attempt(tokens: int) -> None:
        tried.append(tokens)
        if tokens > 3000:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert largest_pass(attempt, 16_384) == 2048
    assert tried == [8192, 4096, 2048]
    with pytest.raises(ValueError, match="another"):
        largest_pass(lambda tokens: (_ for _ in ()).throw(ValueError("another")), 64)


@pytest.mark.parametrize(
    ("rows", "fits", "hint"),
    [
        (8, 2048, "per_device_train_batch_size=2 fits"),
        (8, 512, "max_seq_length=512 and per_device_train_batch_size=1 fits"),
        (1, 512, "max_seq_length=512 fits"),
        (8, 0, "gradient_checkpointing=true, or a larger flavor"),
    ],
)
def test_what_fits_is_said_in_hyperparameters(rows: int, fits: int, hint: str) -> None:
    given = tiny.hyperparameters(per_device_train_batch_size=rows, max_seq_length=1024)
    error = does_not_fit(rows * 1024, fits, given, "cuda:0")
    assert error.hint is not None
    assert error.hint.startswith(hint)
