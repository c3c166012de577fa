"""What torch is slow at on a CPU, in float32: `native.c`, which is compiled when it is first used.

torch's own attention and thin products multiply by a library that is slow where the processor is not Intel's
(`matmul.py`), and it attends to packed rows one at a time; here attention is three to four times as fast, thin
products twice. It needs a C compiler with OpenMP; the pool of threads is torch's own. Where memory runs out, all of it
raises MemoryError.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"),
    # Products and sums become one operation; nothing waits for errors that nobody reads.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
LANES = 16
"""A divisor of the columns of every matrix here, and of the width of heads."""

logger = logging.getLogger(__name__)


def fits(columns: int, *given: torch.Tensor) -> bool:
    """Whether the functions here take tensors of `columns` columns."""
    alike = columns % LANES == 0 and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in given)
    return alike and why_missing() is None


@cache
def why_missing() -> str | None:
    """Why nothing here can be used on this machine, which is logged once; None where it can."""
    library = _library()
    if not isinstance(library, str):
        return None
    logger.warning("attention and thin products are torch's own, which are several times slower: %s", library)
    return library


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [1, heads, tokens, width], key and value [1, kv heads, tokens, width], offsets int32 [rows + 1].

    Tokens before offsets[0] are the beginning of every row. Returns what the rows attend to, [1, tokens, heads, width],
    and the logsumexp of their scores, [1, tokens, heads].
    """
    states = [_by_tokens(state) for state in (query, key, value)]
    tokens, heads, width = states[0].shape
    out = query.new_empty(tokens, heads, width)
    logsumexp = query.new_empty(tokens, heads)
    _attention("forward", [*states, out], [*states, out, logsumexp], offsets, scale)
    return out[None], logsumexp[None]


def attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    offsets: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, each shaped like it and laid out by tokens; `grad` is shaped like `out`."""
    states = [_by_tokens(state) for state in (query, key, value)]
    given = _by_tokens(grad.transpose(1, 2))
    made = [torch.empty(state.shape) for state in states]
    _attention("backward", [*states, out[0], given, *made], [*states, out, logsumexp, given, *made], offsets, scale)
    grad_query, grad_key, grad_value = (grad.transpose(0, 1)[None] for grad in made)
    return grad_query, grad_key, grad_value


def narrow_down(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """x [tokens, columns] times a [rank, columns], transposed: [tokens, rank]."""
    narrow = x.new_empty(len(x), len(a))
    _thin("narrow_down", [narrow, x, a], narrow, x)
    return narrow


def add_widened(y: torch.Tensor, narrow: torch.Tensor, wide: torch.Tensor) -> None:
    """Add narrow [tokens, rank] times wide [rank, columns] to y [tokens, columns], which is contiguous."""
    _thin("add_widened", [y, narrow, wide], narrow, y)


def sum_over_tokens(low: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """low [tokens, rank], transposed, times x [tokens, columns]: [rank, columns]."""
    out = x.new_empty(low.shape[1], x.shape[1])
    _thin("sum_over_tokens", [out, low, x, None, None], low, x)
    return out


def sum_and_narrow_down(low: torch.Tensor, x: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `sum_over_tokens` makes of low and x, and `narrow_down` of x and a, while x is gone through once."""
    out, narrow = x.new_empty(low.shape[1], x.shape[1]), x.new_empty(low.shape)
    _thin("sum_over_tokens", [out, low, x, narrow, a], low, x)
    return out, narrow


def _by_tokens(state: torch.Tensor) -> torch.Tensor:
    """[1, heads, tokens, width] as [tokens, heads, width], where heads' numbers stand side by side."""
    made = state[0].transpose(0, 1)
    return made if made.stride(-1) == 1 else made.contiguous()


def _attention(
    name: str, laid_out: Sequence[torch.Tensor], given: Sequence[torch.Tensor], offsets: torch.Tensor, scale: float
) -> None:
    """`laid_out` are the tensors [tokens, heads, width] whose strides are told; `given` those whose address is."""
    query, key = laid_out[:2]
    strides = [stride for state in laid_out for stride in (state.stride(1), state.stride(0))]
    sizes = (len(offsets) - 1, query.shape[1], key.shape[1], query.shape[2])
    _call(name, (ctypes.c_int64 * len(strides))(*strides), *given, offsets, *sizes, ctypes.c_float(scale))


def _thin(name: str, given: Sequence[torch.Tensor | None], narrow: torch.Tensor, wide: torch.Tensor) -> None:
    contiguous = [None if tensor is None else tensor.contiguous() for tensor in given]
    _call(name, *contiguous, *narrow.shape, wide.shape[1])


def _call(name: str, *given: Any) -> None:
    """Tensors are given by their address, whole numbers as int64_t; the number of threads comes last.

    MemoryError where memory ran out.
    """
    library: Any = _library()
    if library[name](*map(_as_c, given), torch.get_num_threads()):
        raise MemoryError(f"memory ran out in {name} of {SOURCE.name}")


def _as_c(given: Any) -> Any:
    if isinstance(given, torch.Tensor):
        return ctypes.c_void_p(given.data_ptr())
    return ctypes.c_int64(given) if isinstance(given, int) else given


@cache
def _library() -> ctypes.CDLL | str:
    """The compiled library, or why there is none. Compiling takes half a second."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "native.so"
        command = [*compiler, *FLAGS, "-o", str(path), str(SOURCE), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(path))
        except FileNotFoundError:
            return f"there is no C compiler {compiler[0]!r}"
        except subprocess.CalledProcessError as error:
            return f"the C compiler failed: {(error.stderr.strip().splitlines() or ['no word'])[-1]}"
        except OSError as error:
            return f"what the C compiler made cannot be loaded: {error}"
