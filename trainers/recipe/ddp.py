"""The strategy `ddp`: every worker holds all, and all trained parameters lie in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainers.recipe.collate import Pass
from trainers.recipe.device import Device
from trainers.recipe.loss import attention_of, loss_sum
from trainers.recipe.strategy import Snapshot, Worker, trained_parameters
from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters


class Flat:
    """All trained parameters in one tensor, and all gradients in another: one optimizer step, one all-reduce.

    The step's loss and the wish to stop are reduced together with the gradients.
    """

    in_step = False

    def __init__(self, model: Any, h: LoraHyperparameters, advanced: Advanced, worker: Worker, device: Device) -> None:
        self._model = model.to(device.torch_device)
        self._parameters = trained_parameters(model)
        self._world_size, self._max_norm = worker.world_size, h.max_grad_norm
        size = sum(p.numel() for p in self._parameters.values())
        self.values = nn.Parameter(torch.cat([p.detach().flatten().float() for p in self._parameters.values()]))
        self._reduced = torch.zeros(size + 2, dtype=torch.float32, device=device.torch_device)
        self._gradients = self._reduced[:size]
        self.values.grad = self._gradients
        self.loss, self.stop = self._reduced[size], self._reduced[size + 1]
        self._broken = torch.zeros((), dtype=torch.int64, device=device.torch_device)
        self._is_new = True
        for parameter, values, gradients in zip(
            self._parameters.values(), self._split(self.values.data), self._split(self._gradients), strict=True
        ):
            parameter.data, parameter.grad = values, gradients
        fused = device.torch_device.type == "cuda" or None  # None: as torch does by itself
        self._optimizer = torch.optim.AdamW(
            [self.values], h.learning_rate, weight_decay=advanced.weight_decay, fused=fused
        )

    def backward(self, rows: Pass, weight: float, *, last: bool) -> None:
        if self._is_new:
            self._reduced.zero_()
            self._is_new = False
        with attention_of(self._model, rows):
            loss = loss_sum(self._model, rows) * weight
            loss.backward()  # type: ignore[no-untyped-call]
        self.loss += loss.detach()

    def step(self, number: int, learning_rate: float, *, wishes_stop: bool) -> torch.Tensor:
        if self._is_new:  # this worker had no rows
            self._reduced.zero_()
        self._is_new = True
        self.stop += float(wishes_stop)
        if self._world_size > 1:
            dist.all_reduce(self._reduced)
        norm: torch.Tensor = torch.linalg.vector_norm(self._gradients)
        broke = ((self.loss + norm).isfinite().logical_not() & (self._broken == 0)).long()
        self._broken += broke * number  # without asking the device
        self._gradients.mul_((self._max_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        return norm

    def broken_step(self) -> int:
        return int(self._broken)

    def loss_sum(self, rows: Pass) -> torch.Tensor:
        return loss_sum(self._model, rows)

    def snapshot(self) -> Snapshot:
        weights = {name: p.detach().float().cpu() for name, p in self._parameters.items()}
        moments = {name: tensor.detach().cpu() for name, tensor in self._optimizer.state[self.values].items()}
        return Snapshot(weights, moments)

    def restore(self, moments: Mapping[str, torch.Tensor]) -> None:
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": {0: dict(moments)}})

    def _split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        sizes = [p.numel() for p in self._parameters.values()]
        return [part.view_as(p) for part, p in zip(torch.split(flat, sizes), self._parameters.values(), strict=True)]
