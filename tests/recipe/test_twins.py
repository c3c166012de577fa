"""A long run, packed and compiled, ends where its unpacked, uncompiled twin does."""

import shutil
import statistics
from pathlib import Path

import pytest

from tests.support import tiny
from trainers.recipe.training_loop import Hooks, train
from trainers.text.shards import TokenizedRows

pytestmark = pytest.mark.soak

STEPS = 500


def held_out_loss(folder: Path, rows: TokenizedRows, eval_rows: TokenizedRows, *, seed: int, fast: bool) -> float:
    outcome = train(
        folder,
        rows,
        eval_rows,
        hyperparameters=tiny.hyperparameters(
            per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=STEPS, save_steps=STEPS
        ),
        advanced=tiny.advanced(packing="auto" if fast else "off", num_train_epochs=100, seed=seed),
        hooks=Hooks(report=lambda step, values: None, save=lambda step, at: None, should_stop=lambda: False),
        compiled=fast,
    )
    assert outcome.steps == STEPS
    assert outcome.eval_loss is not None
    return outcome.eval_loss


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_the_twins_end_with_the_same_held_out_loss(tmp_path: Path) -> None:
    """Noise is what another seed, that is another order of rows and another start of the adapter, makes of it.

    The twins take the same steps, so they lie closer together than runs of different seeds do.
    """
    folder, rows, eval_rows = tiny.make_model(tmp_path), tiny.tokens(64), tiny.tokens(16)
    slow = [held_out_loss(folder, rows, eval_rows, seed=seed, fast=False) for seed in range(4)]
    noise = statistics.stdev(slow)
    fast = held_out_loss(folder, rows, eval_rows, seed=0, fast=True)
    assert abs(fast - slow[0]) < noise, (fast, slow)
