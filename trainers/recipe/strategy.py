"""What the recipe asks of a strategy: how the workers of a run share it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from trainers.recipe.collate import Pass
from trainers.recipe.device import Device
from tunesmith.errors import TunesmithError

SHARE_BASE = ("zero3", "zero3_offload")
"""Strategies whose workers hold a piece of the base each."""


@dataclass(frozen=True)
class Worker:
    """This process among the workers of the run; where there are several, torch.distributed is set up already."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


@dataclass(frozen=True)
class Snapshot:
    """The trained parameters and their moments, whole, on the CPU in float32, the same under every strategy."""

    weights: Mapping[str, torch.Tensor]
    """By the parameters' names in the peft model."""
    moments: Mapping[str, torch.Tensor]
    """AdamW's `exp_avg` and `exp_avg_sq`, all parameters end to end, and `step`; empty before the first step."""


class Strategy(Protocol):
    """The trained parameters of one worker and what updates them, beside those of the other workers."""

    in_step: bool
    """Whether every worker must make as many passes in a step as the others, because they meet in each pass."""
    loss: torch.Tensor
    """Mean loss of the step's global batch, after `step`; the wish of any worker to stop is in `stop` then."""
    stop: torch.Tensor

    def backward(self, rows: Pass, weight: float, *, last: bool) -> None:
        """Add the gradients of the pass's summed loss times `weight`; `last` of this worker in the step."""
        ...

    def step(self, number: int, learning_rate: float, *, wishes_stop: bool) -> torch.Tensor:
        """Update the parameters by all workers' gradients; their norm, before it was clipped."""
        ...

    def broken_step(self) -> int:
        """The first step whose loss or gradient was not a number; 0 where there was none. Waits for the device."""
        ...

    def loss_sum(self, rows: Pass) -> torch.Tensor:
        """Summed loss of the pass's trained tokens, nats, without gradients."""
        ...

    def snapshot(self) -> Snapshot:
        """Every worker calls it."""
        ...

    def restore(self, moments: Mapping[str, torch.Tensor]) -> None:
        """Go on with the moments of a snapshot whose weights are in the model already. Every worker calls it."""
        ...


class StepsDifferError(TunesmithError):
    """The workers of a run do not begin after the same step."""

    code = "steps_differ"


def begin_together(step: int, worker: Worker, device: Device) -> None:
    """Every worker calls it with the step it goes on from, 0 at the beginning; StepsDifferError where they differ."""
    if worker.world_size == 1:
        return
    mine = torch.tensor([step], device="cpu" if device.backend == "gloo" else device.torch_device)
    each = [torch.zeros_like(mine) for _ in range(worker.world_size)]
    dist.all_gather(each, mine)
    steps = [int(of_one) for of_one in each]
    if len(set(steps)) > 1:
        said = ", ".join(f"worker {rank} from step {at}" for rank, at in enumerate(steps))
        raise StepsDifferError(
            f"the workers were to go on from one checkpoint, but they begin at different ones: {said}",
            hint="start the attempt again: its driver hands the same checkpoint to every worker",
        )


def trained_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def shares_base(model: Any) -> bool:
    """Whether this worker holds only a piece of the model's weights: then all make every forward pass together."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
