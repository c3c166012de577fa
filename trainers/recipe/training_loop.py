"""The LoRA recipe, from top to bottom. It knows tensors, hyperparameters and a few callables, and no Ray.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021); the adapter is peft's.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainers.recipe.batches import BatchPlan
from trainers.recipe.checkpoint_files import CheckpointWriter, load_adapter, load_moments
from trainers.recipe.collate import Pass, one_row, pack, pad, shared_beginning, shares_beginnings
from trainers.recipe.compilation import compile_layers, why_not_compiled
from trainers.recipe.device import Device, keep_freed_memory, pick_device
from trainers.recipe.held_out_loss import held_out_loss
from trainers.recipe.kernels.attention import why_not_packed
from trainers.recipe.lora import load_model
from trainers.recipe.loss import attention_of, loss_sum
from trainers.recipe.memory import does_not_fit, is_out_of_memory, largest_pass
from trainers.recipe.strategies import choose, strategy
from trainers.recipe.strategy import SHARE_BASE, Strategy, Worker, begin_together
from trainers.recipe.trace import traced
from trainers.text.shards import TokenizedRows
from tunesmith.errors import ModelError, OutOfMemoryError, TunesmithError
from tunesmith.hyperparameters.definitions import Advanced, LoraHyperparameters

PASS_TOKENS = {"cpu": 1536}
"""Tokens of a forward pass over packed rows, by the device's type: more take more memory and are hardly faster.

Where the device is not named the passes are those that the user asks for."""
STOP_STEPS = 10
"""After so many steps at most the recipe looks again whether it should stop."""
SHOWN_ROWS = 64
"""So many rows of a step an error names at most."""

logger = logging.getLogger(__name__)


class LossError(TunesmithError):
    """The loss, or the norm of its gradient, is no longer a number."""

    code = "loss_not_finite"
    reason = "user_error"


@dataclass(frozen=True)
class Hooks:
    """How the recipe speaks to its caller. Every worker calls them at the same steps."""

    report: Callable[[int, Mapping[str, float]], None]
    """Takes step and metrics: every `logging_steps`, and whenever the held-out loss is known."""
    save: Callable[[int, Path | None], None]
    """Takes the step, and on rank 0 the folder of a whole checkpoint, which is gone after the call."""
    should_stop: Callable[[], bool]
    """Asked after every step and in evaluations. Where one worker's returns true, all stop after a checkpoint."""
    phase: Callable[[str, Mapping[str, int]], None] = lambda name, data: None
    """Takes `evaluate`, or `train`; at the beginning with `total_steps` and `first_step`."""
    evaluated: Callable[[int, Any, float], None] = lambda step, model, loss: None
    """Takes step, model and held-out loss: before training, before checkpoints, at the end. Changes no weight."""


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

    The loss of a step is the mean over the trained tokens of its global batch, so the split into rows, passes and
    workers does not matter. `start_from` is the folder of an adapter that the run begins with, `resume_from` a
    checkpoint's; steps, rows and dropout are functions of seed and step, so nothing else needs to be kept.
    `compiled` says whether layers are compiled; None: where that pays. `profile` is a file for a trace of some steps.
    """
    h, device = hyperparameters, pick_device(worker.local_rank)
    model = load_model(model_folder, h, advanced, device)
    begun = _load_beginning(model, worker, device, start_from=start_from, resume_from=resume_from)
    strategy_name = choose(advanced.strategy, model, worker, device, quantized=h.bits is not None)
    logger.info("strategy %s, %d workers", strategy_name, worker.world_size)
    plan, total_steps = _plan(rows, h, advanced, worker)
    keep_freed_memory(device)
    is_packed = _is_packed(model, rows, advanced.packing, device)
    if strategy_name not in SHARE_BASE:
        model.to(device.torch_device)
    if compiled is None:
        tokens = int(rows.lengths.sum()) * total_steps // plan.steps_per_epoch // worker.world_size
        compiled = _pays_to_compile(model, advanced, device, tokens, strategy_name=strategy_name)
    if compiled:
        _compile(model, (pack if is_packed else pad)(rows, plan.rows(1)[:2], device.torch_device))
    shared = strategy(strategy_name, model, h, advanced, worker, device)
    if begun.moments:
        shared.restore(begun.moments)
    run = _Run(
        h=h,
        advanced=advanced,
        hooks=hooks,
        worker=worker,
        device=device,
        model=model,
        rows=rows,
        eval_rows=eval_rows,
        plan=plan,
        total_steps=total_steps,
        is_packed=is_packed,
        shared=shared,
        checkpoint=CheckpointWriter(model),
        saved_step=begun.step,
        eval_before=begun.eval_before,
    )
    return run.to_the_end(begun.step, profile)


@dataclass(frozen=True)
class _Beginning:
    """What a run goes on from."""

    step: int = 0
    """Steps done."""
    eval_before: float | None = None
    """The held-out loss before the first step, where it is known."""
    moments: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The optimizer's; empty before the first step."""


def _load_beginning(
    model: Any, worker: Worker, device: Device, *, start_from: Path | None, resume_from: Path | None
) -> _Beginning:
    """Load the adapter of the checkpoint `resume_from`, or the one in `start_from`, into the model."""
    moments, state = ({}, {"step": 0}) if resume_from is None else load_moments(resume_from)
    begin_together(state["step"], worker, device)
    adapter = start_from if resume_from is None else resume_from / "adapter"
    if adapter is not None:
        load_adapter(adapter, model)
    return _Beginning(step=state["step"], eval_before=state.get("eval_loss_before"), moments=moments)


def _plan(rows: TokenizedRows, h: LoraHyperparameters, advanced: Advanced, worker: Worker) -> tuple[BatchPlan, int]:
    """Which rows a step takes, and how many steps there are."""
    plan = BatchPlan(
        rows.lengths,
        batch_rows=h.per_device_train_batch_size,
        passes=h.gradient_accumulation_steps,
        world_size=worker.world_size,
        seed=advanced.seed,
    )
    steps = plan.steps_per_epoch * advanced.num_train_epochs
    return plan, steps if h.max_steps is None else min(steps, h.max_steps)


def _is_packed(model: Any, rows: TokenizedRows, packing: str, device: Device) -> bool:
    """Whether rows are packed, which is logged with the reason. ModelError where they cannot be and have to."""
    model.eval()  # where dropout is at work, no two passes are alike
    unpacked = "packing is off" if packing == "off" else why_not_packed(model, int(rows.lengths.max()))
    model.train()
    if unpacked and packing == "on":
        raise ModelError(
            f"rows cannot be packed: {unpacked}", fields=["advanced.packing"], hint="packing=auto pads them"
        )
    if unpacked:
        logger.info("rows are padded: %s", unpacked)
        return False
    once = ", what those of a pass begin with is computed once" if shares_beginnings(device.torch_device) else ""
    logger.info("rows are packed%s", once)
    return True


def _pays_to_compile(model: Any, advanced: Advanced, device: Device, tokens: int, *, strategy_name: str) -> bool:
    """Whether the layers are compiled for a run of so many tokens a worker, which is logged with the reason."""
    why_not: str | None = "the workers share its weights"
    if strategy_name not in SHARE_BASE:
        why_not = why_not_compiled(model, advanced, device.torch_device, tokens)
    logger.info("layers are %s", f"not compiled: {why_not}" if why_not else "compiled")
    return why_not is None


def _compile(model: Any, first: Pass) -> None:
    """Compile the layers, trying them with one pass."""
    compile_layers(model, lambda: loss_sum(model, first).backward())  # type: ignore[no-untyped-call]
    model.zero_grad()


@dataclass
class _Run:
    """A run under way on one worker."""

    h: LoraHyperparameters
    advanced: Advanced
    hooks: Hooks
    worker: Worker
    device: Device
    model: Any
    rows: TokenizedRows
    eval_rows: TokenizedRows | None
    plan: BatchPlan
    total_steps: int
    is_packed: bool
    shared: Strategy
    checkpoint: CheckpointWriter
    saved_step: int
    """The step of the newest checkpoint; 0 before the first one."""
    eval_before: float | None

    def to_the_end(self, step: int, profile: Path | None) -> Outcome:
        """Train from after `step` to the last step, or to where a worker is to stop."""
        first_step, stopped = step + 1, False
        if self.eval_before is None:
            self.eval_before = self._evaluate(0)
        self.hooks.phase("train", {"total_steps": self.total_steps, "first_step": first_step})
        meter = _Meter()
        for step in traced(range(first_step, self.total_steps + 1), profile):
            batch = self.plan.rows(step)
            learning_rate = self._learning_rate(step)
            self._backward(step, batch)
            grad_norm = self.shared.step(step, learning_rate, wishes_stop=self.hooks.should_stop())
            meter.add(tokens=int(self.rows.lengths[batch].sum()), rows=len(batch))
            # Asking the device makes the host wait for it.
            if step % min(self.h.logging_steps, STOP_STEPS) == 0:
                stopped = bool(self.shared.stop.item() > 0) and step < self.total_steps
            is_last = step == self.total_steps or stopped
            is_reported, is_saved = step % self.h.logging_steps == 0, step % self.h.save_steps == 0
            if is_reported or is_saved or is_last:
                self._check_finite()
            if is_reported or is_last:
                figures = {"loss": float(self.shared.loss), "learning_rate": learning_rate}
                self.hooks.report(step, {**figures, "grad_norm": float(grad_norm), **self._rates(meter)})
                meter = _Meter()
            if is_saved or is_last:
                with meter.paused():
                    self._save(step, evaluated_first=not is_last)
            if stopped:
                break
        eval_after = None if stopped else self._evaluate(step)
        weights = self.shared.snapshot().weights
        return Outcome(step, self.total_steps, stopped, self.eval_before, eval_after, self.model, weights)

    def _learning_rate(self, step: int) -> float:
        share = schedule(
            step - 1, self.total_steps, warmup_ratio=self.h.warmup_ratio, kind=self.advanced.lr_scheduler_type
        )
        return self.h.learning_rate * share

    def _backward(self, step: int, batch: Sequence[int]) -> None:
        """Add the gradients of this worker's share of the batch. OutOfMemoryError where a pass does not fit."""
        trained = sum(int(self.rows.trained(row)[1:].sum()) for row in batch)
        passes = self._passes(step, batch)
        for number, share in enumerate(passes):
            if self.h.lora_dropout > 0:
                torch.manual_seed(dropout_seed(self.advanced.seed, step, self.worker.rank, number))
            # Without rows of its own, a worker goes along with one that counts nothing.
            given = self._make_pass(self.rows, share or batch[-1:], self.device.torch_device)
            weight = 1 / max(1, trained) if share else 0.0
            ran_out = False
            try:
                self.shared.backward(given, weight, last=number == len(passes) - 1)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                ran_out = True
            if ran_out:  # here the error holds no tensor any more
                may_try = self.device.torch_device.type != "cpu" and not self.shared.in_step
                raise _does_not_fit(self.model, given, self.h, may_try=may_try)

    def _passes(self, step: int, batch: Sequence[int]) -> list[list[int]]:
        """The rows of each pass of this worker; where workers meet in every pass, some may have none."""
        device = self.device.torch_device
        if self.is_packed:
            beginning = shared_beginning([self.rows.ids(row) for row in batch], device)
            passes = self.plan.packed(step, self.worker.rank, PASS_TOKENS.get(device.type), beginning)
        else:
            passes = self.plan.padded(step, self.worker.rank)
        return passes if self.shared.in_step else [share for share in passes if share]

    @property
    def _make_pass(self) -> Callable[[TokenizedRows, Sequence[int], torch.device], Pass]:
        return pack if self.is_packed else pad

    def _check_finite(self) -> None:
        if broken := self.shared.broken_step():
            raise _not_finite(broken, self.plan.rows(broken), self.saved_step)

    def _rates(self, meter: _Meter) -> dict[str, float]:
        """Tokens a second and card, and the guide's throughput."""
        elapsed_s, cards = meter.elapsed_s(), self.worker.world_size
        return {
            "tokens_per_s_per_card": meter.tokens / elapsed_s / cards,
            "throughput": meter.rows / elapsed_s * self.h.max_seq_length / cards,
        }

    def _save(self, step: int, *, evaluated_first: bool) -> None:
        """Save a checkpoint. It is evaluated before, because a run that goes on from it does not evaluate it again."""
        if evaluated_first and self._evaluate(step) is not None:
            self.hooks.phase("train", {})
        snapshot = self.shared.snapshot()
        if self.worker.rank > 0:
            self.hooks.save(step, None)
        else:
            with tempfile.TemporaryDirectory() as folder:
                state = {"step": step, "eval_loss_before": self.eval_before}
                self.checkpoint.write(Path(folder), snapshot, state)
                self.hooks.save(step, Path(folder))
        self.saved_step = step

    def _evaluate(self, step: int) -> float | None:
        """The held-out loss after `step`; None where there are no such rows, or where a worker is to stop."""
        if self.eval_rows is None:
            return None
        self.hooks.phase("evaluate", {})
        with torch.compiler.set_stance("force_eager"):
            loss = held_out_loss(
                self.shared,
                model=self.model,
                rows=self.eval_rows,
                device=self.device,
                worker=self.worker,
                should_stop=self.hooks.should_stop,
                make_pass=self._make_pass,
            )
            if loss is not None:
                self.hooks.report(step, {"eval_loss": loss})
                self.hooks.evaluated(step, self.model, loss)
        return loss


class _Meter:
    """Counts what was trained since it was made, and the time that this took."""

    def __init__(self) -> None:
        self.tokens = self.rows = 0
        self._since = time.perf_counter()

    def add(self, *, tokens: int, rows: int) -> None:
        self.tokens += tokens
        self.rows += rows

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time that is spent inside does not count."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun


def dropout_seed(seed: int, step: int, rank: int, number: int) -> int:
    """The seed of dropout in pass `number` of a worker's step: the same on every machine and interpreter."""
    return int(np.random.SeedSequence((seed, step, rank, number)).generate_state(1)[0])


def _does_not_fit(model: Any, given: Pass, h: LoraHyperparameters, *, may_try: bool) -> OutOfMemoryError:
    """The error for a pass that took too much memory; with `may_try`, smaller ones are tried to say what fits.

    They cannot be tried where workers make passes together, nor on a CPU, where oneDNN fails from then on.
    """
    fits = largest_pass(lambda tokens: _try_pass(model, given, tokens), given.tokens) if may_try else None
    return does_not_fit(given.tokens, fits, h, str(given.ids.device))


def _try_pass(model: Any, like: Pass, tokens: int) -> None:
    """Make a forward and backward pass of one row of `tokens` tokens, all of them trained."""
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
