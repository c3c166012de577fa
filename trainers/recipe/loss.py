"""The loss of one forward pass: cross-entropy summed over the trained tokens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from trainers.recipe.collate import Pass
from trainers.recipe.kernels.attention import rows_apart
from trainers.recipe.kernels.cross_entropy import cross_entropy_sum


class Loss(nn.Module):
    """`loss_sum` of a peft model as a module: DeepSpeed hangs its work on the calls of modules."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Pass) -> torch.Tensor:
        return loss_sum(self.model, rows)


def loss_sum(model: Any, rows: Pass) -> torch.Tensor:
    """Summed cross-entropy of the trained tokens, nats; logits are made at their places only.

    Padding stands at the right and attention is causal, so no token ever sees it and no attention mask is needed.
    """
    base = model.get_base_model()
    packed = {"offsets": rows.offsets, "longest": rows.longest} if rows.offsets is not None else {}
    with attention_of(model, rows):
        if has_plain_head(base):
            hidden = base.base_model(input_ids=rows.ids, position_ids=rows.positions, use_cache=False, **packed)
            wanted = hidden.last_hidden_state.flatten(0, 1).index_select(0, rows.places)
            return cross_entropy_sum(wanted, base.get_output_embeddings().weight, rows.targets)
        logits = base(input_ids=rows.ids, position_ids=rows.positions, use_cache=False, **packed).logits
        wanted = logits.flatten(0, 1).index_select(0, rows.places)
    loss: torch.Tensor = F.cross_entropy(wanted.float(), rows.targets, reduction="sum")
    return loss


def attention_of(model: Any, rows: Pass) -> Any:
    """A context with the attention that the pass needs; where activations are checkpointed, also for its backward."""
    return nullcontext() if rows.offsets is None else rows_apart(model.get_base_model())


def has_plain_head(base: Any) -> bool:
    """Whether logits are the product of a frozen matrix with the last hidden state and nothing more."""
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return False
    scaled = ("logit_scale", "logits_scaling", "final_logit_softcapping", "lm_head_multiplier")
    return all(getattr(base.config, name, None) in (None, 1, 1.0) for name in scaled)
