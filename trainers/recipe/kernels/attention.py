"""Attention over packed rows that never lets one row see another, as an attention implementation of transformers.

Registered as `ROWS`; a forward pass under it is given `offsets`, as in `Pass`, and `longest`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from trainers.recipe.collate import pack_tokens
from trainers.recipe.kernels import native

ROWS = "tunesmith_rows"
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""Fewer heads of keys than of queries: torch 2.11 takes them without being told, its successors want to be."""


@contextmanager
def rows_apart(model: Any) -> Iterator[None]:
    """Inside this context the model's attention is that of packed rows."""
    own = model.config._attn_implementation
    model.config._attn_implementation = ROWS
    try:
        yield
    finally:
        model.config._attn_implementation = own


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    offsets: torch.Tensor,
    longest: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row: query [1, heads, tokens, d], key and value [1, kv heads, tokens, d].

    Tokens before the first row are the beginning of every row. Returns [1, tokens, heads, d]. Raises
    NotImplementedError for a kind of attention that is not implemented here.
    """
    if dropout or softcap is not None or s_aux is not None or (sliding_window is not None and sliding_window < longest):
        raise NotImplementedError("dropout, soft caps, sinks and windows shorter than the rows")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if _is_native(query.device.type, query.dtype, query.shape[-1]):
        return _attend_on_cpu(query, key, value, offsets, scale)[0], None
    if query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16):
        return _attend_on_gpu(query, key, value, offsets, longest, scale), None
    borders = offsets.tolist()
    made = [_attend_by_torch(query, key, value, start, end, borders[0], scale) for start, end in pairwise(borders)]
    if borders[0]:
        made.insert(0, _attend_by_torch(query, key, value, 0, borders[0], 0, scale))
    return torch.cat(made, dim=2).transpose(1, 2), None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_native(device: str, dtype: torch.dtype, width: int) -> bool:
    return native.fits(width, torch.empty(0, dtype=dtype, device=device))


def _attend_by_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, end: int, shared: int, scale: float
) -> torch.Tensor:
    """What the tokens from `start` to `end` attend to: the `shared` first ones and themselves."""
    q, k, v = (states[:, :, start:end] for states in (query, key, value))
    mask = None
    if shared:
        k, v = (torch.cat((states[:, :, :shared], own), dim=2) for states, own in ((key, k), (value, v)))
        mask = torch.ones(end - start, shared + end - start, dtype=torch.bool, device=q.device).tril(shared)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)


def _attend_on_gpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    causal = (-1, 0)
    made: Any = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=causal, **_GROUPED)
    out: torch.Tensor = made[None]
    return out


@torch.library.custom_op("tunesmith::attend_rows", mutates_args=())
def _attend_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return native.attend(query, key, value, offsets, scale)


@torch.library.custom_op("tunesmith::attend_rows_backward", mutates_args=())
def _backward_on_cpu(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    offsets: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return native.attend_backward(grad, query, key, value, out, logsumexp, offsets, scale)


@_attend_on_cpu.register_fake
def _(query: torch.Tensor, key: Any, value: Any, offsets: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    _, heads, tokens, width = query.shape
    return query.new_empty(1, tokens, heads, width), query.new_empty(1, tokens, heads)


@_backward_on_cpu.register_fake
def _(
    grad: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: Any,
    logsumexp: Any,
    offsets: Any,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    return tuple(
        like.new_empty(1, like.shape[2], like.shape[1], like.shape[3]).transpose(1, 2) for like in (query, key, value)
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *states, offsets, ctx.scale = inputs
    ctx.save_for_backward(*states, *output, offsets)


def _backward(context: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    return (*_backward_on_cpu(grad, *context.saved_tensors, context.scale), None, None)


_attend_on_cpu.register_autograd(_backward, setup_context=_keep)
# Without a mask of its own transformers makes none, and does not ask the device where rows begin.
AttentionInterface.register(ROWS, attend)


@torch.no_grad()
def why_not_packed(model: Any, longest: int) -> str | None:
    """Why rows of up to `longest` tokens must not be packed for this peft model; None where they may.

    The model itself is asked: two rows that begin alike must give together what each gives alone.
    """
    base = model.get_base_model()
    device = base.get_input_embeddings().weight.device
    ids = np.arange(24) * 37 % base.get_input_embeddings().num_embeddings
    rows = [ids[:13], np.concatenate((ids[:4], ids[13:]))]
    given = pack_tokens(rows, [np.ones(len(row), bool) for row in rows], device)
    try:
        with rows_apart(base):
            options = {"position_ids": given.positions, "offsets": given.offsets, "longest": longest}
            hidden = base.base_model(input_ids=given.ids, use_cache=False, **options).last_hidden_state[0]
        together = hidden[given.places]
        each = [torch.from_numpy(row[:-1]).to(device) for row in rows]
        alone = [base.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in each]
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"the model cannot do it ({error})"
    difference = torch.linalg.vector_norm((together - torch.cat(alone)).float())
    share = float(difference / torch.linalg.vector_norm(together.float()))
    # What rounding comes to; a row that sees another differs by far more.
    if not share < (1e-4 if together.dtype == torch.float32 else 3e-2):
        return f"in this model one row would see another (their hidden states differ by {share:.2g})"
    return None
