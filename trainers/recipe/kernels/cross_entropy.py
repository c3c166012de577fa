"""Cross-entropy straight from hidden states: logits are made a few at a time and never kept."""

from __future__ import annotations

from typing import Any

import torch

from trainers.recipe.kernels.matmul import product

LOGITS_AT_ONCE = {"cpu": 1 << 24, "other": 1 << 28}
"""Logits held at a time: 64 MB in float32 on a CPU, 1 GB on an accelerator."""


def cross_entropy_sum(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy, nats, a float32 scalar.

    `hidden` [tokens, width]; `head` [vocabulary, width], frozen; `targets` [tokens], int64. The gradient of `hidden`
    is made with the loss, so that the logits are made once.
    """
    loss: torch.Tensor = _CrossEntropy.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        kind = "cpu" if hidden.device.type == "cpu" else "other"
        at_once = max(1, LOGITS_AT_ONCE[kind] // head.shape[0])
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad = torch.empty_like(hidden) if context.needs_input_grad[0] else None
        for at in range(0, len(hidden), at_once):
            wanted = targets[at : at + at_once, None]
            logits = product(hidden[at : at + at_once], head).float()
            highest = logits.amax(1, keepdim=True)
            right = logits.gather(1, wanted) - highest
            shares = logits.sub_(highest).exp_()
            total = shares.sum(1, keepdim=True)
            loss += (total.log() - right).sum()
            if grad is not None:
                shares.div_(total).scatter_add_(1, wanted, torch.full_like(total, -1.0))
                grad[at : at + at_once] = product(shares.to(head.dtype), head.t())
        if grad is not None:
            context.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(context: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = context.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None
