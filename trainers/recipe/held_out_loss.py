"""The loss of held-out rows, shared out among the workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainers.recipe.collate import Pass
from trainers.recipe.device import Device
from trainers.recipe.strategy import Strategy, Worker, shares_base
from trainers.text.shards import TokenizedRows

BATCH_ROWS = 8


@torch.no_grad()
def held_out_loss(
    shared: Strategy,
    *,
    model: Any,
    rows: TokenizedRows,
    device: Device,
    worker: Worker,
    should_stop: Callable[[], bool],
    make_pass: Callable[[TokenizedRows, Sequence[int], torch.device], Pass],
) -> float | None:
    """Mean loss per trained token of `rows`, nats, over all workers; None where one of them is to stop."""
    was_training, in_step = model.training, shares_base(model)
    model.eval()
    order = np.argsort(-rows.lengths, kind="stable").tolist()
    # Summed loss, trained tokens, and the wish to stop.
    total = torch.zeros(3, dtype=torch.float64, device="cpu" if device.backend == "gloo" else device.torch_device)
    for at in range(0, len(order), worker.world_size * BATCH_ROWS):
        total[2] += should_stop()
        if total[2] > 0 and not in_step:
            break
        mine = at + worker.rank * BATCH_ROWS
        share = order[mine : mine + BATCH_ROWS]
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
