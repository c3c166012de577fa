"""The LoRA recipe, top to bottom. It knows tensors, a config and a few callables; it runs with or without Ray.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021); the adapter is peft's.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainers.recipe.batches import BatchPlan
from trainers.recipe.checkpoint_files import CheckpointWriter, load_adapter, load_moments
from trainers.recipe.collate import Pass, one_row, pack, pad, shared_beginning, shares_beginnings
from trainers.recipe.compilation import compile_layers, why_not_compiled
from trainers.recipe.device import Device, keep_freed_memory, pick_device
from trainers.recipe.kernels.attention import why_not_packed
from trainers.recipe.lora import load_model
from trainers.recipe.loss import attention_of, loss_sum
from trainers.recipe.memory import does_not_fit, is_out_of_memory, largest_pass
from trainers.recipe.strategies import choose, strategy
from trainers.recipe.strategy import SHARE_BASE, Strategy, Worker, begin_together, shares_base
from trainers.recipe.trace import traced
from trainers.text.shards import TokenizedRows
from tunesmith.errors import ModelError, OutOfMemoryError, TunesmithError
from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters

EVAL_BATCH_ROWS = 8
PASS_TOKENS = {"cpu": 1536}
"""Tokens of a forward pass over packed rows, by the device's type: more take more memory and are hardly faster.

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
    """Step, model and held-out loss: before the training, before checkpoints, at the end. Leaves the model alone."""


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
    """The base with its tuned adapter, a peft model; under a strategy of `SHARE_BASE` each worker's piece of it."""
    weights: Mapping[str, torch.Tensor]
    """The adapter, whole, on the CPU in float32, by the names in the model."""


def train(
    model_folder: Path,
    rows: TokenizedRows,
    eval_rows: TokenizedRows | None,
    *,
    hyperparameters: LoraHyperparameters,
    advanced: Advanced,
    hooks: Hooks,
    worker: Worker = Worker(),
    start_from: Path | None = None,
    resume_from: Path | None = None,
    compiled: bool | None = None,
    profile: Path | None = None,
) -> Outcome:
    """Train an adapter for the model in `model_folder`.

    The loss of a step is the mean over the
    trained tokens of its global batch, so the split into rows, passes and workers does not matter. `start_from` is the
    folder of an adapter that the run begins with, `resume_from` a checkpoint's; steps, rows and dropout are functions
    of seed and step, so nothing else needs to be kept.
    The model's layers are `compiled` where that pays, unless it is said. `profile` is a file for a trace of some steps.
    """
    h, seed = hyperparameters, advanced.seed
    device = pick_device(worker.local_rank)
    model = load_model(model_folder, h, advanced, device)
    state: dict[str, Any] = {"step": 0}
    moments: Mapping[str, torch.Tensor] = {}
    if resume_from is not None:
        moments, state = load_moments(resume_from)
        start_from = resume_from / "adapter"
    begin_together(state["step"], worker, device)
    if start_from is not None:
        load_adapter(start_from, model)
    strategy_name = choose(advanced.strategy, model, worker, device, quantized=h.bits is not None)
    logger.info("strategy %s, %d workers", strategy_name, worker.world_size)

    plan = BatchPlan(
        rows.lengths,
        batch_rows=h.per_device_train_batch_size,
        passes=h.gradient_accumulation_steps,
        world_size=worker.world_size,
        seed=seed,
    )
    total_steps = plan.steps_per_epoch * advanced.num_train_epochs
    if h.max_steps is not None:
        total_steps = min(total_steps, h.max_steps)

    keep_freed_memory(device)
    model.eval()  # where dropout is at work, no two passes are alike
    unpacked = "packing is off" if advanced.packing == "off" else why_not_packed(model, int(rows.lengths.max()))
    model.train()
    if unpacked and advanced.packing == "on":
        raise ModelError(
            f"rows cannot be packed: {unpacked}", fields=["advanced.packing"], hint="packing=auto pads them"
        )
    make_pass = pad if unpacked else pack
    packed = "packed" + (
        ", what those of a pass begin with is computed once" if shares_beginnings(device.torch_device) else ""
    )
    logger.info("rows are %s", f"padded: {unpacked}" if unpacked else packed)
    in_pieces = strategy_name in SHARE_BASE
    if not in_pieces:
        model.to(device.torch_device)
    if compiled is None:
        tokens = int(rows.lengths.sum()) * total_steps // plan.steps_per_epoch // worker.world_size
        uncompiled = (
            "the workers share its weights"
            if in_pieces
            else why_not_compiled(model, advanced, device.torch_device, tokens)
        )
        logger.info("layers are %s", f"not compiled: {uncompiled}" if uncompiled else "compiled")
        compiled = uncompiled is None
    if compiled:
        first = make_pass(rows, plan.rows(1)[:2], device.torch_device)
        compile_layers(model, lambda: loss_sum(model, first).backward())  # type: ignore[no-untyped-call]
        model.zero_grad()
    shared = strategy(strategy_name, model, h, advanced, worker, device)
    if moments:
        shared.restore(moments)

    first_step = state["step"] + 1
    eval_before = state.get("eval_loss_before")

    def evaluate_at(step: int) -> float | None:
        if eval_rows is None:
            return None
        hooks.phase("evaluate", {})
        with torch.compiler.set_stance("force_eager"):
            loss = evaluate(shared, model, eval_rows, device, worker, hooks.should_stop, make_pass)
            if loss is None:
                return None
            hooks.report(step, {"eval_loss": loss})
            hooks.evaluated(step, model, loss)
        return loss

    if eval_before is None:
        eval_before = evaluate_at(0)
    hooks.phase("train", {"total_steps": total_steps, "first_step": first_step})

    checkpoint = CheckpointWriter(model)

    def save(step: int) -> None:
        snapshot = shared.snapshot()
        if worker.rank > 0:
            hooks.save(step, None)
            return
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.write(Path(folder), snapshot, {"step": step, "eval_loss_before": eval_before})
            hooks.save(step, Path(folder))

    pass_tokens = PASS_TOKENS.get(device.torch_device.type)
    step, saved_step, stopped = state["step"], state["step"], False
    since, tokens, samples = time.perf_counter(), 0, 0
    for step in traced(range(first_step, total_steps + 1), profile):
        learning_rate = h.learning_rate * schedule(
            step - 1, total_steps, warmup_ratio=h.warmup_ratio, kind=advanced.lr_scheduler_type
        )
        batch = plan.rows(step)
        trained = sum(int(rows.trained(row)[1:].sum()) for row in batch)
        if unpacked:
            passes = plan.padded(step, worker.rank)
        else:
            shared_tokens = shared_beginning([rows.ids(row) for row in batch], device.torch_device)
            passes = plan.packed(step, worker.rank, pass_tokens, shared_tokens)
        if not shared.in_step:
            passes = [share for share in passes if share]
        ran_out = False
        try:
            for number, share in enumerate(passes):
                if h.lora_dropout > 0:
                    torch.manual_seed(hash((seed, step, worker.rank, number)) & 0x7FFFFFFF)
                # Without rows of its own, a worker goes along with one that counts nothing.
                given = make_pass(rows, share or batch[-1:], device.torch_device)
                weight = 1 / max(1, trained) if share else 0.0
                shared.backward(given, weight, last=number == len(passes) - 1)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            ran_out = True
        if ran_out:  # here the error holds no tensor any more
            raise _does_not_fit(model, given, h, may_try=device.torch_device.type != "cpu" and not shared.in_step)
        grad_norm = shared.step(step, learning_rate, wishes_stop=hooks.should_stop())

        tokens += int(rows.lengths[batch].sum())
        samples += len(batch)
        # Asking the device makes the host wait for it.
        if step % min(h.logging_steps, STOP_STEPS) == 0:
            stopped = bool(shared.stop.item() > 0) and step < total_steps
        is_last = step == total_steps or stopped
        is_reported, is_saved = step % h.logging_steps == 0, step % h.save_steps == 0
        if (is_reported or is_saved or is_last) and (broken := shared.broken_step()):
            raise _not_finite(broken, plan.rows(broken), saved_step)
        if is_reported or is_last:
            elapsed_s = time.perf_counter() - since
            hooks.report(
                step,
                {
                    "loss": float(shared.loss),
                    "learning_rate": learning_rate,
                    "grad_norm": float(grad_norm),
                    "tokens_per_s_per_card": tokens / elapsed_s / worker.world_size,
                    "throughput": samples / elapsed_s * h.max_seq_length / worker.world_size,
                },
            )
            since, tokens, samples = time.perf_counter(), 0, 0
        if is_saved or is_last:
            paused = time.perf_counter()
            # First, for whoever goes on from the checkpoint evaluates it no more.
            if step < total_steps and not stopped and evaluate_at(step) is not None:
                hooks.phase("train", {})
            save(step)
            saved_step = step
            since += time.perf_counter() - paused
        if stopped:
            break

    eval_after = None if stopped else evaluate_at(step)
    return Outcome(step, total_steps, stopped, eval_before, eval_after, model, shared.snapshot().weights)


def _does_not_fit(model: Any, given: Pass, h: LoraHyperparameters, *, may_try: bool) -> OutOfMemoryError:
    """What is to be said of a pass that took too much memory; where it can be, smaller ones are tried.

    Not where workers make each pass together; nor on a CPU, where oneDNN makes nothing more after such a failure.
    """
    fits = largest_pass(lambda tokens: _try_pass(model, given, tokens), given.tokens) if may_try else None
    return does_not_fit(given.tokens, fits, h, str(given.ids.device))


def _try_pass(model: Any, like: Pass, tokens: int) -> None:
    """A forward and backward pass of one row of so many tokens, all of them trained."""
    if like.ids.device.type == "cuda":
        torch.cuda.empty_cache()
    row = one_row(tokens, like)
    with torch.compiler.set_stance("force_eager"), attention_of(model, row):
        loss_sum(model, row).backward()  # type: ignore[no-untyped-call]


def _not_finite(step: int, rows: Sequence[int], saved_step: int) -> LossError:
    shown = ", ".join(map(str, sorted(rows)[:SHOWN_ROWS])) + (" …" if len(rows) > SHOWN_ROWS else "")
    saved = f"the last good checkpoint is that of step {saved_step}" if saved_step else "there is no checkpoint yet"
    return LossError(
        f"the loss or gradient of step {step} is not a number; its rows, as the audit counts them: {shown}; {saved}",
        hint="lower learning_rate, or look at these rows",
    )


def schedule(done: int, total: int, *, warmup_ratio: float, kind: str) -> float:
    """Share of the highest learning rate after `done` steps: up from 0 over the warmup, then down to 0."""
    warmup = math.ceil(warmup_ratio * total)
    if done < warmup:
        return done / warmup
    left = (total - done) / max(1, total - warmup)
    return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left)))}[kind]


@torch.no_grad()
def evaluate(
    shared: Strategy,
    model: Any,
    rows: TokenizedRows,
    device: Device,
    worker: Worker,
    should_stop: Callable[[], bool],
    make_pass: Callable[[TokenizedRows, Sequence[int], torch.device], Pass],
) -> float | None:
    """Mean loss per trained token of `rows`, nats, shared among the workers; None where one of them is to stop."""
    was_training, in_step = model.training, shares_base(model)
    model.eval()
    order = np.argsort(-rows.lengths, kind="stable").tolist()
    total = torch.zeros(3, dtype=torch.float64, device="cpu" if device.backend == "gloo" else device.torch_device)
    for at in range(0, len(order), worker.world_size * EVAL_BATCH_ROWS):
        total[2] += should_stop()
        if total[2] > 0 and not in_step:
            break
        mine = at + worker.rank * EVAL_BATCH_ROWS
        share = order[mine : mine + EVAL_BATCH_ROWS]
        if share or in_step:
            given = make_pass(rows, share or order[-1:], device.torch_device)
            loss = shared.loss_sum(given)
            if share:
                total[0] += loss
                total[1] += len(given.targets)
    if worker.world_size > 1:
        dist.all_reduce(total)
    model.train(was_training)
    return None if total[2] > 0 else float(total[0] / total[1].clamp(min=1))
