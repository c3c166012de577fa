"""The LoRA recipe, top to bottom. It knows tensors, a config and a few callables; it runs with or without Ray.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021); the adapter is peft's.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn

from trainers.adapter import load_model
from trainers.attention import rows_apart, why_not_packed
from trainers.batches import BatchPlan
from trainers.checkpoints import load_adapter, load_checkpoint, save_checkpoint
from trainers.compilation import compile_layers, why_not_compiled
from trainers.cross_entropy import cross_entropy_sum
from trainers.device import Device, keep_freed_memory, pick_device
from trainers.passes import Pass, pack, pad
from trainers.shards import TokenizedRows
from trainers.trace import traced
from tunesmith.errors import ModelError, TunesmithError

EVAL_BATCH_ROWS = 8
PASS_TOKENS = {"cpu": 1536}
"""Tokens of a forward pass over packed rows: more take more memory and are hardly faster, by the device's type.

Where the device is not named the passes are those that the user asks for."""
STOP_STEPS = 10
"""Steps at most from one look at the wish to stop to the next."""
SHOWN_ROWS = 64
"""Rows of a step that an error names."""

logger = logging.getLogger(__name__)


class LossError(TunesmithError):
    """The loss, or the norm of its gradient, is no longer a number."""

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
    start_from: Path | None = None,
    resume_from: Path | None = None,
    compiled: bool | None = None,
    profile: Path | None = None,
) -> Outcome:
    """Train an adapter for the model in `model_folder`.

    `hyperparameters` and `advanced` are resolved (tunesmith.hyperparameters). The loss of a step is the mean over the
    trained tokens of its global batch, so the split into rows, passes and workers does not matter. `start_from` is the
    folder of an adapter that the run begins with, `resume_from` a checkpoint's; steps, rows and dropout are functions
    of seed and step, so nothing else needs to be kept.
    The model's layers are `compiled` where that pays, unless it is said. `profile` is a file for a trace of some steps.
    """
    h, seed = hyperparameters, int(advanced["seed"])
    device = pick_device(worker.local_rank)
    model = load_model(model_folder, h, advanced, device)
    if start_from is not None:
        load_adapter(start_from, model)
    flat = _Flat([p for p in model.parameters() if p.requires_grad])
    fused = device.torch_device.type == "cuda" or None  # None: as torch does by itself
    optimizer = torch.optim.AdamW([flat.values], h["learning_rate"], weight_decay=advanced["weight_decay"], fused=fused)

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

    keep_freed_memory(device)
    model.train()
    unpacked = "packing is off" if advanced["packing"] == "off" else why_not_packed(model, int(rows.lengths.max()))
    if unpacked and advanced["packing"] == "on":
        raise ModelError(
            f"rows cannot be packed: {unpacked}", fields=["advanced.packing"], hint="packing=auto pads them"
        )
    make_pass = pad if unpacked else pack
    logger.info("rows are %s", f"padded: {unpacked}" if unpacked else "packed")
    if compiled is None:
        tokens = int(rows.lengths.sum()) * total_steps // plan.steps_per_epoch // worker.world_size
        uncompiled = why_not_compiled(model, advanced, device.torch_device, tokens)
        logger.info("layers are %s", f"not compiled: {uncompiled}" if uncompiled else "compiled")
        compiled = uncompiled is None
    if compiled:
        first = make_pass(rows, plan.rows(1)[:2], device.torch_device)
        compile_layers(model, lambda: _backward(model, first, 1))

    state = load_checkpoint(resume_from, model, optimizer) if resume_from is not None else {"step": 0}
    first_step = state["step"] + 1
    eval_before = state.get("eval_loss_before")

    def evaluate_at(step: int) -> float | None:
        if eval_rows is None:
            return None
        hooks.phase("evaluate", {})
        with torch.compiler.set_stance("force_eager"):
            loss = evaluate(model, eval_rows, device, worker, hooks.should_stop, make_pass)
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

    pass_tokens = PASS_TOKENS.get(device.torch_device.type)
    step, saved_step, stopped = state["step"], state["step"], False
    since, tokens, samples = time.perf_counter(), 0, 0
    for step in traced(range(first_step, total_steps + 1), profile):
        learning_rate = h["learning_rate"] * schedule(step - 1, total_steps, h["warmup_ratio"], advanced)
        batch = plan.rows(step)
        trained = sum(int(rows.trained(row)[1:].sum()) for row in batch)
        passes = plan.padded(step, worker.rank) if unpacked else plan.packed(step, worker.rank, pass_tokens)
        flat.clear()
        for number, share in enumerate(passes):
            if share:
                if h["lora_dropout"] > 0:
                    torch.manual_seed(hash((seed, step, worker.rank, number)) & 0x7FFFFFFF)
                flat.loss += _backward(model, make_pass(rows, share, device.torch_device), max(1, trained))
        flat.stop += float(hooks.should_stop())
        flat.reduce(worker.world_size)
        grad_norm = flat.clip(h["max_grad_norm"], step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()

        tokens += int(rows.lengths[batch].sum())
        samples += len(batch)
        # Asking the device makes the host wait for it.
        if step % min(h["logging_steps"], STOP_STEPS) == 0:
            stopped = bool(flat.stop.item() > 0) and step < total_steps
        is_last = step == total_steps or stopped
        is_reported, is_saved = step % h["logging_steps"] == 0, step % h["save_steps"] == 0
        if (is_reported or is_saved or is_last) and (broken := flat.broken_step()):
            raise _not_finite(broken, plan.rows(broken), saved_step)
        if is_reported or is_last:
            elapsed_s = time.perf_counter() - since
            hooks.report(
                step,
                {
                    "loss": float(flat.loss),
                    "learning_rate": learning_rate,
                    "grad_norm": float(grad_norm),
                    "tokens_per_s_per_card": tokens / elapsed_s / worker.world_size,
                    "throughput": samples / elapsed_s * h["max_seq_length"] / worker.world_size,
                },
            )
            since, tokens, samples = time.perf_counter(), 0, 0
        if is_saved or is_last:
            paused = time.perf_counter()
            save(step)
            saved_step = step
            if step < total_steps and not stopped and evaluate_at(step) is not None:
                hooks.phase("train", {})
            since += time.perf_counter() - paused
        if stopped:
            break

    eval_after = None if stopped else evaluate_at(step)
    return Outcome(step, total_steps, stopped, eval_before, eval_after, model)


def _not_finite(step: int, rows: Sequence[int], saved_step: int) -> LossError:
    shown = ", ".join(map(str, sorted(rows)[:SHOWN_ROWS])) + (" …" if len(rows) > SHOWN_ROWS else "")
    saved = f"the last good checkpoint is that of step {saved_step}" if saved_step else "there is no checkpoint yet"
    return LossError(
        f"the loss or gradient of step {step} is not a number; its rows, as the audit counts them: {shown}; {saved}",
        hint="lower learning_rate, or look at these rows",
    )


def schedule(done: int, total: int, warmup_ratio: float, advanced: Mapping[str, Any]) -> float:
    """Share of the highest learning rate after `done` steps: up from 0 over the warmup, then down to 0."""
    warmup = math.ceil(warmup_ratio * total)
    if done < warmup:
        return done / warmup
    left = (total - done) / max(1, total - warmup)
    kind = advanced["lr_scheduler_type"]
    return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left)))}[kind]


def loss_sum(model: Any, rows: Pass) -> torch.Tensor:
    """Summed cross-entropy of the trained tokens, nats; logits are made at their places only.

    Padding stands at the right and attention is causal, so no token ever sees it and no attention mask is needed.
    """
    base = model.get_base_model()
    packed = {"offsets": rows.offsets, "longest": rows.longest} if rows.offsets is not None else {}
    with nullcontext() if rows.offsets is None else rows_apart(base):
        if has_plain_head(base):
            hidden = base.base_model(input_ids=rows.ids, position_ids=rows.positions, use_cache=False, **packed)
            wanted = hidden.last_hidden_state.flatten(0, 1).index_select(0, rows.places)
            return cross_entropy_sum(wanted, base.get_output_embeddings().weight, rows.targets)
        logits = base(input_ids=rows.ids, position_ids=rows.positions, use_cache=False, **packed).logits
        wanted = logits.flatten(0, 1).index_select(0, rows.places)
    loss: torch.Tensor = F.cross_entropy(wanted.float(), rows.targets, reduction="sum")
    return loss


def _backward(model: Any, rows: Pass, trained: int) -> torch.Tensor:
    """Add the gradients of the pass's share in the mean loss over `trained` tokens; that share."""
    # Where activations are checkpointed, layers run once more in the backward pass.
    with nullcontext() if rows.offsets is None else rows_apart(model.get_base_model()):
        loss = loss_sum(model, rows) / trained
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


@torch.no_grad()
def evaluate(
    model: Any,
    rows: TokenizedRows,
    device: Device,
    worker: Worker,
    should_stop: Callable[[], bool],
    make_pass: Callable[[TokenizedRows, Sequence[int], torch.device], Pass],
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
        share = make_pass(rows, order[at : at + EVAL_BATCH_ROWS], device.torch_device)
        total[0] += loss_sum(model, share)
        total[1] += len(share.targets)
    if worker.world_size > 1:
        dist.all_reduce(total)
    model.train(was_training)
    return None if total[2] > 0 else float(total[0] / total[1].clamp(min=1))


def has_plain_head(base: Any) -> bool:
    """Whether logits are the product of a frozen matrix with the last hidden state and nothing more."""
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return False
    scaled = ("logit_scale", "logits_scaling", "final_logit_softcapping", "lm_head_multiplier")
    return all(getattr(base.config, name, None) in (None, 1, 1.0) for name in scaled)


class _Flat:
    """All trained parameters in one tensor, and all gradients in another: one optimizer step, one all-reduce.

    With the gradients go the step's loss and the wish to stop.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        size = sum(p.numel() for p in parameters)
        self.values = nn.Parameter(torch.cat([p.detach().flatten().float() for p in parameters]))
        self._reduced = torch.zeros(size + 2, dtype=torch.float32, device=parameters[0].device)
        self._gradients = self._reduced[:size]
        self.values.grad = self._gradients
        self.loss, self.stop = self._reduced[size], self._reduced[size + 1]
        self._broken = torch.zeros((), dtype=torch.int64, device=self._reduced.device)
        at = 0
        for parameter in parameters:
            place = slice(at, at + parameter.numel())
            parameter.data = self.values.data[place].view_as(parameter)
            parameter.grad = self._gradients[place].view_as(parameter)
            at += parameter.numel()

    def clear(self) -> None:
        self._reduced.zero_()

    def reduce(self, world_size: int) -> None:
        """Sum over the workers; each one's loss is its share of the global mean already."""
        if world_size > 1:
            dist.all_reduce(self._reduced)

    def clip(self, max_norm: float, step: int) -> torch.Tensor:
        """Scale down to `max_norm`; the norm before. Where it or the loss is not a number, `step` is remembered."""
        norm: torch.Tensor = torch.linalg.vector_norm(self._gradients)
        broke = ((self.loss + norm).isfinite().logical_not() & (self._broken == 0)).long()
        self._broken += broke * step  # without asking the device
        self._gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def broken_step(self) -> int:
        """The first step whose loss or gradient was not a number; 0 where there was none. Waits for the device."""
        return int(self._broken)
