"""Which strategy a run takes: how its workers share the work."""

from __future__ import annotations

import logging
from typing import Any

import torch

from trainers.recipe.device import Device
from trainers.recipe.strategy import Strategy, Worker
from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters

SHARE_OF_DEVICE = 0.5
"""Where the base takes a larger share of an accelerator's memory, `auto` has the workers share it."""

logger = logging.getLogger(__name__)


def choose(wished: str, model: Any, worker: Worker, device: Device, *, quantized: bool = False) -> str:
    """The strategy of a run that asked for `wished`; docs/strategies.md has the rule of `auto`."""
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
    hyperparameters: LoraHyperparameters,
    advanced: Advanced,
    worker: Worker,
    device: Device,
) -> Strategy:
    """The strategy called `name`, which takes the model's parameters over and moves the model to the device."""
    if name == "ddp":
        from trainers.recipe.ddp import Flat

        return Flat(model, hyperparameters, advanced, worker, device)
    from trainers.recipe.zero import Zero

    return Zero(name, model, hyperparameters, advanced, worker, device)


def _base_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _memory(device: Device) -> int:
    module = getattr(torch, device.torch_device.type)
    total: int = module.mem_get_info(device.torch_device)[1]
    return total
