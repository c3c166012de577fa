"""How workers share a run: what the recipe asks of a strategy, and which one a run takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trainers.device import Device
from trainers.passes import Pass

SHARE_BASE = ("zero3", "zero3_offload")
"""Strategies whose workers hold a piece of the base each."""
SHARE_OF_DEVICE = 0.5
"""Where the base takes a larger share of an accelerator's memory, `auto` has the workers share it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Worker:
    """This process among those of the run; above one, torch.distributed is set up already."""

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
    """Whether every worker must make as many passes in a step as the others, for they meet in each."""
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


def choose(wished: str, model: Any, worker: Worker, device: Device, *, quantized: bool = False) -> str:
    """The strategy of a run that wished for `wished`; the rule of `auto` is in docs/strategies.md."""
    if wished != "auto":
        return wished
    if worker.world_size == 1:
        return "ddp"
    if device.torch_device.type == "cpu":
        return "ddp"
    is_large = _base_bytes(model) > SHARE_OF_DEVICE * _memory(device)
    return "zero3" if is_large and not quantized else "zero2"


def strategy(
    name: str,
    model: Any,
    hyperparameters: Mapping[str, Any],
    advanced: Mapping[str, Any],
    worker: Worker,
    device: Device,
) -> Strategy:
    """The strategy called `name`, with the model's parameters taken over; the model is moved to the device."""
    if name == "ddp":
        from trainers.flat import Flat

        return Flat(model, hyperparameters, advanced, worker, device)
    from trainers.zero import Zero

    return Zero(name, model, hyperparameters, advanced, worker, device)


def trained_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def shares_base(model: Any) -> bool:
    """Whether this worker holds only a piece of the model's weights: its forward passes are made by all together."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _base_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _memory(device: Device) -> int:
    module = getattr(torch, device.torch_device.type)
    total: int = module.mem_get_info(device.torch_device)[1]
    return total
