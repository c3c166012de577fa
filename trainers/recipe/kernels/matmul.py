"""The matrix products of adapted layers and logits, each by whichever library is fast at it. No gradient is kept.

In float32 on an x86 processor torch multiplies by MKL, which keeps to AVX2 where the processor is not Intel's. oneDNN,
which torch carries too and uses in compiled inference, takes AVX-512 wherever it is: twice as fast on AMD's Zen 5. With
AVX2 alone (AMD's Zen 3) it is the faster one, by up to a third, where a weight is read as it lies, as forward; MKL
where it is read transposed, as backward.
Products that are as thin as an adapter's rank are our own (trainers.recipe.kernels.native).
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from trainers.recipe.kernels import native


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [rows, in] times weight [out, in] transposed, plus bias [out]: [rows, out]. Either may be a view."""
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() and _is_onednns(weight):
        onednn: Any = torch.ops.mkldnn._linear_pointwise
        made: torch.Tensor = onednn(x, weight, bias, "none", [], "")
        return made
    return F.linear(x, weight, bias)


def _is_onednns(weight: torch.Tensor) -> bool:
    return _has_onednn() and (weight.is_contiguous() or torch.backends.cpu.get_cpu_capability() == "AVX512")


@cache
def _has_onednn() -> bool:
    known = platform.machine() in ("x86_64", "AMD64") and torch._C._has_mkldnn
    return known and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def narrow_down(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """x [tokens, columns] times a [rank, columns], transposed: [tokens, rank]."""
    return native.narrow_down(x, a) if native.fits(x.shape[1], x, a) else x @ a.t()


def add_widened(y: torch.Tensor, narrow: torch.Tensor, wide: torch.Tensor, scale: float) -> None:
    """Add scale times narrow [tokens, rank] times wide [rank, columns] to y [tokens, columns], which is contiguous."""
    if native.fits(y.shape[1], y, narrow, wide):
        native.add_widened(y, narrow, wide * scale)
    else:
        y.addmm_(narrow, wide, alpha=scale)


def sum_over_tokens(low: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """low [tokens, rank], transposed, times x [tokens, columns]: [rank, columns]."""
    return native.sum_over_tokens(low, x) if native.fits(x.shape[1], low, x) else low.t() @ x


def sum_and_narrow_down(low: torch.Tensor, x: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `sum_over_tokens` makes of low and x, and `narrow_down` of x and a."""
    if native.fits(x.shape[1], low, x, a):
        return native.sum_and_narrow_down(low, x, a)
    return low.t() @ x, x @ a.t()
