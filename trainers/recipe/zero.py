"""The strategies `zero1` to `zero3_offload`: DeepSpeed's ZeRO.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn

from trainers.recipe.collate import Pass
from trainers.recipe.device import Device
from trainers.recipe.lora import LoraLinear
from trainers.recipe.loss import Loss, attention_of, has_plain_head
from trainers.recipe.strategy import SHARE_BASE, Snapshot, Worker, trained_parameters
from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters

MOMENTS = ("exp_avg", "exp_avg_sq")


def engine_config(name: str) -> dict[str, Any]:
    """DeepSpeed's configuration for the strategy `name`, from `cluster_configs/deepspeed/`."""
    config: dict[str, Any] = json.loads(files("cluster_configs").joinpath("deepspeed", f"{name}.json").read_text())
    return config


class Zero:
    """DeepSpeed's engine over the trained parameters; from stage 3 on over the base as well, each worker a piece.

    Optimizer states and gradients are in pieces from stages 1 and 2 on. The optimizer is torch's AdamW: DeepSpeed's own
    would be compiled first.
    """

    in_step = True

    def __init__(
        self,
        name: str,
        model: Any,
        h: LoraHyperparameters,
        advanced: Advanced,
        worker: Worker,
        device: Device,
    ) -> None:
        import deepspeed

        self._model, self._worker, self._device = model, worker, device
        config = engine_config(name)
        # In bf16 is the frozen base alone, which is DeepSpeed's to share at most.
        config |= {"gradient_clipping": h.max_grad_norm}
        self._in_pieces = name in SHARE_BASE
        _join(worker, device)
        objective = Loss(model)
        if self._in_pieces:
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
            for module, parameter in _read_from_outside(objective):
                deepspeed.zero.register_external_parameter(module, parameter)
        self._parameters = trained_parameters(model)
        optimizer = torch.optim.AdamW(self._parameters.values(), h.learning_rate, weight_decay=advanced.weight_decay)
        self._engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
        self._sums = torch.zeros(2, device=device.torch_device)
        self.loss, self.stop = self._sums
        self._broken = torch.zeros((), dtype=torch.int64, device=device.torch_device)
        self._steps = 0

    def backward(self, rows: Pass, weight: float, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        with attention_of(self._model, rows):
            loss = self._engine(rows) * weight
            # A pass's loss is its share in the global mean; DeepSpeed takes the mean over the workers.
            self._engine.backward(loss * self._worker.world_size)
        self._sums[0] += loss.detach()

    def step(self, number: int, learning_rate: float, *, wishes_stop: bool) -> torch.Tensor:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self._steps += 1
        sums = torch.stack([self._sums[0], self._sums.new_tensor(float(wishes_stop))])
        if self._worker.world_size > 1:
            dist.all_reduce(sums)
        self.loss, self.stop = sums
        self._sums.zero_()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=sums.device)
        overflow = float(self._engine.optimizer.overflow)
        broke = (((self.loss + norm).isfinite().logical_not() | (overflow > 0)) & (self._broken == 0)).long()
        self._broken += broke * number
        return norm

    def broken_step(self) -> int:
        return int(self._broken)

    def loss_sum(self, rows: Pass) -> torch.Tensor:
        loss: torch.Tensor = self._engine(rows)
        return loss

    def snapshot(self) -> Snapshot:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights = {name: safe_get_full_fp32_param(p).cpu() for name, p in self._parameters.items()}
        if not self._steps:
            return Snapshot(weights, {})
        moments = {"step": torch.tensor(float(self._steps))}
        for key in MOMENTS:
            whole = [safe_get_full_optimizer_state(p, key).flatten().cpu() for p in self._parameters.values()]
            moments[key] = torch.cat(whole)
        return Snapshot(weights, moments)

    def restore(self, moments: Mapping[str, torch.Tensor]) -> None:
        self._steps = int(moments["step"])
        zero = self._engine.optimizer
        parts = zero.fp32_partitioned_groups_flat if self._in_pieces else zero.single_partition_of_fp32_groups
        for part in parts:  # as AdamW makes them in its first step
            begun = {key: torch.zeros_like(part.data) for key in MOMENTS}
            zero.optimizer.state[part] = {"step": torch.tensor(float(self._steps)), **begun}
        if not self._in_pieces:
            zero._lazy_init_hp_params_optimizer_state()
        sizes = [_numel(p) for p in self._parameters.values()]
        for key in MOMENTS:
            for parameter, value in zip(self._parameters.values(), torch.split(moments[key], sizes), strict=True):
                self._set(parameter, key, value)

    def _set(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Put this worker's piece of a parameter's whole moment `key` in place."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        value = value.to(self._device.torch_device)
        if not self._in_pieces:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        size: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        pieces = torch.split(F.pad(value, (0, size * self._worker.world_size - value.numel())), size)
        safe_set_local_optimizer_state(parameter, pieces[self._worker.rank], key)


def _read_from_outside(objective: Loss) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Each module that reads a parameter of another one which it never calls, with the parameter."""
    base = objective.model.get_base_model()
    if has_plain_head(base):
        yield objective, base.get_output_embeddings().weight
    for layer in objective.modules():
        if isinstance(layer, LoraLinear):
            for parameter in layer.parameters():
                yield layer, parameter


def _join(worker: Worker, device: Device) -> None:
    """A process group also for one worker alone, and none of DeepSpeed's own kernels, which it would compile first."""
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", str(worker.local_rank))  # DeepSpeed reads it
    if not dist.is_initialized():
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group(device.backend, store=store, rank=worker.rank, world_size=worker.world_size)
    if device.torch_device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _numel(parameter: nn.Parameter) -> int:
    """Of the whole parameter; stage 3 leaves an empty tensor in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
