"""The LoRA recipe, top to bottom. It knows tensors, a config and a few callables; it runs with or without Ray.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021); the adapter is peft's.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from trainers.batches import BatchPlan
from trainers.checkpoints import load_checkpoint, save_checkpoint
from trainers.device import Device, pick_device
from trainers.shards import TokenizedRows
from tunesmith.errors import ModelError, TunesmithError

EVAL_BATCH_ROWS = 8


class LossError(TunesmithError):
    """The loss is no longer a number."""

    code = "loss_not_finite"
    reason = "user_error"


@dataclass(frozen=True)
class Worker:
    """This process among those of the run; above one, torch.distributed is set up already."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


@dataclass(frozen=True)
class Hooks:
    """What the recipe tells the outside, on every worker alike, at the same steps."""

    report: Callable[[int, Mapping[str, float]], None]
    """Step and metrics: every `logging_steps`, and for the held-out loss before and after."""
    save: Callable[[int, Path | None], None]
    """Step, and on rank 0 a folder that is a whole checkpoint and is gone after the call."""
    should_stop: Callable[[], bool]
    """Asked at every step border and in evaluations; one worker's yes stops all, after a checkpoint."""
    phase: Callable[[str, Mapping[str, int]], None] = lambda name, data: None
    """`evaluate`, or `train`, at its beginning with `total_steps` and `first_step`."""
    evaluated: Callable[[int, Any, float], None] = lambda step, model, loss: None
    """Step, model and held-out loss: before the training, after checkpoints, and at the end. Leaves the model alone."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    steps: int
    """Optimizer steps done, those before a resume included."""
    total_steps: int
    stopped: bool
    eval_loss_before: float | None
    eval_loss: float | None
    """Mean loss per trained token of the held-out rows, nats; before training and after."""
    model: Any
    """The base with its tuned adapter, a peft model."""


def train(
    model_folder: Path,
    rows: TokenizedRows,
    eval_rows: TokenizedRows | None,
    *,
    hyperparameters: Mapping[str, Any],
    advanced: Mapping[str, Any],
    hooks: Hooks,
    worker: Worker = Worker(),
    resume_from: Path | None = None,
) -> Outcome:
    """Train an adapter for the model in `model_folder`.

    `hyperparameters` and `advanced` are resolved (tunesmith.hyperparameters). The loss of a step is the mean over the
    trained tokens of its global batch, so the split into rows, passes and workers does not matter. `resume_from` is a
    checkpoint's folder; steps, rows and dropout are functions of seed and step, so nothing else needs to be kept.
    """
    h, seed = hyperparameters, int(advanced["seed"])
    device = pick_device(worker.local_rank)
    model = load_model(model_folder, h, advanced, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = _FlatGradients(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=h["learning_rate"], weight_decay=advanced["weight_decay"])

    plan = BatchPlan(
        rows.lengths,
        batch_rows=h["per_device_train_batch_size"],
        passes=h["gradient_accumulation_steps"],
        world_size=worker.world_size,
        seed=seed,
    )
    total_steps = plan.steps_per_epoch * int(advanced["num_train_epochs"])
    if h["max_steps"] is not None:
        total_steps = min(total_steps, h["max_steps"])

    state = load_checkpoint(resume_from, model, optimizer) if resume_from is not None else {"step": 0}
    first_step = state["step"] + 1
    eval_before = state.get("eval_loss_before")

    def evaluate_at(step: int) -> float | None:
        if eval_rows is None:
            return None
        hooks.phase("evaluate", {})
        loss = evaluate(model, eval_rows, device, worker, hooks.should_stop)
        if loss is None:
            return None
        hooks.report(step, {"eval_loss": loss})
        hooks.evaluated(step, model, loss)
        return loss

    if eval_before is None:
        eval_before = evaluate_at(0)
    hooks.phase("train", {"total_steps": total_steps, "first_step": first_step})

    def save(step: int) -> None:
        if worker.rank > 0:
            hooks.save(step, None)
            return
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), model, optimizer, {"step": step, "eval_loss_before": eval_before})
            hooks.save(step, Path(folder))

    model.train()
    step, stopped = state["step"], False
    since, tokens, samples = time.perf_counter(), 0, 0
    for step in range(first_step, total_steps + 1):
        learning_rate = h["learning_rate"] * schedule(step - 1, total_steps, h["warmup_ratio"], advanced)
        batch = plan.rows(step)
        trained = sum(int(rows.trained(row)[1:].sum()) for row in batch)
        gradients.clear()
        for number, share in enumerate(plan.share(step, worker.rank)):
            if share:
                if h["lora_dropout"] > 0:
                    torch.manual_seed(hash((seed, step, worker.rank, number)) & 0x7FFFFFFF)
                loss = loss_sum(model, *collate(rows, share, device.torch_device)) / max(1, trained)
                loss.backward()  # type: ignore[no-untyped-call]
                gradients.loss += loss.detach()
        gradients.stop += float(hooks.should_stop())
        gradients.reduce(worker.world_size)
        grad_norm = gradients.clip(h["max_grad_norm"])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()

        tokens += int(rows.lengths[batch].sum())
        samples += len(batch)
        stopped = bool(gradients.stop.item() > 0) and step < total_steps
        if step % h["logging_steps"] == 0 or step == total_steps or stopped:
            loss_value = float(gradients.loss)
            if not math.isfinite(loss_value):
                raise LossError(
                    f"the loss of step {step} is {loss_value}",
                    hint="lower learning_rate, or look at the rows of this step",
                )
            elapsed_s = time.perf_counter() - since
            hooks.report(
                step,
                {
                    "loss": loss_value,
                    "learning_rate": learning_rate,
                    "grad_norm": float(grad_norm),
                    "tokens_per_s_per_card": tokens / elapsed_s / worker.world_size,
                    "throughput": samples / elapsed_s * h["max_seq_length"] / worker.world_size,
                },
            )
            since, tokens, samples = time.perf_counter(), 0, 0
        if step % h["save_steps"] == 0 or step == total_steps or stopped:
            paused = time.perf_counter()
            save(step)
            if step < total_steps and not stopped and evaluate_at(step) is not None:
                hooks.phase("train", {})
            since += time.perf_counter() - paused
        if stopped:
            break

    eval_after = None if stopped else evaluate_at(step)
    return Outcome(step, total_steps, stopped, eval_before, eval_after, model)


def load_model(folder: Path, h: Mapping[str, Any], advanced: Mapping[str, Any], device: Device) -> Any:
    """The frozen base with a fresh adapter, the same on every worker for the same seed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    half = advanced["precision"] == "bf16" or (advanced["precision"] == "auto" and device.has_bf16)
    dtype = torch.bfloat16 if half else torch.float32
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    targets = str(advanced["target_modules"])
    config = LoraConfig(
        r=h["lora_rank"],
        lora_alpha=h["lora_alpha"],
        lora_dropout=h["lora_dropout"],
        target_modules=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(int(advanced["seed"]))
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise ModelError(
            f"target_modules {targets!r} fit no module of the model: {error}", fields=["advanced.target_modules"]
        ) from error
    if advanced["gradient_checkpointing"]:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    return model.to(device.torch_device)


def schedule(done: int, total: int, warmup_ratio: float, advanced: Mapping[str, Any]) -> float:
    """Share of the highest learning rate after `done` steps: up from 0 over the warmup, then down to 0."""
    warmup = math.ceil(warmup_ratio * total)
    if done < warmup:
        return done / warmup
    left = (total - done) / max(1, total - warmup)
    kind = advanced["lr_scheduler_type"]
    return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left)))}[kind]


def collate(rows: TokenizedRows, share: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, longest] and the mask of trained ones, padded at the right."""
    longest = int(rows.lengths[share].max())
    ids = torch.zeros(len(share), longest, dtype=torch.long)
    trained = torch.zeros(len(share), longest, dtype=torch.bool)
    for place, row in enumerate(share):
        length = int(rows.lengths[row])
        ids[place, :length] = torch.from_numpy(rows.ids(row).astype(np.int64))
        trained[place, :length] = torch.from_numpy(rows.trained(row).copy())
    return ids.to(device, non_blocking=True), trained.to(device, non_blocking=True)


def loss_sum(model: Any, ids: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of the trained tokens, nats; logits are made at their places only.

    Padding stands at the right and attention is causal, so no token ever sees it and no attention mask is needed.
    """
    base = model.get_base_model()
    targets = ids[:, 1:][trained[:, 1:]]
    if _has_plain_head(base.config):
        hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = base.get_output_embeddings()(hidden[:, :-1][trained[:, 1:]])
    else:
        logits = base(input_ids=ids, use_cache=False).logits[:, :-1][trained[:, 1:]]
    loss: torch.Tensor = F.cross_entropy(logits.float(), targets, reduction="sum")
    return loss


@torch.no_grad()
def evaluate(
    model: Any, rows: TokenizedRows, device: Device, worker: Worker, should_stop: Callable[[], bool]
) -> float | None:
    """Mean loss per trained token of `rows`, nats, shared among the workers; None where one of them is to stop."""
    was_training = model.training
    model.eval()
    order = np.argsort(-rows.lengths, kind="stable").tolist()
    total = torch.zeros(3, dtype=torch.float64, device="cpu" if device.backend == "gloo" else device.torch_device)
    for at in range(worker.rank * EVAL_BATCH_ROWS, len(order), worker.world_size * EVAL_BATCH_ROWS):
        if should_stop():
            total[2] = 1
            break
        ids, trained = collate(rows, order[at : at + EVAL_BATCH_ROWS], device.torch_device)
        total[0] += loss_sum(model, ids, trained)
        total[1] += trained[:, 1:].sum()
    if worker.world_size > 1:
        dist.all_reduce(total)
    model.train(was_training)
    return None if total[2] > 0 else float(total[0] / total[1].clamp(min=1))


class _FlatGradients:
    """All gradients in one tensor, with the step's loss and the wish to stop: one all-reduce a step carries all."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        size = sum(p.numel() for p in parameters)
        self._flat = torch.zeros(size + 2, dtype=torch.float32, device=parameters[0].device)
        self._gradients = self._flat[:size]
        self.loss, self.stop = self._flat[size], self._flat[size + 1]
        at = 0
        for parameter in parameters:
            parameter.grad = self._flat[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()

    def clear(self) -> None:
        self._flat.zero_()

    def reduce(self, world_size: int) -> None:
        """Sum over the workers; each one's loss is its share of the global mean already."""
        if world_size > 1:
            dist.all_reduce(self._flat)

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale down to `max_norm`; the norm before."""
        norm: torch.Tensor = torch.linalg.vector_norm(self._gradients)
        self._gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


def _has_plain_head(config: Any) -> bool:
    """Whether logits are the output embeddings' product with the last hidden state and nothing more."""
    scaled = ("logit_scale", "logits_scaling", "final_logit_softcapping", "lm_head_multiplier")
    return all(getattr(config, name, None) in (None, 1, 1.0) for name in scaled)
