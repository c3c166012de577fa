"""The matrix products of adapted layers and logits, each by whichever library is fast at it. No gradient is kept.

In float32 on an x86 processor torch multiplies by MKL, which keeps to AVX2 where the processor is not Intel's. oneDNN,
which torch carries too and uses in compiled inference, takes AVX-512 wherever it is: twice as fast on AMD's Zen 5.
Products that are as thin as an adapter's rank are our own (trainers.native).
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from trainers import native

CACHE_LINE = 64
"""Bytes."""


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [rows, in] times weight [out, in] transposed, plus bias [out]: [rows, out]. Either may be a view."""
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() and _has_onednn():
        onednn: Any = torch.ops.mkldnn._linear_pointwise
        made: torch.Tensor = onednn(x, weight, bias, "none", [], "")
        return made
    return F.linear(x, weight, bias)


@cache
def _has_onednn() -> bool:
    known = platform.machine() in ("x86_64", "AMD64") and torch._C._has_mkldnn
    return known and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def align(model: nn.Module) -> None:
    """Copy weights on the CPU that begin inside a cache line, as those of a mapped file do.

    Transposed, as a backward pass reads them, oneDNN multiplies by such weights half as fast without AVX-512.
    """
    for weight in model.parameters():
        if weight.device.type == "cpu" and weight.data_ptr() % CACHE_LINE:
            weight.data = weight.data.clone()


def narrow_down(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """x [tokens, columns] times a [rank, columns], transposed: [tokens, rank]."""
    return native.narrow_down(x, a) if native.fits(x.shape[1], x, a) else x @ a.t()


def add_widened(y: torch.Tensor, narrow: torch.Tensor, wide: torch.Tensor, scale: float) -> None:
    """Add scale times narrow [tokens, rank] times wide [rank, columns] to y [tokens, columns], which is contiguous."""
    if native.fits(y.shape[1], y, narrow, wide):
        native.add_widened(y, narrow, wide * scale)
    else:
        y.addmm_(narrow, wide, alpha=scale)


def sum_over_tokens(narrow: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """narrow [tokens, rank], transposed, times x [tokens, columns]: [rank, columns]."""
    return native.sum_over_tokens(narrow, x) if native.fits(x.shape[1], narrow, x) else narrow.t() @ x
