"""A run of the recipe in this process, for comparison with what a job left: no Ray, no storage, one worker."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support import tiny
from trainers.recipe.training_loop import Hooks, train


@dataclass(frozen=True)
class Whole:
    """What a run leaves: losses by step, and its adapter's file."""

    losses: dict[int, float]
    adapter: Path


def train_alone(folder: Path, *, hyperparameters: dict[str, Any], advanced: dict[str, Any]) -> Whole:
    """Train the tiny model on the rows that jobs over the tiny dataset train on."""
    losses: dict[int, float] = {}
    outcome = train(
        tiny.make_model(folder / "model"),
        tiny.tokens(tiny.TRAINED_ROWS),
        None,
        hyperparameters=tiny.hyperparameters(**hyperparameters),
        advanced=tiny.advanced(**advanced),
        hooks=Hooks(
            report=lambda step, values: losses.update({step: values["loss"]}),
            save=lambda step, at: None,
            should_stop=lambda: False,
        ),
    )
    outcome.model.save_pretrained(folder / "adapter")
    return Whole(losses, folder / "adapter" / "adapter_model.safetensors")


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    """Tensors of the same names, each within `tolerance` of its other."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name} {text}"
        )
